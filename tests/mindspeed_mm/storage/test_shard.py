"""Reading and writing one shard."""

from __future__ import annotations

import argparse
import enum
import os
import pickle
import random
import stat
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mindspeed_mm.errors import CheckpointError, DiskFullError, SetupError
from mindspeed_mm.storage.pickle_tree import Call
from mindspeed_mm.storage.shard import ShardPlanner, index_shard, read_shard, write_shard
from mindspeed_mm.storage.tensors import DTYPES


def training_content() -> dict[str, Any]:
    return {
        "model": OrderedDict(a=torch.randn(3, 4), b=torch.zeros(2, dtype=torch.bfloat16)) | {"a._extra_state": None},
        "checkpoint_version": 3.0,
        "iteration": 7,
        "args": argparse.Namespace(tp=2, dtype=torch.bfloat16, nested=[(1, None)], shape=torch.Size([2, 3])),
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "tracker": {"x": torch.arange(5)},
            }
        ],
        "optimizer": {
            0: {(torch.float32, torch.bfloat16): {"param": torch.arange(6.0), "numel": 6}},
            "scalar": np.float32(2.5),
        },
    }


def assert_equal(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_equal(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        assert type(ours) is type(theirs)
        for left, right in zip(ours, theirs, strict=True):
            assert_equal(left, right)
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, argparse.Namespace):
        assert_equal(vars(ours), vars(theirs))
    else:
        assert type(ours) is type(theirs)
        assert np.array_equal(ours, theirs) if isinstance(theirs, np.ndarray) else ours == theirs


@pytest.mark.parametrize("mmap", [True, False])
def test_what_is_written_is_read(mmap: bool, tmp_path: Path) -> None:
    content = training_content()
    write_shard(tmp_path / "a" / "model_optim_rng.pt", content)
    assert_equal(read_shard(tmp_path / "a" / "model_optim_rng.pt", mmap=mmap), content)


def test_random_states_work_after_a_round_trip(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.pt", training_content())
    state = read_shard(tmp_path / "x.pt")["rng_state"][0]
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])


def test_a_mapped_tensor_may_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.pt", {"a": torch.zeros(4)})
    read_shard(tmp_path / "x.pt")["a"].fill_(1)
    assert read_shard(tmp_path / "x.pt")["a"].sum() == 0


def test_modes_are_those_of_a_checkpoint_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_shard(tmp_path / "a" / "b" / "x.pt", {"a": 1})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "b" / "x.pt").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.pt", {"a": 1})
    with pytest.raises(SetupError, match="File exists"):
        write_shard(tmp_path / "x.pt", {"a": 2})
    assert read_shard(tmp_path / "x.pt") == {"a": 1}


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x.pt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SetupError):
        write_shard(tmp_path / "x.pt", {"a": 2})
    assert not (tmp_path / "elsewhere").exists()


def test_a_full_disk_is_reported_as_such() -> None:
    with pytest.raises(DiskFullError, match="disk full"):
        _write_to_full_device()


def _write_to_full_device() -> None:
    import mindspeed_mm.storage.shard as shard

    original = shard.open_new
    shard.open_new = lambda path: os.open("/dev/full", os.O_WRONLY)
    try:
        write_shard(Path("/tmp/never-there.pt"), {"a": torch.zeros(1 << 20)})
    finally:
        shard.open_new = original


def test_every_dtype_is_indexed_in_place(tmp_path: Path) -> None:
    content = {dtype.name: torch.arange(3).to(getattr(torch, dtype.name)) for dtype in DTYPES}
    torch.save(content, tmp_path / "x.pt")
    index = index_shard(tmp_path / "x.pt")
    raw = (tmp_path / "x.pt").read_bytes()
    for name, stored in index.tensors(index.tree).items():
        assert stored.dtype.name == name
        expected = content[name].view(torch.uint8) if name != "bool" else content[name].to(torch.uint8)
        assert raw[stored.offset : stored.offset + stored.nbytes] == expected.numpy().tobytes()


