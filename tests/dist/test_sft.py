"""The command line end to end: layouts that train alike, exits with their codes, exports that transformers loads."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from mindspeed_mm.storage.shard import read_shard
from tests.dist.harness import ROOT, run_ranks
from tests.dist.jobs import Workplace, arguments, make_workplace

PP2 = ("--pipeline-model-parallel-size", "2")
LAYOUTS: dict[str, tuple[int, tuple[str, ...], tuple[int, ...], tuple[int, ...]]] = {
    "pp2": (2, PP2, (4, 0), (1, 3)),
    "dp2": (2, ("--use-distributed-optimizer", "--overlap-grad-reduce", "--micro-batch-size", "1"), (4,), (4,)),
    "tp2pp2": (4, (*PP2, "--tensor-model-parallel-size", "2"), (3, 1), (0, 4)),
}
"""World size, flags and stage lists."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("sft"))


def rows(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def single(place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six iterations on one process, exported."""
    save = tmp_path_factory.mktemp("single")
    argv = arguments(place, place.model((4,), (4,)), "--train-iters", "6", "--load", str(place.hf), "--save", str(save))
    assert run_ranks(1, "tests.dist.jobs:train", [[*argv, "--save-hf", str(save / "hf"), "--log-tps"]]) == [[0]]
    return save


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_see_the_same_samples_and_learn_alike(
    name: str, place: Workplace, single: Path, tmp_path: Path
) -> None:
    world_size, flags, vision, text = LAYOUTS[name]
    model = place.model(vision, text)
    # The mean over a micro-batch depends on how the global batch is cut, the mean over its tokens does not.
    same_loss = ("--calculate-per-token-loss",)
    argv = arguments(place, model, "--train-iters", "6", "--load", str(place.hf), *flags, *same_loss)
    alone = arguments(place, place.model((4,), (4,)), "--train-iters", "6", "--load", str(place.hf), *same_loss)
    run_ranks(world_size, "tests.dist.jobs:train", [[*argv, "--save", str(tmp_path / "many")]])
    run_ranks(1, "tests.dist.jobs:train", [[*alone, "--save", str(tmp_path / "one")]])
    many, one = rows(tmp_path / "many"), rows(tmp_path / "one")
    # float32 sums in another order, grown by six updates
    assert [row["loss"] for row in many] == pytest.approx([row["loss"] for row in one], rel=1e-4)
    assert [row["grad_norm"] for row in many] == pytest.approx([row["grad_norm"] for row in one], rel=1e-3)
    assert [row["supervised_tokens"] for row in many] == [row["supervised_tokens"] for row in one]
    assert [row["tokens_per_sample"] for row in many] == [row["tokens_per_sample"] for row in one]


def test_frozen_stage_leaves_the_losses_as_they_are(place: Workplace, tmp_path: Path) -> None:
    common = ("--train-iters", "5", "--load", str(place.hf))
    one = arguments(place, place.model((4,), (4,), freezes_vision=True), *common, "--save", str(tmp_path / "one"))
    two = arguments(place, place.model((4, 0), (0, 4), freezes_vision=True), *common, *PP2)
    run_ranks(1, "tests.dist.jobs:train", [one])
    allowed = [*two, "--enable-dummy-optimizer", "--save", str(tmp_path / "two")]
    assert run_ranks(2, "tests.dist.jobs:train", [two, allowed]) == [[2, 0]] * 2  # refused until it is asked for
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    before = read_weights(place.hf)
    shard = read_shard(tmp_path / "two" / "iter_0000005" / "mp_rank_00_000" / "model_optim_rng.pt")["model"]
    frozen = "image_encoder.encoder.patch_embed.proj.weight"
    assert torch.equal(shard[frozen], before["visual.patch_embed.proj.weight"])


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def test_export_loads_in_transformers_and_holds_the_trained_weights(place: Workplace, single: Path) -> None:
    model, info = Qwen2VLForConditionalGeneration.from_pretrained(
        single / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    before = Qwen2VLForConditionalGeneration.from_pretrained(place.hf, dtype=torch.float32)
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(changed)
    assert AutoTokenizer.from_pretrained(single / "hf").chat_template
    names = {path.name for path in place.hf.iterdir() if path.suffix != ".safetensors"}
    assert names <= {path.name for path in (single / "hf").iterdir()}


def test_run_leaves_a_curve_and_a_plan(single: Path) -> None:
    assert (single / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (single / "iter_0000006" / "stage_plan.json").exists()
    assert rows(single)[-1]["iteration"] == 6


def test_exits_name_what_is_wrong(place: Workplace, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = place.model((4,), (4,))
    common = arguments(place, model, "--train-iters", "2")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        ([*common, "--load", str(empty)], 13, "holds no checkpoint"),
        ([*common, "--load", str(tmp_path / "absent")], 13, "not a directory"),
        (common, 2, "--init-random"),
        ([*common, "--load", str(place.hf), "--trian-iters", "3"], 2, "--train-iters"),
        (
            [*common, "--load", str(place.hf), "--context-parallel-size", "2", "--world-size", "2", "--dry-run"],
            2,
            "ulysses_cp_algo",
        ),
        ([*common, "--load", str(place.hf), "--ckpt-step", "7"], 2, "Hugging Face directory"),
        ([*common, "--load", str(place.hf), "--save-hf", str(place.hf)], 2, "is not empty"),
    ]
    for argv, code, text in cases:
        # Each in its own process: process groups are not made twice.
        result = run(argv)
        assert result.returncode == code, result.stdout + result.stderr
        assert text in result.stdout + result.stderr
        assert "Traceback" not in result.stderr


def run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "MM_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "pretrain_vlm.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120, check=False)


def test_signal_saves_and_the_run_goes_on_from_there(place: Workplace, tmp_path: Path) -> None:
    argv = arguments(place, place.model((4,), (4,)), "--train-iters", "100000", "--load", str(place.hf))
    environ = {**os.environ, "MM_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "pretrain_vlm.py"), *argv, "--save", str(tmp_path / "save")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if re.search(r"iteration +3/", line):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 18, rest
    stopped = int((tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text())
    assert stopped >= 3
    assert f"iteration {stopped}" in rest
    again = [*argv, "--load", str(tmp_path / "save"), "--save", str(tmp_path / "save"), "--exit-interval", "1"]
    result = run(again)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [row["iteration"] for row in rows(tmp_path / "save")] == list(range(1, stopped + 2))


def test_dry_run_starts_nothing(place: Workplace, tmp_path: Path) -> None:
    argv = arguments(place, place.model((3, 1), (0, 4)), *PP2, "--train-iters", "2", "--load", str(place.hf))
    started = time.monotonic()
    result = run([*argv, "--dry-run", "--world-size", "4", "--save", str(tmp_path / "save")])
    assert result.returncode == 0, result.stderr
    assert "patch_embed" in result.stdout
    assert not (tmp_path / "save").exists()
    assert time.monotonic() - started < 10


def test_losses_of_the_kinds_differ_as_they_should(place: Workplace, tmp_path: Path) -> None:
    argv = arguments(place, place.model((4,), (4,)), "--train-iters", "1", "--load", str(place.hf))
    kinds = {"default": [], "token": ["--calculate-per-token-loss"], "sample": ["--calculate-per-sample-loss"]}
    commands = [[*argv, *flags, "--save", str(tmp_path / name)] for name, flags in kinds.items()]
    assert run_ranks(1, "tests.dist.jobs:train", commands) == [[0, 0, 0]]
    losses = {name: rows(tmp_path / name)[0]["loss"] for name in kinds}
    assert len(set(losses.values())) == 3
