"""What the converter's tests are made of: a tiny model, plans for it, and ways to compare directories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.stores.hf import INDEX_FILE, read_model_config
from mindspeed_mm.plan import StagePlan
from tools.make_tiny_checkpoint import TinySize, make_tiny_checkpoint

VISION_LAYERS, TEXT_LAYERS = 4, 6
SIZE = TinySize(
    hidden_size=64,
    intermediate_size=96,
    num_layers=TEXT_LAYERS,
    num_attention_heads=4,
    num_query_groups=2,
    mrope_section=(2, 3, 3),
    vision_hidden_size=32,
    vision_num_layers=VISION_LAYERS,
    vision_num_heads=2,
    vision_mlp_ratio=2,
)
Lists = Sequence[Sequence[int]]
LAYOUTS: dict[str, tuple[Lists, Lists, int]] = {
    "tp1_pp1": ([[4]], [[6]], 1),
    "tp2_pp1": ([[4]], [[6]], 2),
    "tp1_pp2": ([[4, 0]], [[1, 5]], 1),
    "tp2_pp3_vision_on_two": ([[3, 1, 0]], [[0, 2, 4]], 2),
    "tp2_pp2": ([[4, 0]], [[1, 5]], 2),
    "tp1_pp2_text_last": ([[4, 0]], [[0, 6]], 1),
    "tp2_pp2_vp2": ([[2, 2], [0, 0]], [[0, 1], [2, 3]], 2),
    "tp1_pp2_vp3": ([[4, 0], [0, 0], [0, 0]], [[0, 1], [1, 2], [1, 1]], 1),
}
"""Name -> vision lists, text lists, tp_size."""


def write_hf(path: Path, *, tied: bool, num_shards: int = 2, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """A tiny Hugging Face directory."""
    return make_tiny_checkpoint(
        path, tied=tied, seed=seed, vocab_size=640, size=SIZE, dtype=dtype, num_shards=num_shards
    )


def layout_plan(name: str, hf_dir: Path) -> StagePlan:
    """One of LAYOUTS for the model of a directory."""
    vision, text, tp_size = LAYOUTS[name]
    return make_plan(vision, text, tp_size, is_tied=read_model_config(hf_dir).text_decoder.is_tied)


def make_plan(vision: Lists, text: Lists, tp_size: int, *, is_tied: bool) -> StagePlan:
    """A plan for the tiny model."""
    return StagePlan.from_lists(
        "qwen2vl",
        vision,
        text,
        tp_size=tp_size,
        vision_layers=sum(map(sum, vision)),
        text_layers=sum(map(sum, text)),
        is_tied=is_tied,
    )


def read_tensors(hf_dir: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory."""
    return {name: tensor for path in sorted(hf_dir.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def rewrite_tensors(source: Path, target: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    """A copy of a Hugging Face directory in one file, its tensors changed."""
    shutil.copytree(source, target)
    tensors = change(read_tensors(target))
    for path in [*target.glob("*.safetensors"), target / INDEX_FILE]:
        path.unlink(missing_ok=True)
    save_file(dict(tensors), target / "model.safetensors", metadata={"format": "pt"})
    return target


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def same_trees(ours: Path, theirs: Path, *, ignored: Sequence[str] = ("manifest.json",)) -> None:
    """Assert that two directories hold the same files byte for byte."""
    assert _names(ours, ignored) == _names(theirs, ignored)
    for name in _names(ours, ignored):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def _names(root: Path, ignored: Sequence[str]) -> list[str]:
    found = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return sorted(name for name in found if name.rpartition("/")[2] not in ignored)


def assert_same_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Assert that two sets of tensors are equal bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
