"""Tensors of a store in memory, one at a time: for the few jobs that compute instead of moving bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from checkpoint.ranges import Sources
from checkpoint.rules.base import join_parts
from checkpoint.stores.base import Placement
from mindspeed_mm.storage.tensors import StoredTensor


def read_tensor(sources: Sources, stored: StoredTensor) -> Tensor:
    """A stored tensor, dtype as on disk."""
    tensor = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype.name))
    sources.read_into(stored.path, stored.offset, memory_of(tensor))
    return tensor


def read_whole(sources: Sources, placement: Placement) -> Tensor:
    """A whole tensor of its stored parts."""
    parts = [read_tensor(sources, stored) for stored in placement.tensors]
    return join_parts(placement.layout, parts, placement.shape)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared with it."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
