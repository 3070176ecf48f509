"""Runs a function on several real gloo processes and brings back what each returned."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1


def run_ranks(world_size: int, target: str, *args: Any, timeout_s: float = 300) -> list[Any]:
    """Call `target(*args)` on every rank of a job.

    Args:
        world_size: processes; each has RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set and one torch thread.
        target: "module:function".
        args: given to every rank; picklable.
    Returns:
        what each rank returned, by rank.
    """
    context = multiprocessing.get_context("spawn")
    queue: Any = context.SimpleQueue()
    port = free_port()
    # Children inherit the environment at start: one BLAS thread each, or they fight for the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    processes = [
        context.Process(target=_run, args=(rank, world_size, port, target, args, queue), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    failure = None
    try:
        while len(results) < world_size and failure is None:
            rank, value, error = _get(queue, processes, timeout_s)
            if error is None:
                results[rank] = pickle.loads(value)
            else:
                failure = _root_cause(queue, rank, error)
    finally:
        for process in processes:
            process.join(timeout=1 if failure else 30)
            if process.is_alive():
                process.kill()
    if failure:
        raise AssertionError(failure)
    return [results[rank] for rank in range(world_size)]


def free_port() -> int:
    """A TCP port that nothing listens on now, with the seven above it free as well.

    Below the range that the kernel takes ports for outgoing connections from: a port of that range can be gone again
    before the job binds it.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32000, 8)
        try:
            for number in range(8):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + number))
        except OSError:
            continue
        return port


def _root_cause(queue: Any, rank: int, error: str) -> str:
    """The first failure that is not the echo of another rank's end."""
    failures = [(rank, error)]
    while queue._reader.poll(1.0):
        other, _, text = queue.get()
        if text is not None:
            failures.append((other, text))
    rank, error = next(((r, text) for r, text in failures if "by peer" not in text), failures[0])
    return f"rank {rank} failed:\n{error}"


def _get(queue: Any, processes: Sequence[Any], timeout_s: float) -> tuple[int, Any, str | None]:
    waited = 0.0
    while not queue._reader.poll(0.5):
        waited += 0.5
        dead = [(i, p.exitcode) for i, p in enumerate(processes) if p.exitcode not in (None, 0)]
        if dead and not queue._reader.poll(1.0):
            return dead[0][0], None, f"it died with exit code {dead[0][1]}"
        if waited > timeout_s:
            return -1, None, f"no answer within {timeout_s} s"
    return queue.get()


def _run(rank: int, world_size: int, port: int, target: str, args: tuple[Any, ...], queue: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    # A test run that is killed takes its processes with it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    try:
        module, name = target.split(":")
        value = getattr(importlib.import_module(module), name)(*args)
        # As bytes: torch would hand tensors over as shared memory of a process that is about to end.
        queue.put((rank, pickle.dumps(value), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        os._exit(1)
