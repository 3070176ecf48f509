"""Stages with nothing trained at or before them run forward only: real processes, every message counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from checkpoint.convert import mm_to_hf
from mindspeed_mm.config import OptimizerConfig, ParallelConfig, RuntimeConfig, TrainingConfig
from mindspeed_mm.ops.batch import Batch
from mindspeed_mm.plan import StagePlan
from mindspeed_mm.plan.checks import holds_trainable, input_needs_gradient
from tests.dist.harness import run_ranks
from tests.parity.engine import Case, _Job, _write_gradients
from tests.parity.problem import make_samples, read_config, to_batch, with_frozen, with_layout
from tests.parity.reference import CLIP, LEARNING_RATE, WEIGHT_DECAY, solve
from tests.parity.test_parity import SIZE, load_all, worst_gradient
from tools.make_tiny_checkpoint import make_tiny_checkpoint

STEPS, MICRO_BATCHES = 2, 4
SIDE, TOWER, TEXT = ("vision", "projector"), ("vision",), ("text",)

CASES = [
    # a rank, or two, of vision alone
    Case(pp=2, vision=(4, 0), text=(0, 4), frozen=SIDE, steps=STEPS),
    Case(pp=3, vision=(2, 2, 0), text=(0, 0, 4), frozen=SIDE, steps=STEPS, loss="token"),
    # the stage where vision ends holds trained text layers
    Case(pp=3, vision=(2, 2, 0), text=(0, 1, 3), frozen=SIDE, steps=STEPS),
    # the projector is trained, in the second stage
    Case(pp=3, vision=(3, 1, 0), text=(0, 2, 2), frozen=TOWER, steps=STEPS),
    # frozen stages behind a trained one pass gradients through
    Case(pp=3, vision=(4, 0, 0), text=(0, 2, 2), frozen=TEXT, steps=STEPS),
    Case(pp=3, vision=(2, 2, 0), text=(0, 0, 4), frozen=("vision", "text"), steps=STEPS),
    Case(pp=3, vision=(2, 2, 0), text=(0, 1, 3), frozen=("projector",), steps=STEPS),
    # virtual chunks: both chunks of the first round frozen; one; projector in the second chunk; text frozen
    Case(pp=2, vp=2, vision=((2, 2), (0, 0)), text=((0, 0), (2, 2)), frozen=SIDE, steps=STEPS),
    Case(pp=2, vp=2, vision=((4, 0), (0, 0)), text=((0, 1), (2, 1)), frozen=SIDE, steps=STEPS),
    Case(pp=2, vp=2, vision=((1, 2), (1, 0)), text=((0, 0), (0, 4)), frozen=SIDE, steps=STEPS, loss="token"),
    Case(pp=2, vp=2, vision=((1, 3), (0, 0)), text=((0, 0), (2, 2)), frozen=TOWER, steps=STEPS),
    Case(pp=2, vp=2, vision=((2, 2), (0, 0)), text=((0, 0), (2, 2)), frozen=TEXT, steps=STEPS),
    # with the other axes
    Case(pp=4, vp=2, vision=((1, 1, 1, 1), (0, 0, 0, 0)), text=((0, 0, 0, 0), (1, 1, 1, 1)), frozen=SIDE, steps=STEPS),
    Case(tp=2, pp=2, vision=(4, 0), text=(0, 4), frozen=SIDE, steps=STEPS),
    Case(tp=2, pp=2, sp=True, vision=(3, 1), text=(0, 4), frozen=TOWER, steps=STEPS, distributed_optimizer=True),
    Case(tp=2, pp=2, vp=2, vision=((2, 2), (0, 0)), text=((0, 0), (2, 2)), frozen=SIDE, steps=STEPS),
    Case(dp=2, pp=2, vision=(4, 0), text=(0, 4), frozen=SIDE, steps=STEPS, distributed_optimizer=True),
]


@dataclass
class Traffic:
    """What a rank did in its first training iteration."""

    losses: list[float]
    """Loss of every step; zeros on all but the last stage."""
    gradients_sent: list[int] = field(default_factory=list)
    """Values of every gradient sent to the stage before."""
    gradients_received: int = 0
    outputs_sent: int = 0
    kept: dict[int, int] = field(default_factory=dict)
    """Stage -> tensors that its forward passes kept for a backward pass."""
    held_inputs: int = 0
    """Values in the largest input that the schedule held on to, of the stages whose input needs no gradient."""


def solve_all(cases: list[Case], checkpoint: Path, out: Path) -> list[Traffic]:
    """What a rank does: every case; gradients go to `out/<case>`."""
    from mindspeed_mm.platform.groups import destroy, init_process_group
    from mindspeed_mm.platform.select import activate, choose_platform

    platform = choose_platform("cpu")
    activate(platform)
    init_process_group(platform, RuntimeConfig(distributed_timeout_minutes=5))
    traffic = [_solve(case, checkpoint, out / case.name, platform) for case in cases]
    destroy()
    return traffic


def solve_all_on_older(*args: Any) -> list[Traffic]:
    """`solve_all`, where the older megatron-core is what Python finds."""
    from mindspeed_mm.platform.select import activate, choose_platform

    activate(choose_platform("cpu"))
    import megatron.core
    from megatron.core import parallel_state

    assert megatron.core.__version__ == "0.12.1"
    destroy = parallel_state.destroy_model_parallel

    def destroy_all() -> None:
        destroy()
        # it forgets the embedding groups but not their ranks
        parallel_state._EMBEDDING_GLOBAL_RANKS = parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None

    parallel_state.destroy_model_parallel = destroy_all
    return solve_all(*args)


def _solve(case: Case, checkpoint: Path, out: Path, platform: Any) -> Traffic:
    from megatron.core import parallel_state

    from checkpoint.load import read_stage
    from mindspeed_mm.models.qwen2vl.chunk import build_chunk
    from mindspeed_mm.platform.groups import init_model_parallel, seed_everything
    from mindspeed_mm.training.build import fill, wrap_chunks
    from mindspeed_mm.training.loop import connect_schedule
    from mindspeed_mm.training.messages import GradientMessages
    from mindspeed_mm.training.optimizer import build_optimizer
    from mindspeed_mm.training.step import loss_kind

    model, parallel, plan = layout(case, checkpoint)
    config = read_config(checkpoint)
    training = TrainingConfig(
        micro_batch_size=2,
        global_batch_size=2 * MICRO_BATCHES,
        train_iters=STEPS,
        seq_length=512,
        calculate_per_token_loss=case.loss == "token",
    )
    settings = OptimizerConfig(
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        clip_grad=CLIP,
        use_distributed_optimizer=case.distributed_optimizer,
    )
    groups = init_model_parallel(parallel, plan, timeout_minutes=5)
    seed_everything(platform, 1, groups.ranks)
    chunks = []
    for stage in plan.stages_of_rank(groups.ranks.pp_rank):
        chunk = build_chunk(model, plan, stage, parallel, training, platform, None, initialize=False)
        assert not fill(chunk, read_stage(checkpoint, model, plan, stage, groups.ranks.tp_rank))
        chunks.append(chunk)
    models = wrap_chunks(chunks, settings, training)
    optimizer = build_optimizer(settings, training, models)
    connect_schedule(models, optimizer, groups.embedding)
    batches = [to_batch(samples, config) for samples in make_samples(config)][groups.ranks.dp_rank :: case.dp]
    job = _FrozenJob(models, optimizer, batches, groups, platform, loss_kind(training))
    job.messages = GradientMessages(chunks, plan, model)
    traffic = Traffic(losses=[])
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, traffic, chunks, job)
        traffic.losses.append(job.forward_backward())
    _write_gradients(out, plan, groups, models)
    optimizer.step()
    for _ in range(STEPS - 1):
        traffic.losses.append(job.forward_backward())
        optimizer.step()
    parallel_state.destroy_model_parallel()
    return traffic


class _FrozenJob(_Job):
    """The parity tests' job, with the arguments that training gives to the schedule."""

    messages: Any = None

    def _schedule(self, step: Any, *, forward_only: bool, **kwargs: Any) -> list[Any]:
        return super()._schedule(
            step, forward_only=forward_only, **kwargs, **self.messages.arguments(len(self.batches))
        )


