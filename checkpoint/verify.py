"""Do two checkpoints hold the same weights? Any two, tensor by tensor, through the rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from checkpoint.job import Options
from checkpoint.load import recognise
from checkpoint.plans import UNSAID, Cut, check_plan_of_model, plan_of_checkpoint
from checkpoint.ranges import Sources, read_segment
from checkpoint.rules.base import RuleSet, Weight
from checkpoint.rules.qwen2vl import qwen2vl_rules, qwen2vl_rules_of_plan
from checkpoint.stores.base import Placement, WeightStore
from checkpoint.stores.hf import HfStore, read_model_config
from checkpoint.stores.mm import MmStore, choose_iteration
from checkpoint.transfer import segments_of
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.storage import layout
from mindspeed_mm.storage.manifest import check_manifest

if TYPE_CHECKING:
    from mindspeed_mm.config import Qwen2VLConfig
    from mindspeed_mm.plan import StagePlan


@dataclass(frozen=True, slots=True)
class Subject:
    """One of the two checkpoints."""

    path: Path
    cut: Cut = UNSAID
    """Layout of MM shards; not needed where a stage plan lies beside them."""
    iteration: layout.Iteration | None = None


@dataclass(frozen=True, slots=True)
class GroupDifference:
    """How the tensors of one rule differ."""

    name: str
    tensors: int
    different: int
    """Tensors that are not equal byte for byte."""
    largest: float
    """Largest absolute difference of two values; NaN where one of them is."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result, by tensor group, and the first difference in the order of the model."""

    groups: tuple[GroupDifference, ...]
    first: str | None

    @property
    def is_same(self) -> bool:
        """All weights are equal byte for byte."""
        return self.first is None

    def table(self) -> str:
        """One line per tensor group."""
        width = max(len(group.name) for group in self.groups)
        lines = [f"{'tensor group'.ljust(width)}  tensors  different  largest difference"]
        lines += [
            f"{group.name.ljust(width)}  {group.tensors:7d}  {group.different:9d}  {group.largest:.6g}"
            for group in self.groups
        ]
        return "\n".join(lines)


def verify(first: Subject, second: Subject, options: Options | None = None) -> Comparison:
    """Compare the weights of two checkpoints, each a Hugging Face or an MM directory.

    Raises:
        CheckpointError: one of them is damaged, or holds another model than its configuration or plan says.
        ConfigError: they are of different models.
    """
    options = options or Options()
    subjects = (first, second)
    for subject in subjects:
        if options.check_hashes:
            check_manifest(_folder(subject))
    model = next((read_model_config(s.path) for s in subjects if recognise(s.path) == "hf"), None)
    plans = [_plan(subject, model) for subject in subjects]
    if model is not None:
        rules = qwen2vl_rules(model)
    else:
        assert plans[0] is not None
        rules = qwen2vl_rules_of_plan(plans[0])
        for other, subject in zip(plans[1:], subjects[1:], strict=True):
            assert other is not None
            ours = plans[0]
            check_plan_of_model(
                other,
                vision_layers=ours.vision_layers,
                text_layers=ours.text_layers,
                is_tied=ours.is_tied,
                where=str(subject.path),
            )
    stores = [_open(subject, plan, rules) for subject, plan in zip(subjects, plans, strict=True)]
    with Sources() as sources:
        return _compare(stores[0], stores[1], rules, sources)


def _plan(subject: Subject, model: Qwen2VLConfig | None) -> StagePlan | None:
    if recognise(subject.path) == "hf":
        return None
    chosen = choose_iteration(subject.path, subject.iteration)
    is_tied = None if model is None else model.text_decoder.is_tied
    plan = plan_of_checkpoint(subject.path, chosen, subject.cut, is_tied=is_tied)
    if model is not None:
        check_plan_of_model(
            plan,
            vision_layers=model.vision_layers,
            text_layers=model.text_decoder.num_layers,
            is_tied=model.text_decoder.is_tied,
            where=str(subject.path),
        )
    return plan


def _open(subject: Subject, plan: StagePlan | None, rules: RuleSet) -> HfStore | MmStore:
    if plan is None:
        other = read_model_config(subject.path)
        problems = [
            f"{ours} is {list(ours.shape or ())} in one model and {list(theirs.shape or ())} in the other."
            for ours, theirs in zip(rules.rules, qwen2vl_rules(other).rules, strict=False)
            if ours.shape is not None and ours.shape != theirs.shape
        ]
        if problems:
            raise ConfigError(str(subject.path), problems)
        hf = HfStore.open(subject.path, rules.aliases)
        hf.check(rules)
        return hf
    mm = MmStore.open(subject.path, plan, rules, subject.iteration)
    mm.check()
    return mm


def _folder(subject: Subject) -> Path:
    if recognise(subject.path) == "hf":
        return subject.path
    return layout.iteration_dir(subject.path, choose_iteration(subject.path, subject.iteration))


def _compare(first: WeightStore, second: WeightStore, rules: RuleSet, sources: Sources) -> Comparison:
    groups: dict[str, list[float | None]] = {}
    named: str | None = None
    for weight in rules.weights:
        found = groups.setdefault(str(weight.rule), [])
        difference = _difference(weight, first.placements(weight), second.placements(weight), sources)
        found.append(None if difference is None else difference[0])
        if difference is not None and named is None:
            named = f"{weight.mm}: {difference[1]}"
    results = []
    for name, values in groups.items():
        different = [value for value in values if value is not None]
        largest = float(np.max(different)) if different else 0.0
        results.append(GroupDifference(name, len(values), len(different), largest))
    return Comparison(tuple(results), named)


def _difference(
    weight: Weight, ours: tuple[Placement, ...], theirs: tuple[Placement, ...], sources: Sources
) -> tuple[float, str] | None:
    """(largest difference, what it is) of the copies of one tensor; None if all are equal."""
    for one, other in ((ours[0], copy) for copy in (*theirs, *ours[1:])):
        if one.shape != other.shape:
            return float("nan"), f"shapes {list(one.shape)} and {list(other.shape)}"
        if one.dtype != other.dtype:
            return float("nan"), f"dtypes {one.dtype.name} and {other.dtype.name}"
        largest = 0.0
        is_equal = True
        for left, right in _pairs(weight, one, other, sources):
            if left.tobytes() != right.tobytes():  # one memcmp; views are compared element by element
                is_equal = False
                largest = float(np.maximum(largest, _largest(left, right, one.dtype.name)))
        if not is_equal:
            return largest, f"values differ by up to {largest:.6g}"
    return None


def _pairs(
    weight: Weight, one: Placement, other: Placement, sources: Sources
) -> Iterator[tuple[memoryview, memoryview]]:
    for number, segments in segments_of(str(weight.rule), one, other).items():
        path = other.tensors[number].path
        for segment in segments:
            for start, left in read_segment(sources, segment):
                right = memoryview(bytearray(len(left)))
                sources.read_into(path, segment.offset + start, right)
                yield left, right


def _largest(left: memoryview, right: memoryview, dtype: str) -> float:
    return float(np.max(np.abs(_as_floats(left, dtype) - _as_floats(right, dtype))))


def _as_floats(data: memoryview, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (np.frombuffer(data, "u2").astype("u4") << 16).view("f4").astype("f8")
    return np.frombuffer(data, {"float16": "f2", "float32": "f4", "float64": "f8"}[dtype]).astype("f8")
