"""The norm of all parameters of a model that is spread over processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

if TYPE_CHECKING:
    from mindspeed_mm.platform.groups import Groups


def parameters_norm(chunks: Iterable[torch.nn.Module], groups: Groups, device: torch.device) -> float:
    """L2 norm of every weight counted once, whatever the layout. A collective over the whole job.

    Args:
        chunks: the model chunks of this rank.
        device: where collectives of the job run.
    """
    total = torch.zeros((), dtype=torch.float32, device=device)
    if groups.ranks.dp_rank == 0 and groups.ranks.cp_rank == 0:
        for chunk in chunks:
            for parameter in chunk.parameters():
                # The tied head copy and replicated weights of other tensor ranks are the same numbers again.
                if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
                    total += torch.linalg.vector_norm(parameter.detach(), dtype=torch.float32).square()
    dist.all_reduce(total)
    return float(total.sqrt())
