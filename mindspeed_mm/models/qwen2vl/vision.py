"""The vision side of Qwen2-VL: patch embedding, the part of the tower that a stage holds, and the projector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from mindspeed_mm.models.common.attention import RowLayout
from mindspeed_mm.models.common.norm import norm_spec
from mindspeed_mm.models.common.transformer import ACTIVATIONS, build_block, mlp_submodules, tower_config
from mindspeed_mm.ops.mrope import vision_cu_seqlens, vision_position_ids
from mindspeed_mm.ops.rotary import vision_tables
from mindspeed_mm.plan import Part, Stage

if TYPE_CHECKING:
    from mindspeed_mm.config import ImageEncoderConfig, VisionEncoderConfig, VisionProjectorConfig
    from mindspeed_mm.models.common.building import Building


class PatchEmbed(nn.Module):
    """Patches to hidden states: a convolution whose kernel is its stride, hence one product over flattened patches.

    Args:
        vision: patch geometry and width.
        dtype: of the weight.
    """

    def __init__(self, vision: VisionEncoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        kernel = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        self.proj = _FlatConv3d(vision.in_channels, vision.hidden_size, kernel, stride=kernel, bias=False, dtype=dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[p, 1, e] of pixel_values [p, channels * frames * height * width]."""
        return self.proj(pixel_values).unsqueeze(1)


class _FlatConv3d(nn.Conv3d):
    """Keeps the five dims of the weight, as checkpoints have it, and takes patches that are flat.

    A module of its own, because megatron waits for gathered weights before the forward of the module that holds them.
    """

    def forward(self, patches: Tensor) -> Tensor:
        return nn.functional.linear(patches.to(self.weight.dtype), self.weight.flatten(1))


class VisionTower(nn.Module):
    """The vision layers of one stage, with the patch embedding where the first of them lives.

    Args:
        vision: settings of the tower.
        stage: which layers and parts live here.
        building: what all modules of the chunk are told.
    """

    def __init__(
        self,
        vision: VisionEncoderConfig,
        stage: Stage,
        building: Building,
    ) -> None:
        super().__init__()
        self.split = building.split
        config = tower_config(
            building,
            num_layers=vision.num_layers,
            hidden_size=vision.hidden_size,
            ffn_hidden_size=vision.ffn_hidden_size,
            num_attention_heads=vision.num_attention_heads,
            activation_func=ACTIVATIONS[vision.activation_func],
            normalization=vision.normalization,
            layernorm_epsilon=vision.layernorm_epsilon,
            add_bias_linear=True,
            recompute_granularity=vision.recompute_granularity,
            recompute_method=vision.recompute_method,
            recompute_num_layers=vision.recompute_num_layers,
        )
        self.patch_embed = PatchEmbed(vision, config.params_dtype) if Part.PATCH_EMBED in stage.parts else None
        self.blocks = build_block(
            config, stage.vision, normalization=vision.normalization, kernels=building.kernels, has_final_norm=False
        )
        self.merge_size = vision.spatial_merge_size
        self.head_size = vision.head_size

    def forward(self, hidden: Tensor | None, pixel_values: Tensor | None, grid_thw: Tensor) -> Tensor:
        """Hidden states after this stage's layers.

        Args:
            hidden: [p, 1, e] from the stage before, or None where patches are embedded.
            pixel_values: [p, patch_dim], needed where patches are embedded.
            grid_thw: [media, 3] int64 on the host.
        Returns:
            [p, 1, e], the rows that this rank holds.
        """
        split = self.split
        if self.patch_embed is not None:
            assert pixel_values is not None, "the batch relay gives pixels to the stage that embeds patches"
            hidden = split.enter_layers(self.patch_embed(split.take_local(pixel_values)))
        assert hidden is not None, "a stage without the patch embedding receives vision states"
        positions = vision_position_ids(grid_thw, self.merge_size)
        patches = positions.shape[0]
        cos, sin = vision_tables(split.pad(positions).to(hidden.device, non_blocking=True), self.head_size)
        cu_seqlens = split.pad_segments(vision_cu_seqlens(grid_thw), patches)
        layout = RowLayout(cu_seqlens=cu_seqlens, causal=False, cos=cos, sin=sin, split=split)
        return self.blocks(hidden, None, packed_seq_params=layout)

    def gather(self, hidden: Tensor, patches: int) -> Tensor:
        """All `patches` vision states [p, 1, e] on every rank, of this rank's rows."""
        return self.split.gather_rows(self.split.leave_layers(hidden), patches)


class Projector(nn.Module):
    """Norm, 2x2 merge and MLP from vision states to the width of the text decoder."""

    def __init__(
        self,
        projector: VisionProjectorConfig,
        merge_size: int,
        building: Building,
    ) -> None:
        super().__init__()
        config = tower_config(
            # Its rows are whole on every rank: 2x2 patches merge across any border.
            building.with_whole_rows(),
            num_layers=1,
            hidden_size=projector.hidden_size,
            ffn_hidden_size=projector.ffn_hidden_size,
            # There is no attention here; megatron wants a number that TP divides.
            num_attention_heads=building.parallel.tp_size,
            activation_func=ACTIVATIONS[projector.activation_func],
            layernorm_epsilon=projector.layernorm_epsilon,
            add_bias_linear=projector.add_bias_linear,
        )
        self.layernorm = build_module(
            norm_spec(projector.normalization, building.kernels),
            config,
            projector.input_size,
            projector.layernorm_epsilon,
        )
        self.merged_size = projector.input_size * merge_size**2
        self.encoder = MLP(config, mlp_submodules(), input_size=self.merged_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[p/merge^2, 1, h] of vision states [p, 1, e]; patches of one merge block are neighbours."""
        merged = self.layernorm(hidden).reshape(-1, 1, self.merged_size)
        out, bias = self.encoder(merged)
        return out if bias is None else out + bias


class ImageEncoder(nn.Module):
    """What a stage holds of the vision side, under the names that checkpoints use."""

    def __init__(
        self,
        image: ImageEncoderConfig,
        stage: Stage,
        building: Building,
    ) -> None:
        super().__init__()
        vision, projector = image.vision_encoder, image.vision_projector
        self.encoder = VisionTower(vision, stage, building)
        self.encoder.requires_grad_(not vision.freeze)
        self.projector = None
        if Part.PROJECTOR in stage.parts:
            self.projector = Projector(projector, vision.spatial_merge_size, building)
            self.projector.requires_grad_(not projector.freeze)

    def forward(self, hidden: Tensor | None, pixel_values: Tensor | None, grid_thw: Tensor) -> Tensor:
        """Vision states [p, 1, e], or image embeddings [p/merge^2, 1, h] where the projector lives."""
        hidden = self.encoder(hidden, pixel_values, grid_thw)
        if self.projector is None:
            return hidden
        return self.projector(self.encoder.gather(hidden, int(grid_thw.prod(dim=1).sum())))
