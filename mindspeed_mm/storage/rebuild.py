"""From the tree of a shard to values: an allow-list of what is rebuilt, by code of ours; all else stays inert."""

from __future__ import annotations

import argparse
import math
import warnings
from collections import OrderedDict
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage.pickle_tree import Call, Global
from mindspeed_mm.storage.shard import ShardIndex, as_items, map_file
from mindspeed_mm.storage.tensors import StoredTensor

_BUILTINS = {
    f"{module}.{kind.__name__}": kind for module in ("builtins", "__builtin__") for kind in (bytearray, set, frozenset)
}
_NUMPY_ARRAY = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
_NUMPY_SCALAR = {f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")}
_MAX_DEPTH = 150


class Rebuilder:
    """Turns nodes of one shard into values.

    Args:
        index: the shard.
        share: tensors share memory with the mapped file (copied on write).
    """

    def __init__(self, index: ShardIndex, *, share: bool) -> None:
        self._index = index
        self._share = share
        self._bytes: Any = None
        self._done: dict[int, tuple[Any, Any]] = {}

    def build(self, node: Any, depth: int = 0) -> Any:
        """The value of a node; containers keep their order, unknown objects stay `Call`s with built attributes."""
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"{self._index.path}: values are nested more than {_MAX_DEPTH} deep.")
        if isinstance(node, Call | dict | list | tuple | set | frozenset):
            known = self._done.get(id(node))
            if known is None:
                known = self._done[id(node)] = (node, self._compound(node, depth + 1))
            return known[1]
        if isinstance(node, Global) and node.module == "torch":
            value = getattr(torch, node.name, None)
            return value if isinstance(value, torch.dtype) else node
        return node

    def _compound(self, node: Any, depth: int) -> Any:
        if isinstance(node, dict):
            return {self.build(key, depth): self.build(value, depth) for key, value in node.items()}
        if isinstance(node, Call):
            return self._call(node, depth)
        return type(node)(self.build(item, depth) for item in node)

    def _call(self, node: Call, depth: int) -> Any:
        stored = self._index.tensor(node)
        if stored is not None:
            return self._tensor(stored)
        name = str(node.target)
        if name in ("collections.OrderedDict", "collections.defaultdict"):
            items = ((self.build(key, depth), self.build(value, depth)) for key, value in as_items(node, where=name))
            return OrderedDict(items) if name.endswith("OrderedDict") else dict(items)
        if name == "argparse.Namespace":
            return argparse.Namespace(**{key: self.build(value, depth) for key, value in node.attributes().items()})
        args = tuple(self.build(item, depth) for item in node.args)
        value = self._plain(name, args, node, depth)
        if value is not None:
            return value
        inert = Call(node.target, args, node.kwargs, node.is_new)
        inert.state, inert.has_state = self.build(node.state, depth), node.has_state
        inert.appended = [self.build(item, depth) for item in node.appended]
        inert.entries = [(self.build(key, depth), self.build(item, depth)) for key, item in node.entries]
        return inert

    def _plain(self, name: str, args: tuple[Any, ...], node: Call, depth: int) -> Any:
        """Small values of the standard library, numpy and torch; None if `name` is not on the list."""
        try:
            if name == "_codecs.encode" and args[1:] == ("latin1",):
                return args[0].encode("latin1")
            kind = _BUILTINS.get(name)
            if kind is not None and len(args) == 1:
                return kind(args[0])
            if name in ("builtins.complex", "__builtin__.complex"):
                return complex(*map(float, args))
            if name == "pathlib.PosixPath":
                return PurePosixPath(*map(str, args))
            if name == "torch.Size":
                return torch.Size(args[0])
            if name == "torch.device":
                return torch.device(*args)
            if name == "numpy.dtype":
                return _numpy_dtype(args, node)
            if name in _NUMPY_ARRAY:
                return _numpy_array(self.build(node.state, depth))
            if name in _NUMPY_SCALAR:
                return np.frombuffer(args[1], dtype=args[0], count=1)[0]
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{self._index.path}: a value of kind {name} is damaged ({error}).") from error
        return None

    def _tensor(self, stored: StoredTensor) -> torch.Tensor:
        dtype = getattr(torch, stored.dtype.name)
        count = math.prod(stored.shape)
        if count == 0:
            return torch.empty(stored.shape, dtype=dtype)
        if self._bytes is None:
            self._bytes = map_file(stored.path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about read-only buffers; this one is a private copy
            flat = torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=stored.offset)
        return (flat if self._share else flat.clone()).view(stored.shape)


def _numpy_dtype(args: tuple[Any, ...], node: Call) -> np.dtype[Any]:
    dtype = np.dtype(str(args[0]))
    if dtype.hasobject:
        raise ValueError("arrays of Python objects are not read")
    order = node.state[1] if isinstance(node.state, tuple) and len(node.state) > 1 else "|"
    return dtype.newbyteorder(">") if order == ">" else dtype


def _numpy_array(state: Any) -> np.ndarray[Any, Any]:
    _, shape, dtype, is_fortran, data = state
    array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if is_fortran else "C")
    return array.copy()
