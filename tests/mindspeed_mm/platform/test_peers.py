"""A roll call names who is lost, who ended with an error, and where the others wait; ranks are objects here."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from mindspeed_mm.errors import DataError, PeerLostError
from mindspeed_mm.platform import peers as module
from mindspeed_mm.platform.peers import Peers, is_lost_peer, lost_peer_error, render_verdict

CLOSED = (
    "[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:39303. This is typically caused by a "
    "remote worker crashing. Check the logs."
)
LATE = "[/src/gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 6000ms for send operation to complete"


@pytest.mark.parametrize(
    "text",
    [
        CLOSED,
        LATE,
        "[pair.cc:1] Read error [10.0.0.2]:1: Connection reset by peer",
        "[pair.cc:1] writev [10.0.0.2]:1: Broken pipe",
        "Application timeout caused pair closure",
        "[pair.cc:1] Remote peer closed the connection.",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "wait timeout after 10000ms, keys: /default_pg/0",
        "The client socket has timed out after 60000ms while trying to connect to (10.0.0.1, 6000).",
        "NCCL error: remote process exited or there was a network error",
        "[Rank 3] Watchdog caught collective operation timeout: WorkHCCL(SeqNum=7, OpType=ALLREDUCE)",
    ],
)
def test_a_failed_collective_is_known_by_its_text(text: str) -> None:
    assert is_lost_peer(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape '[2]' is invalid"), RuntimeError("DataLoader timed out after 300 seconds"), OSError(CLOSED)],
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert not is_lost_peer(error)


def test_the_message_says_what_to_do() -> None:
    closed = str(lost_peer_error(RuntimeError(CLOSED), "rank 1 is lost.", "iteration 7, f > recv", 10))
    assert closed.splitlines()[:2] == [
        "rank 1 is lost.",
        "  This process was in iteration 7, f > recv: Connection closed by peer [10.0.0.2]:39303.",
    ]
    assert "the log of its machine" in closed
    late = str(lost_peer_error(RuntimeError(LATE), "rank 1 is lost.", "iteration 7, f > send", 0.1))
    assert "send: Timed out waiting 6000ms for send operation to complete." in late
    assert "The time allowed is --distributed-timeout-minutes 0.1; raise it if" in late
    assert "py-spy dump" in late


def test_many_lost_ranks_are_counted() -> None:
    text = render_verdict([], [f"rank {rank} (node9, process {rank})" for rank in range(10)], {})
    assert "rank 7 (node9, process 7), and 2 more do not answer" in text


class Job:
    """Ranks of a job as objects of this process, with a real store."""

    def __init__(self, world_size: int) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks = [Peers(self._connect, rank, world_size, 10) for rank in range(world_size)]
        for rank in self.ranks:
            rank.__enter__()
            rank.activity = lambda: "iteration 7"

    def _connect(self) -> dist.Store:
        return dist.TCPStore(
            "127.0.0.1", self.store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5)
        )

    def fail(self, rank: int, error: Exception) -> str:
        """What the rank says when this error ends it."""
        with pytest.raises(PeerLostError) as caught:
            self.ranks[rank].__exit__(type(error), error, None)
        return str(caught.value)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(module, "ANSWER_S", 1.5)
    job = Job(4)
    yield job
    for peers in job.ranks:
        peers.__exit__(None, None, None)
    assert not [thread for thread in threading.enumerate() if thread.name == "roll call"]


def test_a_rank_that_does_not_answer_is_named_to_all(job: Job) -> None:
    job.ranks[2]._leaving = True  # its thread ends without a word, as if it was killed
    job.store.set("call/2", "")
    thread = job.ranks[2]._thread
    assert thread is not None
    thread.join()
    expected = f"rank 2 ({socket.gethostname()}, process "
    first = job.fail(0, RuntimeError(CLOSED))
    assert first.startswith(expected)
    assert "does not answer: killed" in first
    # Rank 1 waited for rank 0, which left: the first verdict holds, rank 0 is not blamed.
    assert job.fail(1, RuntimeError(CLOSED)).startswith(expected)


def test_a_rank_that_ended_with_an_error_is_quoted(job: Job) -> None:
    error = DataError("records.json[7]: no such picture\nmore")
    job.ranks[3].__exit__(DataError, error, None)
    assert "rank 3 (" in (text := job.fail(0, RuntimeError(CLOSED)))
    assert ") ended with DataError: records.json[7]: no such picture\n" in text


def test_ranks_that_wait_for_each_other_say_where(job: Job) -> None:
    text = job.fail(1, RuntimeError(LATE))
    assert text.startswith("every process answers, and yet they wait for each other:\n    rank ")
    assert "rank 0, 1, 2, 3: iteration 7" in text


def test_a_job_of_one_has_no_roll_call() -> None:
    with pytest.raises(RuntimeError, match="by peer"), Peers(None, 0, 1, 10):
        raise RuntimeError("by peer")
