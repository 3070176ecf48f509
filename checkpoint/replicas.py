"""Copies of a tensor that must hold the same bytes: replicated weights, and the copy of a tied output head."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from checkpoint.ranges import Sources
from checkpoint.rules.base import Weight
from checkpoint.stores.base import WeightStore, raise_problems
from mindspeed_mm.storage.tensors import StoredTensor

_STEP_BYTES = 1 << 20


def check_replicas(store: WeightStore, weights: Iterable[Weight], sources: Sources) -> None:
    """Check that all copies of every tensor are equal.

    Raises:
        CheckpointError: with every tensor whose copies differ, and the files.
    """
    problems = []
    for weight in weights:
        first, *others = store.placements(weight)
        for other in others:
            for ours, theirs in zip(first.tensors, other.tensors, strict=True):
                offset = find_difference(sources, ours, theirs)
                if offset is not None:
                    where = f"{ours.path.parent.name} and {theirs.path.parent.name}"
                    problems.append(f"{weight.mm}: {where} differ at byte {offset:,} of the tensor")
    raise_problems("copies of one tensor differ (files of different checkpoints in one directory?)", problems)


def find_difference(sources: Sources, ours: StoredTensor, theirs: StoredTensor) -> int | None:
    """The first byte where two tensors of equal shape and dtype differ; None if they are equal."""
    step = min(_STEP_BYTES, max(ours.nbytes, 1))
    left, right = np.empty(step, np.uint8), np.empty(step, np.uint8)
    for start in range(0, ours.nbytes, step):
        count = min(step, ours.nbytes - start)
        sources.read_into(ours.path, ours.offset + start, left[:count].data)
        sources.read_into(theirs.path, theirs.offset + start, right[:count].data)
        # Comparing bytes objects is one memcmp: many times as fast as element by element.
        if left[:count].tobytes() != right[:count].tobytes():
            return start + int(np.not_equal(left[:count], right[:count]).argmax())
    return None
