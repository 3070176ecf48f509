"""The functions that rows of the patch table put in place of library functions."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_mm.platform.base import Platform, is_cuda_device

if TYPE_CHECKING:
    from torch import Tensor

FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint")
"""Functions of torch that make tensors and take a `device` keyword."""


def own_object(value: object) -> object:
    """`value` itself, or for a function a new one that calls it.

    torch._dynamo (every optimizer imports it) keeps rules by function object and refuses one object under two names.
    """
    if not isinstance(value, FunctionType):
        return value

    def call(*args: Any, **kwargs: Any) -> Any:
        return value(*args, **kwargs)

    return functools.update_wrapper(call, value)


def with_device_keyword(call: Callable[..., Tensor], platform: Platform) -> Callable[..., Tensor]:
    """`call` with device="cuda" meaning the platform's device."""

    @functools.wraps(call)
    def factory(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is not None and is_cuda_device(device):
            kwargs["device"] = platform.redirect_device(device)
        return call(*args, **kwargs)

    return factory


def tensor_to(call: Callable[..., Tensor], platform: Platform) -> Callable[..., Tensor]:
    """`Tensor.to` with "cuda" meaning the platform's device, by position or keyword."""

    @functools.wraps(call)
    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and is_cuda_device(args[0]):
            args = (platform.redirect_device(args[0]), *args[1:])
        elif "device" in kwargs:
            kwargs["device"] = platform.redirect_device(kwargs["device"])
        return call(self, *args, **kwargs)

    return to


def tensor_cuda(platform: Platform) -> Callable[..., Tensor]:
    """`Tensor.cuda` that moves to the platform's device."""

    def cuda(self: Tensor, device: object = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
        target: Any = platform.redirect_device("cuda" if device is None else device)
        return self.to(device=target, non_blocking=non_blocking, **kwargs)

    return cuda


def tensor_type(call: Callable[..., Any], platform: Platform) -> Callable[..., Any]:
    """`Tensor.type` that answers with CUDA's type names; with arguments it converts as before."""

    @functools.wraps(call)
    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = call(self, *args, **kwargs)
        return platform.type_name(answer) if isinstance(answer, str) else answer

    return type_


def with_device_type(call: Callable[..., Any], platform: Platform) -> Callable[..., Any]:
    """A decorator factory of torch.amp with device_type="cuda" meaning the platform's."""

    @functools.wraps(call)
    def decorator(*args: Any, device_type: str, **kwargs: Any) -> Any:
        return call(*args, device_type=platform.name if device_type == "cuda" else device_type, **kwargs)

    return decorator


def identity_decorator(function: Any = None, *args: Any, **kwargs: Any) -> Any:
    """A compiler that compiles nothing; usable with and without arguments."""
    return identity_decorator if function is None else function


def get_rng_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
    """Random state of the device as a CPU byte tensor; graphs are never captured off CUDA."""
    return torch.cuda.get_rng_state()


def set_rng_state(new_state: Tensor, device: object = -1, graph_safe: bool = False) -> None:
    """Set the random state of the device now, not when CUDA starts."""
    torch.cuda.set_rng_state(new_state)


def drop_generator_warning(record: logging.LogRecord) -> bool:
    """Logging filter: False for the warning that the CPU generator moved while a device state was forked."""
    return not record.getMessage().startswith("CPU RNG state changed")


def skip_without_params(call: Callable[..., None]) -> Callable[..., None]:
    """`quantize_param_shard` that returns when there is nothing to quantize."""

    @functools.wraps(call)
    def quantize_param_shard(model_params: Sequence[object], *args: Any, **kwargs: Any) -> None:
        if model_params:
            call(model_params, *args, **kwargs)

    return quantize_param_shard


def calculate_predicted_logits(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    logits_max: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What VocabParallelCrossEntropy needs of one vocabulary shard, without boolean indexing.

    Args:
        vocab_parallel_logits: [..., v] float32, this rank's part of the vocabulary; overwritten by its exponentials.
        target: [...] int64, numbers in the whole vocabulary.
        logits_max: [...], the largest logit over all parts.
        vocab_start_index: first entry of this part.
        vocab_end_index: one past its last entry.

    Returns:
        target_mask [...] (True: not in this part), masked_target_1d, predicted_logits [...], sum_exp_logits [...],
        exp_logits [..., v].
    """
    vocab_parallel_logits -= logits_max.unsqueeze(dim=-1)
    target_mask = (target < vocab_start_index) | (target >= vocab_end_index)
    masked_target = (target - vocab_start_index).masked_fill_(target_mask, 0)
    masked_target_1d = masked_target.view(-1)
    logits_2d = vocab_parallel_logits.view(-1, vocab_parallel_logits.size(-1))
    predicted_logits = logits_2d.gather(1, masked_target_1d.unsqueeze(1)).view_as(target)
    predicted_logits = predicted_logits.masked_fill_(target_mask, 0.0)
    exp_logits = vocab_parallel_logits
    torch.exp(vocab_parallel_logits, out=exp_logits)
    return target_mask, masked_target_1d, predicted_logits, exp_logits.sum(dim=-1), exp_logits


def fused_adam(params: Any, *, adam_w_mode: bool = True, **kwargs: Any) -> torch.optim.Optimizer:
    """torch's fused AdamW (Adam with L2 decay if not `adam_w_mode`) with the arguments of Apex's FusedAdam."""
    optimizer = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    return optimizer(params, fused=True, **kwargs)