def watch(patch: pytest.MonkeyPatch, traffic: Traffic, chunks: list[Any], job: _FrozenJob) -> None:
    """Count what passes megatron's one function for transfers, and what forward passes keep."""
    from megatron.core.pipeline_parallel import p2p_communication

    from mindspeed_mm.models.qwen2vl.chunk import InputGradient
    from mindspeed_mm.training import step

    owner = getattr(p2p_communication, "P2PCommunicator", p2p_communication)
    communicate, forward_step = owner._communicate, step.forward_step
    inputs: list[Tensor] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        if kwargs["tensor_send_prev"] is not None:
            traffic.gradients_sent.append(kwargs["tensor_send_prev"].numel())
        traffic.gradients_received += kwargs["recv_next"]
        traffic.outputs_sent += kwargs["tensor_send_next"] is not None
        return communicate(*args, **kwargs)

    def observed(iterator: Iterator[Batch], chunk: Any, **kwargs: Any) -> Any:
        output, reduce = forward_step(iterator, chunk, **kwargs)
        stage = chunk.module.stage
        number = stage.vp_stage * job.groups.ranks.pp_size + stage.pp_rank
        traffic.kept[number] = traffic.kept.get(number, 0) + (output.grad_fn is not None)
        traffic.held_inputs = max([traffic.held_inputs, *(tensor.numel() for tensor in inputs)])
        return output, reduce

    def held(chunk: Any) -> Any:
        take = chunk.set_input_tensor

        def taking(tensors: list[Tensor | None]) -> None:
            take(tensors)
            if chunk.input_gradient is not InputGradient.WHOLE:
                inputs.extend(tensor for tensor in tensors if tensor is not None)

        return taking

    patch.setattr(owner, "_communicate", counted)
    patch.setattr(step, "forward_step", observed)
    for chunk in chunks:
        patch.setattr(chunk, "set_input_tensor", held(chunk))


