"""A conversation as the checkpoint's chat template writes it, and the spans of it that are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mindspeed_mm.errors import DataError

ASSISTANT_HEADER = "<|im_start|>assistant\n"
END_OF_TURN = "<|im_end|>"
Span = tuple[int, int]


def render(messages: Sequence[dict[str, Any]], tokenizer: Any) -> tuple[str, tuple[Span, ...]]:
    """The text, and for every answer the half-open range from behind its header to the end of its `<|im_end|>`.

    Spans come from rendering the conversation up to each answer, so text of a user that looks like a header is not
    learned. The newline behind `<|im_end|>` is not learned either.

    Raises:
        DataError: the tokenizer's template writes earlier turns differently once later ones follow.
    """

    def rendered(count: int, **options: Any) -> str:
        return tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, **options)

    text = rendered(len(messages))
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = rendered(index, add_generation_prompt=True)
        turn = rendered(index + 1)
        end = turn.rfind(END_OF_TURN) + len(END_OF_TURN)
        if not (text.startswith(turn) and turn.startswith(head) and len(head) < end):
            raise DataError(
                "the chat template does not write turns one after another; answers cannot be located. Use the "
                "published MOSS-VL template (chat_template.json)."
            )
        spans.append((len(head), end))
    return text, tuple(spans)
