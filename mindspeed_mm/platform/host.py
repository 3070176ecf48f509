"""Stand-ins for device objects on a machine without an accelerator: the host runs everything in order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class HostStream:
    """A stream of a device that finishes every operation before the next one starts; waiting costs nothing."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.device = device
        self.priority = priority

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """An event that has happened."""
        event = event or HostEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always finished."""
        return True


class HostEvent:
    """A point in time on the host clock."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.time_s = 0.0

    def record(self, stream: object = None) -> None:
        """Take the time."""
        self.time_s = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always happened."""
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from this event to `end`."""
        return (end.time_s - self.time_s) * 1e3


HOST_STREAM = HostStream()


@contextmanager
def use_stream(stream: object) -> Iterator[None]:
    """Context of a chosen stream; there is only one."""
    yield


def current_stream(device: object = None) -> HostStream:
    """The one stream of the host."""
    return HOST_STREAM


def do_nothing(*args: object, **kwargs: object) -> None:
    """Accepts what a device call accepts."""
