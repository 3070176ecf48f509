"""Laying out the optimizer state and the rest of a training save under another plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from checkpoint.rules.base import RuleSet, Split, Weight
from checkpoint.stores.base import Placement
from checkpoint.stores.mm import MmStore, Rank
from checkpoint.training_state import MAIN, Param, Shapes, TrainingState, deal_groups, name_lists_of
from mindspeed_mm.plan import StagePlan
from mindspeed_mm.storage import layout
from mindspeed_mm.storage.pickle_tree import Call
from mindspeed_mm.storage.shard import PlannedShard, ShardIndex, ShardPlanner, as_items
from mindspeed_mm.storage.tensors import FileLayout, StoredTensor

_WEIGHTS = ("model", "checkpoint_version", "optimizer")
_FLAT_KEY = "numel_unpadded"

Transfer = tuple[str, Placement, Placement]
_Slot = tuple[Path, int]
"""File, and number of the tensor in it."""


@dataclass
class StateWriter:
    """Gives every new shard what the old ones held beside the weights, and says which bytes go where.

    Args:
        store: the old shards.
        contents: content of every old shard file.
        state: the optimizer state; None where the save has none.
        plan: the new plan.
    """

    store: MmStore
    contents: Mapping[Rank, Mapping[str, Any]]
    state: TrainingState | None
    plan: StagePlan
    rules: RuleSet
    _values: dict[tuple[str, str, int, int], dict[int, tuple[_Slot, int, tuple[int, ...]]]] = field(
        default_factory=dict
    )
    """(channel, canonical name, pp_rank, vp_stage) -> tp_rank -> (slot, first element in it, shape)."""
    _copied: list[tuple[StoredTensor, _Slot]] = field(default_factory=list)
    _flat: list[PlannedShard] = field(default_factory=list)
    _gaps: dict[Path, list[tuple[int, int, int]]] = field(default_factory=dict)
    """File -> (number of a flat tensor, first element, elements) that no parameter fills."""

    def __post_init__(self) -> None:
        weights = {weight.mm: self.store.placements(weight)[0].shape for weight in self.rules.weights}
        self._shapes = Shapes(self.plan, weights)

    def extend(self, planner: ShardPlanner, rank: Rank) -> dict[str, Any]:
        """What the shard of a rank holds beside the weights."""
        source = self._nearest(rank)
        index = self.store.index(source)
        content = {
            key: self._relocate(index, planner, value)
            for key, value in self.contents[source].items()
            if key not in _WEIGHTS and not (key.startswith("model") and key[5:].isdigit())
        }
        if "args" in content:
            content["args"] = self._with_sizes(content["args"])
        params = self._trained(rank)
        if self.state is not None and params:
            content["optimizer"] = (
                self._distributed(planner, rank, params)
                if self.state.is_distributed
                else self._plain(planner, rank, params)
            )
        return content

    def files(self) -> dict[Path, FileLayout]:
        """Size and literal bytes of the files with flat state; what no parameter fills is zero."""
        found = {}
        for shard in self._flat:
            zeros = [
                (
                    shard.tensors[number].offset + first * shard.tensors[number].dtype.itemsize,
                    count * shard.tensors[number].dtype.itemsize,
                )
                for number, first, count in self._gaps.get(shard.path, [])
            ]
            literals = [*shard.layout.literals, *((offset, bytes(count)) for offset, count in zeros)]
            found[shard.path] = shard.layout._replace(literals=tuple(sorted(literals)))
        return found

    def transfers(self, shards: Mapping[Rank, PlannedShard]) -> Iterator[Transfer]:
        """(name, source, target) of every value that the new save holds beside the weights."""
        planned = {shard.path: shard for shard in (*shards.values(), *self._flat)}
        for stored, (path, number) in self._copied:
            yield "saved state", _alone(stored), _alone(planned[path].tensors[number])
        by_name = {weight.mm: weight for weight in self.rules.weights}
        for (channel, mm, _, _), parts in self._values.items():
            assert self.state is not None
            weight = by_name[mm]
            source = self.state.placement(channel, weight, self.store)
            tensors = []
            for tp_rank in range(self.plan.tp_size):
                (path, number), first, shape = parts[tp_rank]
                tensor = planned[path].tensors[number]
                tensors.append(StoredTensor(path, tensor.dtype, shape, tensor.offset + first * tensor.dtype.itemsize))
            for target in _placements(weight, tuple(tensors), source, self.plan):
                yield f"{channel} of {mm}", source, target

    # ---- parts of a shard ------------------------------------------------------------------------------------------

    def _trained(self, rank: Rank) -> list[Param]:
        if self.state is None:
            return []
        return self.state.form.trained_params(self.plan, self.rules, rank, self._shapes)

    def _nearest(self, rank: Rank) -> Rank:
        """The old rank whose random states and the like a new one takes over."""
        return min(rank[0], self.store.plan.tp_size - 1), min(rank[1], self.store.plan.pp_size - 1)

    def _with_sizes(self, args: Any) -> Any:
        """Saved arguments with the parallel sizes of the new plan; Megatron compares them when it loads."""
        if not isinstance(args, Call) or not isinstance(args.state, dict):
            return args
        sizes = {
            "tensor_model_parallel_size": self.plan.tp_size,
            "pipeline_model_parallel_size": self.plan.pp_size,
            "virtual_pipeline_model_parallel_size": self.plan.vp_size if self.plan.vp_size > 1 else None,
        }
        state = {**args.state, **{key: value for key, value in sizes.items() if key in args.state}}
        return Call(
            args.target, args.args, args.kwargs, args.is_new, state, args.has_state, args.appended, args.entries
        )

    def _relocate(self, index: ShardIndex, planner: ShardPlanner, node: Any) -> Any:
        """A tree whose tensors are those of another file; they are copied as they are."""
        stored = index.tensor(node)
        if stored is not None:
            new, number = planner.tensor(stored.dtype, stored.shape)
            self._copied.append((stored, (planner.path, number)))
            return new
        if isinstance(node, dict):
            return {key: self._relocate(index, planner, value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(self._relocate(index, planner, value) for value in node)
        if isinstance(node, Call):
            new = Call(node.target, self._relocate(index, planner, node.args), node.kwargs, node.is_new)
            new.state, new.has_state = self._relocate(index, planner, node.state), node.has_state
            new.appended = [self._relocate(index, planner, value) for value in node.appended]
            new.entries = [(key, self._relocate(index, planner, value)) for key, value in node.entries]
            return new
        return node

    def _value(self, channel: str, param: Param, rank: Rank, slot: _Slot, first: int = 0) -> None:
        key = (channel, param.weight.rule.mm_name(param.weight.layer), rank[1], param.stage.vp_stage)
        self._values.setdefault(key, {})[rank[0]] = (slot, first, param.shape)

    def _template(self) -> tuple[ShardIndex, Any]:
        """An old shard that has optimizer state, and that state."""
        rank = next(rank for rank, content in self.contents.items() if "optimizer" in content)
        return self.store.index(rank), self.contents[rank]["optimizer"]

    def _distributed(self, planner: ShardPlanner, rank: Rank, params: list[Param]) -> Any:
        """Plan the file of flat buffers, and give the part of the optimizer that has no values."""
        assert self.state is not None
        flat = ShardPlanner(planner.path.with_name(layout.DISTRIB_FILE))
        tree: dict[Any, Any] = {"buckets_coalesced": True}
        chunks = [[param for param in params if param.stage.vp_stage == vp] for vp in range(self.plan.vp_size)]
        for number, chunk in enumerate(chunk for chunk in chunks if chunk):
            places = self.state.form.layout(chunk)
            buffer: dict[str, Any] = {}
            for channel, values in self.state.channels.items():
                dtype = next(iter(values.values())).dtype
                buffer[channel], tensor = flat.tensor(dtype, (places.numel,))
                end = 0
                for start, param in sorted(zip(places.starts, chunk, strict=True), key=lambda item: item[0]):
                    self._add_gap(flat.path, tensor, end, start)
                    self._value(channel, param, rank, (flat.path, tensor), start)
                    end = start + prod(param.shape)
                self._add_gap(flat.path, tensor, end, places.numel)
            tree[number] = {self.state.buffer_key: {**buffer, _FLAT_KEY: places.numel}}
        self._flat.append(flat.finish(tree))
        index, optimizer = self._template()
        return self._relocate(index, planner, optimizer)

    def _add_gap(self, path: Path, tensor: int, start: int, end: int) -> None:
        if end > start:
            self._gaps.setdefault(path, []).append((tensor, start, end - start))

    def _plain(self, planner: ShardPlanner, rank: Rank, params: list[Param]) -> Any:
        """The state of one of torch's optimizers, numbered for this rank's parameters."""
        assert self.state is not None
        index, optimizer = self._template()
        outer = dict(as_items(optimizer, where="optimizer"))
        inner = dict(as_items(outer["optimizer"], where="optimizer")) if "optimizer" in outer else outer
        names = name_lists_of(next(iter(self.contents.values())).get("args"))
        groups = deal_groups(params, self.state.form.groups, names, len(inner["param_groups"]))
        assert groups is not None, "every name belongs to a group of the source"
        first = dict(as_items(next(iter(dict(as_items(inner["state"], where="state")).values())), where="state"))
        state: dict[int, Any] = {}
        new_groups = []
        for group, saved in zip(groups, inner["param_groups"], strict=True):
            numbers = range(len(state), len(state) + len(group))
            kept = self._relocate(index, planner, dict(as_items(saved, where="param_groups")))
            new_groups.append({**kept, "params": list(numbers)})
            for number, param in zip(numbers, group, strict=True):
                state[number] = {
                    key: self._channel_node(planner, rank, key, param)
                    if key in self.state.channels
                    else self._relocate(index, planner, value)
                    for key, value in first.items()
                }
        result = {
            **self._relocate(index, planner, {k: v for k, v in inner.items() if k not in ("state", "param_groups")})
        }
        result.update(state=state, param_groups=new_groups)
        if "optimizer" not in outer:
            return result
        kept = {key: value for key, value in outer.items() if key not in ("optimizer", "fp32_from_fp16_params")}
        content = {"optimizer": result, **self._relocate(index, planner, kept)}
        if "fp32_from_fp16_params" in outer:
            has_main = MAIN in self.state.channels
            content["fp32_from_fp16_params"] = [
                [self._channel_node(planner, rank, MAIN, param) for param in group] if has_main else []
                for group in groups
            ]
        return content

    def _channel_node(self, planner: ShardPlanner, rank: Rank, channel: str, param: Param) -> Any:
        assert self.state is not None
        dtype = next(iter(self.state.channels[channel].values())).dtype
        node, number = planner.tensor(dtype, param.shape)
        self._value(channel, param, rank, (planner.path, number))
        return node


def _alone(tensor: StoredTensor) -> Placement:
    return Placement((tensor,), Split.REPLICATED.layout(1), tensor.shape)


def _placements(
    weight: Weight, tensors: tuple[StoredTensor, ...], source: Placement, plan: StagePlan
) -> Iterator[Placement]:
    tp_layout = weight.rule.tp.layout(plan.tp_size)
    if weight.rule.tp is Split.REPLICATED:
        yield from (Placement((tensor,), tp_layout, source.shape) for tensor in tensors)
    else:
        yield Placement(tensors, tp_layout, source.shape)
