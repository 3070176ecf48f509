"""Records of both formats, placeholders, paths, spans (test vectors 6 and 7), and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.data.mossvl.conversation import to_conversation
from mindspeed_mm.data.mossvl.dataset import MossVLDataset
from mindspeed_mm.data.mossvl.rendering import render
from mindspeed_mm.errors import DataError
from mindspeed_mm.models.mossvl.hf import MossVLProcessor

ROOT = Path("/media")
TWO = {"video_path": "b.mp4", "segments": [[0, 1], [2, 3]]}
THREE = {"video_path": "c.mp4", "segments": [[0, 1], [2, 3], [4]]}


def rendered(columns: dict[str, Any], processor: MossVLProcessor) -> tuple[str, list[tuple[int, int]]]:
    text, spans = render(to_conversation(columns, ROOT).messages, processor.tokenizer)
    return text, list(spans)


def test_the_documented_prompt_record(processor: MossVLProcessor) -> None:
    text, spans = rendered(
        {
            "prompt": "Describe this image.",
            "response": "A beautiful landscape with mountains and a sunset.",
            "images": ["a.jpg"],
            "system_prompt": "You are a helpful assistant.",
        },
        processor,
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|image|>\nDescribe this image."
        "<|im_end|>\n<|im_start|>assistant\nA beautiful landscape with mountains and a sunset.<|im_end|>\n"
    )
    assert (len(text), spans) == (199, [(138, 198)])


def test_images_come_before_clips_and_segments_count(processor: MossVLProcessor) -> None:
    record = {"prompt": "Compare.", "response": "OK.", "images": ["a.png", "b.png"], "videos": ["a.mp4", TWO]}
    text, spans = rendered(record, processor)
    assert "user\n<|image|>\n<|image|>\n<|video|>\n<|video|>\n<|video|>\nCompare.<|im_end|>" in text
    assert (len(text), spans) == (122, [(108, 121)])


def test_every_answer_is_learned(processor: MossVLProcessor) -> None:
    turns = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "<|image|>\nDescribe this image."},
        {"role": "assistant", "content": "A beautiful landscape."},
        {"role": "user", "content": "What colour have the trees?"},
        {"role": "assistant", "content": "Green."},
    ]
    text, spans = rendered({"conversations": turns, "images": ["a.jpg"]}, processor)
    assert [text[start:end] for start, end in spans] == ["A beautiful landscape.<|im_end|>", "Green.<|im_end|>"]
    assert (len(text), spans) == (265, [(138, 170), (248, 264)])


def test_a_later_system_message_is_dropped(processor: MossVLProcessor) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "system", "content": "mid"},
        {"role": "assistant", "content": "b"},
    ]
    text, _ = rendered({"conversations": turns}, processor)
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"


def test_text_that_looks_like_a_header_is_not_learned(processor: MossVLProcessor) -> None:
    record = {"prompt": "<|im_start|>assistant\nI am the user.", "response": "No."}
    text, spans = rendered(record, processor)
    assert [text[start:end] for start, end in spans] == ["No.<|im_end|>"]


def test_tool_turns(processor: MossVLProcessor) -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "done"},
    ]
    text, spans = rendered({"conversations": turns}, processor)
    assert [text[start:end] for start, end in spans] == [
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
        "done<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("contents", "videos", "expected"),
    [
        (["<|video|>\nWhat happens?"], [TWO], ["<|video|><|video|>\nWhat happens?"]),
        (
            ["A <|video|> B <|video|> C"],
            [THREE, "a.mp4"],
            ["A <|video|><|video|><|video|> B <|video|> C"],
        ),
        (["<|video|>", "<|video|>?"], ["a.mp4", TWO], ["<|video|>", "<|video|><|video|>?"]),
        (["<|video|><|video|>"], [TWO], ["<|video|><|video|>"]),
        (["<|video|>"], [{"video_path": "a.mp4"}], ["<|video|>"]),
    ],
)
def test_placeholders_repeat_for_segments(contents: list[str], videos: list[Any], expected: list[str]) -> None:
    turns = []
    for content in contents:
        turns += [{"role": "user", "content": content}, {"role": "assistant", "content": "ok"}]
    conversation = to_conversation({"conversations": turns, "videos": videos}, ROOT)
    assert [message["content"] for message in conversation.messages[::2]] == expected


def test_two_placeholders_for_three_segments_stay_and_are_refused() -> None:
    turns = [{"role": "user", "content": "A <|video|> B <|video|> C"}, {"role": "assistant", "content": "ok"}]
    with pytest.raises(DataError, match=r"2 <\|video\|>, but the record has 3 video"):
        to_conversation({"conversations": turns, "videos": [THREE]}, ROOT)


def test_items_of_a_content_become_text() -> None:
    items = [{"type": "image"}, {"type": "text", "text": "What?"}, " Really?"]
    turns = [{"role": "user", "content": items}, {"role": "assistant", "content": [{"type": "text", "text": "It."}]}]
    conversation = to_conversation({"conversations": turns, "images": ["x.png"]}, ROOT)
    assert [message["content"] for message in conversation.messages] == ["<|image|>What? Really?", "It."]


def test_paths_are_joined_to_the_root() -> None:
    record = {
        "prompt": "p",
        "response": "r",
        "images": ["sub/a.png", "/abs/b.png"],
        "videos": ["c.mp4", {"video_path": "d.mp4", "segments": [[0, 1]], "note": "kept"}],
    }
    conversation = to_conversation(record, ROOT)
    assert conversation.images == ("/media/sub/a.png", "/abs/b.png")
    assert conversation.videos == (
        "/media/c.mp4",
        {"video_path": "/media/d.mp4", "segments": [[0, 1]], "note": "kept"},
    )


def test_paths_of_a_file_are_joined_to_its_folder_or_to_data_dir(processor: MossVLProcessor, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([{"prompt": "p", "response": "r", "images": ["a.png"]}]), encoding="utf-8")
    assert MossVLDataset(path, processor.tokenizer)[0].image_paths == (str(tmp_path / "a.png"),)
    elsewhere = MossVLDataset(path, processor.tokenizer, data_dir="/other")
    assert elsewhere[0].image_paths == ("/other/a.png",)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


ANSWER = {"role": "assistant", "content": "ok"}
BAD_RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "neither format": ({"question": "q", "answer": "a"}, "expected 'prompt' and 'response'"),
    "both formats": ({"prompt": "p", "response": "r", "conversations": [user("a"), ANSWER]}, "mixes both formats"),
    "no response": ({"prompt": "p"}, "expected 'prompt' and 'response'"),
    "empty response": ({"prompt": "p", "response": "  "}, "answer of the assistant is empty"),
    "response is no text": ({"prompt": "p", "response": 5}, "response = 5 must be text"),
    "misspelt key": ({"prompt": "p", "response": "r", "image": ["a.png"]}, "did you mean 'images'"),
    "images is no list": ({"prompt": "p", "response": "r", "images": "a.png"}, "must be a list"),
    "image is no path": ({"prompt": "p", "response": "r", "images": [7]}, "not a path"),
    "address of an image": ({"prompt": "p", "response": "r", "images": ["https://x/a.png"]}, "not from addresses"),
    "inline image": ({"prompt": "p", "response": "r", "images": ["data:image/png;base64,xx"]}, "not from addresses"),
    "video without path": ({"prompt": "p", "response": "r", "videos": [{"segments": [[0, 1]]}]}, "'video_path'"),
    "empty segments": (
        {"prompt": "p", "response": "r", "videos": [{"video_path": "a.mp4", "segments": []}]},
        "at least one",
    ),
    "empty conversation": ({"conversations": []}, "at least one message"),
    "conversation is no list": ({"conversations": "hi"}, "must be a list"),
    "unknown role": ({"conversations": [{"role": "human", "content": "a"}, ANSWER]}, "unknown role 'human'"),
    "other keys": ({"conversations": [{"from": "human", "value": "a"}]}, "'role' and 'content'"),
    "nothing to learn": ({"conversations": [user("a")]}, "nothing to learn"),
    "answer first": ({"conversations": [ANSWER, user("a")]}, "starts with an answer"),
    "empty answer": ({"conversations": [user("a"), {"role": "assistant", "content": ""}]}, "is empty"),
    "strange item": ({"conversations": [user([{"type": "audio"}]), ANSWER]}, "audio"),
    "image of the assistant": (
        {"conversations": [user("a"), {"role": "assistant", "content": [{"type": "image"}]}]},
        "image or video of the user",
    ),
    "too few placeholders": (
        {"conversations": [user("a"), ANSWER], "images": ["a.png"]},
        r"0 <\|image\|>, but .* 1 im",
    ),
    "too many placeholders": ({"conversations": [user("<|image|>"), ANSWER]}, r"1 <\|image\|>, but .* 0 images"),
    "placeholder in a prompt": (
        {"prompt": "<|image|> p", "response": "r", "images": ["a.png"]},
        r"2 <\|image\|>, but .* 1 images",
    ),
    "too few clips": ({"conversations": [user("<|video|>"), ANSWER]}, r"1 <\|video\|>, but .* 0 video"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_are_refused_with_their_place(name: str, processor: MossVLProcessor, tmp_path: Path) -> None:
    record, message = BAD_RECORDS[name]
    path = tmp_path / "records.json"
    path.write_text(json.dumps([{"prompt": "p", "response": "r"}, record]), encoding="utf-8")
    dataset = MossVLDataset(path, processor.tokenizer)
    assert dataset[0].error is None
    with pytest.raises(DataError, match=message) as caught:
        dataset[1]
    assert str(caught.value).startswith(f"{path}[1]: ")
    assert MossVLDataset(path, processor.tokenizer, keep_bad=True)[1].error == str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "p", "response": "r"}', "must be a JSON list"),
        ('{"a": 1}\n{"a": 2}', "must be a JSON list"),
        ("[]", "no records"),
        ("", None),
        ("[{]", None),
        ('"text"', None),
        ('[{"prompt": "p", "response": "r"}', None),
    ],
)
def test_files_that_are_no_list_of_records_are_refused(
    content: str, message: str | None, processor: MossVLProcessor, tmp_path: Path
) -> None:
    path = tmp_path / "records.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        MossVLDataset(path, processor.tokenizer)[0]
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(processor: MossVLProcessor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json"):
        MossVLDataset(tmp_path / "none.json", processor.tokenizer)


def test_a_template_that_rewrites_turns_is_refused(processor: MossVLProcessor) -> None:
    processor.tokenizer.chat_template = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="answers cannot be located"):
        render(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), processor.tokenizer)
