"""Rows that are spread over ranks: context parallelism (Ulysses) and sequence parallelism, for any length.

A row is padded to a multiple of the ranks that share it. The padding is a segment of its own at the end: attention
never mixes it with real rows, it carries no label, and it is cut off before anything that leaves the tower, so neither
loss nor gradients see it. Context parallelism splits the padded row first; sequence parallelism splits each part
between layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from mindspeed_mm.ops.context import key_ranges, round_up, uneven_ranges


@dataclass(frozen=True, slots=True)
class RowSplit:
    """How rows are spread in this run; the same object for both towers.

    Attributes:
        cp_group: ranks that share a row; None for one rank.
        tp_size: ranks that share the rows of a context rank between layers; 1 without sequence parallelism.
    """

    cp_group: dist.ProcessGroup | None = None
    tp_size: int = 1

    @property
    def cp_size(self) -> int:
        """Context-parallel ranks."""
        return 1 if self.cp_group is None else self.cp_group.size()

    @property
    def cp_rank(self) -> int:
        """This rank's place among them."""
        return 0 if self.cp_group is None else self.cp_group.rank()

    def padded(self, length: int) -> int:
        """Length of a row with its padding."""
        return round_up(length, self.cp_size * self.tp_size)

    def local(self, length: int) -> range:
        """Rows of the padded row that this context rank holds."""
        part = self.padded(length) // self.cp_size
        return range(self.cp_rank * part, (self.cp_rank + 1) * part)

    def pad_segments(self, cu_seqlens: Tensor, length: int) -> Tensor:
        """Segment boundaries with the padding as a last segment."""
        padded = self.padded(length)
        return cu_seqlens if padded == length else torch.cat([cu_seqlens, cu_seqlens.new_tensor([padded])])

    def pad(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """`tensor` with zeros for the padding rows along `dim`."""
        missing = self.padded(tensor.shape[dim]) - tensor.shape[dim]
        if missing == 0:
            return tensor
        shape = list(tensor.shape)
        shape[dim] = missing
        return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)

    def take_local(self, tensor: Tensor) -> Tensor:
        """The rows of this context rank, of a tensor that holds the whole row without padding."""
        if self.cp_size == 1 and self.tp_size == 1:
            return tensor
        rows = self.local(tensor.shape[0])
        return self.pad(tensor)[rows.start : rows.stop]

    def enter_layers(self, hidden: Tensor) -> Tensor:
        """The rows of this tensor rank, of the rows of a context rank; the backward gathers."""
        return scatter_to_sequence_parallel_region(hidden) if self.tp_size > 1 else hidden

    def leave_layers(self, hidden: Tensor) -> Tensor:
        """The rows of a context rank on all its tensor ranks.

        What follows works on whole gradients (its linears sum them over the tensor ranks), so the backward only splits:
        summing here as well would make them TP times too large.
        """
        if self.tp_size == 1:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)

    def gather_rows(self, local: Tensor, length: int) -> Tensor:
        """The whole row without padding, of the rows of every context rank; the backward sums over the ranks."""
        whole = local if self.cp_group is None else _GatherRows.apply(local, self.cp_group)
        return whole[:length]

    def exchange(self, num_heads: int, num_groups: int) -> HeadExchange | None:
        """The exchange of attention for these heads per tensor rank; None for one context rank."""
        return None if self.cp_group is None else HeadExchange(self.cp_group, num_heads, num_groups)


class HeadExchange:
    """Rows of all heads to all rows of some heads and back, over the context-parallel ranks.

    Head counts need not divide: the first ranks get one head more, a rank may get none, and a key-value head goes to
    every rank that holds one of its query heads.

    Args:
        group: context-parallel ranks.
        num_heads, num_groups: query and key-value heads of this tensor rank.
    """

    def __init__(self, group: dist.ProcessGroup, num_heads: int, num_groups: int) -> None:
        self.group = group
        size, rank = group.size(), group.rank()
        repeat = num_heads // num_groups
        queries = uneven_ranges(num_heads, size)
        keys = key_ranges(queries, repeat)
        self.query_counts = [len(r) for r in queries]
        self.key_counts = [len(r) for r in keys]
        self.key_heads = [head for r in keys for head in r]
        mine = queries[rank]
        self.key_of_query = [head // repeat - keys[rank].start for head in mine]
        self.num_heads, self.num_keys = len(mine), len(keys[rank])

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[s/cp, n, d] and [s/cp, g, d] to [s, n_mine, d], the keys and values repeated where groups are cut."""
        query = self._to_heads(query, self.query_counts, self.num_heads)
        heads = torch.tensor(self.key_heads, device=key.device)
        key, value = (self._to_heads(t.index_select(1, heads), self.key_counts, self.num_keys) for t in (key, value))
        if self.num_keys and self.num_heads % self.num_keys == 0:
            repeat = self.num_heads // self.num_keys
            if self.key_of_query == [head // repeat for head in range(self.num_heads)]:
                return query, key, value
        chosen = torch.tensor(self.key_of_query, dtype=torch.int64, device=key.device)
        return query, key.index_select(1, chosen), value.index_select(1, chosen)

    def to_rows(self, out: Tensor) -> Tensor:
        """[s, n_mine, d] to [s/cp, n, d]."""
        size = self.group.size()
        parts = out.unflatten(0, (size, -1)).transpose(1, 2).flatten(0, 1)
        received = _AllToAll.apply(parts, [self.num_heads] * size, self.query_counts, self.group)
        return received.transpose(0, 1)

    def _to_heads(self, x: Tensor, counts: list[int], mine: int) -> Tensor:
        size = self.group.size()
        received = _AllToAll.apply(x.transpose(0, 1), counts, [mine] * size, self.group)
        return received.unflatten(0, (size, mine)).transpose(1, 2).flatten(0, 1)


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all along dim 0; the backward sends everything back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


class _GatherRows(torch.autograd.Function):
    """All-gather of equally many rows; every rank uses the whole, so the backward sums before it splits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        out = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(out, grad, group=ctx.group)
        return out, None
