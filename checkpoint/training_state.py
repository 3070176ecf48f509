"""The optimizer state of a training save by parameter: which bytes belong to which weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, permutations, product
from math import prod
from typing import Any, NamedTuple

from checkpoint.flat_buffers import DEFAULT_BUCKET_SIZE, FlatLayout, flat_layout
from checkpoint.ranges import Sources
from checkpoint.rules.base import RuleSet, Split, StageWeight, Weight
from checkpoint.rules.qwen2vl import MM_HEAD
from checkpoint.stores.base import Placement
from checkpoint.stores.mm import MmStore, Rank
from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.plan import Stage, StagePlan
from mindspeed_mm.storage import layout
from mindspeed_mm.storage.pickle_tree import Call
from mindspeed_mm.storage.shard import ShardIndex, as_items, index_shard
from mindspeed_mm.storage.tensors import StoredTensor

MAIN = "param"
"""Channel of the optimizer's own fp32 copy of a weight."""
_MODULES = ("image_encoder.encoder.", "image_encoder.projector.", "text_decoder.")
_EMBEDDING = "text_decoder.embedding.word_embeddings.weight"
_ADVICE = "Re-split the weights alone with --cfg.weights_only true."


class Param(NamedTuple):
    """A parameter of one rank."""

    stage: Stage
    weight: StageWeight
    shape: tuple[int, ...]
    """Of this rank's shard."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a save does not say about its optimizer state; found out by trying which one fits sizes and values."""

    trained: frozenset[str]
    """Prefixes of the modules that are trained; the others are frozen."""
    alone: frozenset[str] = frozenset()
    """Names of parameters with a bucket of their own."""
    bucket_size: int | None = None
    groups: tuple[tuple[bool, bool], ...] = ()
    """The (no weight decay, scaled learning rate) of every parameter group; empty where there is one group."""

    def trained_params(self, plan: StagePlan, rules: RuleSet, rank: Rank, shapes: Shapes) -> list[Param]:
        """The trained parameters of a rank, in the order in which Megatron numbers them."""
        return [
            Param(stage, entry, shapes.of(stage, entry, rank))
            for stage in plan.stages_of_rank(rank[1])
            for entry in rules.for_stage(plan, stage)
            if any(entry.name.startswith(module) for module in self.trained)
        ]

    def layout(self, params: Sequence[Param]) -> FlatLayout:
        """Where the parameters of one chunk lie in its flat state."""
        alone = [param.weight.name in self.alone for param in params]
        return flat_layout([prod(param.shape) for param in params], alone=alone, bucket_size=self.bucket_size)


class Shapes:
    """Shapes of shards under a plan, from the whole shapes of all tensors."""

    def __init__(self, plan: StagePlan, whole: Mapping[str, tuple[int, ...]]) -> None:
        self._plan = plan
        self._whole = whole

    def of(self, stage: Stage, entry: StageWeight, rank: Rank) -> tuple[int, ...]:
        """The shape of a rank's shard of one tensor."""
        split = entry.rule.tp
        shapes = split.layout(self._plan.tp_size).part_shapes(self._whole[entry.rule.mm_name(entry.layer)])
        return shapes[0 if split is Split.REPLICATED else rank[0]]


Place = tuple[Rank, int, str]
"""Rank, virtual stage and local name of a parameter."""


@dataclass(frozen=True)
class TrainingState:
    """The optimizer state of a save."""

    form: Form
    is_distributed: bool
    channels: Mapping[str, Mapping[Place, StoredTensor]]
    """Kind of value -> where those of each parameter lie, as a tensor of the parameter's shape."""
    contents: Mapping[Rank, Mapping[str, Any]]
    """What each rank's shard file holds beside the weights."""
    buffer_key: Any = None
    """Key of a flat buffer: its dtypes."""

    def placement(self, channel: str, weight: Weight, store: MmStore) -> Placement:
        """Where the values of a weight lie."""
        stage, name = store.homes[weight.mm][0]
        values = self.channels[channel]
        count = weight.rule.tp.num_parts(store.plan.tp_size)
        tensors = tuple(values[(tp_rank, stage.pp_rank), stage.vp_stage, name] for tp_rank in range(count))
        shape = store.placements(weight)[0].shape
        return Placement(tensors, weight.rule.tp.layout(store.plan.tp_size), shape)

    def optimizer(self) -> Any:
        """The optimizer part of a rank that has one."""
        return next(content["optimizer"] for content in self.contents.values() if "optimizer" in content)


def contents_of(store: MmStore) -> dict[Rank, dict[str, Any]]:
    """Everything that each rank's shard file holds."""
    return {rank: dict(as_items(store.index(rank).tree, where=str(store.shard_path(rank)))) for rank in store.ranks}


