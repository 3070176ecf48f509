"""Placeholders, stamps, spans and labels (test vectors 11 and 13)."""

import re

import pytest

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.mossvl.expansion import expand_text, media_order, supervised_labels, time_stamps

SPECIAL = {
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|time_start|>": 151669,
    "<|time_end|>": 151670,
}


def toy_tokens(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Special tokens to their ids, every other character to its code point."""
    pattern = "|".join(re.escape(token) for token in SPECIAL) + "|(?s:.)"
    matches = list(re.finditer(pattern, text))
    return [SPECIAL.get(m.group(), ord(m.group()[0])) for m in matches], [m.span() for m in matches]


def labels(text: str, spans: tuple[tuple[int, int], ...]) -> list[int]:
    ids, offsets = toy_tokens(text)
    return supervised_labels(ids, offsets, spans, image_token_id=151655, vision_start_id=151652, vision_end_id=151653)


def test_stamps() -> None:
    assert time_stamps([0.0, 1.04, 2.08]) == (
        "<|vision_start|><|time_start|>0.0 seconds<|time_end|><|image_pad|><|time_start|>1.0 seconds<|time_end|>"
        "<|image_pad|><|time_start|>2.1 seconds<|time_end|><|image_pad|><|vision_end|>"
    )
    assert re.findall(r"[\d.]+(?= sec)", time_stamps([0.25, 0.35, 1.05, 1.25])) == ["0.2", "0.3", "1.1", "1.2"]


def test_a_conversation_with_both_media() -> None:
    text = "<|im_start|>user\n<|image|>\nHi <|video|><|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    expanded = expand_text(text, [[0.0, 1.0]], [(72, 86)])
    assert expanded.spans == ((197, 211),)
    ids, _ = toy_tokens(expanded.text)
    seconds = [32, 115, 101, 99, 111, 110, 100, 115, 151670, 151655]
    assert ids == [
        *[151644, 117, 115, 101, 114, 10, 151655, 10, 72, 105, 32, 151652],
        *[151669, 48, 46, 48, *seconds, 151669, 49, 46, 48, *seconds],
        *[151653, 151645, 10, 151644, 97, 115, 115, 105, 115, 116, 97, 110, 116, 10, 89, 101, 115, 46, 151645, 10],
    ]
    assert len(ids) == 60
    supervised = {index: label for index, label in enumerate(labels(expanded.text, expanded.spans)) if label != -100}
    assert supervised == {54: 89, 55: 101, 56: 115, 57: 46, 58: 151645}


def test_an_image_in_an_answer_is_not_learned() -> None:
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nsee <|image|> ok<|im_end|>\n"
    start = text.index("see")
    expanded = expand_text(text, [], [(start, start + 26)])
    assert expanded.spans == ((start, start + 30),)
    assert [label for label in labels(expanded.text, expanded.spans) if label != -100] == [
        *[115, 101, 101, 32, 32, 111, 107, 151645]
    ]
    shifted = expand_text("x" * 51 + "see <|image|> ok<|im_end|>", [], [(51, 77)])
    assert shifted.spans == ((51, 81),)


def test_a_video_in_an_answer_is_not_learned() -> None:
    expanded = expand_text("ok <|video|>!", [[0.0]], [(0, 13)])
    assert [chr(label) for label in labels(expanded.text, expanded.spans) if label != -100] == list("ok !")


def test_order_of_media() -> None:
    assert media_order("a<|video|><|image|>b<|video|>") == ["video", "image", "video"]
    assert media_order("<|image_pad|><|video_pad|> image video") == ["image", "video"]


def test_missing_or_surplus_videos_are_refused() -> None:
    with pytest.raises(DataError, match="1 video placeholders, but 0"):
        expand_text("<|video|>", [])
    with pytest.raises(DataError, match="0 video placeholders, but 1"):
        expand_text("no clip", [[0.0]])
