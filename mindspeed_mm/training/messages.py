"""Gradients between stages: none is computed or sent for stages with nothing trained at or before them.

Whether the gradient of a stage's input is needed follows from the plan and the freezes (`input_needs_gradient`), so the
two sides of a border agree without a word. The sender's chunk takes its input out of the graph; the receiver's schedule
does not ask for what will not come.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron.core.pipeline_parallel import get_forward_backward_func

from mindspeed_mm.models.qwen2vl.chunk import InputGradient
from mindspeed_mm.plan.checks import holds_trainable, input_needs_gradient
from mindspeed_mm.plan.schedule import rank_steps

if TYPE_CHECKING:
    from mindspeed_mm.config import Qwen2VLConfig
    from mindspeed_mm.models.qwen2vl.chunk import Qwen2VLChunk
    from mindspeed_mm.plan import StagePlan


class GradientMessages:
    """What a rank sends and receives in the backward pass. Made once, before the first training iteration.

    Args:
        chunks: the chunks of this rank; those whose input needs no gradient are told so.
        plan: the stage plan of the run.
        model: says what is frozen.
    """

    def __init__(self, chunks: Sequence[Qwen2VLChunk], plan: StagePlan, model: Qwen2VLConfig) -> None:
        self.plan, self.model, self.chunks = plan, model, chunks
        leaves_out = _takes_communicator()
        for chunk in chunks:
            is_trained = any(parameter.requires_grad for parameter in chunk.parameters())
            assert is_trained == holds_trainable(model, plan, chunk.stage), "chunks are frozen as the settings say"
            if not input_needs_gradient(model, plan, chunk.stage):
                chunk.input_gradient = InputGradient.NONE if leaves_out else InputGradient.STAND_IN

    def arguments(self, num_micro_batches: int) -> dict[str, Any]:
        """What the schedule of one training iteration is called with, beside its usual arguments.

        Empty where every gradient is received, and for a megatron-core that takes no communicator.
        """
        receipts = list(self._receipts(num_micro_batches))
        if all(receipts) or not _takes_communicator():
            return {}
        from megatron.core import parallel_state
        from megatron.core.process_groups_config import ProcessGroupCollection

        # Megatron wants both or none; these are the groups that it takes by itself.
        groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "embd", "pos_embd", "pp", "dp_cp"])
        pp_group = parallel_state.get_pipeline_model_parallel_group()
        communicator = _build_communicator(pp_group, self.chunks[0].config, receipts)
        return {"p2p_communicator": communicator, "pg_collection": groups}

    def _receipts(self, num_micro_batches: int) -> Iterator[bool]:
        """For every gradient that the schedule wants to receive, in its order: whether it is sent."""
        plan, pp_rank = self.plan, self.chunks[0].stage.pp_rank
        for step in rank_steps(pp_rank, plan.pp_size, plan.vp_size, num_micro_batches):
            following = plan.next_of(plan.at(pp_rank, step.vp_stage))
            if not step.is_forward and following is not None:
                yield input_needs_gradient(self.model, plan, following)


def _takes_communicator() -> bool:
    """Since 0.15 the schedules of megatron-core take an object that sends and receives; before, they call functions."""
    parameters = inspect.signature(get_forward_backward_func()).parameters
    return "p2p_communicator" in parameters and "pg_collection" in parameters


def _build_communicator(group: Any, config: Any, receipts: Sequence[bool]) -> Any:
    """Megatron's communicator, which receives the n-th gradient of an iteration only if `receipts[n]` says so."""
    # older releases lack it
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    class Communicator(P2PCommunicator):
        def __init__(self) -> None:
            super().__init__(group, config)
            self._receipts = iter(receipts)

        def _communicate(self, *, recv_next: bool, **kwargs: Any) -> Any:
            # The one place that all transfers go through. A sender without gradient passes None: megatron sends nothing
            # for it.
            return super()._communicate(recv_next=recv_next and next(self._receipts), **kwargs)

    return Communicator()
