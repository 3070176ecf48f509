"""Norms of the transformer layers, built by megatron's layer specs.

The library's own local norm refuses sequence parallelism because its weights are not marked; ours mark them, so that
megatron sums their gradients over the tensor-parallel ranks that each saw a part of the sequence. Weights are made on
torch's default device, which the chunk builder sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mindspeed_mm.models.common.kernels import Kernels

NormFunction = Callable[[Tensor, Tensor, float], Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in float32.

    Args:
        config: gives the dtype of the weight and whether sequence parallelism is on.
        hidden_size: h, the last dim of the input.
        eps: added to the mean square.
        function: (x, weight, eps) -> normalised x.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, *, function: NormFunction, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.function = function
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        _mark([self.weight], config)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias; arguments as RMSNorm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        _mark([self.weight, self.bias], config)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


def norm_spec(normalization: str, kernels: Kernels) -> ModuleSpec:
    """The spec of the norm that a model names, "RMSNorm" or "LayerNorm"."""
    if normalization == "RMSNorm":
        return ModuleSpec(module=RMSNorm, params={"function": kernels.rms_norm})
    return ModuleSpec(module=LayerNorm)


def _mark(parameters: list[nn.Parameter], config: TransformerConfig) -> None:
    for parameter in parameters:
        setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010, torch types no such attribute
