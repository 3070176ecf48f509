"""LoRA adapters: merged into the base, exported for peft, imported from peft."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.convert import compile_conversion, kinds_of
from checkpoint.execute import execute
from checkpoint.job import Clock, Options, Summary, check_apart, check_space, stamped
from checkpoint.peft_files import PeftAdapter, read_peft, write_peft
from checkpoint.plans import UNSAID, Cut, plan_of_checkpoint
from checkpoint.ranges import Sources
from checkpoint.replicas import check_replicas
from checkpoint.rules.base import COLUMN, COLUMN_GATED, RuleSet, Weight, WeightRule
from checkpoint.rules.lora import A_SUFFIX, B_SUFFIX, adapted_rules, is_adapter, lora_rules
from checkpoint.rules.qwen2vl import qwen2vl_rules, qwen2vl_rules_of_plan
from checkpoint.stores.hf import read_model_config
from checkpoint.stores.mm import MmStore, choose_iteration
from checkpoint.stores.targets import CHECKPOINT_VERSION, plan_mm_target
from mindspeed_mm.errors import CheckpointError, ConfigError
from mindspeed_mm.plan import StagePlan
from mindspeed_mm.storage import layout
from mindspeed_mm.storage.checksums import refresh_checksums
from mindspeed_mm.storage.files import make_dir, write_errors, write_file
from mindspeed_mm.storage.manifest import write_manifest
from mindspeed_mm.storage.pickle_tree import Call
from mindspeed_mm.storage.publish import check_target, staging_directory
from mindspeed_mm.storage.shard import as_items, write_shard

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters of an MM directory."""

    store: MmStore
    bases: tuple[WeightRule, ...]
    """The rules of the weights that they adapt."""
    rank: int
    alpha: float

    @property
    def scaling(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank

    def weight(self, base: Weight, suffix: str) -> Weight:
        """One of the two matrices of a base weight."""
        mm = base.rule.mm.removesuffix(".weight") + suffix
        return Weight(next(rule for rule in self.store.rules.rules if rule.mm == mm), base.layer)


def merge(
    base_dir: Path,
    lora_dir: Path,
    target_dir: Path,
    base_cut: Cut = UNSAID,
    lora_cut: Cut = UNSAID,
    *,
    iteration: layout.Iteration | None = None,
    lora_iteration: layout.Iteration | None = None,
    alpha: float | None = None,
    rank: int | None = None,
    options: Options | None = None,
) -> Summary:
    """Write the weights `W + alpha / r * B A` as `release`, cut as the base.

    The product and the sum are computed in fp32 and rounded once to the dtype of the base.

    Args:
        lora_dir: a directory that holds adapters only; it may be cut in another way than the base.
        alpha, rank: of the adapters; None to take them from the directory.
    Raises:
        CheckpointError, ConfigError, SetupError, DiskFullError, NumericError: as `hf_to_mm`.
    """
    clock, options = Clock(), options or Options()
    base_dir, lora_dir, target_dir = Path(base_dir), Path(lora_dir), Path(target_dir)
    check_apart(base_dir, target_dir)
    check_apart(lora_dir, target_dir)
    check_target(target_dir, overwrite=options.overwrite)
    chosen = choose_iteration(base_dir, iteration)
    with stamped(layout.iteration_dir(base_dir, chosen)) as sources:
        plan = plan_of_checkpoint(base_dir, chosen, base_cut)
        rules = qwen2vl_rules_of_plan(plan)
        base = MmStore.open(base_dir, plan, rules, chosen)
        base.check()
        check_replicas(base, rules.weights, sources)
        adapters = open_adapters(lora_dir, lora_cut, rules, lora_iteration, alpha=alpha, rank=rank, sources=sources)
        with staging_directory(target_dir, overwrite=options.overwrite) as staging:
            target = plan_mm_target(staging, layout.RELEASE, plan, rules, kinds_of(base, rules))
            files = compile_conversion(rules, base, target, target.layouts)
            check_space(target_dir, sum(file.nbytes for file in files))
            folder = make_dir(layout.iteration_dir(staging, layout.RELEASE))
            execute(files, sources, folder, workers=options.workers, allow_nan=options.allow_nan)
            for weight in rules.weights:
                if weight.rule in adapters.bases:
                    _merge_one(weight, adapters, target.placements(weight)[0].tensors, sources)
            for shard in target.shards.values():
                refresh_checksums(shard.path, shard.layout.checksums)
            sources.check_unchanged()
            write_file(folder / layout.PLAN_FILE, plan.to_json().encode())
            write_manifest(folder)
            layout.write_tracker(staging, layout.RELEASE)
    return Summary(len(rules.weights), sum(file.nbytes for file in files), len(files), clock())


def _merge_one(weight: Weight, adapters: Adapters, shards: Any, sources: Sources) -> None:
    """Add the product of one pair of adapters to the shards of a weight, in place."""
    import torch

    from checkpoint.whole import memory_of, read_tensor, read_whole

    matrix_a, matrix_b = (
        read_whole(sources, adapters.store.placements(adapters.weight(weight, suffix))[0]).float()
        for suffix in (A_SUFFIX, B_SUFFIX)
    )
    split, tp_size = weight.rule.tp, len(shards)
    is_column = split in (COLUMN, COLUMN_GATED)
    parts_a = [matrix_a] * tp_size if is_column else split.shard(matrix_a, tp_size)
    parts_b = split.shard(matrix_b, tp_size) if is_column else [matrix_b] * tp_size
    for stored, part_a, part_b in zip(shards, parts_a, parts_b, strict=True):
        if (part_b.shape[0], part_a.shape[1]) != stored.shape:
            raise CheckpointError(
                f"{weight.mm}: its adapters make a product of shape [{part_b.shape[0]}, {part_a.shape[1]}], the weight "
                f"has {list(stored.shape)}; they belong to different models."
            )
        with Sources() as written:
            value = read_tensor(written, stored)
        merged = (value.float() + adapters.scaling * (part_b @ part_a)).to(value.dtype).contiguous()
        if not bool(torch.isfinite(merged).all()):
            raise CheckpointError(f"{weight.mm}: merging gives numbers that are not finite.")
        with write_errors(stored.path):
            descriptor = os.open(stored.path, os.O_WRONLY)
            try:
                os.pwrite(descriptor, memory_of(merged), stored.offset)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def open_adapters(
    lora_dir: Path,
    cut: Cut,
    rules: RuleSet,
    iteration: layout.Iteration | None,
    *,
    alpha: float | None,
    rank: int | None,
    sources: Sources,
) -> Adapters:
    """The adapters of an MM directory, checked to be complete.

    Raises:
        CheckpointError: there are other weights than adapters, or some are missing.
        ConfigError: alpha is not known, or `rank` is not theirs.
    """
    chosen = choose_iteration(lora_dir, iteration)
    plan = plan_of_checkpoint(lora_dir, chosen, cut, is_tied=rules.is_tied)
    _check_same_model(plan, rules, lora_dir)
    probe = MmStore.open(lora_dir, plan, rules, chosen)
    names = {name for stage in plan.stages for name in probe.tensors(0, stage)}
    if not any(map(is_adapter, names)):
        raise CheckpointError(f"{probe.folder} holds no LoRA adapters.")
    bases = adapted_rules(rules, names)
    store = MmStore.open(lora_dir, plan, lora_rules(rules, bases), chosen)
    store.check()
    check_replicas(store, store.rules.weights, sources)
    ranks = {
        store.placements(weight)[0].shape[0] for weight in store.rules.weights if weight.rule.mm.endswith(A_SUFFIX)
    }
    if len(ranks) != 1 or (rank is not None and ranks != {rank}):
        raise ConfigError("cfg.lora_r", f"the adapters have rank {sorted(ranks)}, expected {rank or 'one'}.")
    if alpha is None:
        alpha = _saved_alpha(store)
    return Adapters(store, bases, ranks.pop(), alpha)


def _check_same_model(plan: StagePlan, rules: RuleSet, where: Path) -> None:
    ours, theirs = (plan.vision_layers, plan.text_layers), (rules.vision_layers, rules.text_layers)
    if ours != theirs:
        raise ConfigError(
            str(where), f"has {ours[0]} vision and {ours[1]} text layers, the base {theirs[0]} and {theirs[1]}."
        )


def _saved_alpha(store: MmStore) -> float:
    args = dict(as_items(store.index((0, 0)).tree, where="shard")).get("args")
    alpha = args.attributes().get("lora_alpha") if isinstance(args, Call) else None
    if not isinstance(alpha, int | float):
        raise ConfigError(
            "cfg.lora_alpha", f"{store.folder} does not say which alpha its adapters were trained with; give it."
        )
    return float(alpha)


def export_adapter(
    lora_dir: Path,
    reference_hf_dir: Path,
    out_dir: Path,
    cut: Cut = UNSAID,
    *,
    iteration: layout.Iteration | None = None,
    alpha: float | None = None,
    rank: int | None = None,
    has_hub_names: bool = False,
    options: Options | None = None,
) -> Summary:
    """Write MM adapters as a directory that `peft` loads on the Hugging Face model.

    An adapter of a fused linear becomes one per Hugging Face linear: all have its A, each has its rows of B.

    Args:
        has_hub_names: name modules as transformers before 4.52 does.
    """
    clock, options = Clock(), options or Options()
    lora_dir, out_dir = Path(lora_dir), Path(out_dir)
    check_apart(lora_dir, out_dir)
    check_target(out_dir, overwrite=options.overwrite)
    rules = qwen2vl_rules(read_model_config(Path(reference_hf_dir)))
    chosen = choose_iteration(lora_dir, iteration)
    with stamped(layout.iteration_dir(lora_dir, chosen)) as sources:
        adapters = open_adapters(lora_dir, cut, rules, chosen, alpha=alpha, rank=rank, sources=sources)
        modules: dict[str, tuple[Tensor, Tensor]] = {}
        for weight in rules.weights:
            if weight.rule in adapters.bases:
                modules.update(_hf_modules(weight, adapters, sources))
        adapter = PeftAdapter(adapters.rank, adapters.alpha, modules)
        with staging_directory(out_dir, overwrite=options.overwrite) as staging:
            nbytes = write_peft(staging, adapter, str(reference_hf_dir), rules.aliases, has_hub_names=has_hub_names)
            write_manifest(staging)
    return Summary(2 * len(modules), nbytes, 1, clock())


def _hf_modules(weight: Weight, adapters: Adapters, sources: Sources) -> Mapping[str, tuple[Tensor, Tensor]]:
    from checkpoint.whole import read_whole

    matrix_a, matrix_b = (
        read_whole(sources, adapters.store.placements(adapters.weight(weight, suffix))[0])
        for suffix in (A_SUFFIX, B_SUFFIX)
    )
    parts = weight.rule.pack.split(matrix_b)
    return {
        name.removesuffix(".weight"): (matrix_a.clone(), part.contiguous())
        for name, part in zip(weight.hf, parts, strict=True)
    }


def import_adapter(
    peft_dir: Path, reference_hf_dir: Path, mm_dir: Path, plan: StagePlan, *, options: Options | None = None
) -> Summary:
    """Write a peft directory as MM adapters under a plan, as `release`.

    Where the linears of a fused one have different A, or some have no adapter, the fused adapter has their ranks side
    by side; the others are filled up with zeros to the same rank, and alpha grows with it, so that nothing changes.
    """
    clock, options = Clock(), options or Options()
    peft_dir, mm_dir = Path(peft_dir), Path(mm_dir)
    check_apart(peft_dir, mm_dir)
    check_target(mm_dir, overwrite=options.overwrite)
    rules = qwen2vl_rules(read_model_config(Path(reference_hf_dir)))
    _check_same_model(plan, rules, mm_dir)
    problems = rules.tp_problems(plan.tp_size)
    if problems:
        raise ConfigError("parallel_config", problems)
    adapter = read_peft(peft_dir, rules)
    fused = {
        weight: _fuse(weight, adapter)
        for weight in rules.weights
        if any(n in adapter.modules for n in _modules(weight))
    }
    rank = max(matrix_a.shape[0] for matrix_a, _ in fused.values())
    bases = tuple(rule for rule in rules.rules if any(weight.rule is rule for weight in fused))
    whole = _padded(fused, [weight for weight in rules.weights if weight.rule in bases], rank)
    alpha = adapter.alpha * rank / adapter.rank
    targets = sorted({rule.mm.removesuffix(".weight").rpartition(".")[2] for rule in bases})
    args = argparse.Namespace(lora_r=rank, lora_alpha=alpha, lora_target_modules=targets)
    derived = lora_rules(rules, bases)
    with staging_directory(mm_dir, overwrite=options.overwrite) as staging:
        for pp_rank in range(plan.pp_size):
            for tp_rank in range(plan.tp_size):
                content: dict[str, Any] = {"args": args, "checkpoint_version": CHECKPOINT_VERSION}
                for stage in plan.stages_of_rank(pp_rank):
                    key = "model" if plan.vp_size == 1 else f"model{stage.vp_stage}"
                    content[key] = {
                        name: rule.tp.shard(whole[rule.mm_name(layer)], plan.tp_size)[tp_rank].contiguous()
                        for rule, layer, name in derived.for_stage(plan, stage)
                    }
                folder = layout.shard_dir(staging, layout.RELEASE, tp_rank, pp_rank, plan.pp_size)
                write_shard(folder / layout.SHARD_FILE, content)
        folder = layout.iteration_dir(staging, layout.RELEASE)
        write_file(folder / layout.PLAN_FILE, plan.to_json().encode())
        write_manifest(folder)
        layout.write_tracker(staging, layout.RELEASE)
    nbytes = sum(tensor.nbytes for tensor in whole.values())
    return Summary(len(whole), nbytes, plan.pp_size * plan.tp_size, clock())


def _modules(weight: Weight) -> list[str]:
    return [name.removesuffix(".weight") for name in weight.hf]


def _fuse(weight: Weight, adapter: PeftAdapter) -> tuple[Tensor, Tensor]:
    """A and B of a fused linear, from the adapters of its Hugging Face linears."""
    import torch

    names = _modules(weight)
    present = [name for name in names if name in adapter.modules]
    assert weight.rule.shape is not None
    shapes = weight.rule.pack.part_shapes(weight.rule.shape)
    for name, shape in zip(names, shapes, strict=True):
        if name in present:
            matrix_a, matrix_b = adapter.modules[name]
            if (matrix_b.shape[0], matrix_a.shape[1]) != shape:
                raise CheckpointError(
                    f"{name} has shape {list(shape)}, its adapter [{matrix_b.shape[0]}, {matrix_a.shape[1]}]."
                )
    first_a, first_b = adapter.modules[present[0]]
    if present == names and all(torch.equal(first_a, adapter.modules[name][0]) for name in names):
        return first_a, weight.rule.pack.join([adapter.modules[name][1] for name in names])
    rank = adapter.rank
    columns = {name: number * rank for number, name in enumerate(present)}
    parts = []
    for name, shape in zip(names, shapes, strict=True):
        part = torch.zeros((shape[0], rank * len(present)), dtype=first_b.dtype)
        if name in columns:
            part[:, columns[name] : columns[name] + rank] = adapter.modules[name][1]
        parts.append(part)
    return torch.cat([adapter.modules[name][0] for name in present]), weight.rule.pack.join(parts)


def _padded(fused: Mapping[Weight, tuple[Tensor, Tensor]], weights: list[Weight], rank: int) -> dict[str, Tensor]:
    """Canonical adapter name -> matrix of the common rank; layers without an adapter get zeros."""
    import torch

    like = next(iter(fused.values()))[0]
    found = {}
    for weight in weights:
        assert weight.rule.shape is not None
        rows, cols = weight.rule.shape
        matrix_a, matrix_b = torch.zeros((rank, cols), dtype=like.dtype), torch.zeros((rows, rank), dtype=like.dtype)
        if weight in fused:
            given_a, given_b = fused[weight]
            matrix_a[: given_a.shape[0]], matrix_b[:, : given_b.shape[1]] = given_a, given_b
        prefix = weight.mm.removesuffix(".weight")
        found[prefix + A_SUFFIX], found[prefix + B_SUFFIX] = matrix_a, matrix_b
    return found
