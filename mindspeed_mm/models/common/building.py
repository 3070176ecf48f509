"""What every module of a chunk is told when it is built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mindspeed_mm.config import ParallelConfig, TrainingConfig
    from mindspeed_mm.models.common.kernels import Kernels
    from mindspeed_mm.models.common.sequence import RowSplit


@dataclass(frozen=True, slots=True)
class Building:
    """The same for all modules of a chunk."""

    parallel: ParallelConfig
    training: TrainingConfig
    kernels: Kernels
    """Fused operations of the platform."""
    split: RowSplit
    """How rows are spread over ranks."""
    initialize: bool
    """Fill weights at random; otherwise they are left for a checkpoint."""

    def with_whole_rows(self) -> Building:
        """For modules whose rows are whole on every tensor rank: no sequence parallelism."""
        return replace(self, parallel=self.parallel.model_copy(update={"sequence_parallel": False}))
