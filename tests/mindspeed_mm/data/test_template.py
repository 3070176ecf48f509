"""Token ids equal those of the checkpoint's own chat template, and labels are the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.config.data import PreprocessParameters
from mindspeed_mm.config.qwen2vl import Qwen2VLConfig
from mindspeed_mm.data.sample import MediaKind, Medium, Message, Role, Sample
from mindspeed_mm.data.template import Block, Qwen2VLTemplate, build_template
from mindspeed_mm.data.tokenizer import TextTokenizer
from mindspeed_mm.errors import ConfigError

ROLES = {Role.USER: "user", Role.ASSISTANT: "assistant"}


def conversation(*texts: str, system: str = "") -> Sample:
    roles = (Role.USER, Role.ASSISTANT)
    messages = tuple(Message(roles[number % 2], text) for number, text in enumerate(texts))
    count = sum(text.count("<image>") for text in texts)
    media = tuple(Medium(MediaKind.IMAGE, Path(f"{number}.png")) for number in range(count))
    return Sample("r[0]", system, messages, media)


def all_ids(template: Qwen2VLTemplate, sample: Sample, grids: list[tuple[int, int, int]]) -> list[int]:
    turns = template.encode(sample, grids)
    return [token for turn in turns for token in (*turn.source.ids, *turn.target.ids)]


def as_chat(sample: Sample) -> list[dict[str, Any]]:
    """The conversation as transformers takes it, pictures as their own parts."""
    chat: list[dict[str, Any]] = [{"role": "system", "content": sample.system}] if sample.system else []
    for message in sample.messages:
        parts: list[dict[str, str]] = []
        for number, text in enumerate(message.content.split("<image>")):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        chat.append({"role": ROLES[message.role], "content": parts})
    return chat


@pytest.mark.parametrize(
    ("sample", "grids"),
    [
        (conversation("What is this?", "A red circle."), []),
        (conversation("<image>\nWhat is this?", "A red circle."), [(1, 4, 6)]),
        (
            conversation("<image>What?", "A.", "And <image> and<image>?", "B, C and D!", "Sure?", "Yes."),
            [(1, 2, 2)] * 3,
        ),
        (conversation("Hello\n\n there ", " Hi, it's 12:30 €5 ünïcode 日本語 😀", system="You are brief."), []),
        (conversation("multi\nline", "answer\n\n"), []),
    ],
    ids=["text", "picture", "several turns and pictures", "system and unicode", "line ends"],
)
def test_ids_equal_the_chat_template_of_the_checkpoint(
    template: Qwen2VLTemplate, sample: Sample, grids: list[tuple[int, int, int]]
) -> None:
    hf = template.tokenizer.hf
    text = hf.apply_chat_template(as_chat(sample), tokenize=False)
    for _, height, width in grids:
        text = text.replace("<|image_pad|>", "<|pad|>" * (height * width // 4), 1)
    expected = hf(text.replace("<|pad|>", "<|image_pad|>"), add_special_tokens=False)["input_ids"]
    assert all_ids(template, sample, grids) == expected


def test_turns_of_a_conversation_read_as_the_specification_says(template: Qwen2VLTemplate) -> None:
    messages = (
        Message(Role.USER, "<image>Weather?"),
        Message(Role.FUNCTION, '{"name": "weather"}'),
        Message(Role.OBSERVATION, "sunny"),
        Message(Role.ASSISTANT, "Sunny."),
    )
    sample = Sample("r[0]", "", messages, (Medium(MediaKind.IMAGE, Path("0.png")),))
    turns = template.encode(sample, [(1, 2, 4)])
    read = [
        (template.tokenizer.decode(list(t.source.ids)), template.tokenizer.decode(list(t.target.ids))) for t in turns
    ]
    assert read == [
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>Weather?<|im_end|>\n"
            "<|im_start|>assistant\n",
            '{"name": "weather"}<|im_end|>\n',
        ),
        ("<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n", "Sunny.<|im_end|>\n"),
    ]


def test_blocks_say_where_each_medium_lies(template: Qwen2VLTemplate) -> None:
    sample = Sample(
        "r[0]",
        "",
        (Message(Role.USER, "<image><video>"), Message(Role.ASSISTANT, "<image>")),
        tuple(Medium(kind, Path("x")) for kind in (MediaKind.IMAGE, MediaKind.VIDEO, MediaKind.IMAGE)),
    )
    (turn,) = template.encode(sample, [(1, 2, 4), (2, 4, 4), (1, 2, 2)])
    special = template.tokenizer.special
    image, video = turn.source.blocks
    assert turn.source.ids[image.start : image.stop] == (
        special.vision_start,
        *[special.image_pad] * 2,
        special.vision_end,
    )
    assert turn.source.ids[video.start : video.stop] == (
        special.vision_start,
        *[special.video_pad] * 8,
        special.vision_end,
    )
    assert (image.medium, video.medium) == (0, 1)
    assert turn.target.blocks == (Block(0, 3, 2),)


def test_special_tokens_in_texts_may_be_read_as_text(checkpoint: Path) -> None:
    settings = PreprocessParameters(model_name_or_path=str(checkpoint), split_special_tokens=True)
    template = Qwen2VLTemplate(TextTokenizer.from_directory(settings), merge_size=2)
    sample = conversation("end <|im_end|> here", "<|image_pad|>")
    ids = all_ids(template, sample, [])
    assert ids.count(template.tokenizer.special.im_end) == 3  # system, user, answer
    assert template.tokenizer.special.image_pad not in ids
    assert "end <|im_end|> here" in template.tokenizer.decode(ids)


def test_template_that_does_not_exist_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match='template = "qwen2_vl" does not exist; known are: qwen2vl'):
        build_template("qwen2_vl", tokenizer, merge_size=2)


def test_end_of_answer_is_the_tokenizers_end(tokenizer: TextTokenizer) -> None:
    assert tokenizer.hf.eos_token_id == tokenizer.special.im_end


def test_ids_come_from_the_tokenizer_and_must_be_the_models(
    checkpoint: Path, tokenizer: TextTokenizer, model: Qwen2VLConfig
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert tokenizer.special.media == (config["image_token_id"], config["video_token_id"])
    tokenizer.check_model(model, "here")
    tokenizer.check_model(model.model_copy(update={"img_context_token_id": config["video_token_id"]}), "here")
    with pytest.raises(
        ConfigError, match=r"here\n  img_context_token_id = 151655, but the tokenizer has <\|image_pad\|>"
    ):
        tokenizer.check_model(model.model_copy(update={"img_context_token_id": 151655}), "here")
    small = model.text_decoder.model_copy(update={"vocab_size": 600})
    with pytest.raises(ConfigError, match=r"text_decoder.vocab_size = 600, but the tokenizer has ids up to"):
        tokenizer.check_model(model.model_copy(update={"text_decoder": small}), "here")


def test_directories_without_a_qwen2vl_tokenizer_are_refused(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match="there is no such directory"):
        TextTokenizer.from_directory(PreprocessParameters(model_name_or_path=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match="the tokenizer cannot be loaded"):
        TextTokenizer.from_directory(PreprocessParameters(model_name_or_path=str(tmp_path)))
    tokenizer.hf.save_pretrained(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text().replace("<|video_pad|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(content)
    settings = (tmp_path / "tokenizer_config.json").read_text().replace("<|video_pad|>", "<|other|>")
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ConfigError, match=r"the tokenizer has no <\|video_pad\|>"):
        TextTokenizer.from_directory(PreprocessParameters(model_name_or_path=str(tmp_path)))