def read_training_state(store: MmStore, sources: Sources) -> TrainingState | None:
    """The optimizer state of a training save; None where the save has none.

    Raises:
        CheckpointError: it is there, but no arrangement of parameters fits it.
    """
    contents = contents_of(store)
    if not any("optimizer" in content for content in contents.values()):
        return None
    files = {rank: store.shard_path(rank).with_name(layout.DISTRIB_FILE) for rank in store.ranks}
    present = {rank: index_shard(path) for rank, path in files.items() if path.exists()}
    is_plain = any("state" in _inner(content["optimizer"]) for content in contents.values() if "optimizer" in content)
    reader = _Reader(store, sources, contents, present)
    if is_plain == bool(present):
        found = "there is" if present else "there is no"
        raise CheckpointError(
            f"{store.folder}: the optimizer state is incomplete: {found} {layout.DISTRIB_FILE}. {_ADVICE}"
        )
    for form in reader.forms(is_distributed=not is_plain):
        channels = reader.plain_channels(form) if is_plain else reader.flat_channels(form)
        if channels is not None and reader.main_values_agree(channels):
            return TrainingState(form, not is_plain, channels, contents, reader.buffer_key)
    raise CheckpointError(
        f"{store.folder}: the optimizer state cannot be matched with the weights: no choice of frozen modules and "
        f"parameter groups fits its sizes and values. {_ADVICE}"
    )


def _inner(optimizer: Any) -> dict[str, Any]:
    """torch's part of a saved optimizer; mixed precision and the distributed optimizer keep it under `optimizer`."""
    content = dict(as_items(optimizer, where="optimizer"))
    return dict(as_items(content["optimizer"], where="optimizer")) if "optimizer" in content else content


