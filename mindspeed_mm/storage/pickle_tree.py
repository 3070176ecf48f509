"""Pickles read as trees of plain values, never executed, and written back the same way.

Foreign checkpoints carry objects whose classes do not exist here, and may carry malicious ones. The opcodes are
therefore interpreted here: whatever a pickle would have called or imported stays a `Call` or a `Global` in the tree.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mindspeed_mm.errors import CheckpointError

MAX_PICKLE_BYTES = 1 << 29
"""Larger pickles are refused: they hold names and shapes, not tensors."""
_MAX_OPCODES = 10_000_000
_MAX_DEPTH = 150


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Persistent:
    """A reference to something beside the pickle; torch names its storages so."""

    pid: Any


@dataclass(slots=True, eq=False)
class Call:
    """What a pickle would have built by a call, with the state and the items it would have put in."""

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    is_new: bool = False
    """Built by `cls.__new__` rather than by calling."""
    state: Any = None
    has_state: bool = False
    appended: list[Any] = field(default_factory=list)
    entries: list[tuple[Any, Any]] = field(default_factory=list)

    def attributes(self) -> dict[str, Any]:
        """The attributes that the state would have set; slots included."""
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        return {str(key): value for part in parts if isinstance(part, dict) for key, value in part.items()}


class _Mark:
    """Where a group of stack items begins."""


_MARK = _Mark()
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
_IGNORED = frozenset(("PROTO", "FRAME"))


def parse_pickle(data: bytes, *, where: str) -> Any:
    """The tree that a pickle describes: plain containers and numbers, `Global`, `Call` and `Persistent`.

    Args:
        where: the file, for error texts.
    Raises:
        CheckpointError: the bytes are not a whole pickle.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{where}: a pickle of {len(data):,} bytes is refused; checkpoints have far smaller ones."
        )
    try:
        return _Reader().read(data)
    except CheckpointError:
        raise
    except Exception as error:  # whatever damaged bytes provoke in the parser is one kind of error for the reader
        raise CheckpointError(f"{where}: the pickle inside is damaged ({type(error).__name__}: {error}).") from error


