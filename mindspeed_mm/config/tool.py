"""Profiling settings: what `--mm-tool` (tools.json) holds. Every key may be left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mindspeed_mm.config.base import Ints, Settings


class StaticProfile(Settings):
    """A profile of fixed steps."""

    level: Literal["level0", "level1", "level2"] = "level1"
    """Detail of NPU profiles."""
    with_stack: bool = False
    """Record Python stacks."""
    with_memory: bool = False
    """Record memory."""
    record_shapes: bool = False
    """Record tensor shapes."""
    with_cpu: bool = True
    """Record CPU activity."""
    save_path: str = "./npu_profiling"
    """Directory for the traces."""
    start_step: int = Field(default=10, ge=0)
    """First profiled step."""
    end_step: int = Field(default=11, ge=0)
    """Step after the last profiled one."""
    data_simplification: bool = False
    """Delete intermediate NPU files."""
    aic_metrics_type: Literal["PipeUtilization", "ArithmeticUtilization"] = "PipeUtilization"
    """Kind of NPU core metrics."""
    analyse_flag: bool = True
    """Analyse NPU profiles at the end."""

    @model_validator(mode="after")
    def _check(self) -> StaticProfile:
        if self.end_step <= self.start_step:
            raise ValueError(f"end_step = {self.end_step} should be greater than start_step = {self.start_step}.")
        return self


class DynamicProfile(Settings):
    """A profile that is switched on while the run goes."""

    config_path: str = "path to dynamic config folder"
    """Folder of the dynamic profiler's configuration."""


class ProfileConfig(Settings):
    """Profiler."""

    enable: bool = False
    """Switch the profiler on."""
    profile_type: Literal["static", "dynamic"] = "static"
    """Which of the two sections is used."""
    ranks: Ints = (0, 1, 2, 3)
    """Global ranks that record; [-1] is all."""
    static_param: StaticProfile = StaticProfile()
    """Settings of a static profile."""
    dynamic_param: DynamicProfile = DynamicProfile()
    """Settings of a dynamic profile."""


class MemoryProfileConfig(Settings):
    """Memory snapshots."""

    enable: bool = False
    """Switch snapshots on."""
    start_step: int = Field(default=0, ge=0)
    """First recorded step."""
    end_step: int = Field(default=2, ge=0)
    """Step after the last recorded one."""
    save_path: str = "./memory_snapshot"
    """Directory for snapshots."""
    dump_ranks: Ints = (0,)
    """Global ranks that record."""
    stacks: str = "all"
    """Stacks that the snapshot records."""
    max_entries: int | None = None
    """Most events in a snapshot."""
    mem_info: bool = False
    """Log peak memory per step."""


class ToolConfig(Settings):
    """The whole tools file."""

    ignored_keys: ClassVar[Mapping[str, str]] = {"sorafeature": "belongs to another model"}

    profile: ProfileConfig = ProfileConfig()
    """Profiler."""
    memory_profile: MemoryProfileConfig = MemoryProfileConfig()
    """Memory snapshots."""
