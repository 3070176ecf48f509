"""Write a small Qwen2-VL checkpoint in the form of the model hub: config, weights, tokenizer and processor files.

The directory loads with transformers 4.57 and 5.x (`Qwen2VLForConditionalGeneration`, `AutoTokenizer` and
`AutoImageProcessor`; `AutoProcessor` too where torchvision is installed). The tests and the quick start train it.
Nothing is downloaded: the tokenizer is a byte-level BPE trained on `tiny_corpus.txt`, with Qwen2's special tokens in
Qwen2's order after the last BPE token, and the weights are drawn from a seed.

    python tools/make_tiny_checkpoint.py OUT_DIR [--tied] [--seed 0] [--size tiny] [--vocab-size 1024]
    python tools/make_tiny_checkpoint.py OUT_DIR --family mossvl [--seed 0] [--size tiny]    (make_tiny_mossvl.py)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""In the order of the real checkpoints, where they are 151643 to 151656."""

PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- set counter = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{%- set counter.images = counter.images + 1 -%}
{%- if add_vision_id -%}{{- 'Picture ' ~ counter.images ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}
{%- set counter.videos = counter.videos + 1 -%}
{%- if add_vision_id -%}{{- 'Video ' ~ counter.videos ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class TinySize:
    """The extents of a small Qwen2-VL; the head size of the text is `hidden_size / num_attention_heads`."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    mrope_section: tuple[int, int, int]
    """Adds up to half the head size."""
    vision_hidden_size: int
    vision_num_layers: int
    vision_num_heads: int
    vision_mlp_ratio: int = 4
    max_position_embeddings: int = 4096


SIZES = {
    "tiny": TinySize(128, 256, 6, 4, 2, (4, 6, 6), 96, 4, 4),
    "nano": TinySize(64, 128, 3, 4, 2, (2, 3, 3), 32, 2, 2),
}
"""`tiny` is what the quick start trains; `nano` is for tests that only need the structure."""


def make_tiny_checkpoint(
    path: str | Path,
    *,
    tied: bool,
    seed: int,
    vocab_size: int = 1024,
    size: str | TinySize = "tiny",
    dtype: str = "float32",
    num_shards: int = 1,
) -> Path:
    """Write the checkpoint directory and give its path back; files of the same names are replaced.

    Args:
        path: the directory; made when absent.
        tied: whether the output head is the token embedding (then no `lm_head.weight` is written).
        seed: of the weights; the same seed gives the same bytes.
        vocab_size: rows of the embedding; the tokenizer has at most as many entries.
        size: a name in `SIZES`, or extents of your own.
        dtype: of the weights: "float32", "bfloat16" or "float16".
        num_shards: safetensors files; more than one comes with an index, as in the larger hub checkpoints.
    """
    import torch
    from safetensors.torch import save_file

    extents = SIZES[size] if isinstance(size, str) else size
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    first_special = _write_tokenizer(directory, vocab_size, extents.max_position_embeddings)
    config = _config(extents, tied=tied, vocab_size=vocab_size, first_special=first_special, dtype=dtype)
    ids = {"bos_token_id": config["bos_token_id"], "pad_token_id": first_special}
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {**ids, "eos_token_id": [config["eos_token_id"], first_special]})
    _write_json(directory / "preprocessor_config.json", _preprocessor_config())

    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _draw(shape, std, generator).to(getattr(torch, dtype))
        for name, shape, std in _weights(extents, tied=tied, vocab_size=vocab_size)
    }
    for stale in (*directory.glob("model*.safetensors"), directory / "model.safetensors.index.json"):
        stale.unlink(missing_ok=True)
    if num_shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[shard * len(names) // num_shards : (shard + 1) * len(names) // num_shards]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return directory


def build_tokenizer(vocab_size: int = 1024) -> PreTrainedTokenizerBase:
    """The tokenizer of the tiny checkpoints as a transformers object, with at most `vocab_size` entries."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_train_bpe(vocab_size)[0],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def _train_bpe(vocab_size: int) -> tuple[Tokenizer, int]:
    """A byte-level BPE with Qwen2's pre-tokenizer, and the id of the first special token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise SystemExit(
            f"vocab_size = {vocab_size} is below {smallest}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = (Path(__file__).parent / "tiny_corpus.txt").read_text(encoding="utf-8")
    tokenizer.train_from_iterator(corpus.splitlines(), trainer)
    first_special = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer, first_special


def _write_tokenizer(directory: Path, vocab_size: int, max_length: int) -> int:
    """Write the tokenizer files of the hub and give back the id of the first special token."""
    tokenizer, first_special = _train_bpe(vocab_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))  # vocab.json and merges.txt
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(first_special + i): {"content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)}
    _write_json(
        directory / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": max_length,
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    _write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    return first_special


def _config(size: TinySize, *, tied: bool, vocab_size: int, first_special: int, dtype: str) -> dict[str, Any]:
    """config.json in the flat form of the hub's Qwen2-VL repositories."""
    ids = {token: first_special + i for i, token in enumerate(SPECIAL_TOKENS)}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": size.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate_size,
        "max_position_embeddings": size.max_position_embeddings,
        "max_window_layers": size.num_layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": size.num_attention_heads,
        "num_hidden_layers": size.num_layers,
        "num_key_value_heads": size.num_query_groups,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": size.vision_num_layers,
            "embed_dim": size.vision_hidden_size,
            "mlp_ratio": size.vision_mlp_ratio,
            "num_heads": size.vision_num_heads,
            "in_chans": 3,
            "in_channels": 3,
            "hidden_size": size.hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(size.mrope_section)},
        "vocab_size": vocab_size,
    }


def _preprocessor_config() -> dict[str, Any]:
    """preprocessor_config.json with the values of the hub's Qwen2-VL repositories."""
    return {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }


def _weights(size: TinySize, *, tied: bool, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...], float | None]]:
    """Name, shape and standard deviation of every weight; None stands for a norm's ones, 0.0 for zeros.

    Matrices get 1/sqrt(inputs), those that write to the residual stream less by sqrt(2 * layers): a model this narrow
    learns within a few hundred steps from it, and hardly at all from the 0.02 of wide models.
    """
    vision, text = size.vision_hidden_size, size.hidden_size
    yield "visual.patch_embed.proj.weight", (vision, 3, 2, 14, 14), _std(3 * 2 * 14 * 14)
    for layer in range(size.vision_num_layers):
        block, depth = f"visual.blocks.{layer}.", 2 * size.vision_num_layers
        for norm in ("norm1", "norm2"):
            yield from _affine(block + norm, (vision,), None)
        yield from _affine(block + "attn.qkv", (3 * vision, vision), _std(vision))
        yield from _affine(block + "attn.proj", (vision, vision), _std(vision, depth))
        wide = size.vision_mlp_ratio * vision
        yield from _affine(block + "mlp.fc1", (wide, vision), _std(vision))
        yield from _affine(block + "mlp.fc2", (vision, wide), _std(wide, depth))
    merged = 4 * vision
    yield from _affine("visual.merger.ln_q", (vision,), None)
    yield from _affine("visual.merger.mlp.0", (merged, merged), _std(merged))
    yield from _affine("visual.merger.mlp.2", (text, merged), _std(merged))
    yield "model.embed_tokens.weight", (vocab_size, text), _std(text)
    keys = size.num_query_groups * text // size.num_attention_heads
    for layer in range(size.num_layers):
        block, depth = f"model.layers.{layer}.", 2 * size.num_layers
        yield block + "input_layernorm.weight", (text,), None
        for name, rows in (("q", text), ("k", keys), ("v", keys)):
            yield from _affine(f"{block}self_attn.{name}_proj", (rows, text), _std(text))
        yield block + "self_attn.o_proj.weight", (text, text), _std(text, depth)
        yield block + "post_attention_layernorm.weight", (text,), None
        for name in ("gate", "up"):
            yield f"{block}mlp.{name}_proj.weight", (size.intermediate_size, text), _std(text)
        yield block + "mlp.down_proj.weight", (text, size.intermediate_size), _std(size.intermediate_size, depth)
    yield "model.norm.weight", (text,), None
    if not tied:
        yield "lm_head.weight", (vocab_size, text), _std(text)


