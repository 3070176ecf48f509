"""Who of the job is lost: when a collective fails, the processes that still live say so, and the others are named.

The store that started the job carries the roll call. In every process a thread sleeps in it until a call comes, so
nothing is sent while all is well. The first process whose collective fails calls and writes down who is missing; the
others read it.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Self

import torch.distributed as dist

from mindspeed_mm.errors import PeerLostError

ANSWER_S = 3.0
"""How long the caller waits after the last answer; a live process gives one within milliseconds."""
STORE_S = 5.0
"""How long one operation of the store may take."""
MOST_NAMED = 8

# Texts of gloo, NCCL, HCCL and the store. The peer is gone:
_CLOSED = re.compile(
    r"by peer|Remote peer closed|Broken pipe|pair closure|Connection was likely closed|Connection refused"
    r"|No route to host|(?:host|network) is unreachable|ncclRemoteError|remote process exited|communicator was aborted",
    re.IGNORECASE,
)
# The peer did not come in time:
_LATE = re.compile(
    r"Timed out waiting|Watchdog caught collective|Operation timed out|Connection timed out|wait timeout|Socket Timeout"
    r"|socket .*timed out|socket establish timeout|EI0002|EI0006",
    re.IGNORECASE,
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is a failed collective, by its text: all libraries raise plain RuntimeErrors."""
    text = str(error)
    return isinstance(error, RuntimeError) and bool(_CLOSED.search(text) or _LATE.search(text))


def lost_peer_error(error: BaseException, verdict: str, place: str, timeout_minutes: float | None) -> PeerLostError:
    """The named error for a failed collective.

    Args:
        error: what the collective raised.
        verdict: which processes are lost.
        place: what this process was doing.
        timeout_minutes: --distributed-timeout-minutes, None if it is not known here.
    """
    text = str(error)
    if _LATE.search(text) and not _CLOSED.search(text):
        allowed = "" if timeout_minutes is None else f" {timeout_minutes:g}"
        advice = (
            f"The time allowed is --distributed-timeout-minutes{allowed}; raise it if the other side was only slow "
            "(a first load, a long save).\n  `py-spy dump --pid PROCESS` on its machine shows where a process hangs."
        )
    else:
        advice = "Its own message, if it had one, stands earlier in the log, or in the log of its machine."
    # gloo writes its source file before the reason, and general advice after it.
    reason = re.sub(r"^\[[^]]*\] ?", "", text.partition("\n")[0]).partition(". This is typically")[0]
    return PeerLostError(
        f"{verdict}\n  This process was in {place}: {reason.rstrip('.')}.\n  {advice}\n"
        "  Start the job again when the cause is gone; --load on the save directory takes up the last save."
    )


