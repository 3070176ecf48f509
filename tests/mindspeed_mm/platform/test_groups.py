"""Ranks, start of the job, and its errors; groups of real processes are in test_training.py."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from mindspeed_mm.errors import SetupError
from mindspeed_mm.plan.stage import StagePlan
from mindspeed_mm.platform import groups
from mindspeed_mm.platform.cpu import CpuPlatform
from mindspeed_mm.platform.groups import ORDER, Ranks, embedding_ranks, init_process_group

AXES = ("tp_size", "cp_size", "dp_size", "pp_size")
DEGREES = [
    dict(zip(("tp_size", "cp_size", "dp_size", "pp_size"), sizes, strict=True))
    for sizes in product((1, 2, 3), repeat=4)
]


@pytest.mark.parametrize("sizes", DEGREES, ids=str)
def test_places_and_ranks_are_inverse(sizes: dict[str, int]) -> None:
    world_size = sizes["tp_size"] * sizes["cp_size"] * sizes["dp_size"] * sizes["pp_size"]
    members = []
    for rank in range(world_size):
        ranks = Ranks.of(rank, **sizes)
        assert ranks.world_size == world_size
        place = {
            "tp_rank": ranks.tp_rank,
            "cp_rank": ranks.cp_rank,
            "dp_rank": ranks.dp_rank,
            "pp_rank": ranks.pp_rank,
        }
        assert ranks.global_rank(**place) == rank
        assert rank in ranks.replica_ranks(ranks.dp_rank)
    for dp_rank in range(sizes["dp_size"]):
        members += Ranks.of(0, **sizes).replica_ranks(dp_rank)
    assert sorted(members) == list(range(world_size))


@pytest.mark.usefixtures("active")
def test_places_are_megatrons() -> None:
    from megatron.core.parallel_state import RankGenerator

    sizes = {"tp": 2, "cp": 3, "dp": 2, "pp": 4}
    generator = RankGenerator(**sizes, ep=1, order=ORDER)
    degrees = {f"{axis}_size": size for axis, size in sizes.items()}
    for axis in sizes:
        for members in generator.get_ranks(axis):
            assert [getattr(Ranks.of(rank, **degrees), f"{axis}_rank") for rank in members] == list(range(sizes[axis]))
    replicas = sorted(sorted(members) for members in generator.get_ranks("tp-cp-pp"))
    assert [Ranks.of(0, **degrees).replica_ranks(dp_rank) for dp_rank in range(2)] == replicas


def _plan(is_tied: bool, embed: int, head: int) -> StagePlan:
    vision = [1] + [0] * head if embed == 0 else [1] * embed + [0] * (head + 1 - embed)
    text = [0] * embed + [1] * (head + 1 - embed)
    return StagePlan.from_lists(
        "qwen2vl", [vision], [text], tp_size=1, vision_layers=sum(vision), text_layers=sum(text), is_tied=is_tied
    )


@pytest.mark.parametrize(
    ("is_tied", "embed", "head", "expected"),
    [(True, 0, 3, [10, 16]), (True, 1, 3, [12, 16]), (True, 3, 3, [16]), (False, 0, 3, [16])],
)
def test_the_embedding_group_follows_the_plan(is_tied: bool, embed: int, head: int, expected: list[int]) -> None:
    ranks_of = embedding_ranks(_plan(is_tied, embed, head))
    assert ranks_of([10, 12, 14, 16]) == expected
    # megatron-core 0.12.1 passes the split rank as well.
    assert ranks_of([10, 12, 14, 16], None) == expected


def _runtime(**changes: Any) -> Any:
    values = {"local_rank": 0, "distributed_backend": "nccl", "distributed_timeout_minutes": 1}
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture
def clean() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("clean")
def test_a_process_alone_is_a_job_of_one() -> None:
    init_process_group(CpuPlatform(), _runtime(), environ={})
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is not a whole number"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            r"RANK=2 is not in 0\.\.1 \(WORLD_SIZE=2\)",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
            "MASTER_PORT='x' in the environment",
        ),
    ],
)
def test_wrong_variables_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        init_process_group(CpuPlatform(), _runtime(), environ=environ)


@pytest.mark.usefixtures("clean")
def test_a_taken_port_is_an_error_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        _set_environment(monkeypatch, port, rank=0)
        with pytest.raises(SetupError, match=rf"127\.0\.0\.1:{port} .* the port is taken\. Choose another MASTER_PORT"):
            init_process_group(CpuPlatform(), _runtime(distributed_timeout_minutes=0.05))


@pytest.mark.usefixtures("clean")
def test_missing_peers_are_an_error_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    _set_environment(monkeypatch, port, rank=0)
    with pytest.raises(SetupError, match=r"rank 0 of 2 cannot join .* not all processes came in time"):
        init_process_group(CpuPlatform(), _runtime(distributed_timeout_minutes=0.02))


def _set_environment(monkeypatch: pytest.MonkeyPatch, port: int, rank: int) -> None:
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_degrees_have_to_fit_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups.dist, "get_world_size", lambda: 6)
    monkeypatch.setattr(groups.dist, "get_rank", lambda: 0)
    parallel: Any = SimpleNamespace(tp_size=2, cp_size=1, pp_size=2, dp_size=1, vp_size=1)
    with pytest.raises(SetupError, match="6 processes cannot be split into tensor 2 x context 1 x pipeline 2"):
        groups.init_model_parallel(parallel, _plan(True, 0, 1))


def test_destroy_without_a_job_does_nothing() -> None:
    groups.destroy()
