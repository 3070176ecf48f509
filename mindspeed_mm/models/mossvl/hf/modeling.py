"""MOSS-VL as a transformers model: the names, the keywords and the outputs of the published checkpoint's own code."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import PreTrainedModel

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.mossvl.hf.attention import TextMask
from mindspeed_mm.models.mossvl.hf.configuration import MossVLConfig
from mindspeed_mm.models.mossvl.hf.generation import MossVLGenerationMixin
from mindspeed_mm.models.mossvl.hf.outputs import MossVLCausalLMOutput, MossVLModelOutput, vision_token_info
from mindspeed_mm.models.mossvl.hf.text import (
    MossVLRMSNorm,
    MossVLTextCrossLayer,
    MossVLTextModel,
    VisionContext,
    has_vision_cache,
)
from mindspeed_mm.models.mossvl.hf.vision import Grids, MossVLVisionMerger, MossVLVisionModel
from mindspeed_mm.models.mossvl.layout import VisionLayout, pack_states
from mindspeed_mm.models.mossvl.positions import rope_deltas, text_positions, vision_positions
from mindspeed_mm.models.mossvl.visibility import dense_mask, row_chunks, visible_lengths

logger = logging.getLogger(__name__)


class MossVLPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about every MOSS-VL model."""

    config_class = MossVLConfig
    config: MossVLConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MossVLTextSelfLayer", "MossVLTextCrossLayer", "MossVLVisionBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.text_config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv3d | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, std)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.zeros_(bias)
        elif isinstance(module, nn.LayerNorm | MossVLRMSNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        elif isinstance(module, MossVLTextCrossLayer):
            nn.init.zeros_(module.cross_attn_attn_gate)
            nn.init.zeros_(module.cross_attn_mlp_gate)
        elif isinstance(module, MossVLModel):
            nn.init.zeros_(module.separator_token)
        elif isinstance(module, MossVLVisionMerger):
            for linear in (module.linear_fc1, module.linear_fc2):
                nn.init.normal_(linear.weight, 0.0, 0.02)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute layers in the backward pass, always in the non-reentrant form.

        All cross-attention layers read the same vision states; the reentrant form would free their graph after the
        first of them.
        """
        asked = dict(gradient_checkpointing_kwargs or {})
        if asked.get("use_reentrant"):
            logger.warning("use_reentrant=True cannot train MOSS-VL's shared vision states; using use_reentrant=False")
        super().gradient_checkpointing_enable({**asked, "use_reentrant": False}, **kwargs)


class MossVLModel(MossVLPreTrainedModel):
    """Vision tower, text tower and the separator that ends every frame."""

    accepts_loss_kwargs = False

    def __init__(self, config: MossVLConfig) -> None:
        config.check()
        super().__init__(config)
        self.visual = MossVLVisionModel(config.vision_config)
        self.language_model = MossVLTextModel(config.text_config)
        self.separator_token = nn.Parameter(torch.zeros(config.vision_config.out_hidden_size))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        """Replaces the token embedding."""
        self.language_model.embed_tokens = value

    def vision_states(
        self, pixel_values: Tensor, grids: Grids, layout: VisionLayout, chunk_length: int | None = None
    ) -> Tensor:
        """What the cross-attention layers read: [b, layout.padded_length, h]."""
        needed = sum(t * h * w for t, h, w in grids)
        if pixel_values.shape[0] != needed:
            raise DataError(f"pixel_values has {pixel_values.shape[0]} patches, but grid_thw stands for {needed}")
        merged = self.visual(pixel_values, grids, chunk_length)
        return pack_states(merged, self.separator_token, layout)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grid_thw: Tensor | None = None,
        media_nums_per_sample: Sequence[int] | None = None,
        vision_position_ids: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        vision_chunked_length: int | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MossVLModelOutput:
        """Run both towers.

        Args:
            input_ids: [b, s] int64; needed with vision input, whose places they tell.
            attention_mask: [b, past + s], 0 on padding.
            position_ids: [3, b, s] int64, only from callers who computed them (generation does); else None.
            inputs_embeds: [b, s, h] in place of the embedded input_ids.
            pixel_values: [p, channels * temporal * patch^2], all media in text order.
            grid_thw: [media, 3] int64.
            media_nums_per_sample: media of each sample (a list, a video counts once); None: one sample.
            vision_position_ids: [3, b, t] int64 to replace the computed ones.
            cross_attention_mask: [b, 1, s, frames] bool, True masked. None with vision input: everything is visible,
                padding included; training always passes it.
            vision_chunked_length: media per run of the vision tower.
        Raises:
            ValueError: inputs that contradict each other.
            DataError: media that do not match the text or the grids.
        """
        _refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds = self.language_model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        layout, grids = self._layout(grid_thw, media_nums_per_sample, embeds.shape[0])
        tokens = _tokens(input_ids, embeds, pixel_values)
        positions = self._positions(tokens, attention_mask, layout, position_ids, num_past)
        mask = TextMask.build(
            attention_mask,
            num_new=embeds.shape[1],
            num_past=num_past,
            is_dense=self.config.text_config._attn_implementation == "eager",
            device=embeds.device,
        )
        states = None
        if pixel_values is not None:
            if layout is None or num_past:
                raise ValueError("pixel_values need grid_thw and, in generation, belong to the first forward pass")
            states = self.vision_states(pixel_values, grids, layout, vision_chunked_length).to(embeds.dtype)
            if vision_position_ids is None:
                text = positions if positions.ndim == 2 else positions[0]
                vision_position_ids = vision_positions(
                    text, tokens, attention_mask, layout, image_token_id=self.config.image_token_id
                )
        vision = self._vision_context(states, vision_position_ids, cross_attention_mask, layout, past_key_values)
        layer_inputs: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.language_model(embeds, positions, mask, vision, past_key_values, layer_inputs)
        return MossVLModelOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=None if layer_inputs is None else (*layer_inputs, hidden),
            vision_token_info=None if layout is None else vision_token_info(layout, grids, media_nums_per_sample),
            rope_deltas=rope_deltas(positions if positions.ndim == 2 else positions[0]),
        )

    def _layout(
        self, grid_thw: Tensor | None, media_nums: Sequence[int] | None, batch_size: int
    ) -> tuple[VisionLayout | None, Grids]:
        if grid_thw is None:
            return None, ()
        grids = [(int(t), int(h), int(w)) for t, h, w in grid_thw.tolist()]
        layout = VisionLayout.build(
            grids,
            media_nums,
            merge_size=self.config.vision_config.spatial_merge_size,
            pad_multiple=self.config.vision_seq_pad_multiple,
        )
        if len(layout.frames) != batch_size:
            raise ValueError(
                f"media_nums_per_sample speaks of {len(layout.frames)} samples, but the batch has {batch_size}"
            )
        return layout, grids

    def _positions(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        layout: VisionLayout | None,
        position_ids: Tensor | None,
        num_past: int,
    ) -> Tensor:
        """[b, s], or the caller's [3, b, s]."""
        if position_ids is not None:
            if position_ids.ndim != 3:
                raise ValueError(
                    f"position_ids has shape {tuple(position_ids.shape)}; MOSS-VL takes [3, b, s] or None. Drop the "
                    "two-dimensional ones that other models use."
                )
            return position_ids
        if num_past:
            raise ValueError("position_ids [3, b, s] are needed to continue from a cache; generate() passes them")
        return text_positions(tokens, attention_mask, layout, image_token_id=self.config.image_token_id)

    def _vision_context(
        self,
        states: Tensor | None,
        positions: Tensor | None,
        frame_mask: Tensor | None,
        layout: VisionLayout | None,
        cache: Cache | None,
    ) -> VisionContext | None:
        first_cross = self.config.text_config.cross_attention_layers[0]
        if states is None and not has_vision_cache(cache, first_cross):
            return None
        rope = None
        if states is not None and positions is not None:
            rope = self.language_model.rope(positions, states.dtype)
        if frame_mask is None:
            return VisionContext(states, rope, None, None, None)
        if layout is None:
            raise ValueError("cross_attention_mask needs grid_thw, which says how many tokens a frame has")
        row_mask = (~frame_mask).any(-1)[:, 0, :, None]
        backend = self.config.text_config._attn_implementation
        lengths = None if backend == "eager" else visible_lengths(frame_mask, layout)
        if lengths is None:
            masked = dense_mask(frame_mask, layout)
            return VisionContext(states, rope, None, masked, row_mask)
        return VisionContext(states, rope, [row_chunks(row) for row in lengths.tolist()], None, row_mask)


class MossVLForConditionalGeneration(MossVLPreTrainedModel, MossVLGenerationMixin):
    """MOSS-VL with its language-model head."""

    # The loss is the mean over this micro-batch; Trainer then averages micro-batches and passes no token counts.
    accepts_loss_kwargs = False
    main_input_name = "input_ids"

    def __init__(self, config: MossVLConfig) -> None:
        super().__init__(config)
        self.model = MossVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @property
    def visual(self) -> nn.Module:
        """The vision tower."""
        return self.model.visual

    @property
    def language_model(self) -> nn.Module:
        """The text tower."""
        return self.model.language_model

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        """Replaces the token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grid_thw: Tensor | None = None,
        media_nums_per_sample: Sequence[int] | None = None,
        vision_position_ids: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        cache_position: Tensor | None = None,
        vision_chunked_length: int | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MossVLCausalLMOutput | tuple[Any, ...]:
        """Loss and logits.

        Args:
            labels: [b, s] int64, equal to input_ids where supervised, -100 elsewhere.
            cache_position: accepted for older callers, without effect: the cache knows its length.
            logits_to_keep: only the last so many rows get logits; 0: all.
            The others: `MossVLModel.forward`.
        Returns:
            In training with labels `logits` is None: the head runs on the supervised rows alone.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            grid_thw=grid_thw,
            media_nums_per_sample=media_nums_per_sample,
            vision_position_ids=vision_position_ids,
            cross_attention_mask=cross_attention_mask,
            vision_chunked_length=vision_chunked_length,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = None if labels is None else self._loss(hidden, labels)
        logits = None
        if labels is None or not self.training:
            logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        result = MossVLCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            vision_token_info=outputs.vision_token_info,
            rope_deltas=outputs.rope_deltas,
        )
        return result.to_tuple() if return_dict is False else result

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy in float32 of every supervised token given the row before it."""
        targets = labels[:, 1:]
        rows = targets != -100
        if not bool(rows.any()):
            # Every rank runs the head once, also one whose samples have nothing to learn.
            return self.lm_head(hidden[:, :1]).float().sum() * 0
        return nn.functional.cross_entropy(self.lm_head(hidden[:, :-1][rows]).float(), targets[rows])


def _tokens(input_ids: Tensor | None, embeds: Tensor, pixel_values: Tensor | None) -> Tensor:
    if input_ids is not None:
        return input_ids
    if pixel_values is not None:
        raise ValueError("vision input needs input_ids: they say where the frames stand")
    return torch.full(embeds.shape[:2], -1, dtype=torch.int64, device=embeds.device)


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Refuse keywords that would be ignored; some are passed by every caller and mean nothing here."""
    harmless = {"output_attentions", "return_dict", "num_items_in_batch", "is_first_iteration", "mm_token_type_ids"}
    unknown = sorted(name for name, value in kwargs.items() if name not in harmless and value is not None)
    if unknown or kwargs.get("output_attentions"):
        raise ValueError(f"MOSS-VL does not take {unknown or ['output_attentions=True']}")
