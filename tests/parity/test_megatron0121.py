"""The core of the parity suite on the older megatron-core, which Ascend users are bound to.

`tools/setup_env.sh` installs it beside the pinned one. Here it comes first in the search path of a job, whose processes
check that they run it. Bounds and reference are those of `test_parity.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.dist.harness import ROOT, run_ranks
from tests.dist.jobs import Workplace, arguments, make_workplace, train
from tests.dist.test_resume import losses, unequal_shards
from tests.parity.engine import Case, solve_all
from tests.parity.test_parity import KINDS, check_parity

VERSION = "0.12.1"
PLACE = Path(sys.prefix) / f"megatron-core-{VERSION}"

CASES = [
    Case(distributed_optimizer=True),
    Case(recompute="uniform"),
    Case(tp=2, sp=True),
    Case(cp=2),
    Case(dp=2, distributed_optimizer=True),
    Case(pp=2, vision=(3, 1), text=(0, 4)),
    Case(pp=2, vp=2, vision=((1, 2), (1, 0)), text=((0, 0), (0, 4)), recompute="block"),
    Case(pp=2, vision=(4, 0), text=(1, 3), frozen=("vision",), steps=5),
    Case(tp=2, pp=2, sp=True, vision=(1, 3), text=(0, 4), distributed_optimizer=True),
]


def run_on_older(world_size: int, target: str, *args: Any) -> list[Any]:
    """`run_ranks` with the older megatron-core: ranks inherit the search path."""
    assert PLACE.is_dir(), f"{PLACE} is missing; run tools/setup_env.sh"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PLACE)
        return run_ranks(world_size, f"tests.parity.test_megatron0121:{target}", *args)


def solve_on_older(cases: list[Case], checkpoints: list[Path], out: Path) -> dict[str, Any]:
    """What a rank does: `solve_all`, and nothing of one case left for the next."""
    from mindspeed_mm.platform.select import activate, choose_platform

    activate(choose_platform("cpu"))
    assert_older()
    from megatron.core import parallel_state

    destroy = parallel_state.destroy_model_parallel

    def destroy_all() -> None:
        destroy()
        # 0.12 forgets the embedding groups but not their ranks; a training run makes its groups only once.
        parallel_state._EMBEDDING_GLOBAL_RANKS = parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None

    parallel_state.destroy_model_parallel = destroy_all
    return solve_all(cases, checkpoints, out)


def train_on_older(argv_lists: list[list[str]]) -> list[int]:
    """What a rank does: run command lines one after another."""
    codes = train(argv_lists)
    assert_older()
    return codes


def assert_older() -> None:
    """Megatron, which is imported already, is the older one."""
    import megatron.core

    assert megatron.core.__version__ == version("megatron-core") == VERSION
    assert PLACE in Path(megatron.core.__file__).parents


@pytest.fixture(scope="module")
def results(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("gradients0121")
    solved: dict[str, Any] = {}
    for world_size in sorted({case.world_size for case in CASES}):
        cases = [case for case in CASES if case.world_size == world_size]
        solved |= run_on_older(world_size, "solve_on_older", cases, list(checkpoints.values()), out)[-1]
    return solved, out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_gives_the_numbers_of_transformers(
    case: Case, kind: str, results: tuple[dict[str, Any], Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    solved, gradients = results
    key = f"{case.name}-{kind}"
    check_parity(case, solved[key], gradients / key, checkpoints[kind], tmp_path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("train0121"))


def test_resumed_equals_uninterrupted(place: Workplace, tmp_path: Path) -> None:
    flags = ("--use-distributed-optimizer", "--micro-batch-size", "1", "--train-iters", "4", "--save-interval", "2")
    common = arguments(place, place.model((4,), (4,)), *flags)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    commands = [
        [*common, "--load", str(place.hf), "--save", str(whole)],
        [*common, "--load", str(place.hf), "--save", str(parts), "--exit-interval", "2"],
        [*common, "--load", str(parts), "--save", str(parts)],
    ]
    assert run_on_older(2, "train_on_older", commands) == [[0, 0, 0]] * 2
    assert not unequal_shards(whole, parts, iteration=4)
    assert losses(whole) == losses(parts)


def test_what_it_lacks_is_refused(place: Workplace, capfd: pytest.CaptureFixture[str]) -> None:
    style = ("--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "2", "--lr-wsd-decay-style", "minus_sqrt")
    argv = arguments(place, place.model((4,), (4,)), "--train-iters", "4", "--load", str(place.hf), *style)
    assert run_on_older(1, "train_on_older", [argv]) == [[2]]
    assert "megatron-core 0.12.1 does not know --lr-wsd-decay-style minus_sqrt" in capfd.readouterr().out


def test_command_line_trains_alike_on_both(place: Workplace, tmp_path: Path) -> None:
    model = place.model((3, 1), (0, 4))
    flags = ("--pipeline-model-parallel-size", "2", "--use-distributed-optimizer", "--train-iters", "4")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    rows = {}
    for name, path in (("pinned", ""), (VERSION, str(PLACE))):
        save = tmp_path / name
        argv = arguments(place, model, *flags, "--load", str(place.hf), "--save", str(save))
        environ = {**os.environ, "MM_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        result = subprocess.run(
            [*command, str(ROOT / "pretrain_vlm.py"), *argv],
            capture_output=True, text=True, env=environ, timeout=120, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        assert (f"megatron-core {VERSION}" in result.stdout) == (name == VERSION)
        rows[name] = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert len(rows[VERSION]) == 4
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("learning_rate", 1e-9)):
        assert [row[key] for row in rows[VERSION]] == pytest.approx([row[key] for row in rows["pinned"]], rel=tolerance)
