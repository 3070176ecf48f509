"""Conversation templates: from a `Sample` to token ids, with the rows that vision embeddings take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from mindspeed_mm.data.sample import MediaKind, Message, Role, Sample, placeholders, split_at_placeholders
from mindspeed_mm.data.tokenizer import TextTokenizer
from mindspeed_mm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Block:
    """Where one medium lies in a token sequence, its start and end marker included."""

    start: int
    stop: int
    medium: int
    """Its number in the sample, from 0."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A token sequence and the media in it."""

    ids: tuple[int, ...]
    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt (the first one with the system prompt before it) and its answer."""

    source: Tokens
    target: Tokens


class Qwen2VLTemplate:
    """The conversation form of Qwen2-VL.

    ```
    <|im_start|>system\\n{system}<|im_end|>\\n                                    before the first prompt
    <|im_start|>user\\n{content}<|im_end|>\\n<|im_start|>assistant\\n              user
    <|im_start|>tool\\n{content}<|im_end|>\\n<|im_start|>assistant\\n              observation
    {content}<|im_end|>\\n                                                       assistant, function
    ```

    `<image>` and `<video>` become `<|vision_start|>`, one pad token per merged patch, `<|vision_end|>`. Function calls
    end with `<|im_end|>` as in LLaMA-Factory; MindSpeed-MM leaves it out, so its models do not learn to stop there.
    Texts between two special tokens are encoded alone, so the ids equal those of the whole text.
    """

    default_system = "You are a helpful assistant."

    def __init__(self, tokenizer: TextTokenizer, *, merge_size: int) -> None:
        self.tokenizer = tokenizer
        self.merge_size = merge_size
        special = tokenizer.special
        self._pads = {MediaKind.IMAGE: special.image_pad, MediaKind.VIDEO: special.video_pad}
        newline = tokenizer.encode("\n")
        self._end = (special.im_end, *newline)
        self._answer_start = (special.im_start, *tokenizer.encode("assistant\n"))

    def encode(self, sample: Sample, grids: Sequence[tuple[int, int, int]]) -> list[Turn]:
        """The turns of a sample.

        Args:
            grids: patches in time, height and width of every medium of the sample.
        """
        media = iter(range(len(grids)))
        turns = []
        for number in range(0, len(sample.messages), 2):
            prompt, answer = sample.messages[number : number + 2]
            source, target = _Writer(), _Writer()
            if number == 0:
                self._write_text(source, "system\n", sample.system or self.default_system)
            self._write_prompt(source, prompt, media, grids)
            self._write_content(target, "", answer, media, grids)
            target.ids += self._end
            turns.append(Turn(source.tokens(), target.tokens()))
        return turns

    def _write_text(self, writer: _Writer, head: str, text: str) -> None:
        writer.ids.append(self.tokenizer.special.im_start)
        writer.ids += self.tokenizer.encode(head + text)
        writer.ids += self._end

    def _write_prompt(
        self, writer: _Writer, prompt: Message, media: Iterator[int], grids: Sequence[tuple[int, int, int]]
    ) -> None:
        writer.ids.append(self.tokenizer.special.im_start)
        head = "tool\n" if prompt.role is Role.OBSERVATION else "user\n"
        self._write_content(writer, head, prompt, media, grids)
        writer.ids += self._end
        writer.ids += self._answer_start

    def _write_content(
        self, writer: _Writer, head: str, message: Message, media: Iterator[int], grids: Sequence[tuple[int, int, int]]
    ) -> None:
        """A message's text with its media; `head` is encoded together with the text up to the first medium."""
        first, *rest = split_at_placeholders(message.content)
        writer.ids += self.tokenizer.encode(head + first)
        for kind, text in zip(placeholders(message.content), rest, strict=True):
            medium = next(media)
            time, height, width = grids[medium]
            start = len(writer.ids)
            writer.ids.append(self.tokenizer.special.vision_start)
            writer.ids += [self._pads[kind]] * (time * height * width // self.merge_size**2)
            writer.ids.append(self.tokenizer.special.vision_end)
            writer.blocks.append(Block(start, len(writer.ids), medium))
            writer.ids += self.tokenizer.encode(text)


class _Writer:
    """A token sequence while it grows."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.blocks: list[Block] = []

    def tokens(self) -> Tokens:
        return Tokens(tuple(self.ids), tuple(self.blocks))


TEMPLATES: Mapping[str, type[Qwen2VLTemplate]] = MappingProxyType({"qwen2vl": Qwen2VLTemplate})


def build_template(name: str, tokenizer: TextTokenizer, *, merge_size: int) -> Qwen2VLTemplate:
    """The template of this name; ConfigError when there is none."""
    if name not in TEMPLATES:
        problem = f'basic_parameters.template = "{name}" does not exist; known are: {", ".join(TEMPLATES)}.'
        raise ConfigError("data.json", problem)
    return TEMPLATES[name](tokenizer, merge_size=merge_size)