def layout(case: Case, checkpoint: Path) -> tuple[Any, ParallelConfig, StagePlan]:
    """Model settings, degrees and plan of a case."""
    model = with_layout(with_frozen(read_config(checkpoint), case.frozen), case.vision, case.text)
    parallel = ParallelConfig(
        tp_size=case.tp,
        pp_size=case.pp,
        vp_size=case.vp,
        world_size=case.world_size,
        sequence_parallel=case.sp,
    )
    return model, parallel, StagePlan.build(model, parallel)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frozen")
    return make_tiny_checkpoint(root / "tied", tied=True, seed=3, vocab_size=320, size=SIZE)


@pytest.fixture(scope="module")
def results(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Traffic]], Path]:
    """What every rank saw of every case; one job per world size."""
    out = tmp_path_factory.mktemp("gradients")
    solved: dict[str, list[Traffic]] = {}
    for world_size in sorted({case.world_size for case in CASES}):
        cases = [case for case in CASES if case.world_size == world_size]
        ranks = run_ranks(world_size, "tests.dist.test_frozen_stages:solve_all", cases, checkpoint, out)
        solved |= {case.name: [rank[number] for rank in ranks] for number, case in enumerate(cases)}
    return solved, out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_and_losses_are_those_of_transformers(
    case: Case, results: tuple[dict[str, list[Traffic]], Path], checkpoint: Path, tmp_path: Path
) -> None:
    solved, gradients = results
    reference = solve(checkpoint, *case.problem)
    assert solved[case.name][-1].losses == pytest.approx(reference.losses, rel=1e-4)
    mm_to_hf(gradients / case.name, checkpoint, tmp_path / "hf")
    worst, deviation = worst_gradient(load_all(tmp_path / "hf"), reference.grads)
    assert deviation <= 1e-4, f"{worst}: {deviation}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_cross_only_the_borders_behind_a_trained_stage(
    case: Case, results: tuple[dict[str, list[Traffic]], Path], checkpoint: Path
) -> None:
    model, _, plan = layout(case, checkpoint)
    micro_batches = MICRO_BATCHES // case.dp
    needs = [input_needs_gradient(model, plan, stage) for stage in plan.stages]
    for rank, traffic in enumerate(results[0][case.name]):
        pp_rank = rank // (case.tp * case.dp)
        mine = plan.stages_of_rank(pp_rank)
        numbers = [plan.number_of(stage) for stage in mine]
        assert len(traffic.gradients_sent) == micro_batches * sum(needs[number] for number in numbers)
        assert traffic.gradients_received == micro_batches * sum(needs[n + 1] for n in numbers if n + 1 < len(needs))
        # forward, nothing is left out
        assert traffic.outputs_sent == micro_batches * sum(n + 1 < len(needs) for n in numbers)
        for stage, number in zip(mine, numbers, strict=True):
            has_graph = needs[number] or holds_trainable(model, plan, stage)
            assert traffic.kept[number] == micro_batches * has_graph, stage
        assert traffic.held_inputs <= 1


OLDER = Path(sys.prefix) / "megatron-core-0.12.1"
OLDER_CASES = [case for case in CASES if case.world_size == 2 and case.frozen in (SIDE, TOWER)]


@pytest.mark.skipif(not OLDER.is_dir(), reason="tools/setup_env.sh has not installed megatron-core 0.12.1")
def test_older_megatron_sends_one_number_in_place_of_a_gradient(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(OLDER)
        ranks = run_ranks(2, "tests.dist.test_frozen_stages:solve_all_on_older", OLDER_CASES, checkpoint, tmp_path)
    for number, case in enumerate(OLDER_CASES):
        model, _, plan = layout(case, checkpoint)
        reference = solve(checkpoint, *case.problem)
        assert ranks[-1][number].losses == pytest.approx(reference.losses, rel=1e-4)
        mm_to_hf(tmp_path / case.name, checkpoint, tmp_path / "hf" / case.name)
        worst, deviation = worst_gradient(load_all(tmp_path / "hf" / case.name), reference.grads)
        assert deviation <= 1e-4, f"{case.name}: {worst}: {deviation}"
        for pp_rank, rank in enumerate(ranks):
            mine = [stage for stage in plan.stages_of_rank(pp_rank) if plan.previous_of(stage) is not None]
            whole = [size for size in rank[number].gradients_sent if size > 1]
            assert len(whole) == MICRO_BATCHES * sum(input_needs_gradient(model, plan, stage) for stage in mine)
            assert len(rank[number].gradients_sent) == MICRO_BATCHES * len(mine)


def test_cases_leave_out_and_pass_through(checkpoint: Path) -> None:
    borders = {needed for case in CASES for needed in border_needs(case, checkpoint)}
    assert borders == {True, False}
    assert border_needs(CASES[4], checkpoint) == [True, True]


def border_needs(case: Case, checkpoint: Path) -> list[bool]:
    """Whether a gradient crosses each border of the plan."""
    model, _, plan = layout(case, checkpoint)
    return [input_needs_gradient(model, plan, stage) for stage in plan.stages[1:]]
