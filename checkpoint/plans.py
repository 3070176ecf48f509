"""Stage plans of the converter: from lists on the command line, and from what lies beside the shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from checkpoint.ranges import Sources
from checkpoint.replicas import find_difference
from checkpoint.rules.base import RuleSet
from checkpoint.rules.qwen2vl import FAMILY, MM_HEAD
from checkpoint.stores.mm import read_plan
from mindspeed_mm.errors import CheckpointError, ConfigError
from mindspeed_mm.plan import StagePlan, Tower
from mindspeed_mm.storage import layout
from mindspeed_mm.storage.shard import index_shard

Lists = Sequence[int] | Sequence[Sequence[int]]
"""Layers per stage: flat (one entry per pipeline rank) or nested (one such list per virtual chunk)."""
NAMES = ("vit_pp_layers", "llm_pp_layers")


@dataclass(frozen=True, slots=True)
class Cut:
    """How a checkpoint is to be cut, or is said to be cut."""

    vit_pp_layers: Lists | None
    """None: no vision tower, or not said."""
    llm_pp_layers: Lists | None
    """None: not said."""
    tp_size: int | None = None
    """None: not said."""


UNSAID = Cut(None, None)
"""Nothing is said about the layout of a checkpoint."""


def build_plan(
    cut: Cut, *, vision_layers: int, text_layers: int, is_tied: bool, rules: RuleSet | None = None
) -> StagePlan:
    """The plan of lists, checked against a model's layers and sizes.

    Raises:
        ConfigError: with everything that is wrong.
    """
    tp_size = cut.tp_size or 1
    problems = [] if rules is None else rules.tp_problems(tp_size)
    if cut.llm_pp_layers is None:
        raise ConfigError("parallel_config", [*problems, "llm_pp_layers is required."])
    text = nested(cut.llm_pp_layers)
    vision = nested(cut.vit_pp_layers) if cut.vit_pp_layers is not None else tuple((0,) * len(row) for row in text)
    try:
        plan = StagePlan.from_lists(
            FAMILY,
            vision,
            text,
            tp_size=tp_size,
            vision_layers=vision_layers,
            text_layers=text_layers,
            is_tied=is_tied,
            names=NAMES,
        )
    except ConfigError as error:
        raise ConfigError("parallel_config", [*problems, *error.problems]) from None
    if problems:
        raise ConfigError("parallel_config", problems)
    return plan


def nested(lists: Lists, pp_size: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Nested lists of nested or flat ones.

    Args:
        pp_size: a flat list is cut into chunks of this many entries; None for one chunk.
    """
    rows = [row for row in lists if not isinstance(row, int)]
    if rows:
        return tuple(tuple(row) for row in rows)
    flat = tuple(entry for entry in lists if isinstance(entry, int))
    size = pp_size or len(flat)
    if size == 0 or len(flat) % size:
        return (flat,)
    return tuple(flat[start : start + size] for start in range(0, len(flat), size))


def plan_of_checkpoint(root: Path, iteration: layout.Iteration, cut: Cut, *, is_tied: bool | None = None) -> StagePlan:
    """The plan that an MM checkpoint was written with: the one beside its shards, or the one that lists describe.

    Args:
        cut: what the command line says; where the plan is saved it is not needed, but must agree.
        is_tied: whether the output head is the token embedding; None to find out from the shards.
    Raises:
        ConfigError: lists are missing, wrong, or disagree with the saved plan.
        CheckpointError: the shards do not show whether the head is tied.
    """
    saved = read_plan(root, iteration)
    if saved is not None:
        _check_agreement(saved, cut, is_tied)
        return saved
    if cut.llm_pp_layers is None:
        raise ConfigError(
            "parallel_config",
            f"{layout.iteration_dir(root, iteration)} has no {layout.PLAN_FILE}, so its layout must be said: "
            "llm_pp_layers, vit_pp_layers and tp_size.",
        )
    pp_size = _pp_size(layout.iteration_dir(root, iteration))
    text = nested(cut.llm_pp_layers, pp_size)
    vision = None if cut.vit_pp_layers is None else nested(cut.vit_pp_layers, pp_size)
    if is_tied is None:
        is_tied = _is_tied(root, iteration, len(text[0]), len(text))
    return build_plan(
        Cut(vision, text, cut.tp_size),
        vision_layers=sum(chain(*vision)) if vision is not None else 0,
        text_layers=sum(chain(*text)),
        is_tied=is_tied,
    )


def check_plan_of_model(plan: StagePlan, *, vision_layers: int, text_layers: int, is_tied: bool, where: str) -> None:
    """Check that a plan is one of a given model.

    Raises:
        ConfigError: both numbers of everything that differs.
    """
    pairs = {
        "vision layers": (plan.vision_layers, vision_layers),
        "text layers": (plan.text_layers, text_layers),
        "tied output head": (plan.is_tied, is_tied),
    }
    problems = [
        f"{what}: the checkpoint has {ours}, the model {theirs}."
        for what, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    if problems:
        raise ConfigError(where, problems)


def _check_agreement(saved: StagePlan, cut: Cut, is_tied: bool | None) -> None:
    problems = []
    for name, lists, tower in ((NAMES[0], cut.vit_pp_layers, Tower.VISION), (NAMES[1], cut.llm_pp_layers, Tower.TEXT)):
        if lists is not None and nested(lists, saved.pp_size) != saved.lists_of(tower):
            problems.append(
                f"{name} = {_plain(lists)}, but the checkpoint was written with {_plain(saved.lists_of(tower))}."
            )
    if cut.tp_size not in (None, saved.tp_size):
        problems.append(f"tp_size = {cut.tp_size}, but the checkpoint was written with {saved.tp_size}.")
    if is_tied not in (None, saved.is_tied):
        problems.append(f"tie_word_embeddings = {is_tied}, but the checkpoint was written with {saved.is_tied}.")
    if problems:
        raise ConfigError(layout.PLAN_FILE, problems)


def _plain(lists: Lists) -> list[object]:
    return [list(row) if not isinstance(row, int) else row for row in lists]


def _pp_size(folder: Path) -> int:
    ranks = [rank for entry in folder.iterdir() if (rank := layout.parse_rank_name(entry.name))]
    if not ranks:
        raise CheckpointError(f"{folder} holds no rank directories (mp_rank_*).")
    return max(pp_rank for _, pp_rank in ranks) + 1


def _is_tied(root: Path, iteration: layout.Iteration, pp_size: int, vp_size: int) -> bool:
    """Whether the last stage has no output head of its own, or one that equals the embedding."""
    folder = layout.iteration_dir(root, iteration)
    last = index_shard(folder / layout.rank_name(0, pp_size - 1, pp_size) / layout.SHARD_FILE)
    chunks = last.chunks()
    if vp_size - 1 not in chunks:
        raise CheckpointError(f"{last.path} holds {len(chunks)} virtual chunks; expected {vp_size}.")
    head = chunks[vp_size - 1].get(MM_HEAD)
    if head is None:
        return True
    for pp_rank in range(pp_size):
        shard = index_shard(folder / layout.rank_name(0, pp_rank, pp_size) / layout.SHARD_FILE)
        for tensors in shard.chunks().values():
            embedding = tensors.get("text_decoder.embedding.word_embeddings.weight")
            if embedding is not None:
                with Sources() as sources:
                    same_kind = (embedding.shape, embedding.dtype) == (head.shape, head.dtype)
                    return same_kind and find_difference(sources, embedding, head) is None
    raise CheckpointError(f"{folder} holds no token embedding.")
