"""Write a small MOSS-VL checkpoint in the form of the model hub, with weights drawn from a seed.

The settings are those of `configs/mossvl/tiny` (3 million parameters, what the quick start trains) or, with
`--size nano`, smaller ones for tests. Nothing is downloaded: the tokenizer is the small BPE of
`make_tiny_checkpoint.py` with the time tokens of MOSS-VL added.

    python tools/make_tiny_mossvl.py OUT_DIR [--size tiny|nano] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).resolve().parents[1]
EXTRA_TOKENS = ("<|time_start|>", "<|time_end|>", "<|silence|>", "<|response|>")
"""In the order of the real checkpoints, where they are 151669 to 151672."""

NANO = {
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "cross_attention_layers": [1, 3],
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 3,
        "num_heads": 2,
        "deepstack_visual_indexes": [0, 1],
        "out_hidden_size": 64,
    },
}
"""What differs from `configs/mossvl/tiny` in the nano size."""


def make_tiny_mossvl(path: str | Path, *, size: str = "tiny", seed: int = 0, dtype: str = "float32") -> Path:
    """Write the checkpoint directory and give its path back; files of the same names are replaced.

    Args:
        path: the directory; made when absent.
        size: "tiny" or "nano".
        seed: of the weights; the same seed gives the same bytes.
        dtype: of the weights.
    """
    from safetensors.torch import save_file

    source, directory = REPOSITORY / "configs" / "mossvl", Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "tiny" / "config.json").read_text(encoding="utf-8"))
    if size == "nano":
        for tower, changes in NANO.items():
            config[tower].update(changes)
    ids = _write_tokenizer(directory, config["text_config"]["vocab_size"])
    _set_ids(config, ids, dtype)
    _write_json(directory / "config.json", config)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (directory / name).write_bytes((source / "tiny" / name).read_bytes())
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    _write_json(directory / "generation_config.json", {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad})
    tensors = {name: tensor.contiguous() for name, tensor in draw_weights(config, seed, dtype).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def draw_weights(config: dict[str, Any], seed: int, dtype: str) -> dict[str, torch.Tensor]:
    """All weights of a configuration, by name.

    Matrices get 1/sqrt(inputs), those that write to the residual stream less by sqrt(2 * layers): a model this narrow
    learns within a few hundred steps from it. Gates are 0.5, as in released checkpoints they are not zero.
    """
    import torch

    from mindspeed_mm.models.mossvl.hf.configuration import MossVLConfig
    from mindspeed_mm.models.mossvl.hf.modeling import MossVLForConditionalGeneration

    with torch.device("meta"):
        model = MossVLForConditionalGeneration(MossVLConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    depth = 2 * max(config["vision_config"]["depth"], config["text_config"]["num_hidden_layers"])
    to_residual = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight")
    constants = {"_gate": 0.5, "bias": 0.0, "norm.weight": 1.0, "norm1.weight": 1.0, "norm2.weight": 1.0}
    tensors = {}
    for name, parameter in model.named_parameters():
        constant = next((value for end, value in constants.items() if name.endswith(end)), None)
        if constant is not None or ".norms." in name or "layernorm" in name:
            drawn = torch.full(parameter.shape, 1.0 if constant is None else constant)
        else:
            inputs = parameter.shape[1:].numel() if parameter.ndim > 1 else parameter.numel()
            scale = 1 / math.sqrt(inputs * (depth if name.endswith(to_residual) else 1))
            drawn = torch.randn(parameter.shape, generator=generator) * scale
        tensors[name] = drawn.to(getattr(torch, dtype))
    return tensors


def _write_tokenizer(directory: Path, vocab_size: int) -> dict[str, int]:
    """The tokenizer of the tiny Qwen2-VL with the extra tokens behind its own; gives the ids of all special tokens."""
    from tokenizers import AddedToken, Tokenizer

    from tools import make_tiny_checkpoint as base

    base._write_tokenizer(directory, vocab_size - len(EXTRA_TOKENS), 4096)
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in EXTRA_TOKENS])
    tokenizer.save(str(path))
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in (*base.SPECIAL_TOKENS, *EXTRA_TOKENS)}
    template = json.loads((REPOSITORY / "configs/mossvl/11b/chat_template.json").read_text(encoding="utf-8"))
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    like = next(iter(settings["added_tokens_decoder"].values()))
    settings["added_tokens_decoder"] |= {str(ids[token]): {**like, "content": token} for token in EXTRA_TOKENS}
    settings["additional_special_tokens"] += EXTRA_TOKENS
    settings |= {"chat_template": template["chat_template"], "padding_side": "right"}
    _write_json(directory / "tokenizer_config.json", settings)
    _write_json(directory / "chat_template.json", template)
    return ids


def _set_ids(config: dict[str, Any], ids: dict[str, int], dtype: str) -> None:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {f"vision_{end}_token_id": f"<|vision_{end}|>" for end in ("start", "end")}
    config |= {key: ids[token] for key, token in names.items()}
    config["dtype"] = config["text_config"]["dtype"] = dtype
    config["text_config"] |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """The command line: write one checkpoint and print where it lies."""
    parser = argparse.ArgumentParser(description="Write a small MOSS-VL checkpoint with weights drawn from a seed.")
    parser.add_argument("path", help="the directory to write")
    parser.add_argument("--size", choices=("tiny", "nano"), default="tiny", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args(argv)
    print(make_tiny_mossvl(args.path, size=args.size, seed=args.seed, dtype=args.dtype))


if __name__ == "__main__":
    # A script's own folder is on the path, the repository is not.
    sys.path.insert(0, str(REPOSITORY))
    main()
