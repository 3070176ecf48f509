"""The model settings of Qwen2-VL: what `--mm-model` (model.json) holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from mindspeed_mm.config.base import Ints, Settings, StageLists, parse_settings
from mindspeed_mm.config.qwen2vl_hf import qwen2vl_json_from_hf

DtypeName = Literal["bf16", "fp16", "half", "fp32", "float16", "float32"]
_DTYPES: dict[str, Literal["bf16", "fp16", "fp32"]] = {
    "bf16": "bf16",
    "fp16": "fp16",
    "half": "fp16",
    "float16": "fp16",
    "fp32": "fp32",
    "float32": "fp32",
}


class _Module(Settings):
    """What the three modules have in common."""

    fp16: bool | None = None
    """Accepted so that existing files load; `--fp16` decides."""
    bf16: bool | None = None
    """Accepted so that existing files load; `--bf16` decides."""
    params_dtype: DtypeName | None = None
    """Accepted so that existing files load; `--bf16` and `--fp16` decide."""
    init_method_std: float = Field(default=0.02, gt=0)
    """Standard deviation of random weights; without effect when a checkpoint is loaded."""

    @property
    def dtype_said(self) -> Literal["bf16", "fp16", "fp32"] | None:
        """The precision that the file names; None if it names none."""
        if self.params_dtype is not None:
            return _DTYPES[self.params_dtype]
        return "bf16" if self.bf16 else "fp16" if self.fp16 else None


class _LayerStack(_Module):
    """What the two towers of transformer layers have in common."""

    num_layers: int = Field(gt=0)
    """Layers in the whole tower, over all stages."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    ffn_hidden_size: int = Field(gt=0)
    """Inner width of the MLP; of each half when the MLP is gated. Absent: 4 * hidden_size."""
    num_attention_heads: int = Field(gt=0)
    """Query heads."""
    num_query_groups: int = Field(gt=0)
    """Key-value heads. Absent: num_attention_heads."""
    kv_channels: int = Field(gt=0)
    """Size of one head. Absent: hidden_size // num_attention_heads."""
    pipeline_num_layers: StageLists = None
    """Layers per stage; see docs of the stage plan. Without effect at pipeline size 1."""
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after attention and after the MLP."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on attention probabilities."""
    layernorm_epsilon: float = Field(default=1e-6, gt=0)
    """Added to the variance in norms."""
    use_fused_rotary_pos_emb: bool = False
    """Use the platform's fused rotary kernel where it has one; same result."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in backward: "full" whole layers, "selective" only core attention."""
    recompute_method: Literal["uniform", "block"] | None = None
    """How "full" chooses layers: "uniform" in groups of recompute_num_layers, "block" the first ones of each stage."""
    recompute_num_layers: int | None = Field(default=None, gt=0)
    """Layers per group ("uniform") or layers recomputed per stage ("block")."""

    @model_validator(mode="before")
    @classmethod
    def _derive_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        hidden, heads = data.get("hidden_size"), data.get("num_attention_heads")
        if isinstance(hidden, int):
            data.setdefault("ffn_hidden_size", 4 * hidden)
        if isinstance(heads, int) and heads > 0:
            data.setdefault("num_query_groups", heads)
            if isinstance(hidden, int):
                data.setdefault("kv_channels", hidden // heads)
        return data

    def _stack_problems(self) -> list[str]:
        problems = []
        if self.num_attention_heads % self.num_query_groups:
            problems.append(
                f"num_attention_heads = {self.num_attention_heads} is not divisible by num_query_groups = "
                f"{self.num_query_groups}; every key-value head serves the same number of query heads."
            )
        if self.recompute_granularity == "full" and (
            self.recompute_method is None or self.recompute_num_layers is None
        ):
            problems.append(
                'recompute_granularity = "full" needs recompute_method and recompute_num_layers as well, '
                'for example "uniform" and 1.'
            )
        if self.recompute_granularity != "full" and self.recompute_method is not None:
            problems.append(
                f'recompute_method = "{self.recompute_method}" has an effect only with recompute_granularity = "full".'
            )
        return problems


class VisionEncoderConfig(_LayerStack):
    """The vision tower: patch embedding and ViT layers with full attention inside each frame."""

    ignored_keys: ClassVar[Mapping[str, str]] = {
        "llm_hidden_size": "vision_projector.hidden_size says it",
        "post_layer_norm": "the tower has no final norm",
        "attention_mask_type": "vision attention is always full inside a frame",
    }

    model_id: Literal["qwen2vit"]
    """Kind of tower."""
    in_channels: int = Field(default=3, gt=0)
    """Colour channels of a picture."""
    patch_size: int = Field(default=14, gt=0)
    """Height and width of a patch, in pixels."""
    temporal_patch_size: int = Field(default=2, gt=0)
    """Frames in a patch; a picture is repeated to fill it."""
    spatial_merge_size: int = Field(default=2, gt=0)
    """This many patches in each direction become one token."""
    normalization: Literal["LayerNorm"] = "LayerNorm"
    """Kind of norm."""
    activation_func: Literal["quick_gelu"] = "quick_gelu"
    """Activation of the MLP: x * sigmoid(1.702 x)."""
    gated_linear_unit: Literal[False] = False
    """The MLP has one input projection."""
    add_bias_linear: Literal[True] = True
    """Every linear has a bias."""
    freeze: bool = True
    """Do not train the tower."""
    canonical_model: Literal[False] = False
    """Un-fused linears; not supported."""

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.kv_channels

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch: the width of `pixel_values`."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @model_validator(mode="after")
    def _check(self) -> VisionEncoderConfig:
        problems = self._stack_problems()
        if self.num_query_groups != self.num_attention_heads:
            problems.append(
                f"num_query_groups = {self.num_query_groups} differs from num_attention_heads = "
                f"{self.num_attention_heads}; this tower has one key-value head per query head."
            )
        if self.kv_channels * self.num_attention_heads != self.hidden_size:
            problems.append(
                f"hidden_size = {self.hidden_size} is not num_attention_heads * head size = "
                f"{self.num_attention_heads} * {self.kv_channels}."
            )
        if self.kv_channels % 4:
            problems.append(
                f"kv_channels = {self.kv_channels} is not divisible by 4; rotary positions give a quarter to sine and "
                "cosine of height and of width."
            )
        _raise(problems)
        return self


class VisionProjectorConfig(_Module):
    """The projector: norm, 2x2 merge and a two-layer MLP into the width of the text decoder."""

    ignored_keys: ClassVar[Mapping[str, str]] = {
        "bias_activation_fusion": "kernel choice, same result",
    }

    model_id: Literal["lnmlp"]
    """Kind of projector."""
    num_layers: Literal[1] = 1
    """The projector has one block."""
    input_size: int = Field(gt=0)
    """Width of the vision tower."""
    ffn_hidden_size: int = Field(gt=0)
    """Width after the merge and of the MLP: input_size * spatial_merge_size ** 2."""
    hidden_size: int = Field(gt=0)
    """Width of the text decoder."""
    gated_linear_unit: Literal[False] = False
    """The MLP has one input projection."""
    add_bias_linear: Literal[True] = True
    """Both linears have a bias."""
    activation_func: Literal["gelu"] = "gelu"
    """Activation of the MLP, exact (erf)."""
    normalization: Literal["LayerNorm"] = "LayerNorm"
    """Kind of norm."""
    layernorm_epsilon: float = Field(default=1e-6, gt=0)
    """Added to the variance in the norm."""
    freeze: bool = False
    """Do not train the projector."""


class ImageEncoderConfig(Settings):
    """The vision side: tower and projector."""

    vision_encoder: VisionEncoderConfig
    vision_projector: VisionProjectorConfig

    @model_validator(mode="after")
    def _check(self) -> ImageEncoderConfig:
        tower, projector = self.vision_encoder, self.vision_projector
        problems = []
        if projector.input_size != tower.hidden_size:
            problems.append(
                f"vision_projector.input_size = {projector.input_size}, but vision_encoder.hidden_size = "
                f"{tower.hidden_size}."
            )
        merged_size = tower.hidden_size * tower.spatial_merge_size**2
        if projector.ffn_hidden_size != merged_size:
            problems.append(
                f"vision_projector.ffn_hidden_size = {projector.ffn_hidden_size}, but {tower.spatial_merge_size} x "
                f"{tower.spatial_merge_size} merged patches of width {tower.hidden_size} have {merged_size} values."
            )
        _raise(problems)
        return self


class RopeScaling(Settings):
    """The `rope_scaling` object of a Hugging Face configuration; only its sections are used."""

    ignored_keys: ClassVar[Mapping[str, str]] = {"type": "always mrope", "rope_type": "always mrope"}

    mrope_section: Ints
    """See TextDecoderConfig.mrope_section."""


class TextDecoderConfig(_LayerStack):
    """The language model: causal decoder with grouped queries, M-RoPE and SwiGLU."""

    ignored_keys: ClassVar[Mapping[str, str]] = {
        "group_query_attention": "num_query_groups says it",
        "disable_bias_linear": "add_bias_linear says it",
        "parallel_output": "logits always stay split over tensor ranks",
        "attention_softmax_in_fp32": "softmax is always computed in fp32",
    }

    model_id: Literal["qwen2lm"]
    """Kind of decoder."""
    vocab_size: int = Field(gt=0)
    """Rows of the token embedding and of the output head; not padded."""
    max_position_embeddings: int = Field(gt=0)
    """Longest sequence, in tokens; `--seq-length` may not exceed it."""
    untie_embeddings_and_output_weights: bool
    """False: the output head is the token embedding."""
    rope_theta: float = Field(default=1e6, gt=0)
    """Base of the rotary frequencies."""
    position_embedding_type: Literal["mrope"] = "mrope"
    """Kind of positions: temporal, height and width."""
    rope_scaling: RopeScaling | None = None
    """Another place for mrope_section."""
    mrope_section: Ints
    """Rotary frequencies for temporal, height and width positions; they add up to half the head size."""
    normalization: Literal["RMSNorm"] = "RMSNorm"
    """Kind of norm."""
    activation_func: Literal["silu"] = "silu"
    """Activation of the MLP."""
    gated_linear_unit: Literal[True] = True
    """The MLP is silu(gate) * up."""
    add_bias_linear: Literal[False] = False
    """No linear but the query-key-value projection has a bias."""
    add_qkv_bias: Literal[True] = True
    """The query-key-value projection has a bias."""
    freeze: bool = False
    """Do not train the decoder."""

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def is_tied(self) -> bool:
        """The output head is the token embedding."""
        return not self.untie_embeddings_and_output_weights

    @model_validator(mode="before")
    @classmethod
    def _mrope_section_from_rope_scaling(cls, data: Any) -> Any:
        if isinstance(data, dict) and "mrope_section" not in data and isinstance(data.get("rope_scaling"), dict):
            sections = data["rope_scaling"].get("mrope_section")
            return data if sections is None else {**data, "mrope_section": sections}
        return data

    @model_validator(mode="after")
    def _check(self) -> TextDecoderConfig:
        problems = self._stack_problems()
        sections = self.mrope_section
        if len(sections) != 3 or min(sections) < 0:
            problems.append(f"mrope_section = {list(sections)} should be three counts: temporal, height, width.")
        elif 2 * sum(sections) != self.kv_channels:
            problems.append(
                f"mrope_section = {list(sections)} adds up to {sum(sections)}, but half the head size (kv_channels) is "
                f"{self.kv_channels / 2:g}."
            )
        if self.rope_scaling is not None and self.rope_scaling.mrope_section != sections:
            problems.append(
                f"mrope_section = {list(sections)} differs from rope_scaling.mrope_section = "
                f"{list(self.rope_scaling.mrope_section)}; keep one of them."
            )
        _raise(problems)
        return self


class Qwen2VLConfig(Settings):
    """A whole Qwen2-VL model."""

    ignored_keys: ClassVar[Mapping[str, str]] = {
        "patch": "names patches of another code base",
        "lora_apply_modules": "only LoRA training reads it",
        "lora_mixed_training": "only LoRA training reads it",
    }

    model_id: Literal["qwen2vl"]
    """Family of the model."""
    img_context_token_id: int = Field(default=151655, ge=0)
    """Token whose embeddings the vision features of pictures replace."""
    video_token_id: int = Field(default=151656, ge=0)
    """Token whose embeddings the vision features of videos replace."""
    vision_start_token_id: int = Field(default=151652, ge=0)
    """Token in front of every picture or video."""
    image_encoder: ImageEncoderConfig | None = None
    """Vision side; null for a text-only model."""
    text_decoder: TextDecoderConfig
    """Language model."""
    text_encoder: None = None
    """Does not exist in this family."""
    video_encoder: None = None
    """Does not exist in this family: videos go through the image encoder."""

    @property
    def vision_layers(self) -> int:
        """Layers of the vision tower; 0 without one."""
        return 0 if self.image_encoder is None else self.image_encoder.vision_encoder.num_layers

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any], *, where: str = "config.json") -> Qwen2VLConfig:
        """The settings that a Hugging Face `config.json` describes, with `"auto"` stage lists.

        Args:
            hf_config: content of the file; flat (transformers 4) or with a nested `text_config` (transformers 5).
        Raises:
            ConfigError: the file describes another model, or one with a feature that is not supported.
        """
        return parse_settings(cls, qwen2vl_json_from_hf(hf_config, where=where), where=where)

    @model_validator(mode="after")
    def _check(self) -> Qwen2VLConfig:
        problems = []
        text = self.text_decoder
        for name in ("img_context_token_id", "video_token_id", "vision_start_token_id"):
            token_id = getattr(self, name)
            if token_id >= text.vocab_size:
                problems.append(
                    f"{name} = {token_id} is outside the vocabulary: text_decoder.vocab_size = {text.vocab_size}."
                )
        if self.image_encoder is not None and self.image_encoder.vision_projector.hidden_size != text.hidden_size:
            problems.append(
                f"image_encoder.vision_projector.hidden_size = {self.image_encoder.vision_projector.hidden_size}, but "
                f"text_decoder.hidden_size = {text.hidden_size}."
            )
        _raise(problems)
        return self


def _raise(problems: list[str]) -> None:
    """Hand all problems of one section to pydantic, one per line."""
    if problems:
        raise ValueError("\n".join(problems))
