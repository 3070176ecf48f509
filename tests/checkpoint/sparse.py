"""A large checkpoint that takes no room: its weights are a hole in the file."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoint.rules.qwen2vl import qwen2vl_rules
from checkpoint.stores.hf import read_model_config
from mindspeed_mm.storage.safetensors_file import plan_safetensors
from mindspeed_mm.storage.tensors import BY_NAME
from tests.checkpoint.samples import write_hf


def write_sparse_hf(path: Path, *, vocab_size: int) -> Path:
    """A tied tiny model of zeros whose embedding has `vocab_size` rows of 64 bfloat16 values."""
    write_hf(path, tied=True, num_shards=1)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}))
    tensors = {}
    for weight in qwen2vl_rules(read_model_config(path)).weights:
        assert weight.rule.shape is not None
        for name, shape in zip(weight.hf, weight.rule.pack.part_shapes(weight.rule.shape), strict=True):
            tensors[name] = (BY_NAME["bfloat16"], shape)
    planned = plan_safetensors(tensors, {"format": "pt"})
    with (path / "model.safetensors").open("wb") as file:
        file.write(planned.header)
        file.truncate(planned.nbytes)
    return path


def anonymous() -> int:
    """The largest resident size of this process that is not page cache, in bytes.

    Linux counts the peak for all memory together; file pages are few here, as files are read by copying.
    """
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    files = int(lines["RssFile"].split()[0]) * 1024
    return int(lines["VmHWM"].split()[0]) * 1024 - files
