"""Text tower of MOSS-VL: Qwen3-style layers, every fourth of which attends to the vision states instead of the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from mindspeed_mm.models.mossvl.hf.attention import (
    TextMask,
    additive,
    dense_attention,
    grouped_sdpa,
    prefix_attention,
    self_attention,
)
from mindspeed_mm.models.mossvl.hf.configuration import MossVLTextConfig
from mindspeed_mm.models.mossvl.rope import interleaved_rope, rotate
from mindspeed_mm.models.mossvl.visibility import RowChunk

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class VisionContext:
    """What cross-attention reads, the same in all layers.

    Attributes:
        states: [b, t, h] vision tokens with separators; None when their keys and values are cached.
        rope: vision tables, two [b, 1, t, d]; None when cached.
        chunks: rows of each sample by what they see; None: `dense` or everything is visible.
        masked: [b, 1, s, t] bool for the dense path; None: everything is visible or `chunks` says it.
        row_mask: [b, s, 1] of 0 and 1, which rows see anything; None: all.
    """

    states: Tensor | None
    rope: Rope | None
    chunks: list[tuple[RowChunk, ...]] | None
    masked: Tensor | None
    row_mask: Tensor | None


class MossVLRMSNorm(nn.Module):
    """Root-mean-square norm with float32 statistics, cast back before the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class _Projections(nn.Module):
    """Query, key, value and output maps with a norm over each head of queries and keys."""

    def __init__(self, config: MossVLTextConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        query_size, key_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = MossVLRMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = MossVLRMSNorm(config.head_dim, config.rms_norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _query(self, x: Tensor, rope: Rope) -> Tensor:
        return rotate(self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2), *rope)

    def _key_value(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        key = rotate(self.k_norm(self._heads(self.k_proj(x))).transpose(1, 2), *rope)
        return key, self._heads(self.v_proj(x)).transpose(1, 2)

    @property
    def _backend(self) -> str:
        return self.config._attn_implementation or "sdpa"


class MossVLTextSelfAttention(_Projections):
    """Causal grouped attention over the text."""

    is_causal = True

    def forward(self, x: Tensor, rope: Rope, mask: TextMask, cache: Any | None) -> Tensor:
        """[b, s, h] -> [b, s, h]; rope: two [b, 1, s, d]."""
        query, (key, value) = self._query(x, rope), self._key_value(x, rope)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        return self.o_proj(self_attention(self, query, key, value, mask, self._backend).flatten(2))


class MossVLTextCrossAttention(_Projections):
    """Grouped attention of text tokens to the vision states, each token to a prefix of them."""

    def forward(self, x: Tensor, rope: Rope, vision: VisionContext, cache: Any | None) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        query = self._query(x, rope)
        if vision.states is None or vision.rope is None:
            key, value = cached_key_value(cache, self.layer)
        else:
            key, value = self._key_value(vision.states, vision.rope)
            if cache is not None:
                key, value = cache.update(key, value, self.layer)
        return self.o_proj(self._attend(query, key, value, vision).flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, vision: VisionContext) -> Tensor:
        if vision.chunks is not None:
            return prefix_attention(query, key, value, vision.chunks)
        if vision.masked is None and self._backend != "eager":
            return grouped_sdpa(query, key, value, self.head_dim**-0.5).transpose(1, 2)
        bias = None
        if vision.masked is not None:
            bias = additive(vision.masked, query.dtype)
            if vision.row_mask is not None:
                # Rows that see nothing get a uniform softmax, finite; the row mask removes what comes out.
                bias = bias * vision.row_mask[:, None]
        return dense_attention(query, key, value, bias, self.head_dim**-0.5).transpose(1, 2)


def cached_key_value(cache: Any | None, layer: int) -> tuple[Tensor, Tensor]:
    """Vision keys and values that the prefill left in the cache, two [b, g, t, d]."""
    if not has_vision_cache(cache, layer):
        raise ValueError(f"cross-attention layer {layer} has neither vision states nor cached keys")
    cached = cache.layers[layer]  # type: ignore[union-attr]
    return cached.keys, cached.values


def has_vision_cache(cache: Any | None, layer: int) -> bool:
    """Whether the cache holds vision keys of a cross-attention layer."""
    layers = [] if cache is None else cache.layers
    return len(layers) > layer and getattr(layers[layer], "keys", None) is not None


class MossVLTextMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: MossVLTextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MossVLTextSelfLayer(GradientCheckpointingLayer):
    """Self-attention and MLP, pre-norm."""

    def __init__(self, config: MossVLTextConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = MossVLTextSelfAttention(config, layer)
        self.mlp = MossVLTextMLP(config)
        self.input_layernorm = MossVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MossVLRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, vision: VisionContext | None, rope: Rope, mask: TextMask, past_key_values: Any | None = None
    ) -> Tensor:
        """[b, s, h] -> [b, s, h]; `vision` is not read, it keeps the two kinds of layers alike."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x))


class MossVLTextCrossLayer(GradientCheckpointingLayer):
    """Cross-attention and MLP, each behind a tanh gate; text that sees no vision token passes unchanged."""

    def __init__(self, config: MossVLTextConfig, layer: int) -> None:
        super().__init__()
        self.cross_attn = MossVLTextCrossAttention(config, layer)
        self.mlp = MossVLTextMLP(config)
        self.input_layernorm = MossVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MossVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Tensor, vision: VisionContext | None, rope: Rope, mask: TextMask, past_key_values: Any | None = None
    ) -> Tensor:
        """[b, s, h] -> [b, s, h]; the identity without vision input."""
        if vision is None:
            return x
        row_mask = 1 if vision.row_mask is None else vision.row_mask.to(x.dtype)
        attended = self.cross_attn(self.input_layernorm(x), rope, vision, past_key_values)
        x = x + self.cross_attn_attn_gate.tanh() * (row_mask * attended)
        return x + self.cross_attn_mlp_gate.tanh() * (row_mask * self.mlp(self.post_attention_layernorm(x)))


class MossVLTextModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: MossVLTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            (MossVLTextCrossLayer if layer in config.cross_attention_layers else MossVLTextSelfLayer)(config, layer)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = MossVLRMSNorm(config.hidden_size, config.rms_norm_eps)

    def rope(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """Tables of [b, s] or [3, b, s] positions: two [b, 1, s, d]."""
        theta, section = self.config.rope_parameters["rope_theta"], self.config.mrope_section
        cos, sin = interleaved_rope(positions, theta=theta, section=section, dtype=dtype)
        return cos[:, None], sin[:, None]

    def forward(
        self,
        inputs_embeds: Tensor,
        positions: Tensor,
        mask: TextMask,
        vision: VisionContext | None,
        cache: Any | None = None,
        layer_inputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [b, s, h].

        Args:
            inputs_embeds: [b, s, h].
            positions: [b, s] or [3, b, s] int64.
            layer_inputs: takes the input of every layer, for callers who asked for hidden states.
        """
        rope = self.rope(positions, inputs_embeds.dtype)
        x = inputs_embeds
        for layer in self.layers:
            if layer_inputs is not None:
                layer_inputs.append(x)
            x = layer(x, vision, rope, mask, past_key_values=cache)
        return self.norm(x)