class _Reader:
    def __init__(
        self,
        store: MmStore,
        sources: Sources,
        contents: Mapping[Rank, Mapping[str, Any]],
        files: Mapping[Rank, ShardIndex],
    ) -> None:
        self._store = store
        self._sources = sources
        self._contents = contents
        self._files = files
        self._shapes = Shapes(store.plan, {w.mm: store.placements(w)[0].shape for w in store.rules.weights})
        self.buffer_key: Any = None

    def forms(self, *, is_distributed: bool) -> Iterator[Form]:
        """Every form that a save may have, likely ones first."""
        for count in range(len(_MODULES), 0, -1):
            for trained in map(frozenset, combinations(_MODULES, count)):
                if not is_distributed:
                    for groups in self._groupings():
                        yield Form(trained, groups=groups)
                    continue
                copies = ({MM_HEAD}, {MM_HEAD, _EMBEDDING}, set()) if self._store.plan.is_tied else (set(),)
                for alone, bucket_size in product(copies, (None, DEFAULT_BUCKET_SIZE)):
                    yield Form(trained, frozenset(alone), bucket_size)

    def _groupings(self) -> Iterator[tuple[tuple[bool, bool], ...]]:
        """Which kind of parameter each group may hold."""
        yield ()
        counts = {len(_inner(c["optimizer"])["param_groups"]) for c in self._contents.values() if "optimizer" in c}
        if max(counts) > 1:
            yield from permutations(product((False, True), repeat=2), max(counts))

    def _trained(self, form: Form, rank: Rank) -> list[Param]:
        return form.trained_params(self._store.plan, self._store.rules, rank, self._shapes)

    # ---- distributed optimizer -----------------------------------------------------------------------------------

    def flat_channels(self, form: Form) -> dict[str, dict[Place, StoredTensor]] | None:
        """The values of every parameter in the flat buffers; None if the form does not fit."""
        channels: dict[str, dict[Place, StoredTensor]] = {}
        for rank in self._store.ranks:
            params = self._trained(form, rank)
            if bool(params) != (rank in self._files):
                return None
            chunks = [[p for p in params if p.stage.vp_stage == vp] for vp in range(self._store.plan.vp_size)]
            chunks = [chunk for chunk in chunks if chunk]
            index = self._files.get(rank)
            if index is None:
                continue
            tree = dict(as_items(index.tree, where=str(index.path)))
            if sorted(key for key in tree if isinstance(key, int) and not isinstance(key, bool)) != list(
                range(len(chunks))
            ):
                return None
            for number, chunk in enumerate(chunks):
                if not self._add_buffer(form, index, tree[number], chunk, rank, channels):
                    return None
        return channels

    def _add_buffer(
        self,
        form: Form,
        index: ShardIndex,
        node: Any,
        params: Sequence[Param],
        rank: Rank,
        channels: dict[str, dict[Place, StoredTensor]],
    ) -> bool:
        buffers = list(as_items(node, where=str(index.path)))
        if len(buffers) != 1:
            raise CheckpointError(f"{index.path}: a chunk has {len(buffers)} kinds of buffers; expected one. {_ADVICE}")
        self.buffer_key, content = buffers[0]
        places = form.layout(params)
        for channel, value in as_items(content, where=str(index.path)):
            flat = index.tensor(value)
            if flat is None:
                continue
            if flat.shape != (places.numel,):
                return False
            for param, start in zip(params, places.starts, strict=True):
                stored = StoredTensor(flat.path, flat.dtype, param.shape, flat.offset + start * flat.dtype.itemsize)
                channels.setdefault(channel, {})[rank, param.stage.vp_stage, param.weight.name] = stored
        return True

    # ---- torch's optimizers ----------------------------------------------------------------------------------------

    def plain_channels(self, form: Form) -> dict[str, dict[Place, StoredTensor]] | None:
        """The values of every parameter by torch's numbering; None if the form does not fit."""
        channels: dict[str, dict[Place, StoredTensor]] = {}
        for rank in self._store.ranks:
            params = self._trained(form, rank)
            if bool(params) != ("optimizer" in self._contents[rank]):
                return None
            if params and not self._add_plain(form, rank, params, channels):
                return None
        return channels

    def _add_plain(
        self, form: Form, rank: Rank, params: list[Param], channels: dict[str, dict[Place, StoredTensor]]
    ) -> bool:
        index, optimizer = self._store.index(rank), self._contents[rank]["optimizer"]
        inner = _inner(optimizer)
        groups = [list(dict(as_items(group, where="param_groups"))["params"]) for group in inner["param_groups"]]
        dealt = deal_groups(params, form.groups, self.name_lists(), len(groups))
        if dealt is None or [len(group) for group in groups] != [len(group) for group in dealt]:
            return False
        state = dict(as_items(inner["state"], where="state"))
        for number, param in zip(chain(*groups), chain(*dealt), strict=True):
            place = (rank, param.stage.vp_stage, param.weight.name)
            for key, value in as_items(state.get(number, {}), where="state"):
                stored = index.tensor(value)
                if stored is None or (not stored.shape and param.shape):
                    continue  # a step count
                if stored.shape != param.shape:
                    return False
                channels.setdefault(key, {})[place] = stored
        outer = dict(as_items(optimizer, where="optimizer"))
        for copies, group in zip(outer.get("fp32_from_fp16_params", ()), dealt, strict=False):
            if len(copies) != len(group):
                return False
            for value, param in zip(copies, group, strict=True):
                stored = index.tensor(value)
                if stored is None or stored.shape != param.shape:
                    return False
                channels.setdefault(MAIN, {})[rank, param.stage.vp_stage, param.weight.name] = stored
        return True

    def name_lists(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Fragments of names without weight decay, and with a scaled learning rate, from the saved arguments."""
        return name_lists_of(next(iter(self._contents.values())).get("args"))

    # ---- values ----------------------------------------------------------------------------------------------------

    def main_values_agree(self, channels: Mapping[str, Mapping[Place, StoredTensor]]) -> bool:
        """The fp32 copies, where the state has them, begin with the values of the weights that they belong to."""
        for (rank, vp_stage, name), copy in channels.get(MAIN, {}).items():
            stage = self._store.plan.at(rank[1], vp_stage)
            if not _same_start(self._sources, self._store.tensors(rank[0], stage)[name], copy):
                return False
        return True


def deal_groups(
    params: Sequence[Param],
    groups: tuple[tuple[bool, bool], ...],
    names: tuple[tuple[str, ...], tuple[str, ...]],
    count: int,
) -> list[list[Param]] | None:
    """The parameters of every group, in order; None if some parameter belongs to no group.

    Args:
        groups: the kind of each group; empty: all parameters are in the first of `count`.
        names: fragments of names without weight decay, and with a scaled learning rate.
    """
    if not groups:
        return [list(params), *([] for _ in range(count - 1))]
    dealt: list[list[Param]] = [[] for _ in groups]
    for param in params:
        name = param.weight.name.lower()
        kind = (any(part in name for part in names[0]), any(part in name for part in names[1]))
        if kind not in groups:
            return None
        dealt[groups.index(kind)].append(param)
    return dealt


def name_lists_of(args: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`weight_decay_exclude_modules` and `lr_scale_modules` of saved arguments, in lower case."""
    found = args.attributes() if isinstance(args, Call) else {}
    wanted = (found.get("weight_decay_exclude_modules") or (), found.get("lr_scale_modules") or ())
    return tuple(str(name).lower() for name in wanted[0]), tuple(str(name).lower() for name in wanted[1])


def _same_start(sources: Sources, weight: StoredTensor, copy: StoredTensor) -> bool:
    """The first values of a weight are those of its fp32 copy, rounded to the weight's dtype."""
    import torch

    count = min(prod(weight.shape), 1024)
    values = []
    for stored in (weight, copy):
        buffer = bytearray(count * stored.dtype.itemsize)
        sources.read_into(stored.path, stored.offset, memoryview(buffer))
        values.append(torch.frombuffer(buffer, dtype=getattr(torch, stored.dtype.name)))
    return torch.equal(values[0], values[1].to(values[0].dtype))
