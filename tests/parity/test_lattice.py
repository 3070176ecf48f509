"""The lattice of layouts against transformers, and a table of its deviations: `make lattice`.

The covering subset in `test_parity.py` runs with every test run; this one takes a quarter of an hour on two cores.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from checkpoint.convert import mm_to_hf
from tests.dist.harness import run_ranks
from tests.parity.engine import Case
from tests.parity.problem import Layers, make_samples, read_config
from tests.parity.reference import solve
from tests.parity.test_parity import KINDS, SIZE, load_all, relative_max, relative_norm
from tools.make_tiny_checkpoint import make_tiny_checkpoint

LISTS: dict[tuple[int, int], list[tuple[Layers, Layers]]] = {
    (1, 1): [((), ())],
    (2, 1): [((4, 0), (1, 3)), ((3, 1), (0, 4))],
    (3, 1): [((4, 0, 0), (1, 1, 2)), ((2, 2, 0), (0, 2, 2))],
    (4, 1): [((4, 0, 0, 0), (1, 1, 1, 1)), ((1, 3, 0, 0), (0, 0, 2, 2))],
    (2, 2): [(((4, 0), (0, 0)), ((0, 1), (2, 1))), (((1, 2), (1, 0)), ((0, 0), (0, 4)))],
    (4, 2): [(((2, 2, 0, 0), (0, 0, 0, 0)), ((0, 0, 1, 0), (1, 1, 0, 1)))],
}
"""Stage lists by (PP, VPP): vision before text, on one stage and on two."""


def _cases() -> list[Case]:
    cases = []
    for (pp, vp), tp, cp, dp in product(LISTS, (1, 2, 4), (1, 2, 3), (1, 2)):
        if pp * tp * cp * dp > 4 or tp == 4:
            continue  # four processes at once; the model has two key-value heads, which four tensor ranks cannot share
        for number, (vision, text) in enumerate(LISTS[pp, vp]):
            if any(sum(layers) == 0 for layers in _stages(vision, text)):
                continue
            base = {"tp": tp, "pp": pp, "vp": vp, "cp": cp, "dp": dp, "vision": vision, "text": text, "steps": 5}
            cases.append(Case(**base, recompute="uniform" if number else ""))
            cases.append(Case(**base, sp=tp > 1, distributed_optimizer=True, recompute="" if number else "block"))
    return cases


def _stages(vision: Layers, text: Layers) -> list[tuple[int, int]]:
    def flat(layers: Layers) -> list[int]:
        return [n for entry in layers for n in (entry if isinstance(entry, tuple) else (entry,))]

    return list(zip(flat(vision), flat(text), strict=True))


CASES = _cases()


@pytest.mark.lattice
def test_lattice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = {
        kind: make_tiny_checkpoint(tmp_path / kind, tied=kind == "tied", seed=3, vocab_size=320, size=SIZE)
        for kind in KINDS
    }
    references = {}
    for kind, path in checkpoints.items():
        config = read_config(path)
        references[kind] = solve(path, make_samples(config), config["image_token_id"], steps=5)
    rows, worst = [], 0.0
    for world_size in sorted({case.world_size for case in CASES}):
        cases = [case for case in CASES if case.world_size == world_size]
        out = tmp_path / "gradients"
        solved = run_ranks(
            world_size, "tests.parity.engine:solve_all", cases, list(checkpoints.values()), out, timeout_s=3000
        )[-1]
        for case, kind in product(cases, KINDS):
            key, reference = f"{case.name}-{kind}", references[kind]
            result = solved[key]
            logits = max(
                relative_max(a, b) for a, b in zip(result.logits, reference.logits[case.dp - 1 :: case.dp], strict=True)
            )
            loss = abs(result.loss - reference.loss) / reference.loss
            later = abs(result.losses[-1] - reference.losses[-1]) / reference.losses[-1]
            gradient = float("nan")
            if case.dp == 1 and not (case.cp > 1 and case.distributed_optimizer):
                mm_to_hf(out / key, checkpoints[kind], tmp_path / "hf" / key)
                ours = load_all(tmp_path / "hf" / key)
                gradient = max(relative_norm(ours[name], theirs) for name, theirs in reference.grads.items())
            rows.append(f"{key:60} {logits:9.1e} {loss:9.1e} {gradient:9.1e} {later:9.1e}")
            bounds = (logits / 1e-4, loss / 1e-5, 0.0 if gradient != gradient else gradient / 1e-4, later / 1e-4)
            worst = max(worst, *bounds)
    with capsys.disabled():
        print(f"\n{len(rows)} combinations; gradients are compared where one rank holds them whole")
        print(f"{'layout':60} {'logits':>9} {'loss':>9} {'gradient':>9} {'loss 5':>9}")
        print("\n".join(rows))
    assert len(rows) >= 60
    assert worst <= 1.0
