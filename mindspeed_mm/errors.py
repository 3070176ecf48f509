"""The named errors of the project and the exit code each one ends a program with.

An error text says where, what was found, what was expected, and what to do. Exit codes are part of the command-line
contract: 0 done, 2 arguments or configuration, 11 environment, 12 data, 13 no usable checkpoint, 14 a peer was lost or
hung, 15 stopped by a numeric guard, 18 stopped by a signal after saving, 19 no space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class MindSpeedMMError(Exception):
    """Base of every error that a user can act on; command lines print it without a traceback."""

    exit_code: ClassVar[int] = 1


class ConfigError(MindSpeedMMError):
    """Arguments or configuration files are wrong; carries all problems found in one place.

    Args:
        where: the file or command line that holds the problems.
        problems: one text per problem, each complete in itself.
    """

    exit_code = 2

    def __init__(self, where: str, problems: str | Sequence[str]) -> None:
        self.where = where
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        lines = [where, *(f"  {line}" for problem in self.problems for line in problem.splitlines())]
        super().__init__("\n".join(lines))


class SetupError(MindSpeedMMError):
    """The environment cannot run the job: device, port, world size, shared directory."""

    exit_code = 11


class DataError(MindSpeedMMError):
    """A record or a medium cannot be used as it is; the text names the record."""

    exit_code = 12


class CheckpointError(MindSpeedMMError):
    """A checkpoint is missing, damaged, or does not fit the model or the plan."""

    exit_code = 13


class PeerLostError(MindSpeedMMError):
    """Another process of the job died or hangs."""

    exit_code = 14


class NumericError(MindSpeedMMError):
    """A loss or gradient is not finite and the policy is to stop."""

    exit_code = 15


class InterruptedRunError(MindSpeedMMError):
    """The run was stopped by a signal after its state was saved."""

    exit_code = 18


class DiskFullError(MindSpeedMMError):
    """There is no space left where a file had to be written."""

    exit_code = 19
