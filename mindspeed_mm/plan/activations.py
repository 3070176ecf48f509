"""What a forward pass keeps for its backward pass on a stage, tensor by tensor, as torch's own kernels keep it.

Fused kernels of accelerators keep a little less (keys and values are not repeated for every query head); segments of
unequal length keep the attention output twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mindspeed_mm.plan.stage import Part, Stage, StagePlan

if TYPE_CHECKING:
    from mindspeed_mm.config import ParallelConfig, Qwen2VLConfig
    from mindspeed_mm.config.qwen2vl import TextDecoderConfig, VisionEncoderConfig
    from mindspeed_mm.plan.flops import SampleShape

FP32_BYTES = 4
INDEX_BYTES = 8
LOGITS_BYTES = 2 << 30
"""The model computes fp32 logits above this size in chunks, which backward computes again; a test compares the two."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one micro-batch."""

    kept_bytes: int = 0
    """From the end of forward until backward."""
    working_bytes: int = 0
    """On top of that while backward runs: recomputed layers, gradients of logits."""

    def __add__(self, other: Activations) -> Activations:
        # backward works on one piece after the other
        return Activations(
            self.kept_bytes + other.kept_bytes,
            max(self.working_bytes, other.working_bytes),
        )


@dataclass(frozen=True, slots=True)
class _Flow:
    """Where gradients flow."""

    vision: bool
    projector: bool
    text: bool

    @classmethod
    def of(cls, model: Qwen2VLConfig) -> _Flow:
        encoder = model.image_encoder
        vision = encoder is not None and not encoder.vision_encoder.freeze
        projector = vision or (encoder is not None and not encoder.vision_projector.freeze)
        return cls(vision, projector, projector or not model.text_decoder.freeze)


@dataclass(frozen=True, slots=True)
class _Split:
    """Sizes of the run that divide or scale every tensor."""

    value_bytes: int
    tp_size: int
    sequence_split: int
    """Ranks that share what lies between the linears."""


def stage_activations(
    model: Qwen2VLConfig,
    plan: StagePlan,
    stage: Stage,
    shape: SampleShape,
    *,
    parallel: ParallelConfig,
    value_bytes: int,
    samples: int = 1,
) -> Activations:
    """What a stage keeps of one micro-batch on one process.

    Args:
        shape: of each sample.
        value_bytes: of the dtype that the model computes in.
        samples: in the micro-batch.
    """
    split = _Split(value_bytes, plan.tp_size, plan.tp_size if parallel.sequence_parallel else 1)
    flow = _Flow.of(model)
    share = samples / parallel.cp_size
    total = Activations()
    encoder = model.image_encoder
    if encoder is not None and (stage.vision or Part.PROJECTOR in stage.parts):
        patches = share * shape.image_tokens * encoder.vision_encoder.spatial_merge_size**2
        total += _scaled(_vision_side(model, stage, flow, split), patches)
    if stage.text and flow.text:
        total += _scaled(_text_layers(model.text_decoder, len(stage.text), split), share * shape.tokens)
        total += _text_parts(model, stage, shape, flow, split, share)
    return total


def _scaled(per_position: Activations, positions: float) -> Activations:
    return Activations(round(per_position.kept_bytes * positions), round(per_position.working_bytes * positions))


