"""One `torch.save` file: its tree with the place of every tensor (without torch), its values, and writing one."""

from __future__ import annotations

import mmap as memory_map
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, cast

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage.archive import Record, plan_archive, read_archive
from mindspeed_mm.storage.files import explain_write_error, open_new
from mindspeed_mm.storage.pickle_tree import MAX_PICKLE_BYTES, Call, Global, Persistent, emit_pickle, parse_pickle
from mindspeed_mm.storage.tensors import BY_STORAGE, Dtype, FileLayout, StoredTensor

_REBUILD_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETERS = (Global("torch._utils", "_rebuild_parameter"), Global("torch._utils", "_rebuild_parameter_with_state"))
_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The content of one `torch.save` file without its tensors' bytes."""

    path: Path
    tree: Any
    """What was saved; see `parse_pickle`. Tensors are `Call`s: hand them to `tensor`."""
    records: Mapping[str, Record]

    def tensor(self, node: Any) -> StoredTensor | None:
        """Where the tensor that a node stands for lies; None if the node is no tensor.

        Raises:
            CheckpointError: its dtype is unknown, it is not contiguous, or it reaches out of its storage.
        """
        call = _tensor_call(node)
        if call is None:
            return None
        try:
            storage, start, shape, stride = call.args[:4]
            _, kind, key, _, count = storage.pid
            dtype = BY_STORAGE.get(kind.name)
            start, count = int(start), int(count)
            shape, stride = tuple(map(int, shape)), tuple(map(int, stride))
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: a tensor is described in a way that torch does not write.") from error
        if dtype is None:
            raise CheckpointError(f"{self.path}: a tensor has elements of kind {kind}, which checkpoints do not use.")
        record = self.records.get(f"data/{key}")
        if record is None:
            raise CheckpointError(f"{self.path}: the bytes of storage {key} are not in the file.")
        _check_extent(self.path, dtype, start, shape, stride, count, record)
        return StoredTensor(self.path, dtype, shape, record.offset + start * dtype.itemsize)

    def tensors(self, mapping: Any) -> dict[str, StoredTensor]:
        """Every tensor of a state dict; entries that are None (such as `_extra_state`) are left out.

        Raises:
            CheckpointError: `mapping` is no state dict, or holds something else than tensors and None.
        """
        found = {}
        for name, node in as_items(mapping, where=str(self.path)):
            if node is None or (isinstance(name, str) and name.endswith("_extra_state")):
                continue
            tensor = self.tensor(node)
            if tensor is None or not isinstance(name, str):
                raise CheckpointError(f"{self.path}: entry {name!r} of the weights is no tensor.")
            found[name] = tensor
        return found

    def chunks(self) -> dict[int, dict[str, StoredTensor]]:
        """The weights by virtual chunk: key `model` is chunk 0 of one, `model0`, `model1`, ... are several.

        Raises:
            CheckpointError: the file holds no weights, or `model` beside numbered ones.
        """
        top = dict(as_items(self.tree, where=str(self.path)))
        names = [name for name in top if isinstance(name, str) and name.startswith("model") and name[5:].isdigit()]
        if "model" in top and not names:
            return {0: self.tensors(top["model"])}
        numbers = sorted(int(name[5:]) for name in names)
        if not names or "model" in top or numbers != list(range(len(names))):
            keys = ", ".join(sorted(map(str, top)))
            raise CheckpointError(
                f"{self.path} holds the keys {keys}; expected 'model', or 'model0', 'model1', ... without gaps."
            )
        return {number: self.tensors(top[f"model{number}"]) for number in numbers}


def _tensor_call(node: Any) -> Call | None:
    """The innermost `_rebuild_tensor_v2` call of a tensor or parameter."""
    while isinstance(node, Call):
        if node.target == _REBUILD_TENSOR:
            return node if len(node.args) >= 4 and isinstance(node.args[0], Persistent) else None
        if node.target in _PARAMETERS and node.args:
            node = node.args[0]
        elif node.target == _FROM_TYPE and len(node.args) == 4 and isinstance(node.args[2], tuple):
            node = Call(node.args[0], node.args[2])
        else:
            return None
    return None


def _check_extent(
    path: Path, dtype: Dtype, start: int, shape: tuple[int, ...], stride: tuple[int, ...], count: int, record: Record
) -> None:
    expected, size = 1, prod(shape)
    is_contiguous = len(shape) == len(stride)
    for extent, step in zip(reversed(shape), reversed(stride), strict=False):
        is_contiguous &= extent <= 1 or step == expected or not size
        expected *= extent
    if not is_contiguous:
        raise CheckpointError(
            f"{path}: a tensor of shape {list(shape)} is stored with strides {list(stride)}; expected contiguous."
        )
    if min((start, count, *shape)) < 0 or start + size > count or count * dtype.itemsize > record.nbytes:
        raise CheckpointError(
            f"{path}: a tensor of shape {list(shape)} reaches out of its storage of {record.nbytes:,} bytes."
        )


