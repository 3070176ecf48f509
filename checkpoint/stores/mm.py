"""A directory of MM shards: written by this project, by MindSpeed-MM's converter, or by a training run of either."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from checkpoint.rules.base import RuleSet, Split, StageWeight, Weight
from checkpoint.stores.base import Placement, check_dtypes, place, raise_problems
from mindspeed_mm.errors import CheckpointError, ConfigError
from mindspeed_mm.plan import Part, Stage, StagePlan
from mindspeed_mm.storage import layout
from mindspeed_mm.storage.shard import ShardIndex, index_shard
from mindspeed_mm.storage.tensors import StoredTensor

logger = logging.getLogger(__name__)

Rank = tuple[int, int]
"""(tp_rank, pp_rank)"""


@dataclass(frozen=True)
class MmStore:
    """The shards of one iteration, under a plan and rules."""

    root: Path
    iteration: layout.Iteration
    plan: StagePlan
    rules: RuleSet
    _indexes: dict[Rank, ShardIndex] = field(default_factory=dict)
    _chunks: dict[Rank, Mapping[int, Mapping[str, StoredTensor]]] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path, plan: StagePlan, rules: RuleSet, iteration: layout.Iteration | None = None) -> MmStore:
        """The shards of an iteration; none is read yet.

        Args:
            iteration: None for the one that the tracker names.
        Raises:
            CheckpointError: no such iteration, or its rank directories are not those of the plan.
        """
        root = Path(root)
        store = cls(root, choose_iteration(root, iteration), plan, rules)
        store._check_ranks()
        return store

    @property
    def folder(self) -> Path:
        """The directory of the iteration."""
        return layout.iteration_dir(self.root, self.iteration)

    @property
    def ranks(self) -> list[Rank]:
        """Every (tp_rank, pp_rank), pipeline ranks outside."""
        return [(tp_rank, pp_rank) for pp_rank in range(self.plan.pp_size) for tp_rank in range(self.plan.tp_size)]

    def shard_path(self, rank: Rank) -> Path:
        """The shard file of a rank."""
        return self.folder / layout.rank_name(*rank, self.plan.pp_size) / layout.SHARD_FILE

    def index(self, rank: Rank) -> ShardIndex:
        """The content of a rank's shard file without its tensors' bytes."""
        if rank not in self._indexes:
            self._indexes[rank] = index_shard(self.shard_path(rank))
        return self._indexes[rank]

    def tensors(self, tp_rank: int, stage: Stage) -> Mapping[str, StoredTensor]:
        """The weights of one stage by local MM name, as they lie in a rank's file.

        Raises:
            CheckpointError: the file is damaged, or holds another number of virtual chunks than the plan.
        """
        rank = (tp_rank, stage.pp_rank)
        if rank not in self._chunks:
            chunks = self.index(rank).chunks()
            if len(chunks) != self.plan.vp_size:
                raise CheckpointError(
                    f"{self.shard_path(rank)} holds {len(chunks)} virtual chunks; expected {self.plan.vp_size}. Give "
                    "the stage lists that the checkpoint was written with."
                )
            self._chunks[rank] = chunks
        return self._chunks[rank][stage.vp_stage]

    def check(self) -> None:
        """Check that every shard holds exactly the tensors of its stage, in the right shapes.

        Raises:
            CheckpointError: with every tensor that is missing, left over, or of another shape or dtype.
        """
        problems = []
        for stage in self.plan.stages:
            wanted = {entry.name for entry in self.rules.for_stage(self.plan, stage)}
            copies = self._copies(stage)
            for tp_rank in range(self.plan.tp_size):
                found = self.tensors(tp_rank, stage).keys()
                place_name = f"{layout.rank_name(tp_rank, stage.pp_rank, self.plan.pp_size)}" + (
                    f", model{stage.vp_stage}" if self.plan.vp_size > 1 else ""
                )
                problems += [f"{place_name}: {name} is missing" for name in sorted(wanted - found - copies)]
                problems += [
                    f"{place_name}: {name} has no place on this stage" for name in sorted(found - wanted - copies)
                ]
        raise_problems(f"{self.folder} does not hold the stages of the plan", problems)
        check_dtypes((weight, placement) for weight in self.rules.weights for placement in self.placements(weight))
        self._check_shapes()

    def placements(self, weight: Weight) -> tuple[Placement, ...]:
        """Every copy of a whole tensor: one per rank where it is not split, and those of a tied output head."""
        found = []
        for stage, name in self.homes[weight.mm]:
            parts = [self._tensor(tp_rank, stage, name) for tp_rank in range(self.plan.tp_size)]
            split = weight.rule.tp
            shape = weight.rule.shape or split.full_shape(parts[0].shape, self.plan.tp_size)
            tp_layout = split.layout(self.plan.tp_size)
            if split is Split.REPLICATED:
                found += [place(weight, [name], [part], tp_layout, shape) for part in parts]
            else:
                found.append(place(weight, [name] * len(parts), parts, tp_layout, shape))
        return tuple(found)

    def stage_placement(self, entry: StageWeight, stage: Stage, tp_rank: int) -> StoredTensor:
        """One rank's shard of a tensor of a stage, its shape checked."""
        tensor = self._tensor(tp_rank, stage, entry.name)
        if entry.rule.shape is not None:
            split = entry.rule.tp
            shape = split.layout(self.plan.tp_size).part_shapes(entry.rule.shape)[
                tp_rank if split is not Split.REPLICATED else 0
            ]
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{tensor.path}: {entry.name} has shape {list(tensor.shape)}; expected {list(shape)}."
                )
        return tensor

    def _tensor(self, tp_rank: int, stage: Stage, name: str) -> StoredTensor:
        tensor = self.tensors(tp_rank, stage).get(name)
        if tensor is None:
            raise CheckpointError(f"{self.shard_path((tp_rank, stage.pp_rank))} lacks {name}.")
        return tensor

    @cached_property
    def homes(self) -> dict[str, list[tuple[Stage, str]]]:
        """Canonical name -> the stages that hold the tensor, with its local name there; copies of a tied head last.

        Some checkpoints of other projects lack that copy where it should be, or have one where none should be: both are
        read, as the embedding holds the same numbers.
        """
        homes: dict[str, list[tuple[Stage, str]]] = {}
        for stage in self.plan.stages:
            for rule, layer, name in self.rules.for_stage(self.plan, stage):
                if name != rule.copy_mm:
                    homes.setdefault(rule.mm_name(layer), []).append((stage, name))
        for stage in self.plan.stages:
            for rule in self.rules.rules:
                if rule.copy_mm in self._copies(stage) and rule.copy_mm in self.tensors(0, stage):
                    homes[rule.mm].append((stage, rule.copy_mm))
        return homes

    def _copies(self, stage: Stage) -> frozenset[str]:
        """Names that a stage may have for the copy of a tied head."""
        if Part.LM_HEAD not in stage.parts:
            return frozenset()
        return frozenset(rule.copy_mm for rule in self.rules.rules if rule.copy_mm)

    def _check_ranks(self) -> None:
        present = {entry.name for entry in self.folder.iterdir() if layout.parse_rank_name(entry.name)}
        wanted = {layout.rank_name(*rank, self.plan.pp_size) for rank in self.ranks}
        problems = [f"{name} is missing" for name in sorted(wanted - present)]
        problems += [f"{name} does not belong to the plan" for name in sorted(present - wanted)]
        sizes = f"tp_size {self.plan.tp_size}, pp_size {self.plan.pp_size}"
        raise_problems(f"{self.folder} does not have the rank directories of {sizes}", problems)

    def _check_shapes(self) -> None:
        """Without a model's sizes, at least all layers of a rule have one shape."""
        first: dict[str, tuple[Weight, Placement]] = {}
        problems = []
        for weight in self.rules.weights:
            placement = self.placements(weight)[0]
            other, reference = first.setdefault(weight.rule.mm, (weight, placement))
            if placement.shape != reference.shape:
                problems.append(
                    f"{weight.mm} has shape {list(placement.shape)}, but {other.mm} has {list(reference.shape)}"
                )
        raise_problems(f"{self.folder}: layers of one kind differ in shape", problems)