def test_parameters_views_and_shared_storages_are_found(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    content = {
        "p": torch.nn.Parameter(flat[2:6].view(2, 2)),
        "q": flat[6:],
        "tagged": torch.nn.Parameter(torch.ones(2)),
    }
    content["tagged"].tag = 1  # attributes make torch use another way to save a tensor
    torch.save({"model": content}, tmp_path / "x.pt")
    model = read_shard(tmp_path / "x.pt")["model"]
    assert model["p"].tolist() == [[2, 3], [4, 5]]
    assert model["q"].tolist() == [6, 7, 8, 9, 10, 11]
    assert model["tagged"].tolist() == [1, 1]


def test_a_transposed_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(2, 3).t()}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="expected contiguous"):
        index_shard(tmp_path / "x.pt").chunks()


def test_a_foreign_training_save_is_read_without_its_classes(tmp_path: Path) -> None:
    module = types.ModuleType("somebody_elses_package")

    class AttnMaskType(enum.Enum):
        causal = 2

    class ConfigReader:
        pass

    for kind in (AttnMaskType, ConfigReader):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    sys.modules[module.__name__] = module
    try:
        reader = ConfigReader()
        reader.mask, reader.layers = AttnMaskType.causal, [1, 10]  # type: ignore[attr-defined]
        content = {**training_content(), "args": argparse.Namespace(mm=reader, tensor_model_parallel_size=2)}
        torch.save(content, tmp_path / "x.pt")
    finally:
        del sys.modules[module.__name__]
    read = read_shard(tmp_path / "x.pt")
    assert read["args"].tensor_model_parallel_size == 2
    assert isinstance(read["args"].mm, Call)
    assert read["args"].mm.attributes()["layers"] == [1, 10]
    assert read["args"].mm.attributes()["mask"].args == (2,)
    assert_equal(read["model"], content["model"])


class Payload:
    """Runs a call when unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], tuple(self.call[1:])


@pytest.mark.parametrize("kind", ["system", "eval", "getattr", "nested", "import", "chain"])
def test_malicious_pickles_are_read_without_running_anything(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w')"
    payloads = {
        "system": Payload(os.system, f"touch {marker}"),
        "eval": Payload(eval, code),
        "getattr": Payload(getattr, Payload(__import__, "os"), "system"),
        "nested": Payload(pickle.loads, pickle.dumps(Payload(eval, code))),
        "import": Payload(exec, f"import os; {code}"),
        "chain": Payload(map, Payload(getattr, open, "__call__"), [str(marker)]),
    }
    torch.save({"model": {"a": torch.ones(2)}, "args": payloads[kind]}, tmp_path / "x.pt")
    content = read_shard(tmp_path / "x.pt")
    assert content["model"]["a"].tolist() == [1, 1]
    assert isinstance(content["args"], Call)
    assert not marker.exists()


def test_a_tensor_that_reaches_out_of_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(4)}}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data.replace(b"K\x00K\x04\x85", b"K\x00K\x7f\x85", 1))
    with pytest.raises(CheckpointError, match="reaches out of its storage"):
        index_shard(tmp_path / "x.pt").chunks()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weights": {}}, "expected 'model'"),
        ({"model": {}, "model0": {}}, "without gaps"),
        ({"model0": {}, "model2": {}}, "without gaps"),
        ({"model": {"a": 3}}, "is no tensor"),
        ({"model": 3}, "expected a dict"),
        ([1], "expected a dict"),
    ],
)
def test_a_file_without_weights_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=words):
        index_shard(tmp_path / "x.pt").chunks()


def test_a_planned_shard_loads_in_torch_once_its_tensors_are_filled_in(tmp_path: Path) -> None:
    planner = ShardPlanner(tmp_path / "model_optim_rng.pt")
    nodes, values = {}, {}
    for dtype in DTYPES:
        values[dtype.name] = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype.name))
        nodes[dtype.name], _ = planner.tensor(dtype, (2, 3))
    planned = planner.finish({"model": nodes, "checkpoint_version": 3.0})
    data = bytearray(planned.layout.nbytes)
    for offset, literal in planned.layout.literals:
        data[offset : offset + len(literal)] = literal
    for stored, value in zip(planned.tensors, values.values(), strict=True):
        data[stored.offset : stored.offset + stored.nbytes] = value.reshape(-1).view(torch.uint8).numpy().tobytes()
    planned.path.write_bytes(data)
    for mmap in (True, False):
        assert_equal(torch.load(planned.path, weights_only=True, mmap=mmap)["model"], values)
    assert_equal(read_shard(planned.path)["model"], values)
