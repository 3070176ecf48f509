"""Work per layer and part, in FLOPs of the matrix products. Estimates: norms and softmax are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mindspeed_mm.config import Qwen2VLConfig

DEFAULT_TEXT_TOKENS = 1024
DEFAULT_IMAGE_TOKENS = 256
"""Tokens of a sample that come from pictures, after the merge: one picture of 448 x 448 pixels."""


@dataclass(frozen=True, slots=True)
class SampleShape:
    """The size of a typical sample, for estimates.

    `tokens` counts all tokens of the text decoder, `image_tokens` those that are vision features.
    """

    tokens: int = DEFAULT_TEXT_TOKENS
    image_tokens: int = DEFAULT_IMAGE_TOKENS

    def __post_init__(self) -> None:
        if not 0 <= self.image_tokens <= self.tokens:
            raise ValueError(f"image_tokens = {self.image_tokens} must lie between 0 and tokens = {self.tokens}")


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of one sample per training step (forward and, where trained or passed through, backward)."""

    vision_layer: float
    patch_embed: float
    projector: float
    text_layer: float
    lm_head: float


def forward_flops(model: Qwen2VLConfig, shape: SampleShape) -> Work:
    """FLOPs of the forward pass of one sample of `shape`."""
    text = model.text_decoder
    s = shape.tokens
    query_width = text.num_attention_heads * text.kv_channels
    qkv_width = query_width + 2 * text.num_query_groups * text.kv_channels
    weights = text.hidden_size * (qkv_width + query_width + 3 * text.ffn_hidden_size)
    # causal attention computes half of the s x s scores, twice: scores and their product with the values
    text_layer = 2.0 * s * weights + 2.0 * s * s * query_width
    lm_head = 2.0 * s * text.hidden_size * text.vocab_size
    if model.image_encoder is None:
        return Work(0.0, 0.0, 0.0, text_layer, lm_head)
    tower, projector = model.image_encoder.vision_encoder, model.image_encoder.vision_projector
    p = shape.image_tokens * tower.spatial_merge_size**2
    vision_weights = tower.hidden_size * (4 * tower.hidden_size + 2 * tower.ffn_hidden_size)
    vision_layer = 2.0 * p * vision_weights + 4.0 * p * p * tower.hidden_size
    patch_embed = 2.0 * p * tower.patch_dim * tower.hidden_size
    projector_weights = projector.ffn_hidden_size * (projector.ffn_hidden_size + projector.hidden_size)
    return Work(vision_layer, patch_embed, 2.0 * shape.image_tokens * projector_weights, text_layer, lm_head)


def training_flops(model: Qwen2VLConfig, shape: SampleShape) -> Work:
    """FLOPs of forward and backward of one sample of `shape`.

    Backward costs one forward for the gradient of the input and one for that of the weights. A frozen tower at the
    start of the model has neither; a frozen module behind a trained one still passes the gradient through.
    """
    work = forward_flops(model, shape)
    text = model.text_decoder
    encoder = model.image_encoder
    vision_trained = encoder is not None and not encoder.vision_encoder.freeze
    vision_side_trained = vision_trained or (encoder is not None and not encoder.vision_projector.freeze)
    vision_factor = 3.0 if vision_trained else 1.0
    projector_factor = 1.0
    if encoder is not None:
        projector_factor += (not encoder.vision_projector.freeze) + vision_trained
    text_factor = 3.0 if not text.freeze else 1.0 + vision_side_trained
    vision_again = text_again = 0.0
    if encoder is not None and encoder.vision_encoder.recompute_granularity == "full" and vision_trained:
        vision_again = 1.0
    if text.recompute_granularity == "full" and text_factor > 1:
        text_again = 1.0
    return Work(
        vision_layer=work.vision_layer * (vision_factor + vision_again),
        patch_embed=work.patch_embed * (2.0 if vision_trained else 1.0),
        projector=work.projector * projector_factor,
        text_layer=work.text_layer * (text_factor + text_again),
        lm_head=work.lm_head * text_factor,
    )
