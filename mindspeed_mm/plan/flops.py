"""Work per layer and part, in FLOPs of the matrix products. Estimates: norms and softmax are left out."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mindspeed_mm.config import Qwen2VLConfig

DEFAULT_TEXT_TOKENS = 1024
DEFAULT_IMAGE_TOKENS = 256
"""Tokens of a sample that come from pictures, after the merge: one picture of 448 x 448 pixels."""


@dataclass(frozen=True, slots=True)
class SampleShape:
    """The size of a typical sample, for estimates."""

    tokens: int = DEFAULT_TEXT_TOKENS
    """All tokens of the text decoder."""
    image_tokens: int = DEFAULT_IMAGE_TOKENS
    """Those of them that are vision features."""
    images: int = 1
    """Pictures (or frames) that they come from, of equal size; vision attention stays inside each."""
    supervised_tokens: int | None = None
    """Positions that the output head and the loss work on; all but the vision features when not given."""

    def __post_init__(self) -> None:
        if not 0 <= self.image_tokens <= self.tokens:
            raise ValueError(f"image_tokens = {self.image_tokens} must lie between 0 and tokens = {self.tokens}")
        if not 0 <= self.head_rows <= self.tokens:
            raise ValueError(f"supervised_tokens = {self.head_rows} must lie between 0 and tokens = {self.tokens}")
        if self.images < 1:
            raise ValueError(f"images = {self.images} must be 1 or more; without pictures, image_tokens is 0")

    @property
    def head_rows(self) -> int:
        """Positions that the output head works on."""
        return self.tokens - self.image_tokens if self.supervised_tokens is None else self.supervised_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """What one sample costs, per layer and part: FLOPs, or measured seconds."""

    vision_layer: float
    patch_embed: float
    projector: float
    text_layer: float
    lm_head: float
    token_embed: float = 0.0
    """No product of matrices, so no FLOPs."""

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


def forward_flops(model: Qwen2VLConfig, shape: SampleShape) -> Work:
    """FLOPs of the forward pass of one sample of `shape`."""
    text = model.text_decoder
    s = shape.tokens
    query_width = text.num_attention_heads * text.kv_channels
    qkv_width = query_width + 2 * text.num_query_groups * text.kv_channels
    weights = text.hidden_size * (qkv_width + query_width + 3 * text.ffn_hidden_size)
    # causal attention computes half of the s x s scores, twice: scores and their product with the values
    text_layer = 2.0 * s * weights + 2.0 * s * s * query_width
    lm_head = 2.0 * shape.head_rows * text.hidden_size * text.vocab_size
    if model.image_encoder is None:
        return Work(0.0, 0.0, 0.0, text_layer, lm_head)
    tower, projector = model.image_encoder.vision_encoder, model.image_encoder.vision_projector
    p = shape.image_tokens * tower.spatial_merge_size**2
    vision_weights = tower.hidden_size * (4 * tower.hidden_size + 2 * tower.ffn_hidden_size)
    vision_layer = 2.0 * p * vision_weights + 4.0 * p * p / shape.images * tower.hidden_size
    patch_embed = 2.0 * p * tower.patch_dim * tower.hidden_size
    projector_weights = projector.ffn_hidden_size * (projector.ffn_hidden_size + projector.hidden_size)
    return Work(vision_layer, patch_embed, 2.0 * shape.image_tokens * projector_weights, text_layer, lm_head)


def backward_flops(model: Qwen2VLConfig, shape: SampleShape) -> Work:
    """FLOPs of the backward pass of one sample of `shape`, recomputation included.

    Backward costs one forward for the gradient of the input and one for that of the weights. A frozen tower at the
    start of the model has neither; a frozen module behind a trained one still passes the gradient through.
    """
    work = forward_flops(model, shape)
    text, encoder = model.text_decoder, model.image_encoder
    vision_factor = patch_factor = projector_factor = 0.0
    if encoder is not None:
        tower, trains_projector = encoder.vision_encoder, not encoder.vision_projector.freeze
        patch_factor = float(not tower.freeze)
        vision_factor = 2.0 * patch_factor
        if not tower.freeze and tower.recompute_granularity == "full":
            vision_factor += 1.0
        projector_factor = float(trains_projector) + patch_factor
    text_factor = 2.0 if not text.freeze else float(projector_factor > 0)
    recomputes = text.recompute_granularity == "full" and text_factor > 0
    return Work(
        vision_layer=work.vision_layer * vision_factor,
        patch_embed=work.patch_embed * patch_factor,
        projector=work.projector * projector_factor,
        text_layer=work.text_layer * (text_factor + recomputes),
        lm_head=work.lm_head * text_factor,
    )


def training_flops(model: Qwen2VLConfig, shape: SampleShape) -> Work:
    """FLOPs of forward and backward of one sample of `shape`."""
    return forward_flops(model, shape) + backward_flops(model, shape)
