"""Logits, loss, every gradient by Hugging Face name and twenty AdamW steps equal those of transformers.

Bounds are those of the house: logits 1e-4 of the largest, loss 1e-5, gradients 1e-4 in norm, losses of the steps 1e-4.
In float32 all of them measure near 1e-6; the room is for other summation orders on other processors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoint.convert import mm_to_hf
from tests.dist.harness import run_ranks
from tests.parity.engine import Case, Result
from tests.parity.reference import solve
from tools.make_tiny_checkpoint import TinySize

SIZE = TinySize(64, 96, 4, 4, 2, (2, 3, 3), 32, 4, 2)

CASES = [
    Case(),
    Case(distributed_optimizer=True),
    Case(recompute="uniform"),
    Case(recompute="block", distributed_optimizer=True),
    Case(recompute="selective"),
    Case(tp=2),
    Case(dp=2, distributed_optimizer=True),
    Case(tp=2, sp=True),
    Case(cp=2),
    Case(pp=2, vp=2, vision=((4, 0), (0, 0)), text=((0, 1), (2, 1))),
    Case(pp=2, vp=2, vision=((1, 2), (1, 0)), text=((0, 0), (0, 4))),
    Case(pp=2, vision=(4, 0), text=(1, 3)),
    Case(pp=2, vision=(3, 1), text=(0, 4)),
    Case(tp=2, pp=2, vision=(4, 0), text=(2, 2), distributed_optimizer=True),
    Case(tp=2, pp=2, vision=(1, 3), text=(0, 4)),
    Case(pp=2, dp=2, vision=(3, 1), text=(0, 4), distributed_optimizer=True),
    Case(pp=2, dp=2, vision=(4, 0), text=(1, 3), distributed_optimizer=True),
    Case(pp=2, vp=2, tp=2, vision=((2, 2), (0, 0)), text=((0, 1), (1, 2)), recompute="uniform"),
    Case(tp=2, pp=2, sp=True, vision=(3, 1), text=(0, 4), distributed_optimizer=True),
    Case(tp=2, cp=2, sp=True),
    Case(pp=2, cp=2, vision=(3, 1), text=(0, 4)),
    Case(dp=2, cp=2, distributed_optimizer=True),
    Case(cp=3, recompute="uniform"),
    Case(pp=4, vision=(2, 2, 0, 0), text=(0, 0, 2, 2)),
    Case(pp=3, vision=(4, 0, 0), text=(1, 1, 2), distributed_optimizer=True),
    Case(pp=3, vision=(2, 2, 0), text=(0, 2, 2)),
    Case(pp=3, vision=(2, 2, 0), text=(0, 0, 4)),
    Case(tp=2, pp=3, vision=(4, 0, 0), text=(1, 2, 1)),
    Case(tp=2, pp=3, vision=(3, 1, 0), text=(0, 1, 3), distributed_optimizer=True),
    Case(dp=2, distributed_optimizer=True, overlap="gather", steps=5),
    Case(dp=2, overlap="reduce", steps=5),
    Case(pp=2, dp=2, vp=2, vision=((4, 0), (0, 0)), text=((0, 1), (2, 1)), overlap="reduce", steps=5),
    # Frozen parts, kinds of loss, kinds of batch.
    Case(pp=2, vision=(4, 0), text=(1, 3), frozen=("vision",), steps=5),
    Case(pp=2, vision=(3, 1), text=(0, 4), frozen=("vision", "projector"), steps=5),
    Case(tp=2, pp=2, vision=(2, 2), text=(0, 4), frozen=("text",), steps=5),
    Case(pp=2, vp=2, vision=((4, 0), (0, 0)), text=((0, 1), (2, 1)), frozen=("vision", "text"), steps=5),
    Case(dp=2, batches="apart", loss="token", distributed_optimizer=True, steps=5),
    Case(cp=2, batches="images", loss="sample", steps=5),
    Case(pp=2, vision=(3, 1), text=(0, 4), batches="text", loss="sample", distributed_optimizer=True, steps=5),
]
KINDS = ("tied", "untied")


@pytest.fixture(scope="session")
def results(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """All cases, one job per world size: starting processes costs more than solving a case."""
    out = tmp_path_factory.mktemp("gradients")
    solved: dict[str, Any] = {}
    for world_size in sorted({case.world_size for case in CASES}):
        cases = [case for case in CASES if case.world_size == world_size]
        ranks = run_ranks(world_size, "tests.parity.engine:solve_all", cases, list(checkpoints.values()), out)
        solved |= ranks[-1]
    return solved, out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_gives_the_numbers_of_transformers(
    case: Case,
    kind: str,
    results: tuple[dict[str, Any], Path],
    checkpoints: dict[str, Path],
    tmp_path: Path,
) -> None:
    solved, gradients = results
    key = f"{case.name}-{kind}"
    check_parity(case, solved[key], gradients / key, checkpoints[kind], tmp_path)


def check_parity(case: Case, result: Result, gradients: Path, checkpoint: Path, work: Path) -> None:
    """What the ranks found for a case, and the gradients that they wrote, are those of transformers."""
    reference = solve(checkpoint, *case.problem)
    # The last rank answers: with replicas, it is the one that takes every second micro-batch from the second on.
    for ours, theirs in zip(result.logits, reference.logits[case.dp - 1 :: case.dp], strict=True):
        assert relative_max(ours, theirs) <= 1e-4
    assert result.loss == pytest.approx(reference.loss, rel=1e-5)
    assert result.losses == pytest.approx(reference.losses, rel=1e-4)
    # Adam divides by the root of tiny second moments: rounding grows tenfold faster in the norm than in the loss.
    assert result.grad_norms == pytest.approx(reference.grad_norms, rel=5e-3)
    mm_to_hf(gradients, checkpoint, work / "hf")
    worst, deviation = worst_gradient(load_all(work / "hf"), reference.grads)
    assert deviation <= 1e-4, f"{worst}: {deviation}"


def worst_gradient(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[str, float]:
    """The name whose gradient differs most, and by how much; what transformers has no gradient for must be 0."""
    assert theirs.keys() <= ours.keys()
    deviations = {
        name: relative_norm(mine, theirs[name]) if name in theirs else float(mine.norm()) for name, mine in ours.items()
    }
    return max(deviations.items(), key=lambda item: item[1])


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def relative_max(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def relative_norm(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
