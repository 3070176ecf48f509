"""Configuration classes of MOSS-VL for transformers 4.57 and 5.x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers.configuration_utils import PretrainedConfig

from mindspeed_mm.errors import ConfigError

DEFAULT_CROSS_LAYERS = tuple(range(2, 48, 4))
DEFAULT_MROPE_SECTION = (24, 20, 20)
DEFAULT_ROPE_THETA = 5000000.0


class MossVLVisionConfig(PretrainedConfig):
    """Vision tower: a ViT with attention inside each frame, and one merger over four of its layers.

    Args:
        out_hidden_size: width of the vision states; equals the text width in every usable model.
        num_position_embeddings: size of the learned position table, a square number.
        deepstack_visual_indexes: layers (from 0) whose outputs the merger reads beside the last one, ascending.
    Raises:
        ConfigError: values that no tower can have.
    """

    model_type = "moss_vl_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        depth: int = 27,
        hidden_size: int = 1152,
        hidden_act: str = "gelu_pytorch_tanh",
        intermediate_size: int = 4304,
        num_heads: int = 16,
        in_channels: int = 3,
        patch_size: int = 16,
        spatial_merge_size: int = 2,
        temporal_patch_size: int = 1,
        out_hidden_size: int = 3584,
        num_position_embeddings: int = 2304,
        deepstack_visual_indexes: Sequence[int] = (8, 16, 24),
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.depth = depth
        self.hidden_size = hidden_size
        self.hidden_act = hidden_act
        self.intermediate_size = intermediate_size
        self.num_heads = num_heads
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.temporal_patch_size = temporal_patch_size
        self.out_hidden_size = out_hidden_size
        self.num_position_embeddings = num_position_embeddings
        self.deepstack_visual_indexes = list(deepstack_visual_indexes)
        self.initializer_range = initializer_range
        self._check()
        super().__init__(**kwargs)

    def _check(self) -> None:
        problems = []
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 4:
            problems.append(
                f"hidden_size = {self.hidden_size} over num_heads = {self.num_heads} must give heads of a multiple of "
                "4: rows and columns each rotate half of a head."
            )
        if int(self.num_position_embeddings**0.5) ** 2 != self.num_position_embeddings:
            problems.append(f"num_position_embeddings = {self.num_position_embeddings} is not a square number.")
        if self.temporal_patch_size != 1:
            problems.append(f"temporal_patch_size = {self.temporal_patch_size}, but one frame is one grid step (1).")
        layers = self.deepstack_visual_indexes
        if layers != sorted(set(layers)) or any(not 0 <= layer < self.depth for layer in layers):
            problems.append(f"deepstack_visual_indexes = {layers} must ascend within 0..{self.depth - 1}.")
        if problems:
            raise ConfigError("vision_config", problems)


class MossVLTextConfig(PretrainedConfig):
    """Text tower: Qwen3-style layers, some of which attend to the vision states instead of to the text.

    Args:
        cross_attention_layers: layers (from 0) that are gated cross-attention; empty or None gives the published
            twelve, every fourth from 2 (upstream tests for truth, so an empty list cannot be expressed).
        rope_theta: base of the rotary embedding; kept beside `rope_scaling` in files for older readers.
        rope_scaling: `mrope_section`, `mrope_interleaved` and `rope_type` ("default" is the only one).
        rope_parameters: the same in the form of transformers 5, with `rope_theta` inside; wins over the pair.
    Raises:
        ConfigError: values that no text tower can have.
    """

    model_type = "moss_vl_text"
    base_config_key = "text_config"
    ignore_keys_at_rope_validation = {"mrope_section", "mrope_interleaved"}  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        intermediate_size: int = 22016,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 32,
        head_dim: int = 128,
        hidden_act: str = "silu",
        max_position_embeddings: int = 128000,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        cross_attention_layers: Sequence[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.cross_attention_layers = list(cross_attention_layers or DEFAULT_CROSS_LAYERS)
        self.rope_parameters = merge_rope(rope_theta, rope_scaling, rope_parameters)
        kwargs["tie_word_embeddings"] = False
        super().__init__(pad_token_id=pad_token_id, **kwargs)  # type: ignore[call-arg]

    @property
    def mrope_section(self) -> tuple[int, int, int]:
        """Angles that follow the frame, the row and the column."""
        section = (self.rope_parameters or {}).get("mrope_section") or DEFAULT_MROPE_SECTION
        return section[0], section[1], section[2]

    def check(self) -> None:
        """Raises ConfigError for a text tower that cannot be built; the model calls it.

        Not part of `__init__`: the class defaults (32 layers, cross layers up to 46) contradict each other upstream
        and must still load, since transformers builds one to find out what differs from the defaults.
        """
        problems = []
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}."
            )
        layers = self.cross_attention_layers
        if layers != sorted(set(layers)) or any(not 0 < layer < self.num_hidden_layers for layer in layers):
            problems.append(
                f"cross_attention_layers = {layers} must ascend within 1..{self.num_hidden_layers - 1}: layer 0 has to "
                "attend to the text, its key cache counts the tokens."
            )
        if sum(self.mrope_section) * 2 != self.head_dim:
            problems.append(f"mrope_section = {list(self.mrope_section)} must add up to half of head_dim.")
        if (rope_type := self.rope_parameters["rope_type"]) != "default":
            problems.append(f"rope_type = {rope_type!r} is not supported; expected 'default'.")
        if self.attention_bias:
            problems.append("attention_bias = true: no MOSS-VL checkpoint has biases in the text tower.")
        if problems:
            raise ConfigError("text_config", problems)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as upstream writes it: `rope_theta` and `rope_scaling`, nothing of transformers 5."""
        output = super().to_dict()
        rope = dict(output.pop("rope_parameters"))
        output["rope_theta"] = rope.pop("rope_theta")
        output["rope_scaling"] = rope
        output.pop("tie_word_embeddings", None)
        if output.get("pad_token_id") is None:
            output.pop("pad_token_id", None)
        return output


