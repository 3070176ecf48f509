"""Logging of entry points: one stream, rank-filtered."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping


class _RankFilter(logging.Filter):
    """Lets the first and the last rank speak; errors pass from everywhere, with the rank before them."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank = rank
        self.speaks = rank in (0, world_size - 1)
        self.is_single = world_size == 1

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING and not self.is_single:
            record.msg = f"[rank {self.rank}] {record.msg}"
            return True
        if self.speaks or record.levelno >= logging.WARNING:
            # The last rank owns the iteration line; everything else is said once, by the first one.
            owns_line = record.name.startswith("mindspeed_mm.training.metrics")
            return owns_line or self.rank == 0 or record.levelno >= logging.WARNING
        return False


def set_up_logging(environ: Mapping[str, str]) -> None:
    """Log messages of this package to stdout, without prefix: scripts parse the lines.

    Args:
        environ: RANK and WORLD_SIZE as torchrun sets them.
    """
    # What megatron-core warns of (no Apex, no Transformer Engine, its own deprecated fields) is by design here.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # Megatron calls torch's collectives by names that the newest torch is renaming.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(_RankFilter(int(environ.get("RANK") or 0), int(environ.get("WORLD_SIZE") or 1)))
    for name in ("mindspeed_mm", "checkpoint"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