class Peers:
    """Stands for this process in the roll call of its job; a context around everything that talks to others.

    Inside, a failed collective becomes a PeerLostError that names who is lost, and any other error is left for the
    others to read. `activity` says what the job is doing, for the message.

    Args:
        connect: a new connection to the store of the job; None in a job of one.
        rank: of this process.
        world_size: processes of the job.
        timeout_minutes: what collectives are allowed, for the message.
    """

    def __init__(
        self, connect: Callable[[], dist.Store] | None, rank: int, world_size: int, timeout_minutes: float
    ) -> None:
        self._connect = connect
        self._rank = rank
        self._world_size = world_size
        self._timeout_minutes = timeout_minutes
        self._leaving = False
        self._thread: threading.Thread | None = None
        self.activity: Callable[[], str] = lambda: "start-up"

    @classmethod
    def of_job(cls, environ: Mapping[str, str], timeout_minutes: float) -> Peers:
        """The peers of a job that torchrun's variables describe; call it after `init_process_group`."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if world_size == 1:
            return cls(None, rank, world_size, timeout_minutes)
        host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        prefix = f"mindspeed_mm/roll/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

        def connect() -> dist.Store:
            # TCPStore alone keeps trying a store that is gone.
            socket.create_connection((host, port), timeout=STORE_S).close()
            store = dist.TCPStore(
                host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_S)
            )
            return dist.PrefixStore(prefix, store)

        return cls(connect, rank, world_size, timeout_minutes)

    def __enter__(self) -> Self:
        if self._connect is not None:
            store = self._connect()
            store.set(f"who/{self._rank}", f"{socket.gethostname()}, process {os.getpid()}")
            asked = threading.main_thread().ident
            assert asked is not None
            self._thread = threading.Thread(target=self._answer, args=(store, asked), name="roll call", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connect is None:
            return
        if error is None:
            self._leave(None)
            return
        if not is_lost_peer(error):
            self._leave(f"{type(error).__name__}: {error}".splitlines()[0])
            return
        # torchrun asks the rest to end as soon as one process of its machine is dead; the message comes first.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        place = self._place(frame for frame, _ in traceback.walk_tb(trace))
        lost = lost_peer_error(error, self._call(place), place, self._timeout_minutes)
        self._leave("")
        raise lost from error

    def _answer(self, store: dist.Store, asked: int) -> None:
        """The thread: sleep until somebody calls, then say where the main thread is."""
        while True:
            try:
                store.wait([f"call/{self._rank}"], timedelta(hours=1))
                break
            except dist.DistStoreError:
                continue
            except RuntimeError:
                return  # The store went with the process that held it.
        if self._leaving:
            return
        frame = sys._current_frames().get(asked)
        place = self._place(reversed([frame for frame, _ in traceback.walk_stack(frame)]))
        try:
            store.set(f"here/{self._rank}", place)
            store.add("answers", 1)
        except RuntimeError:
            return

    def _place(self, frames: Iterable[FrameType]) -> str:
        return ", ".join(filter(None, (self.activity(), describe_place(frames))))

    def _leave(self, reason: str | None) -> None:
        """Leave a word for the others ("" when this process only follows one that is lost), and end the thread."""
        assert self._connect is not None
        assert self._thread is not None
        self._leaving = True
        try:
            store = self._connect()
            if reason is not None:
                store.set(f"left/{self._rank}", reason)
            store.set(f"call/{self._rank}", "leave")
        except (RuntimeError, OSError):
            pass  # The store is gone, and the thread has seen it as well.
        self._thread.join(timeout=STORE_S)

    def _call(self, place: str) -> str:
        """Which processes are lost, in words."""
        assert self._connect is not None
        try:
            store = self._connect()
            if store.add("callers", 1) == 1:
                verdict = self._verdict(store, place)
                store.set("verdict", verdict)
                return verdict
            return store.get("verdict").decode()
        except (RuntimeError, OSError):
            return (
                "another process of the job is lost, and the store of the job does not answer either:\n"
                "  most likely rank 0 or its machine (MASTER_ADDR) is gone."
            )

    def _verdict(self, store: dist.Store, place: str) -> str:
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        for rank in others:
            store.set(f"call/{rank}", "answer")
        answers, deadline = 0, time.monotonic() + ANSWER_S
        while answers < len(others) and time.monotonic() < deadline:
            time.sleep(0.05)
            if (now := store.add("answers", 0)) > answers:
                answers, deadline = now, time.monotonic() + ANSWER_S
        lost: list[str] = []
        ended: list[str] = []
        places = defaultdict(list, {place: [self._rank]})
        for rank in others:
            reason = store.get(f"left/{rank}").decode() if store.check([f"left/{rank}"]) else None
            if reason:
                ended.append(f"rank {rank} ({_who(store, rank)}) ended with {reason}")
            elif store.check([f"here/{rank}"]):
                places[store.get(f"here/{rank}").decode()].append(rank)
            elif reason is None:
                lost.append(f"rank {rank} ({_who(store, rank)})")
        return render_verdict(ended, lost, places)


def render_verdict(ended: Sequence[str], lost: Sequence[str], places: Mapping[str, Sequence[int]]) -> str:
    """The result of a roll call in words.

    Args:
        ended: sentences on processes that left with an error of their own.
        lost: names of processes that did not answer.
        places: what the others are doing, with their ranks.
    """
    if ended:
        return "\n  ".join(_first(ended))
    if lost:
        verb = "does" if len(lost) == 1 else "do"
        return (
            f"{', '.join(_first(lost))} {verb} not answer: killed (out of memory?), stopped, hanging, "
            "or the machine is gone."
        )
    rows = [f"rank {', '.join(map(str, sorted(ranks)))}: {place}" for place, ranks in places.items()]
    return "every process answers, and yet they wait for each other:\n    " + "\n    ".join(_first(rows))


def describe_place(frames: Iterable[FrameType]) -> str:
    """Where a thread is, outermost frame first: our last function, then megatron's and torch.distributed's."""
    ours, library = "", [""]
    for frame in frames:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname
        if module == __name__ or name == "wrapper" or "<locals>" in name:
            continue
        if module.partition(".")[0] in ("mindspeed_mm", "checkpoint"):
            ours, library = name, []
        elif module.startswith(("megatron.", "torch.distributed.")):
            library.append(name)
    return " > ".join(name for name in (ours, *library[-2:]) if name)


def _who(store: dist.Store, rank: int) -> str:
    # A process that never got as far as its name would let `get` wait.
    return store.get(f"who/{rank}").decode() if store.check([f"who/{rank}"]) else "it never came"


def _first(texts: Sequence[str]) -> list[str]:
    rest = len(texts) - MOST_NAMED
    return [*texts[:MOST_NAMED], f"and {rest} more"] if rest > 0 else list(texts)
