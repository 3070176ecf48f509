"""The tiny checkpoints are Qwen2-VL repositories in miniature: transformers loads every file of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

from tools.make_tiny_checkpoint import SPECIAL_TOKENS, build_tokenizer, make_tiny_checkpoint


@pytest.mark.parametrize(("tied", "num_shards"), [(True, 1), (False, 1), (False, 3)])
@pytest.mark.parametrize("size", ["tiny", "nano"])
def test_transformers_loads_every_weight(tmp_path: Path, tied: bool, num_shards: int, size: str) -> None:
    make_tiny_checkpoint(tmp_path, tied=tied, seed=0, size=size, num_shards=num_shards)
    model, info = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.config.tie_word_embeddings is tied
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tied


def test_ids_of_config_and_tokenizer_agree(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, tied=True, seed=0, size="nano", vocab_size=512)
    config = json.loads((tmp_path / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) <= config["vocab_size"] == 512
    named = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "eos_token_id": "<|im_end|>",
    }
    assert {key: config[key] for key in named} == {k: tokenizer.convert_tokens_to_ids(t) for k, t in named.items()}
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.pad_token == "<|endoftext|>"
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(ids[0], ids[0] + 14)), "as in the real checkpoints: 151643 to 151656"


def test_tokenizer_keeps_every_text(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, tied=True, seed=0, size="nano")
    text = "<|im_start|>user\nWhat colour? 图片 é 🙂  1234\n\n<|im_end|>\n"
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), build_tokenizer()):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    assert ids == AutoTokenizer.from_pretrained(tmp_path)(text).input_ids, "no token is added at either end"


def test_chat_template_has_the_effect_of_qwen2vl(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, tied=True, seed=0, size="nano")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    media = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": media}, {"role": "assistant", "content": "red"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>"
        "What is it?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )
    own_system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(own_system, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_image_processor_gives_qwen2vl_patches(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, tied=True, seed=0, size="nano")
    from PIL import Image

    features = AutoImageProcessor.from_pretrained(tmp_path)(images=[Image.new("RGB", (84, 56))], return_tensors="pt")
    assert features["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert features["pixel_values"].shape == (24, 1176)


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_tiny_checkpoint(tmp_path / name, tied=False, seed=seed, size="nano", dtype="bfloat16")
    first, second, other = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in "abc")
    assert first == second
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="below 270"):
        make_tiny_checkpoint(tmp_path, tied=True, seed=0, vocab_size=256)
