"""Trains a tiny transformer with megatron-core in this process of a job; prints losses and gradient norms as JSON.

Started by test_training.py as `python -m tests.mindspeed_mm.platform.tiny_training CASES`, CASES being a JSON list of
{"pp_size", "use_distributed_optimizer", "bf16", "overlap", "variable"}.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_mm.platform.groups import Groups, destroy, init_model_parallel, init_process_group, seed_everything
from mindspeed_mm.platform.select import activate, choose_platform

LAYERS, HIDDEN, VOCABULARY, LENGTH, MICRO_BATCHES, STEPS = 2, 32, 64, 16, 4, 4


def main() -> None:
    """Train every case in turn, in groups of its own."""
    platform = choose_platform("cpu")
    activate(platform)
    runtime: Any = SimpleNamespace(local_rank=0, distributed_backend="nccl", distributed_timeout_minutes=1)
    init_process_group(platform, runtime)
    for case in json.loads(sys.argv[1]):
        pp_size = case.get("pp_size", 1)
        parallel: Any = SimpleNamespace(
            tp_size=1, cp_size=1, vp_size=1, pp_size=pp_size, dp_size=dist.get_world_size() // pp_size
        )
        groups = init_model_parallel(parallel, plan_of(pp_size), timeout_minutes=1)
        seed_everything(platform, 1234, groups.ranks)
        check_relay(groups)
        result = train(groups, **case)
        if groups.ranks.rank == groups.ranks.world_size - 1:
            print(json.dumps(result), flush=True)
        import_module("megatron.core.parallel_state").destroy_model_parallel()
    destroy()


def plan_of(pp_size: int) -> Any:
    """A plan with the embedding on the first stage and its tied head on the last."""
    stages = (
        SimpleNamespace(pp_rank=0, parts={"token_embed"}),
        SimpleNamespace(pp_rank=pp_size - 1, parts={"lm_head"}),
    )
    return SimpleNamespace(is_tied=True, stages=stages)


def check_relay(groups: Groups) -> None:
    """A CPU tensor goes from the first to the last rank of the replica."""
    members = groups.ranks.replica_ranks(groups.ranks.dp_rank)
    tensor = torch.tensor([groups.ranks.dp_rank + 1.0])
    if len(members) > 1 and groups.ranks.rank == members[0]:
        dist.isend(tensor, members[-1], group=groups.replica).wait()
    elif len(members) > 1 and groups.ranks.rank == members[-1]:
        received = torch.zeros(1)
        dist.recv(received, members[0], group=groups.replica)
        assert torch.equal(received, tensor)


def train(
    groups: Groups,
    *,
    pp_size: int = 1,
    use_distributed_optimizer: bool = False,
    bf16: bool = False,
    overlap: bool = False,
    variable: bool = False,
) -> list[tuple[float, float]]:
    """Loss (on the last stage) and gradient norm of every step."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    dtype = torch.bfloat16 if bf16 else torch.float32
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        pipeline_model_parallel_size=pp_size,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=True,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        variable_seq_lengths=variable,
        moe_token_dispatcher_type="alltoall",
        finalize_model_grads_func=finalize_model_grads,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    is_last = parallel_state.is_pipeline_last_stage()
    chunk = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=2 * LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=is_last,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )
    fill(chunk, first_layer=groups.ranks.pp_rank * LAYERS // pp_size)
    if bf16:
        chunk = chunk.bfloat16()
    # Small buckets, so that several are reduced and coalesced.
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=use_distributed_optimizer,
        grad_reduce_in_fp32=bf16,
        overlap_grad_reduce=overlap,
        bucket_size=3000,
    )
    model = DistributedDataParallel(config, ddp, chunk)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        bf16=bf16,
        params_dtype=dtype,
        clip_grad=1.0,
        use_distributed_optimizer=use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(settings, [model])
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = model.no_sync if overlap else None
    result = []
    for step in range(STEPS):
        batches = [batch(step, i, variable) for i in range(MICRO_BATCHES)][groups.ranks.dp_rank :: groups.ranks.dp_size]
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=len(batches),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        loss = torch.stack([item["loss"] for item in losses]).mean() if is_last else torch.zeros(())
        dist.all_reduce(loss, group=groups.dp)
        result.append((loss.item() / groups.ranks.dp_size, float(norm)))
    optimizer.load_state_dict(optimizer.state_dict())
    return result


def forward_step(batches: Any, model: Any) -> Any:
    """megatron's forward step function: next-token loss of one row."""
    tokens = next(batches)
    length = tokens.size(1) - 1
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    output = model(tokens[:, :-1], torch.arange(length)[None], mask, labels=tokens[:, 1:])

    def loss_function(losses: torch.Tensor) -> Any:
        loss = losses.float().mean()
        # A copy: the schedule divides the loss in place.
        return loss, {"loss": loss.detach().clone()}

    return output, loss_function


def batch(step: int, number: int, variable: bool) -> torch.Tensor:
    """Counting upwards modulo the vocabulary from a random start: [1, s + 1] int64."""
    generator = torch.Generator().manual_seed(100 * step + number)
    length = LENGTH + (2 * number if variable else 0)
    return (torch.randint(0, VOCABULARY, (1, 1), generator=generator) + torch.arange(length + 1)) % VOCABULARY


@torch.no_grad()
def fill(chunk: torch.nn.Module, first_layer: int) -> None:
    """Weights that depend on the global name only, so that every cut of the model starts equal."""
    for name, parameter in chunk.named_parameters():
        name = re.sub(r"layers\.(\d+)", lambda match: f"layers.{int(match[1]) + first_layer}", name)
        name = name.replace("output_layer.weight", "embedding.word_embeddings.weight")
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(values + 1 if "norm" in name and "weight" in name else values)


if __name__ == "__main__":
    main()
