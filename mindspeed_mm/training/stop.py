"""Reasons to stop early that all ranks agree on: a signal, or the time that was granted."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequests:
    """What one rank knows of a wish to stop; `agreed` makes it everybody's.

    Args:
        device: where collectives of the whole job run.
        max_minutes: stop after so many minutes from now; None for no limit.
    """

    def __init__(self, device: torch.device, max_minutes: int | None) -> None:
        self.device = device
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.signal_number = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM and SIGINT instead of dying from them; a second SIGINT interrupts at once."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> str | None:
        """Why the job stops after this iteration, equal on all ranks; None to go on. A collective."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        wishes = torch.tensor([self.signal_number, int(late)], dtype=torch.int32, device=self.device)
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX)
        number, is_late = wishes.tolist()
        if number:
            return f"signal {signal.Signals(number).name}"
        return "--exit-duration-in-mins" if is_late else None

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number
