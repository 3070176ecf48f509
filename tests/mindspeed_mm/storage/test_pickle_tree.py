"""Pickles are read without executing anything, and written back as they were."""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage.pickle_tree import Call, Global, emit_pickle, parse_pickle

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


class Foreign:
    """Stands for a class that does not exist where the checkpoint is read."""

    def __init__(self) -> None:
        self.depth = 3


class Malicious:
    """Would write a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@given(PLAIN, st.sampled_from([2, 3, 4, 5]))
@settings(max_examples=200, deadline=None)
def test_plain_values_are_read_as_they_are(value: Any, protocol: int) -> None:
    tree = parse_pickle(pickle.dumps(value, protocol=protocol), where="x")
    if not _has_bytes(value) or protocol > 2:
        assert tree == value
    assert pickle.loads(emit_pickle(tree)) == value


def _has_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_bytes, value.values()))
    return isinstance(value, bytes) or (isinstance(value, list | tuple) and any(map(_has_bytes, value)))


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_objects_stay_inert_with_their_attributes(protocol: int) -> None:
    value = {"args": argparse.Namespace(mm=Foreign(), tp=2), "order": collections.OrderedDict(a=1)}
    tree = parse_pickle(pickle.dumps(value, protocol=protocol), where="x")
    args = tree["args"]
    assert isinstance(args, Call)
    assert args.attributes()["tp"] == 2
    assert args.attributes()["mm"].attributes() == {"depth": 3}
    back = pickle.loads(emit_pickle(tree))
    assert back["args"].tp == 2
    assert back["args"].mm.depth == 3
    assert back["order"] == collections.OrderedDict(a=1)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_malicious_pickle_is_read_without_running_it(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    tree = parse_pickle(pickle.dumps([Malicious(marker)], protocol=protocol), where="x")
    assert tree[0].target in (Global("posix", "system"), Global("os", "system"))
    assert not marker.exists()


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_tree_or_the_named_error(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        parse_pickle(data, where="x")


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_pickle_gives_a_tree_or_the_named_error(data: st.DataObject) -> None:
    good = bytearray(
        pickle.dumps({"a": [1, (2.0, "x")], "b": argparse.Namespace(c={1, 2})}, protocol=data.draw(st.integers(0, 5)))
    )
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointError):
        parse_pickle(bytes(good), where="x")


def test_a_value_that_holds_itself_is_not_written() -> None:
    loop: list[Any] = []
    loop.append(loop)
    tree = parse_pickle(pickle.dumps(loop), where="x")
    with pytest.raises(CheckpointError, match="refers to itself"):
        emit_pickle(tree)


def test_references_that_multiply_are_not_written_out() -> None:
    value: list[Any] = [0]
    for _ in range(60):
        value = [value, value]
    tree = parse_pickle(pickle.dumps(value), where="x")
    with pytest.raises(CheckpointError, match="refers to itself"):
        emit_pickle(tree)


def test_a_type_that_checkpoints_do_not_have_is_not_written() -> None:
    with pytest.raises(CheckpointError, match="type object"):
        emit_pickle({"a": object()})


def test_a_key_nested_deeply_is_refused_before_its_hash_is_computed() -> None:
    bomb = b"\x80\x02}K\x01" + b"\x85" * 2_000_000 + b"K\x01s."
    with pytest.raises(CheckpointError, match="nested too deeply"):
        parse_pickle(bomb, where="x")
