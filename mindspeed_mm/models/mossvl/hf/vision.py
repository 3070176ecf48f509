"""Vision tower of MOSS-VL: a ViT with attention inside each frame and one merger over four of its layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from mindspeed_mm.models.mossvl.hf.attention import (
    OWN_BACKENDS,
    dense_attention,
    grouped_sdpa,
    registered_attention,
)
from mindspeed_mm.models.mossvl.hf.configuration import MossVLVisionConfig
from mindspeed_mm.models.mossvl.rope import merge_block_order, position_corners, rotate, vision_rope
from mindspeed_mm.ops.mrope import vision_cu_seqlens

Grids = Sequence[tuple[int, int, int]]


class MossVLPatchProjection(nn.Conv3d):
    """A convolution whose kernel is its stride, computed as the linear map that it is."""

    def forward(self, patches: Tensor) -> Tensor:
        """[p, channels * temporal * patch^2] -> [p, h]."""
        return nn.functional.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class MossVLVisionPatchEmbed(nn.Module):
    """Flattened patches to the width of the tower."""

    def __init__(self, config: MossVLVisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = MossVLPatchProjection(config.in_channels, config.hidden_size, kernel_size=kernel, stride=kernel)

    def forward(self, patches: Tensor) -> Tensor:
        """[p, channels * temporal * patch^2] -> [p, h]."""
        return self.proj(patches)


class MossVLVisionMLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: MossVLVisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[p, h] -> [p, h]."""
        return self.linear_fc2(self.act_fn(self.linear_fc1(x)))


class MossVLVisionAttention(nn.Module):
    """Full attention inside each frame."""

    is_causal = False  # read by transformers' attention functions, with the next one
    num_key_value_groups = 1

    def __init__(self, config: MossVLVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], grids: Grids) -> Tensor:
        """[p, h] -> [p, h]; rope: two [p, 1, d] float32."""
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)
        q, k = (rotate(part.float(), *rope).to(part.dtype) for part in (q, k))
        backend = self.config._attn_implementation or "sdpa"
        attend = self._attend_frames if backend in OWN_BACKENDS else self._attend_varlen
        return self.proj(attend(q, k, v, grids, backend).flatten(1))

    def _attend_frames(self, q: Tensor, k: Tensor, v: Tensor, grids: Grids, backend: str) -> Tensor:
        """[p, n, d] -> [p, n, d]: neighbouring frames of one size are one batch."""
        scale = q.shape[-1] ** -0.5
        outputs, start = [], 0
        for num_frames, size in _equal_frames(grids):
            rows = slice(start, start + num_frames * size)
            query, key, value = (x[rows].unflatten(0, (num_frames, size)).transpose(1, 2) for x in (q, k, v))
            if backend == "eager":
                attended = dense_attention(query, key, value, None, scale)
            else:
                attended = grouped_sdpa(query, key, value, scale)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
            start = rows.stop
        return torch.cat(outputs)

    def _attend_varlen(self, q: Tensor, k: Tensor, v: Tensor, grids: Grids, backend: str) -> Tensor:
        boundaries = vision_cu_seqlens(torch.tensor(grids)).to(q.device)
        longest = max(height * width for _, height, width in grids)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        attended, _ = registered_attention(backend)(  # type: ignore[operator]
            self,
            q,
            k,
            v,
            None,
            scaling=q.shape[-1] ** -0.5,
            dropout=0.0,
            cu_seq_lens_q=boundaries,
            cu_seq_lens_k=boundaries,
            max_length_q=longest,
            max_length_k=longest,
            is_causal=False,
        )
        return attended[0]


def _equal_frames(grids: Grids) -> list[tuple[int, int]]:
    """(frames, patches per frame) of neighbouring frames with equally many patches."""
    runs: list[tuple[int, int]] = []
    for num_frames, height, width in grids:
        if runs and runs[-1][1] == height * width:
            runs[-1] = (runs[-1][0] + num_frames, height * width)
        else:
            runs.append((num_frames, height * width))
    return runs


class MossVLVisionBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: MossVLVisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = MossVLVisionAttention(config)
        self.mlp = MossVLVisionMLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], grids: Grids) -> Tensor:
        """[p, h] -> [p, h]."""
        x = x + self.attn(self.norm1(x), rope, grids)
        return x + self.mlp(self.norm2(x))


class MossVLVisionMerger(nn.Module):
    """Last layer and deepstack layers, normed and joined per patch, then each square of patches becomes one token."""

    def __init__(self, config: MossVLVisionConfig) -> None:
        super().__init__()
        num_features = 1 + len(config.deepstack_visual_indexes)
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size, eps=1e-6) for _ in range(num_features))
        self.width = config.hidden_size * num_features * config.spatial_merge_size**2
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, config.out_hidden_size)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features [p, h], the last layer first -> [p / merge^2, out]."""
        joined = torch.cat([norm(x) for norm, x in zip(self.norms, features, strict=True)], dim=-1)
        return self.linear_fc2(nn.functional.gelu(self.linear_fc1(joined.view(-1, self.width))))


class MossVLVisionModel(nn.Module):
    """The tower: patches of all media in, one packed sequence of merged tokens out."""

    def __init__(self, config: MossVLVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = MossVLVisionPatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(MossVLVisionBlock(config) for _ in range(config.depth))
        self.merger = MossVLVisionMerger(config)

    def forward(self, pixel_values: Tensor, grids: Grids, chunk_length: int | None = None) -> Tensor:
        """Merged tokens of all media.

        Args:
            pixel_values: [p, channels * temporal * patch^2].
            grids: (frames, height, width) of every medium, in patches.
            chunk_length: run at most this many media at a time (a video is one); the result does not change, since
                no frame sees another. None, 0 or negative: all at once.
        Returns:
            [p / merge^2, out_hidden_size].
        """
        if not chunk_length or chunk_length < 0 or chunk_length >= len(grids):
            return self._run(pixel_values, grids)
        outputs, start = [], 0
        for first in range(0, len(grids), chunk_length):
            media = grids[first : first + chunk_length]
            stop = start + sum(t * h * w for t, h, w in media)
            outputs.append(self._run(pixel_values[start:stop], media))
            start = stop
        return torch.cat(outputs)

    def _run(self, pixel_values: Tensor, grids: Grids) -> Tensor:
        x = self.patch_embed(pixel_values) + self._position_embeddings(grids)
        head_size, merge_size = self.config.hidden_size // self.config.num_heads, self.config.spatial_merge_size
        tables = vision_rope(torch.tensor(grids), head_size=head_size, merge_size=merge_size)
        rope = (tables[0][:, None].to(x.device), tables[1][:, None].to(x.device))
        deep = []
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, grids)
            if layer in self.config.deepstack_visual_indexes:
                deep.append(x)
        return self.merger([x, *deep])

    def _position_embeddings(self, grids: Grids) -> Tensor:
        """[p, h]: the learned table interpolated to every frame's grid.

        One lookup for all media: parameter-partitioning engines gather at every call of a module, so all ranks must
        make equally many.
        """
        side, merge_size = int(self.config.num_position_embeddings**0.5), self.config.spatial_merge_size
        corners = [position_corners(height, width, side) for _, height, width in grids]
        device = self.pos_embed.weight.device
        looked_up = self.pos_embed(torch.cat([indices for indices, _ in corners], dim=1).to(device))
        weights = torch.cat([weight for _, weight in corners], dim=1).to(looked_up)
        frames = (looked_up * weights[..., None]).sum(0).split([height * width for _, height, width in grids])
        return torch.cat(
            [
                merge_block_order(frame, height, width, merge_size).repeat(num_frames, 1)
                for frame, (num_frames, height, width) in zip(frames, grids, strict=True)
            ]
        )
