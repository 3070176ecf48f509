"""Raw records become samples by the sharegpt rules; small literal in, exact literal out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.config.data import Attributes
from mindspeed_mm.data.records import Record
from mindspeed_mm.data.sample import MediaKind, Medium, Message, Role, Sample, UnusableSampleError, to_sample
from mindspeed_mm.errors import DataError

OPENAI = Attributes(
    messages="messages", role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant"
)
MEDIA = Attributes(images="images", videos="videos")


def sharegpt(*turns: tuple[str, str], **columns: Any) -> Record:
    return Record("r[0]", {"conversations": [{"from": tag, "value": text} for tag, text in turns], **columns})


def test_plain_conversation() -> None:
    record = sharegpt(("human", "Hi"), ("gpt", "Hello"))
    messages = (Message(Role.USER, "Hi"), Message(Role.ASSISTANT, "Hello"))
    assert to_sample(record, Attributes(), Path("data")) == Sample("r[0]", "", messages, ())


def test_tags_may_have_other_names() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    sample = to_sample(Record("r[0]", {"messages": turns, "other": 1}), OPENAI, Path("data"))
    assert [message.role for message in sample.messages] == [Role.USER, Role.ASSISTANT]


def test_tools_speak_in_place_of_user_and_assistant() -> None:
    record = sharegpt(("human", "Weather?"), ("function_call", "{}"), ("observation", "sunny"), ("gpt", "Sunny."))
    roles = [message.role for message in to_sample(record, Attributes(), Path("data")).messages]
    assert roles == [Role.USER, Role.FUNCTION, Role.OBSERVATION, Role.ASSISTANT]


def test_system_prompt_comes_from_the_first_message_then_from_its_column() -> None:
    attr = Attributes(system="prompt")
    turns = (("human", "Hi"), ("gpt", "Hello"))
    assert (
        to_sample(sharegpt(("system", "Be kind."), *turns, prompt="Be brief."), attr, Path("data")).system == "Be kind."
    )
    assert to_sample(sharegpt(*turns, prompt="Be brief."), attr, Path("data")).system == "Be brief."
    assert to_sample(sharegpt(*turns, prompt=None), attr, Path("data")).system == ""
    assert to_sample(sharegpt(*turns), attr, Path("data")).system == ""


def test_media_come_in_the_order_of_their_placeholders(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    record = sharegpt(
        ("human", "<video>then<image>?"), ("gpt", "see <image>"), images=["a.png", "/abs/b.png"], videos="clip.mp4"
    )
    assert to_sample(record, MEDIA, tmp_path).media == (
        Medium(MediaKind.VIDEO, Path("clip.mp4")),
        Medium(MediaKind.IMAGE, tmp_path / "a.png"),
        Medium(MediaKind.IMAGE, Path("/abs/b.png")),
    )


@pytest.mark.parametrize(
    ("turns", "reason", "detail"),
    [
        (
            [("gpt", "Hi")],
            "prompts and answers do not alternate",
            'message 0 is from "gpt" where "human" or "observation"',
        ),
        ([("human", "a"), ("human", "b")], "prompts and answers do not alternate", 'message 1 is from "human"'),
        ([("human", "a"), ("gpt", "b"), ("human", "c")], "does not end with an answer", "3 messages"),
        ([], "does not end with an answer", "0 messages"),
        ([("system", "Be kind.")], "does not end with an answer", "0 messages"),
    ],
)
def test_records_that_mindspeed_mm_drops_are_dropped(turns: list[tuple[str, str]], reason: str, detail: str) -> None:
    with pytest.raises(UnusableSampleError) as caught:
        to_sample(sharegpt(*turns), Attributes(), Path("data"))
    assert caught.value.reason == reason
    assert detail in str(caught.value)
    assert str(caught.value).startswith("r[0]: ")


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"messages": []}, r'no column "conversations" \(attr.messages\); its columns are: messages'),
        ({"conversations": "hello"}, 'column "conversations" is not a list of messages but text'),
        ({"conversations": ["hello"]}, "message 0 is not an object but text"),
        (
            {"conversations": [{"role": "human", "value": "x"}]},
            r'needs text under "from" \(attr.role_tag\).* role, value',
        ),
        ({"conversations": [{"from": "human", "value": [1]}]}, r'needs text under "value" .* but has a list'),
    ],
)
def test_records_of_another_form_are_errors(columns: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=r"r\[0\]: .*" + problem):
        to_sample(Record("r[0]", columns), Attributes(), Path("data"))


@pytest.mark.parametrize(
    ("text", "columns", "problem"),
    [
        ("<image>", {}, r'1 <image> in the messages, but 0 paths in column "images" \(attr.images\)'),
        ("x", {"images": ["a.png"]}, "0 <image> in the messages, but 1 paths"),
        ("<video>", {"images": ["a.png"]}, "0 <image>"),
        ("<image>", {"images": [1]}, 'column "images" must hold paths, but has a list'),
        ("<image>", {"images": {"path": "a"}}, "must hold paths, but has an object"),
        ("<image>", {"images": ["http://host/a.png"]}, "not a file path"),
        ("<image>", {"images": ["file:///etc/passwd"]}, "not a file path"),
        ("<image>", {"images": ["data:image/png;base64,AAAA"]}, "not a file path"),
        ("<image>", {"images": ["a\0.png"]}, "not a file path"),
    ],
)
def test_media_that_do_not_fit_are_errors(text: str, columns: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        to_sample(sharegpt(("human", text), ("gpt", "y"), **columns), MEDIA, Path("data"))
