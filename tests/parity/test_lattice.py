"""The lattice of layouts against transformers, and a table of its deviations: `make lattice`.

The covering subset in `test_parity.py` runs with every test run; this one takes about half an hour on two cores.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest

from checkpoint.convert import mm_to_hf
from tests.dist.harness import run_ranks
from tests.parity.engine import Case
from tests.parity.problem import Layers
from tests.parity.reference import solve
from tests.parity.test_parity import KINDS, SIZE, load_all, relative_max, worst_gradient
from tools.make_tiny_checkpoint import TinySize, make_tiny_checkpoint

WIDE = TinySize(64, 96, 4, 8, 4, (1, 1, 2), 32, 4, 4)

CASES_PER_JOB = 8

LISTS: dict[tuple[int, int], list[tuple[Layers, Layers]]] = {
    (1, 1): [((), ())],
    (2, 1): [((4, 0), (1, 3)), ((3, 1), (0, 4))],
    (3, 1): [((4, 0, 0), (1, 1, 2)), ((2, 2, 0), (0, 2, 2))],
    (4, 1): [((4, 0, 0, 0), (1, 1, 1, 1)), ((1, 3, 0, 0), (0, 0, 2, 2))],
    (2, 2): [(((4, 0), (0, 0)), ((0, 1), (2, 1))), (((1, 2), (1, 0)), ((0, 0), (0, 4)))],
    (4, 2): [(((2, 2, 0, 0), (0, 0, 0, 0)), ((0, 0, 1, 0), (1, 1, 0, 1)))],
}
"""Stage lists by (PP, VPP): vision before text, on one stage and on two."""


def _layouts() -> list[Case]:
    """Every layout of up to four processes, each twice: with other stage lists, recompute and optimizer."""
    cases = []
    for (pp, vp), tp, cp, dp in product(LISTS, (1, 2, 4), (1, 2, 3), (1, 2)):
        if pp * tp * cp * dp > 4:
            continue
        for number, (vision, text) in enumerate(LISTS[pp, vp]):
            if any(sum(layers) == 0 for layers in _stages(vision, text)):
                continue
            base = {"tp": tp, "pp": pp, "vp": vp, "cp": cp, "dp": dp, "vision": vision, "text": text, "steps": 5}
            cases.append(Case(**base, recompute="uniform" if number else ""))
            cases.append(Case(**base, sp=tp > 1, distributed_optimizer=True, recompute="" if number else "block"))
    return cases


PROBLEMS: list[dict[str, Any]] = [
    {"frozen": ("vision",)},
    {"frozen": ("vision", "projector"), "loss": "token"},
    {"frozen": ("text",), "batches": "images"},
    {"frozen": ("vision", "text"), "loss": "sample"},
    {"loss": "token", "batches": "apart"},
    {"loss": "sample", "batches": "images"},
    {"batches": "text"},
]
"""Other things to train, losses and batches."""

COVERING: list[dict[str, Any]] = [
    {"dp": 2, "distributed_optimizer": True},
    {"tp": 2, "dp": 2, "sp": True},
    {"tp": 4, "sp": True, "distributed_optimizer": True},
    {"cp": 3},
    {"tp": 2, "cp": 2, "sp": True, "recompute": "selective"},
    {"pp": 2, "dp": 2, "vision": (3, 1), "text": (0, 4), "distributed_optimizer": True},
    {"pp": 2, "cp": 2, "vision": (4, 0), "text": (1, 3)},
    {"pp": 2, "tp": 2, "sp": True, "vision": (2, 2), "text": (0, 4), "recompute": "uniform"},
    {"pp": 2, "tp": 2, "vp": 2, "vision": ((2, 2), (0, 0)), "text": ((0, 1), (1, 2)), "distributed_optimizer": True},
    {"pp": 4, "vision": (2, 2, 0, 0), "text": (0, 0, 2, 2)},
]
"""Layouts that every problem is solved on."""


def _cases() -> list[Case]:
    return _layouts() + [Case(**layout, **problem, steps=5) for layout, problem in product(COVERING, PROBLEMS)]


def _jobs() -> Iterator[tuple[int, bool, list[Case]]]:
    """(processes, whether the wide model is used, cases): few cases a job, for every group of ranks leaves threads."""
    for world_size, is_wide in sorted({(case.world_size, case.tp == 4) for case in CASES}):
        cases = iter([case for case in CASES if (case.world_size, case.tp == 4) == (world_size, is_wide)])
        while job := list(islice(cases, CASES_PER_JOB)):
            yield world_size, is_wide, job


def _stages(vision: Layers, text: Layers) -> list[tuple[int, int]]:
    def flat(layers: Layers) -> list[int]:
        return [n for entry in layers for n in (entry if isinstance(entry, tuple) else (entry,))]

    return list(zip(flat(vision), flat(text), strict=True))


CASES = _cases()


@pytest.mark.lattice
def test_lattice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Four tensor ranks cannot share two key-value heads: they get a model with four.
    checkpoints = {
        prefix + kind: make_tiny_checkpoint(
            tmp_path / (prefix + kind), tied=kind == "tied", seed=3, vocab_size=320, size=s
        )
        for prefix, s in (("", SIZE), ("wide-", WIDE))
        for kind in KINDS
    }
    rows, worst = [], 0.0
    for world_size, is_wide, cases in _jobs():
        kinds = [kind for kind in checkpoints if kind.startswith("wide") == is_wide]
        out = tmp_path / "gradients"
        solved = run_ranks(
            world_size, "tests.parity.engine:solve_all", cases, [checkpoints[k] for k in kinds], out, timeout_s=3000
        )[-1]
        for case, kind in product(cases, kinds):
            key, reference = f"{case.name}-{kind}", solve(checkpoints[kind], *case.problem)
            result = solved[key]
            logits = max(
                relative_max(a, b) for a, b in zip(result.logits, reference.logits[case.dp - 1 :: case.dp], strict=True)
            )
            loss = abs(result.loss - reference.loss) / reference.loss
            later = abs(result.losses[-1] - reference.losses[-1]) / reference.losses[-1]
            mm_to_hf(out / key, checkpoints[kind], tmp_path / "hf" / key)
            _, gradient = worst_gradient(load_all(tmp_path / "hf" / key), reference.grads)
            shutil.rmtree(tmp_path / "hf")
            rows.append(f"{key:76} {logits:9.1e} {loss:9.1e} {gradient:9.1e} {later:9.1e}")
            worst = max(worst, logits / 1e-4, loss / 1e-5, gradient / 1e-4, later / 1e-4)
    with capsys.disabled():
        print(f"\n{len(rows)} combinations")
        print(f"{'layout':76} {'logits':>9} {'loss':>9} {'gradient':>9} {'loss 5':>9}")
        print("\n".join(rows))
    assert len(rows) >= 60
    assert worst <= 1.0
