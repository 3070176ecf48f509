"""Generation with MOSS-VL: vision input in the first pass, positions that do not depend on padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerationMixin

from mindspeed_mm.models.mossvl.layout import VisionLayout
from mindspeed_mm.models.mossvl.positions import text_positions


class MossVLGenerationMixin(GenerationMixin):
    """What `generate` needs beside the forward pass."""

    def prepare_inputs_for_generation(  # type: ignore[override]  # transformers 4.57 and 5 differ
        self,
        input_ids: Tensor,
        past_key_values: Any | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        pixel_values: Tensor | None = None,
        grid_thw: Tensor | None = None,
        media_nums_per_sample: Sequence[int] | None = None,
        cross_attention_mask: Tensor | None = None,
        vision_chunked_length: int | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step: the new tokens, their positions counted over the whole sequence, pixels only at first."""
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = self._all_positions(input_ids, attention_mask, grid_thw, media_nums_per_sample)
        return {
            "input_ids": input_ids[:, num_past:].contiguous(),
            "attention_mask": attention_mask,
            "position_ids": positions[None, :, num_past:].expand(3, -1, -1).contiguous(),
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "pixel_values": None if num_past else pixel_values,
            "grid_thw": grid_thw,
            "media_nums_per_sample": media_nums_per_sample,
            "cross_attention_mask": None if cross_attention_mask is None else cross_attention_mask[:, :, num_past:],
            "vision_chunked_length": vision_chunked_length,
            "logits_to_keep": logits_to_keep or 0,
        }

    def _all_positions(
        self, input_ids: Tensor, attention_mask: Tensor | None, grid_thw: Tensor | None, media_nums: Any
    ) -> Tensor:
        config = self.config  # type: ignore[attr-defined]
        layout = None
        if grid_thw is not None:
            grids = grid_thw.tolist()
            layout = VisionLayout.build(grids, media_nums, merge_size=config.vision_config.spatial_merge_size)
        return text_positions(
            input_ids, attention_mask, layout, image_token_id=config.image_token_id, is_generating=True
        )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        frame_mask = model_kwargs.get("cross_attention_mask")
        if frame_mask is not None:
            # A new token sees what the one before it saw.
            model_kwargs["cross_attention_mask"] = torch.cat([frame_mask, frame_mask[:, :, -1:]], dim=2)
        return model_kwargs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat every sample; pixels and grids are rows of media, not of samples, and are repeated as blocks."""
        if expand_size == 1:
            return input_ids, model_kwargs
        media_nums = model_kwargs.pop("media_nums_per_sample", None)
        grid_thw, pixel_values = (model_kwargs.pop(name, None) for name in ("grid_thw", "pixel_values"))
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,  # type: ignore[arg-type]
            **model_kwargs,
        )
        if grid_thw is not None:
            media_nums = [len(grid_thw)] if media_nums is None else list(media_nums)
            blocks = grid_thw.split(media_nums)
            model_kwargs["grid_thw"] = torch.cat([block for block in blocks for _ in range(expand_size)])
            model_kwargs["media_nums_per_sample"] = [count for count in media_nums for _ in range(expand_size)]
            if pixel_values is not None:
                pixels = pixel_values.split([int(block.prod(1).sum()) for block in blocks])
                model_kwargs["pixel_values"] = torch.cat([part for part in pixels for _ in range(expand_size)])
        return input_ids, model_kwargs
