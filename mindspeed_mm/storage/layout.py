"""Names of the MM checkpoint layout: iteration directories, rank directories, tracker and plan files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage.files import write_file

SHARD_FILE = "model_optim_rng.pt"
DISTRIB_FILE = "distrib_optim.pt"
TRACKER = "latest_checkpointed_iteration.txt"
PLAN_FILE = "stage_plan.json"
MANIFEST_FILE = "manifest.json"
RELEASE: Literal["release"] = "release"

Iteration = int | Literal["release"]
"""A training iteration, or the word that stands for converted weights without one."""

_ITERATION_DIR = re.compile(r"iter_(\d{7,})\Z")
_RANK_DIR = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?\Z")


def iteration_name(iteration: Iteration) -> str:
    """The directory name of an iteration: `release` or `iter_0000010`."""
    return RELEASE if iteration == RELEASE else f"iter_{iteration:07d}"


def iteration_dir(root: Path, iteration: Iteration) -> Path:
    """The directory that holds one iteration's rank directories."""
    return Path(root) / iteration_name(iteration)


def rank_name(tp_rank: int, pp_rank: int, pp_size: int) -> str:
    """The name of a rank directory: `mp_rank_00`, with `_000` behind it where `pp_size` > 1."""
    return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp_size > 1 else "")


def shard_dir(root: Path, iteration: Iteration, tp_rank: int, pp_rank: int, pp_size: int) -> Path:
    """The directory of one (tp, pp) rank's shard."""
    return iteration_dir(root, iteration) / rank_name(tp_rank, pp_rank, pp_size)


def parse_rank_name(name: str) -> tuple[int, int] | None:
    """(tp_rank, pp_rank) of a rank directory's name; pp_rank is 0 where the name has none. None for other names."""
    match = _RANK_DIR.match(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def list_iterations(root: Path) -> list[Iteration]:
    """Every iteration that has a directory under `root`, `release` first, then ascending."""
    root = Path(root)
    if not root.is_dir():
        return []
    numbers = sorted(int(match[1]) for entry in root.iterdir() if (match := _ITERATION_DIR.match(entry.name)))
    found: list[Iteration] = [RELEASE] if (root / RELEASE).is_dir() else []
    return found + list(numbers)


def read_tracker(root: Path) -> Iteration:
    """The iteration that the tracker file names, with or without a newline behind it.

    Raises:
        CheckpointError: there is no tracker, or it holds neither `release` nor a number.
    """
    path = Path(root) / TRACKER
    try:
        text = path.read_bytes()[:64].decode("ascii", "replace").strip()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); it names the iteration to load.") from error
    if text == RELEASE:
        return RELEASE
    if text.isascii() and text.isdigit():
        return int(text)
    raise CheckpointError(f"{path} holds {text!r}; expected 'release' or an iteration number such as 1000.")


def write_tracker(root: Path, iteration: Iteration) -> None:
    """Let the tracker name `iteration`; the file is replaced in one step and has no newline, as Megatron's."""
    write_file(Path(root) / TRACKER, str(iteration).encode(), replace=True)