def merge_rope(
    rope_theta: float | None, rope_scaling: dict[str, Any] | None, rope_parameters: dict[str, Any] | None
) -> dict[str, Any]:
    """One `rope_parameters` dictionary from either generation of keys."""
    merged = dict(rope_parameters or rope_scaling or {"mrope_section": list(DEFAULT_MROPE_SECTION)})
    merged.setdefault("rope_type", merged.pop("type", "default"))
    merged.setdefault("rope_theta", DEFAULT_ROPE_THETA if rope_theta is None else rope_theta)
    return merged


class MossVLConfig(PretrainedConfig):
    """The whole model: text tower, vision tower, special tokens.

    Args:
        text_config: settings or None for the defaults.
        vision_config: settings or None for the defaults.
        vision_seq_pad_multiple: the vision rows of a batch are padded to a multiple of this; never changes results.
    Raises:
        ConfigError: tied embeddings, which no MOSS-VL has; a padding multiple below 1.
    """

    model_type = "moss_vl"
    sub_configs: ClassVar[dict[str, type[PretrainedConfig]]] = {
        "text_config": MossVLTextConfig,
        "vision_config": MossVLVisionConfig,
    }
    # transformers 5 writes only the differences of a nested configuration when it finds the class here
    sub_configs_defaults: ClassVar[dict[str, Any]] = dict(sub_configs)
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "vision_token_info", "rope_deltas"]

    def __init__(
        self,
        text_config: MossVLTextConfig | dict[str, Any] | None = None,
        vision_config: MossVLVisionConfig | dict[str, Any] | None = None,
        image_token_id: int = 151655,
        video_token_id: int = 151656,
        vision_start_token_id: int = 151652,
        vision_end_token_id: int = 151653,
        vision_seq_pad_multiple: int = 8,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        if tie_word_embeddings:
            raise ConfigError("config", "tie_word_embeddings = true, but MOSS-VL has a separate lm_head.")
        if vision_seq_pad_multiple < 1:
            raise ConfigError("config", f"vision_seq_pad_multiple = {vision_seq_pad_multiple} must be at least 1.")
        self.text_config = _as_config(text_config, MossVLTextConfig)
        self.vision_config = _as_config(vision_config, MossVLVisionConfig)
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.vision_start_token_id = vision_start_token_id
        self.vision_end_token_id = vision_end_token_id
        self.vision_seq_pad_multiple = vision_seq_pad_multiple
        super().__init__(tie_word_embeddings=False, **kwargs)  # type: ignore[call-arg]

    def check(self) -> None:
        """Raises ConfigError for a model that cannot be built."""
        self.text_config.check()
        if self.vision_config.out_hidden_size != self.text_config.hidden_size:
            raise ConfigError(
                "config",
                f"vision_config.out_hidden_size = {self.vision_config.out_hidden_size}, but the cross-attention layers "
                f"read states of width text_config.hidden_size = {self.text_config.hidden_size}.",
            )


def _as_config(value: Any, config_class: type[PretrainedConfig]) -> Any:
    if value is None:
        return config_class()
    return config_class(**value) if isinstance(value, dict) else value