def choose_iteration(root: Path, iteration: layout.Iteration | None) -> layout.Iteration:
    """The iteration to read: the given one, or the tracker's, or the only one that there is.

    Raises:
        CheckpointError: there is no such iteration, or the tracker is unusable and there are several.
    """
    there = layout.list_iterations(root)
    if not there:
        raise CheckpointError(f"{root} holds no checkpoint: neither 'release' nor a directory iter_* is there.")
    if iteration is None:
        try:
            iteration = layout.read_tracker(root)
        except CheckpointError as error:
            if len(there) > 1:
                raise CheckpointError(
                    f"{error}\n  Several iterations are there ({_listed(there)}); choose one."
                ) from error
            logger.warning("%s Taking the only iteration that is there: %s.", error, there[0])
            iteration = there[0]
    if iteration not in there:
        raise CheckpointError(f"{root} has no iteration {iteration}; there are: {_listed(there)}.")
    return iteration


def read_plan(root: Path, iteration: layout.Iteration) -> StagePlan | None:
    """The plan that lies beside the shards; None for checkpoints of other projects.

    Raises:
        CheckpointError: the file is there but is no plan.
    """
    path = layout.iteration_dir(root, iteration) / layout.PLAN_FILE
    if not path.is_file():
        return None
    try:
        return StagePlan.from_json(path.read_text(encoding="utf-8"), where=str(path))
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def _listed(iterations: list[layout.Iteration]) -> str:
    return ", ".join(map(str, iterations))