def _vision_side(model: Qwen2VLConfig, stage: Stage, flow: _Flow, split: _Split) -> Activations:
    """Bytes per patch of the vision layers, patch embedding and projector of a stage."""
    assert model.image_encoder is not None
    tower, projector = model.image_encoder.vision_encoder, model.image_encoder.vision_projector
    total = Activations()
    if stage.vision and flow.vision:
        layer = _vision_layer(tower, split)
        total += _layers(tower, layer, tower.hidden_size * split.value_bytes // split.sequence_split, len(stage.vision))
        # rotary tables are fp32 in the tower
        total += Activations(2 * tower.head_size * FP32_BYTES)
        if Part.PATCH_EMBED in stage.parts:
            total += Activations(tower.patch_dim * split.value_bytes)
    if Part.PROJECTOR in stage.parts and flow.projector:
        # a merged token is as wide as its patches together: norm input and fc1 output, per patch
        inner = tower.hidden_size // split.tp_size
        values = tower.hidden_size + inner
        if not projector.freeze:
            values += tower.hidden_size + inner
        total += Activations(values * split.value_bytes + 2 * FP32_BYTES)
    return total


def _vision_layer(tower: VisionEncoderConfig, split: _Split) -> int:
    """Bytes per patch that a vision layer keeps."""
    width, wide = tower.hidden_size, tower.ffn_hidden_size // split.tp_size
    # inputs of both norms and of both linears behind them; mean and scale of the norms
    between = 4 * width * split.value_bytes // split.sequence_split + 4 * FP32_BYTES
    # fc1 output, its sigmoid and their product
    return between + _attention(tower, split) + 3 * wide * split.value_bytes


def _text_layers(text: TextDecoderConfig, num_layers: int, split: _Split) -> Activations:
    """Bytes per token of the text layers of a stage."""
    width, wide = text.hidden_size, text.ffn_hidden_size // split.tp_size
    layer_input = width * split.value_bytes // split.sequence_split
    # inputs and scales of both norms, both halves of fc1; a frozen linear keeps no input
    layer = 2 * (layer_input + FP32_BYTES) + 2 * wide * split.value_bytes + _attention(text, split)
    if not text.freeze:
        layer += 2 * layer_input + wide * split.value_bytes
    tables = Activations(2 * text.kv_channels * split.value_bytes)
    return _layers(text, layer, layer_input, num_layers) + tables


def _attention(stack: TextDecoderConfig | VisionEncoderConfig, split: _Split) -> int:
    """Bytes per position that rotation and attention keep; the output is also the input of the projection."""
    query_width = stack.num_attention_heads * stack.kv_channels
    mixed_width = query_width + 2 * stack.num_query_groups * stack.kv_channels
    repeats_keys = stack.num_query_groups < stack.num_attention_heads
    if stack.recompute_granularity == "selective":
        # what attention starts from, and its output
        values = mixed_width + query_width * (2 if repeats_keys else 1)
        return values // split.tp_size * split.value_bytes
    # values that are not repeated stay a view of queries, keys and values together
    values = 3 * query_width + (query_width if repeats_keys else mixed_width)
    scale_bytes = stack.num_attention_heads // split.tp_size * FP32_BYTES
    return values // split.tp_size * split.value_bytes + scale_bytes


def _layers(
    stack: TextDecoderConfig | VisionEncoderConfig, layer: int, layer_input: int, num_layers: int
) -> Activations:
    """What `num_layers` layers keep, given what one keeps without recomputation and the size of its input."""
    group = stack.recompute_num_layers
    if stack.recompute_granularity != "full" or group is None:
        return Activations(layer * num_layers)
    if stack.recompute_method == "block":
        recomputed = min(group, num_layers)
        return Activations(layer_input * recomputed + layer * (num_layers - recomputed), layer - layer_input)
    groups = -(-num_layers // group)
    return Activations(layer_input * groups, layer * min(group, num_layers) - layer_input)


def _text_parts(
    model: Qwen2VLConfig, stage: Stage, shape: SampleShape, flow: _Flow, split: _Split, share: float
) -> Activations:
    """Embedding, final norm, output head and loss of a stage."""
    text = model.text_decoder
    state_bytes = text.hidden_size * split.value_bytes
    total = Activations()
    if Part.TOKEN_EMBED in stage.parts:
        kept = shape.tokens * INDEX_BYTES + shape.image_tokens * INDEX_BYTES
        if flow.projector:
            kept += shape.image_tokens * state_bytes
        total += Activations(round(share * kept))
    if Part.LM_HEAD in stage.parts:
        norm = shape.tokens * (state_bytes // split.sequence_split + FP32_BYTES)
        rows = shape.head_rows * (INDEX_BYTES + state_bytes)
        total += Activations(round(share * (norm + rows)))
        total += _logits(text.vocab_size // split.tp_size, round(share * shape.head_rows), split.value_bytes)
    return total


def _logits(vocabulary: int, rows: int, value_bytes: int) -> Activations:
    """Log-probabilities in fp32, kept; their gradient, and that of the logits where these have another dtype."""
    rows_at_once = max(1, LOGITS_BYTES // (FP32_BYTES * vocabulary))
    gradient_bytes = FP32_BYTES + (value_bytes if value_bytes != FP32_BYTES else 0)
    if rows <= rows_at_once:
        return Activations(rows * vocabulary * FP32_BYTES, rows * vocabulary * gradient_bytes)
    return Activations(0, rows_at_once * vocabulary * (FP32_BYTES + gradient_bytes))