def as_items(node: Any, *, where: str) -> Iterator[tuple[Any, Any]]:
    """The entries of a dict or of an ordered dict in a tree.

    Raises:
        CheckpointError: the node is something else.
    """
    if isinstance(node, dict):
        yield from node.items()
    elif (
        isinstance(node, Call)
        and isinstance(node.target, Global)
        and node.target.name in ("OrderedDict", "defaultdict")
    ):
        yield from node.entries
    else:
        raise CheckpointError(f"{where}: expected a dict, found {type(node).__name__}.")


def index_shard(path: Path) -> ShardIndex:
    """Read everything of a `torch.save` file but the tensors' bytes; nothing of it is executed.

    Raises:
        CheckpointError: no such file, or not a whole `torch.save` file of a little-endian machine.
    """
    path = Path(path)
    records = read_archive(path)
    if "data.pkl" not in records:
        raise CheckpointError(f"{path} was not written by torch.save: it has no record data.pkl.")
    if records["data.pkl"].nbytes > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: its pickle has {records['data.pkl'].nbytes:,} bytes; checkpoints have far smaller ones."
        )
    with path.open("rb") as file:
        order = _read_record(file, records.get("byteorder"))
        data = _read_record(file, records["data.pkl"])
    if order not in (b"", b"little"):
        raise CheckpointError(f"{path} was written with byte order {order!r}; only little-endian files are read.")
    return ShardIndex(path, parse_pickle(data, where=str(path)), records)


def _read_record(file: IO[bytes], record: Record | None) -> bytes:
    if record is None:
        return b""
    file.seek(record.offset)
    return file.read(record.nbytes)


def read_shard(path: Path, *, mmap: bool = True) -> dict[str, Any]:
    """The values of a shard; classes that are not on the allow-list stay inert `Call`s with their attributes.

    Args:
        mmap: tensors share memory with the file, copied on write; without it they are read at once.
    Returns:
        What was saved, with torch tensors, numpy arrays, `argparse.Namespace` and plain containers rebuilt.
    Raises:
        CheckpointError: the file is missing, damaged or holds no dict.
    """
    from mindspeed_mm.storage.rebuild import Rebuilder

    index = index_shard(path)
    value = Rebuilder(index, share=mmap).build(index.tree)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; expected a dict.")
    return value


def map_file(path: Path) -> memory_map.mmap:
    """The whole file in memory, writable without changing the file."""
    with Path(path).open("rb") as file:
        return memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_COPY)


def write_shard(path: Path, content: Mapping[str, Any]) -> None:
    """Write a shard with `torch.save`, mode 0640 in directories of mode 0750, durable when it returns.

    Args:
        path: a new file; its directory is created.
        content: dict of tensors, plain values, numpy arrays and `argparse.Namespace`.
    Raises:
        CheckpointError, SetupError, DiskFullError: the file exists or cannot be written; what was begun is removed.
    """
    import torch

    from mindspeed_mm.storage.files import make_dir

    path = Path(path)
    make_dir(path.parent)
    sink = _Sink(os.fdopen(open_new(path), "wb"))
    try:
        with sink.file:
            torch.save(dict(content), cast(IO[bytes], sink))
            sink.file.flush()
            os.fsync(sink.file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        cause = sink.error or (error if isinstance(error, OSError) else None)
        if cause is not None:
            raise explain_write_error(path, cause) from error
        raise


class _Sink:
    """A file object that remembers its first error; torch.save reports another one instead."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def tensor_node(dtype: Dtype, shape: tuple[int, ...], key: str) -> Call:
    """The tree node of a contiguous tensor that fills storage `key`."""
    strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    storage = Persistent(("storage", Global("torch", dtype.storage), key, "cpu", prod(shape)))
    return Call(_REBUILD_TENSOR, (storage, 0, shape, strides, False, Call(Global("collections", "OrderedDict"))))


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A `torch.save` file to be written: every byte that is no tensor, and where the tensors go."""

    path: Path
    layout: FileLayout
    tensors: tuple[StoredTensor, ...]
    """In the order in which they were asked for."""


class ShardPlanner:
    """Lays out a `torch.save` file whose tensors somebody else will fill in.

    Args:
        path: where the file will be.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._tensors: list[tuple[Dtype, tuple[int, ...]]] = []

    def tensor(self, dtype: Dtype, shape: tuple[int, ...]) -> tuple[Call, int]:
        """The tree node of one more tensor, and its number in `PlannedShard.tensors`."""
        number = len(self._tensors)
        self._tensors.append((dtype, shape))
        return tensor_node(dtype, shape, str(number)), number

    def finish(self, tree: Any) -> PlannedShard:
        """The layout of a file that holds `tree`."""
        sizes = {str(number): prod(shape) * dtype.itemsize for number, (dtype, shape) in enumerate(self._tensors)}
        archive = plan_archive(emit_pickle(tree), sizes, stem=self.path.stem)
        tensors = tuple(
            StoredTensor(self.path, dtype, shape, archive.offsets[str(number)])
            for number, (dtype, shape) in enumerate(self._tensors)
        )
        return PlannedShard(self.path, archive.file, tensors)