class _Reader:
    """A stack machine for pickle opcodes that builds nodes only."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        handlers = _HANDLERS
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name == "STOP":
                return self._pop()
            elif name not in _IGNORED:
                handler = handlers.get(name)
                if handler is None:
                    raise ValueError(f"opcode {name} is not used by checkpoints")
                handler(self, argument)
        raise ValueError("the pickle has no end")

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("unexpected mark")
        return value

    def _pop_to_mark(self) -> list[Any]:
        for position in range(len(self.stack) - 1, -1, -1):
            if self.stack[position] is _MARK:
                items = self.stack[position + 1 :]
                del self.stack[position:]
                return items
        raise ValueError("no mark on the stack")

    def _tuple(self, count: int) -> None:
        items = tuple(self.stack[len(self.stack) - count :])
        if len(items) != count or any(item is _MARK for item in items):
            raise ValueError("tuple from an empty stack")
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)

    def _set_entries(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if len(pairs) % 2:
            raise ValueError("a key without a value")
        entries = list(zip(pairs[::2], pairs[1::2], strict=True))
        for key, _ in entries:
            _check_hashable(key)
        if isinstance(target, dict):
            target.update(entries)
        elif isinstance(target, Call):
            target.entries.extend(entries)
        else:
            raise ValueError(f"items set on {type(target).__name__}")

    def _append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            for item in items:
                _check_hashable(item)
            target.update(items)
        elif isinstance(target, Call):
            target.appended.extend(items)
        else:
            raise ValueError(f"items appended to {type(target).__name__}")

    def _build(self) -> None:
        state = self._pop()
        target = self.stack[-1]
        if not isinstance(target, Call):
            raise ValueError(f"state set on {type(target).__name__}")
        target.state, target.has_state = state, True

    def _call(self, *, is_new: bool = False) -> None:
        args, target = self._pop(), self._pop()
        if not isinstance(args, tuple):
            raise ValueError("arguments of a call are not a tuple")
        self.stack.append(Call(target, args, is_new=is_new))

    def _call_new_ex(self) -> None:
        kwargs, args, target = self._pop(), self._pop(), self._pop()
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise ValueError("arguments of a call are not a tuple and a dict")
        self.stack.append(Call(target, args, kwargs, is_new=True))

    def _instance(self, target: str) -> None:
        module, _, name = target.partition(" ")
        self.stack.append(Call(Global(module, name), tuple(self._pop_to_mark())))

    def _object(self) -> None:
        target, *args = self._pop_to_mark()
        self.stack.append(Call(target, tuple(args)))

    def _global(self, target: str) -> None:
        module, _, name = target.partition(" ")
        self.stack.append(Global(module, name))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global without a name")
        self.stack.append(Global(module, name))

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index])


_HANDLERS: dict[str, Callable[[_Reader, Any], None]] = {
    "MARK": lambda reader, _: reader.stack.append(_MARK),
    "POP": lambda reader, _: reader.stack.__delitem__(-1),
    "POP_MARK": lambda reader, _: reader._pop_to_mark().clear(),
    "DUP": lambda reader, _: reader.stack.append(reader.stack[-1]),
    "EMPTY_DICT": lambda reader, _: reader.stack.append({}),
    "EMPTY_LIST": lambda reader, _: reader.stack.append([]),
    "EMPTY_SET": lambda reader, _: reader.stack.append(set()),
    "DICT": lambda reader, _: _dict_of_marked(reader),
    "LIST": lambda reader, _: reader.stack.append(reader._pop_to_mark()),
    "TUPLE": lambda reader, _: reader.stack.append(tuple(reader._pop_to_mark())),
    "TUPLE1": lambda reader, _: reader._tuple(1),
    "TUPLE2": lambda reader, _: reader._tuple(2),
    "TUPLE3": lambda reader, _: reader._tuple(3),
    "FROZENSET": lambda reader, _: _frozenset(reader),
    "SETITEM": lambda reader, _: _set_one(reader),
    "SETITEMS": lambda reader, _: reader._set_entries(reader._pop_to_mark()),
    "APPEND": lambda reader, _: reader._append([reader._pop()]),
    "APPENDS": lambda reader, _: reader._append(reader._pop_to_mark()),
    "ADDITEMS": lambda reader, _: reader._append(reader._pop_to_mark()),
    "REDUCE": lambda reader, _: reader._call(),
    "NEWOBJ": lambda reader, _: reader._call(is_new=True),
    "NEWOBJ_EX": lambda reader, _: reader._call_new_ex(),
    "BUILD": lambda reader, _: reader._build(),
    "INST": lambda reader, target: reader._instance(target),
    "OBJ": lambda reader, _: reader._object(),
    "GLOBAL": lambda reader, target: reader._global(target),
    "STACK_GLOBAL": lambda reader, _: reader._stack_global(),
    "PUT": _Reader._put,
    "BINPUT": _Reader._put,
    "LONG_BINPUT": _Reader._put,
    "MEMOIZE": lambda reader, _: reader._put(len(reader.memo)),
    "GET": _Reader._get,
    "BINGET": _Reader._get,
    "LONG_BINGET": _Reader._get,
    "PERSID": lambda reader, pid: reader.stack.append(Persistent(pid)),
    "BINPERSID": lambda reader, _: reader.stack.append(Persistent(reader._pop())),
}


def _check_hashable(key: Any, depth: int = 0) -> None:
    """Refuse keys nested so deeply that computing their hash would overflow the interpreter's stack."""
    if depth > 8:
        raise ValueError("a key is nested too deeply")
    items = key if isinstance(key, tuple | frozenset) else (key.pid,) if isinstance(key, Persistent) else ()
    for item in items:
        _check_hashable(item, depth + 1)


def _frozenset(reader: _Reader) -> None:
    items = reader._pop_to_mark()
    for item in items:
        _check_hashable(item)
    reader.stack.append(frozenset(items))