def _affine(
    name: str, shape: tuple[int, ...], std: float | None
) -> Iterator[tuple[str, tuple[int, ...], float | None]]:
    yield name + ".weight", shape, std
    yield name + ".bias", shape[:1], 0.0


def _std(inputs: int, depth: int = 1) -> float:
    return 1.0 / math.sqrt(inputs * depth)


def _draw(shape: tuple[int, ...], std: float | None, generator: torch.Generator) -> torch.Tensor:
    import torch

    return torch.ones(shape) if std is None else torch.randn(shape, generator=generator) * std


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """The command line: write one checkpoint and print where it lies."""
    parser = argparse.ArgumentParser(description="Write a small checkpoint with weights drawn from a seed.")
    parser.add_argument("path", help="the directory to write")
    parser.add_argument("--family", choices=("qwen2vl", "mossvl"), default="qwen2vl", help="(default: %(default)s)")
    parser.add_argument(
        "--tied", action="store_true", help="use the token embedding as the output head, as the 2B does"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=1024, help="rows of the embedding (default: %(default)s)")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--num-shards", type=int, default=1, help="safetensors files (default: %(default)s)")
    args = parser.parse_args()
    if args.family == "mossvl":
        if args.tied or args.vocab_size != 1024 or args.num_shards != 1:
            parser.error("--tied, --vocab-size and --num-shards are for qwen2vl")
        # A script's own folder is on the path, the repository is not.
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from tools.make_tiny_mossvl import make_tiny_mossvl

        print(make_tiny_mossvl(args.path, size=args.size, seed=args.seed, dtype=args.dtype))
        return
    directory = make_tiny_checkpoint(
        args.path,
        tied=args.tied,
        seed=args.seed,
        vocab_size=args.vocab_size,
        size=args.size,
        dtype=args.dtype,
        num_shards=args.num_shards,
    )
    print(directory)


if __name__ == "__main__":
    main()
