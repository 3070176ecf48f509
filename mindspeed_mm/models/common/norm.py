"""Norms of the transformer layers, built by megatron's layer specs.

The library's own local norm refuses sequence parallelism because its weights are not marked; ours mark them, so that
megatron sums their gradients over the tensor-parallel ranks that each saw a part of the sequence. Weights are made on
torch's default device, which the chunk builder sets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in float32, in the order of transformers' Qwen2RMSNorm.

    Args:
        config: gives the dtype of the weight and whether sequence parallelism is on.
        hidden_size: h, the last dim of the input.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        _mark([self.weight], config)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype)


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


NORMS: dict[str, type[nn.Module]] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


def _mark(parameters: list[nn.Parameter], config: TransformerConfig) -> None:
    for parameter in parameters:
        setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010, torch types no such attribute
