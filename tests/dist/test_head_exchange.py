"""Rows to heads and back over real processes: for any head counts, also fewer than ranks, forward and backward."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mindspeed_mm.ops.context import uneven_ranges
from tests.dist.harness import run_ranks

HEADS = [(4, 4), (4, 2), (5, 5), (6, 2), (2, 1), (1, 1)]
"""Query and key-value heads on three ranks."""


def test_three_ranks_exchange_any_heads() -> None:
    assert run_ranks(3, "tests.dist.test_head_exchange:exchange_everything") == [len(HEADS)] * 3


def exchange_everything() -> int:
    """Run in every rank; the number of head counts that were checked."""
    from mindspeed_mm.platform.select import activate, choose_platform

    activate(choose_platform("cpu"))
    dist.init_process_group("gloo")
    for heads, groups in HEADS:
        _check(heads, groups)
    dist.barrier()
    dist.destroy_process_group()
    return len(HEADS)


def _check(heads: int, groups: int, rows: int = 5, size: int = 4) -> None:
    from mindspeed_mm.models.common.sequence import HeadExchange

    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(heads)
    whole = [torch.randn(rows * world, count, size) for count in (heads, groups, groups)]
    local = [tensor[rank * rows : (rank + 1) * rows].clone().requires_grad_() for tensor in whole]
    exchange = HeadExchange(dist.group.WORLD, heads, groups)
    query, key, value = exchange.to_heads(*local)
    mine = uneven_ranges(heads, world)[rank]
    assert torch.equal(query, whole[0][:, mine.start : mine.stop])
    if mine:
        repeat = query.shape[1] // key.shape[1]
        wanted = [head // (heads // groups) for head in mine]
        assert torch.equal(key.repeat_interleave(repeat, 1), whole[1][:, wanted])
        assert torch.equal(value.repeat_interleave(repeat, 1), whole[2][:, wanted])
        expanded = key.repeat_interleave(repeat, 1) + 2 * value.repeat_interleave(repeat, 1)
    else:
        expanded = key + value
    out = exchange.to_rows(query + expanded)
    out.sum().backward()
    # Every query head adds its key head once and its value head twice.
    assert torch.equal(local[0].grad, torch.ones_like(local[0]))
    assert torch.equal(local[1].grad, torch.full_like(local[1], heads // groups))
    assert torch.equal(local[2].grad, torch.full_like(local[2], 2 * heads // groups))
