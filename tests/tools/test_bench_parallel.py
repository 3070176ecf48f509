"""The benchmark of layouts, on a small model in the place of the big ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def small_configs(folder: Path) -> Path:
    """configs/SIZE/model.json with the depth and lists of 7b and the width of a small model."""
    content = json.loads((ROOT / "configs" / "qwen2vl" / "7b" / "model.json").read_text())
    encoder, text = content["image_encoder"], content["text_decoder"]
    encoder["vision_encoder"] |= {"hidden_size": 64, "ffn_hidden_size": 256, "num_attention_heads": 4}
    encoder["vision_projector"] |= {"input_size": 64, "ffn_hidden_size": 256, "hidden_size": 128}
    text |= {"hidden_size": 128, "ffn_hidden_size": 512, "num_attention_heads": 4, "num_query_groups": 2}
    text |= {"kv_channels": 32, "mrope_section": [4, 6, 6]}
    (folder / "7b").mkdir()
    (folder / "7b" / "model.json").write_text(json.dumps(content))
    return folder


def test_shipped_and_planned_lists_are_compared_under_measured_times(tmp_path: Path) -> None:
    words = ["--sizes", "7b", "--configs", str(small_configs(tmp_path)), "--repeats", "1", "--seq", "512"]
    # a process of its own: it starts a process group and patches megatron
    job = subprocess.run(
        [sys.executable, "tools/bench_parallel.py", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert job.returncode == 0, job.stderr
    rows = re.findall(r"\| (shipped|planned|planned, VPP 2) \| .* \| ([\d.]+)% \| ([\d.]+)% \|$", job.stdout, re.M)
    assert [name for name, *_ in rows] == ["shipped", "planned", "planned, VPP 2"]
    shares, lengths = ([float(row[at]) for row in rows] for at in (1, 2))
    assert all(0 < share <= 100.1 for share in shares)
    assert lengths[0] == 100
    assert re.search(r"\| backward \| 0\.000 \| 0\.000 \| 0\.000 \|", job.stdout), "a frozen tower has no backward"