def _dict_of_marked(reader: _Reader) -> None:
    pairs = reader._pop_to_mark()
    reader.stack.append({})
    reader._set_entries(pairs)


def _set_one(reader: _Reader) -> None:
    value, key = reader._pop(), reader._pop()
    reader._set_entries([key, value])


def emit_pickle(tree: Any) -> bytes:
    """The protocol-2 pickle of a tree of plain values, `Global`, `Call` and `Persistent`; undoes `parse_pickle`.

    Raises:
        CheckpointError: the tree holds another type, refers to itself, or is far too large.
    """
    writer = _Writer()
    writer.emit(tree, 0)
    return b"\x80\x02" + b"".join(writer.out) + b"."


class _Writer:
    """Emits opcodes without memo: shared values are repeated."""

    def __init__(self) -> None:
        self.out: list[bytes] = []

    def emit(self, node: Any, depth: int) -> None:
        if depth > _MAX_DEPTH or len(self.out) > _MAX_OPCODES:
            raise CheckpointError("a value of the checkpoint refers to itself or is nested too deeply to be written.")
        out = self.out
        if node is None:
            out.append(b"N")
        elif isinstance(node, bool):
            out.append(b"\x88" if node else b"\x89")
        elif isinstance(node, int):
            out.append(_integer(node))
        elif isinstance(node, float):
            out.append(b"G" + struct.pack(">d", node))
        elif isinstance(node, str):
            data = node.encode("utf-8", "surrogatepass")
            out.append(b"X" + struct.pack("<I", len(data)) + data)
        elif isinstance(node, Global):
            out.append(f"c{node.module}\n{node.name}\n".encode())
        else:
            self._container(node, depth + 1)

    def _container(self, node: Any, depth: int) -> None:
        if isinstance(node, dict):
            self.out.append(b"}")
            self._entries(node.items(), depth)
        elif isinstance(node, list):
            self.out.append(b"]")
            self._items(node, depth)
        elif isinstance(node, tuple):
            self._tuple(node, depth)
        elif isinstance(node, Persistent):
            self.emit(node.pid, depth)
            self.out.append(b"Q")
        elif isinstance(node, Call):
            self._call(node, depth)
        elif isinstance(node, bytes):
            self.emit(Call(Global("_codecs", "encode"), (node.decode("latin1"), "latin1")), depth)
        elif isinstance(node, bytearray):
            self.emit(Call(Global("__builtin__", "bytearray"), (bytes(node),)), depth)
        elif isinstance(node, set | frozenset):
            self.emit(Call(Global("__builtin__", type(node).__name__), (list(node),)), depth)
        else:
            raise CheckpointError(f"a value of type {type(node).__name__} cannot be written to a checkpoint.")

    def _call(self, node: Call, depth: int) -> None:
        self.emit(node.target, depth)
        self.emit(node.args, depth)
        if node.kwargs is not None:
            raise CheckpointError(f"{node.target} was built with keyword arguments; such a value cannot be written.")
        self.out.append(b"\x81" if node.is_new else b"R")
        self._items(node.appended, depth)
        self._entries(node.entries, depth)
        if node.has_state:
            self.emit(node.state, depth)
            self.out.append(b"b")

    def _tuple(self, node: tuple[Any, ...], depth: int) -> None:
        if not node:
            self.out.append(b")")
            return
        if len(node) > 3:
            self.out.append(b"(")
        for item in node:
            self.emit(item, depth)
        self.out.append({1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(node), b"t"))

    def _items(self, items: list[Any], depth: int) -> None:
        if items:
            self.out.append(b"(")
            for item in items:
                self.emit(item, depth)
            self.out.append(b"e")

    def _entries(self, entries: Iterable[tuple[Any, Any]], depth: int) -> None:
        pairs = list(entries)
        if pairs:
            self.out.append(b"(")
            for key, value in pairs:
                self.emit(key, depth)
                self.emit(value, depth)
            self.out.append(b"u")


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(data) > 255:
        raise CheckpointError("an integer of the checkpoint is too large to be written.")
    return b"\x8a" + bytes([len(data)]) + data
