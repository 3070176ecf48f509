"""The checkpoint's tokenizer, and the ids of Qwen2's special tokens in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_mm.config.data import PreprocessParameters
from mindspeed_mm.config.qwen2vl import Qwen2VLConfig
from mindspeed_mm.errors import ConfigError

_SPECIAL_TOKENS = {
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image_pad": "<|image_pad|>",
    "video_pad": "<|video_pad|>",
}


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids of the special tokens; they are the tokenizer's, whatever they are in the released checkpoints."""

    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int

    @property
    def media(self) -> tuple[int, int]:
        """The tokens whose embeddings the vision tower supplies."""
        return self.image_pad, self.video_pad


class TextTokenizer:
    """Text to ids and back, without any token added.

    Args:
        hf: a tokenizer of transformers (4.57 or 5) with Qwen2's special tokens.
        splits_special_tokens: read special tokens inside of messages as ordinary text. The template's own markers stay
            special.
    Raises:
        ConfigError: a special token is missing.
    """

    def __init__(self, hf: Any, *, splits_special_tokens: bool = False, where: str = "tokenizer") -> None:
        self.hf = hf
        self._splits_special_tokens = splits_special_tokens
        vocabulary = hf.get_vocab()
        missing = [token for token in _SPECIAL_TOKENS.values() if token not in vocabulary]
        if missing:
            raise ConfigError(where, f"the tokenizer has no {', '.join(missing)}; it is not a Qwen2-VL tokenizer.")
        self.special = SpecialIds(**{name: vocabulary[token] for name, token in _SPECIAL_TOKENS.items()})
        self.max_id = max(vocabulary.values())
        # An answer ends with this token, so generation with this tokenizer must stop there.
        hf.eos_token = _SPECIAL_TOKENS["im_end"]

    @classmethod
    def from_directory(cls, settings: PreprocessParameters) -> TextTokenizer:
        """The tokenizer in the directory `model_name_or_path`; nothing is downloaded.

        Raises:
            ConfigError: the directory or the tokenizer in it is missing or cannot be loaded.
        """
        from transformers import (
            AutoTokenizer,
        )  # here, because the import takes a second that most users of data/ need not

        where = settings.model_name_or_path
        if not Path(where).is_dir():
            raise ConfigError(where, "there is no such directory (model_name_or_path); nothing is downloaded.")
        try:
            hf = AutoTokenizer.from_pretrained(
                where,
                use_fast=settings.use_fast_tokenizer,
                trust_remote_code=settings.trust_remote_code,
                local_files_only=True,
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(where, f"the tokenizer cannot be loaded: {error}") from error
        return cls(hf, splits_special_tokens=settings.split_special_tokens, where=where)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without added tokens."""
        ids: list[int] = self.hf.encode(
            text, add_special_tokens=False, split_special_tokens=self._splits_special_tokens, verbose=False
        )
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens written out."""
        text: str = self.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def check_model(self, model: Qwen2VLConfig, where: str) -> None:
        """Refuse a model whose ids are not this tokenizer's.

        Raises:
            ConfigError: `img_context_token_id` is neither the image nor the video pad, or the vocabulary is too small.
        """
        problems = []
        image, video = self.special.media
        if model.img_context_token_id not in (image, video):
            problems.append(
                f"img_context_token_id = {model.img_context_token_id}, but the tokenizer has <|image_pad|> = {image}, "
                f"<|video_pad|> = {video}: vision embeddings would replace other tokens."
            )
        if self.max_id >= model.text_decoder.vocab_size:
            size = model.text_decoder.vocab_size
            problems.append(f"text_decoder.vocab_size = {size}, but the tokenizer has ids up to {self.max_id}.")
        if problems:
            raise ConfigError(where, problems)
