"""Norm and gated unit equal their plain formulas, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from mindspeed_mm.ops.fused import rms_norm, swiglu


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """transformers' order: normalise in float32, cast, multiply."""
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * unit.to(x.dtype)


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_norm_equals_its_formula(dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(*shape, generator=generator).to(dtype) for shape in [(7, 1, 32), (32,), (7, 1, 32)])
    results = []
    for function in (rms_norm, plain_norm):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = function(inputs[0], inputs[1], 1e-6)
        out.backward(grad)
        results.append([out, inputs[0].grad, inputs[1].grad])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype
        # bf16 rounds intermediate gradients in another order
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=bound, atol=bound)


def test_norm_of_a_frozen_weight_has_no_gradient_for_it() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_gated_unit_equals_its_formula() -> None:
    x = torch.randn(5, 1, 12, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(swiglu(x), plain_swiglu(x))
    assert gradcheck(swiglu, (x,))
