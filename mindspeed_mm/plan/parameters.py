"""The parameter tensors of a stage on one tensor rank, one by one: what estimates count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mindspeed_mm.plan.stage import Part, Stage, StagePlan

if TYPE_CHECKING:
    from mindspeed_mm.config import Qwen2VLConfig


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter tensor on one tensor rank."""

    module: str
    """The piece of the stage that it belongs to."""
    count: int
    """Values."""
    is_trained: bool
    is_shared: bool = False
    """One of the two copies of a tied embedding that lie on different stages."""


def stage_tensors(model: Qwen2VLConfig, plan: StagePlan, stage: Stage) -> list[Parameter]:
    """The parameters of a stage in the order of the built chunk: Megatron lays its buffers out in that order.

    The second copy of a tied embedding, on the stage with the output head, counts where it lies.
    """
    text, encoder = model.text_decoder, model.image_encoder
    tensors: list[Parameter] = []

    def add(module: str, counts: list[int], *, frozen: bool, is_shared: bool = False) -> None:
        tensors.extend(Parameter(module, count, not frozen, is_shared) for count in counts)

    if encoder is not None:
        tower, projector = encoder.vision_encoder, encoder.vision_projector
        if Part.PATCH_EMBED in stage.parts:
            add(Part.PATCH_EMBED, [tower.patch_dim * tower.hidden_size], frozen=tower.freeze)
        add("vision layers", _vision_layer(model, plan.tp_size) * len(stage.vision), frozen=tower.freeze)
        if Part.PROJECTOR in stage.parts:
            add(Part.PROJECTOR, _projector(model, plan.tp_size), frozen=projector.freeze)
    vocabulary = text.vocab_size // plan.tp_size * text.hidden_size
    has_copies = plan.is_tied and plan.has_head_copy(plan.stage_of(Part.LM_HEAD))
    if Part.TOKEN_EMBED in stage.parts:
        add(Part.TOKEN_EMBED, [vocabulary], frozen=text.freeze, is_shared=has_copies)
    add("text layers", _text_layer(model, plan.tp_size) * len(stage.text), frozen=text.freeze)
    if Part.FINAL_NORM in stage.parts:
        add(Part.FINAL_NORM, [text.hidden_size], frozen=text.freeze)
    if Part.LM_HEAD in stage.parts and (not plan.is_tied or has_copies):
        add(Part.LM_HEAD, [vocabulary], frozen=text.freeze, is_shared=has_copies)
    return tensors


def _linear(inputs: int, outputs: int, tp_size: int, *, has_bias: bool, splits_rows: bool) -> list[int]:
    """A linear on one tensor rank; the bias is split with the rows (outputs) or not at all."""
    bias = [outputs // tp_size if splits_rows else outputs] if has_bias else []
    return [inputs * outputs // tp_size, *bias]


def _vision_layer(model: Qwen2VLConfig, tp_size: int) -> list[int]:
    assert model.image_encoder is not None
    tower = model.image_encoder.vision_encoder
    width, wide = tower.hidden_size, tower.ffn_hidden_size
    return [
        *(width, width),
        *_linear(width, width, tp_size, has_bias=True, splits_rows=False),
        *_linear(width, 3 * width, tp_size, has_bias=True, splits_rows=True),
        *(width, width),
        *_linear(width, wide, tp_size, has_bias=True, splits_rows=True),
        *_linear(wide, width, tp_size, has_bias=True, splits_rows=False),
    ]


def _projector(model: Qwen2VLConfig, tp_size: int) -> list[int]:
    assert model.image_encoder is not None
    projector = model.image_encoder.vision_projector
    wide = projector.ffn_hidden_size
    return [
        *(projector.input_size, projector.input_size),
        *_linear(wide, wide, tp_size, has_bias=True, splits_rows=True),
        *_linear(wide, projector.hidden_size, tp_size, has_bias=True, splits_rows=False),
    ]


def _text_layer(model: Qwen2VLConfig, tp_size: int) -> list[int]:
    text = model.text_decoder
    width, wide = text.hidden_size, text.ffn_hidden_size
    query_width = text.num_attention_heads * text.kv_channels
    qkv_width = query_width + 2 * text.num_query_groups * text.kv_channels
    return [
        width,
        *_linear(query_width, width, tp_size, has_bias=False, splits_rows=False),
        *_linear(width, qkv_width, tp_size, has_bias=True, splits_rows=True),
        width,
        *_linear(width, 2 * wide, tp_size, has_bias=False, splits_rows=True),
        *_linear(wide, width, tp_size, has_bias=False, splits_rows=False),
    ]
