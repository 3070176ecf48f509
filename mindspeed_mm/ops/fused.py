"""Norm and gated unit with few memory passes: what platforms without fused kernels use."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight; the backward recomputes x / rms(x) instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        unit = x.float() * scale
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (grad.float() * unit).flatten(0, -2).sum(dim=0).to(weight.dtype)
        inner = (grad * weight).float()
        along = torch.linalg.vecdot(inner, unit).unsqueeze(-1).div_(x.shape[-1])
        return inner.addcmul_(unit, along, value=-1).mul_(scale).to(x.dtype), weight_grad, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dim, statistics in float32, in the order of transformers' Qwen2RMSNorm.

    Args:
        x: [..., h].
        weight: [h], in the dtype of x.
        eps: added to the mean square.
    Returns:
        [..., h] in the dtype of x.
    """
    return _RMSNorm.apply(x, weight, eps)


class _Swiglu(torch.autograd.Function):
    """silu(gate) * up; keeps its input only and writes the gradient of both halves in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        gate_grad, up_grad = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=up_grad)
        gate_grad.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


def swiglu(x: Tensor) -> Tensor:
    """SiLU of the first half of the last dim times the second half: [..., 2 f] -> [..., f]."""
    return _Swiglu.apply(x)
