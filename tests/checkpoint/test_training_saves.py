"""Training saves of the real engine: converted, re-split, and continued under another layout with the same loss."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from checkpoint.convert import mm_to_hf, resplit
from checkpoint.plans import UNSAID, Cut
from checkpoint.verify import Subject, verify
from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.plan import StagePlan, Tower
from mindspeed_mm.storage.shard import read_shard
from tests.dist.harness import run_ranks
from tests.dist.jobs import Workplace, arguments, make_workplace
from tests.dist.test_resume import unequal


@dataclass(frozen=True)
class Run:
    """How a training run is spread."""

    name: str
    world_size: int
    flags: tuple[str, ...] = ()
    vision: tuple[int, ...] = (4,)
    text: tuple[int, ...] = (4,)
    tp_size: int = 1

    @property
    def cut(self) -> Cut:
        """The layout of its saves."""
        return Cut(self.vision, self.text, self.tp_size)


TP2, PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
FLAT = ("--use-distributed-optimizer",)
ONE, ONE_FLAT = Run("one", 1), Run("one-flat", 1, FLAT)
BF16, BF16_FLAT = Run("bf16", 1, ("--bf16",)), Run("bf16-flat", 1, ("--bf16", *FLAT))
TWO_STAGES, TWO_RANKS = Run("pp2", 2, PP2, (3, 1), (0, 4)), Run("tp2", 2, TP2, tp_size=2)
TWO_STAGES_FLAT, TWO_RANKS_FLAT = (
    Run("pp2-flat", 2, (*PP2, *FLAT), (4, 0), (1, 3)),
    Run("tp2-flat", 2, (*TP2, *FLAT), tp_size=2),
)
CONTINUED = [
    (TWO_STAGES, TWO_RANKS),
    (TWO_RANKS, ONE),
    (ONE, TWO_STAGES),
    (TWO_STAGES_FLAT, TWO_RANKS_FLAT),
    (TWO_RANKS_FLAT, TWO_STAGES_FLAT),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("saves"))


@pytest.fixture(scope="module")
def saves(place: Workplace) -> dict[str, Path]:
    """Run name -> save directory of 4 steps, with saves at 2 and 4; made when first asked for."""

    class Saves(dict):
        def __missing__(self, name: str) -> Path:
            run = next(
                run for pair in [*CONTINUED, (BF16, BF16_FLAT), (ONE_FLAT, ONE)] for run in pair if run.name == name
            )
            self[name] = place.root / f"save-{name}"
            train(place, run, ["--load", str(place.hf), "--save", str(self[name])])
            return self[name]

    return Saves()


def train(place: Workplace, run: Run, extra: list[str]) -> None:
    model = place.model(run.vision, run.text)
    command = arguments(place, model, *run.flags, "--train-iters", "4", "--save-interval", "2", *extra)
    assert run_ranks(run.world_size, "tests.dist.jobs:train", [command]) == [[0]] * run.world_size


def losses(save: Path) -> dict[int, tuple[float, float]]:
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: (row["loss"], row["grad_norm"]) for row in rows}


@pytest.mark.parametrize(("old", "new"), CONTINUED, ids=lambda run: run.name)
def test_training_goes_on_under_another_layout_with_the_same_loss(
    old: Run, new: Run, place: Workplace, saves: dict[str, Path], tmp_path: Path
) -> None:
    resplit(saves[old.name], tmp_path / "new", UNSAID, new.cut, iteration=2)
    train(place, new, ["--load", str(tmp_path / "new"), "--save", str(tmp_path / "new")])
    expected, found = losses(saves[old.name]), losses(tmp_path / "new")
    assert sorted(found) == [3, 4]
    for step in (3, 4):
        # Sums over another number of ranks: fp32 rounding only, as between any two layouts.
        assert found[step] == pytest.approx(expected[step], rel=1e-4), step
    # The optimizer's moments went along, too: both runs end with the same weights.
    assert verify(Subject(saves[old.name]), Subject(tmp_path / "new")).groups
    largest = max(group.largest for group in verify(Subject(saves[old.name]), Subject(tmp_path / "new")).groups)
    assert largest < 1e-4


@pytest.mark.parametrize("run", [ONE, ONE_FLAT, BF16, BF16_FLAT, TWO_STAGES, TWO_RANKS_FLAT], ids=lambda run: run.name)
def test_a_save_comes_back_bit_for_bit(run: Run, saves: dict[str, Path], tmp_path: Path) -> None:
    save = saves[run.name]
    plan = StagePlan.from_json((save / "iter_0000004" / "stage_plan.json").read_text())
    resplit(save, tmp_path / "there", UNSAID, Cut([[3, 1], [0, 0]], [[0, 1], [2, 1]], 2))
    resplit(
        tmp_path / "there",
        tmp_path / "back",
        UNSAID,
        Cut(plan.lists_of(Tower.VISION), plan.lists_of(Tower.TEXT), plan.tp_size),
    )
    for path in sorted(save.glob("iter_0000004/*/*.pt")):
        theirs = read_shard(tmp_path / "back" / path.relative_to(save))
        ours = read_shard(path)
        if path.name == "model_optim_rng.pt":
            ours["model"] = {name: value for name, value in ours["model"].items() if value is not None}
        is_first = path.parent.name in ("mp_rank_00", "mp_rank_00_000")
        # Random states of ranks beyond the smaller layout are those of its last rank.
        found = [place for place in unequal(ours, theirs, "") if is_first or "/rng_state/" not in place]
        assert not found


def test_arguments_tell_the_new_sizes(saves: dict[str, Path], tmp_path: Path) -> None:
    resplit(saves["one"], tmp_path / "new", UNSAID, Cut([[3, 1], [0, 0]], [[0, 1], [2, 1]], 2))
    args = read_shard(tmp_path / "new" / "iter_0000004" / "mp_rank_01_001" / "model_optim_rng.pt")["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert args.virtual_pipeline_model_parallel_size == 2
    assert args.consumed_train_samples == 16


def test_a_save_is_exported(place: Workplace, saves: dict[str, Path], tmp_path: Path) -> None:
    mm_to_hf(saves["pp2"], place.hf, tmp_path / "hf")
    assert verify(Subject(saves["pp2"]), Subject(tmp_path / "hf")).is_same
    assert not verify(Subject(place.hf), Subject(tmp_path / "hf")).is_same


def test_the_weights_of_a_save_alone(saves: dict[str, Path], tmp_path: Path) -> None:
    resplit(saves["pp2"], tmp_path / "new", UNSAID, ONE.cut, weights_only=True)
    assert read_shard(tmp_path / "new" / "release" / "mp_rank_00" / "model_optim_rng.pt").keys() == {
        "model",
        "checkpoint_version",
    }
    assert verify(Subject(saves["pp2"]), Subject(tmp_path / "new")).is_same


def test_frozen_modules_have_no_state_and_get_none(place: Workplace, tmp_path: Path) -> None:
    model = place.model((4, 0), (1, 3))
    content = json.loads(model.read_text())
    content["image_encoder"]["vision_encoder"]["freeze"] = True
    model.write_text(json.dumps(content))
    command = arguments(place, model, *PP2, "--train-iters", "2", "--save-interval", "2")
    save = tmp_path / "save"
    try:
        assert run_ranks(2, "tests.dist.jobs:train", [[*command, "--load", str(place.hf), "--save", str(save)]]) == [
            [0],
            [0],
        ]
    finally:
        place.model((4, 0), (1, 3))
    resplit(save, tmp_path / "one", UNSAID, ONE.cut)
    shard = read_shard(tmp_path / "one" / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt")
    trained = [name for name in shard["model"] if not name.startswith("image_encoder.encoder.")]
    assert len(shard["optimizer"]["state"]) == len(trained)
    for number, name in enumerate(trained):
        assert shard["optimizer"]["state"][number]["exp_avg"].shape == shard["model"][name].shape


def test_optimizer_state_of_other_weights_is_refused(saves: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saves["one-flat"], tmp_path / "save")
    path = tmp_path / "save" / "iter_0000004" / "mp_rank_00" / "distrib_optim.pt"
    state = read_shard(path, mmap=False)
    buffer = next(iter(state[0].values()))
    buffer["param"] = buffer["param"].roll(64)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="cannot be matched with the weights"):
        resplit(tmp_path / "save", tmp_path / "new", UNSAID, TWO_STAGES.cut)
    resplit(tmp_path / "save", tmp_path / "new", UNSAID, TWO_STAGES.cut, weights_only=True)


def test_a_missing_file_of_the_distributed_state_is_named(saves: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saves["one-flat"], tmp_path / "save")
    (tmp_path / "save" / "iter_0000004" / "mp_rank_00" / "distrib_optim.pt").unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: there is no distrib_optim\.pt"):
        resplit(tmp_path / "save", tmp_path / "new", UNSAID, TWO_STAGES.cut)
