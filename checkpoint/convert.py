"""The conversions: Hugging Face to MM, MM to Hugging Face, and MM cut another way. One loop, three pairs of stores."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from checkpoint.job import Clock, Options, Summary, check_apart, check_space, run_files, stamped
from checkpoint.plans import UNSAID, Cut, build_plan, check_plan_of_model, plan_of_checkpoint
from checkpoint.ranges import Sources
from checkpoint.reference import copy_other_files, read_reference, write_index
from checkpoint.replicas import check_replicas
from checkpoint.rules.base import RuleSet
from checkpoint.rules.lora import adapted_rules, is_adapter, lora_rules
from checkpoint.rules.qwen2vl import qwen2vl_rules, qwen2vl_rules_of_plan
from checkpoint.state_writer import StateWriter, Transfer
from checkpoint.stores.base import WeightStore
from checkpoint.stores.hf import HfStore, read_model_config
from checkpoint.stores.mm import MmStore, choose_iteration
from checkpoint.stores.targets import Kind, plan_hf_target, plan_mm_target, split_names
from checkpoint.training_state import contents_of, read_training_state
from checkpoint.transfer import TargetFile, compile_files
from mindspeed_mm.config import Qwen2VLConfig
from mindspeed_mm.errors import CheckpointError, ConfigError
from mindspeed_mm.plan import StagePlan
from mindspeed_mm.storage import layout
from mindspeed_mm.storage.files import make_dir, write_file
from mindspeed_mm.storage.manifest import check_manifest, read_manifest
from mindspeed_mm.storage.pickle_tree import Call
from mindspeed_mm.storage.publish import check_target, staging_directory
from mindspeed_mm.storage.shard import as_items
from mindspeed_mm.storage.tensors import FileLayout

logger = logging.getLogger(__name__)


def hf_to_mm(
    hf_dir: Path, mm_dir: Path, plan: StagePlan, *, vision_only: bool = False, options: Options | None = None
) -> Summary:
    """Write a Hugging Face checkpoint as MM shards, as iteration `release`.

    Args:
        mm_dir: a new or empty directory; it appears complete or not at all.
        vision_only: write only tensors whose Hugging Face names begin with `visual`.
    Raises:
        CheckpointError: the source does not hold exactly this model, or is damaged.
        ConfigError: the plan does not fit the model, or the target must not be written.
        SetupError, DiskFullError, NumericError: see `execute`.
    """
    clock, options = Clock(), options or Options()
    hf_dir, mm_dir = Path(hf_dir), Path(mm_dir)
    check_apart(hf_dir, mm_dir)
    check_target(mm_dir, overwrite=options.overwrite)
    with stamped(hf_dir) as sources:
        model = read_model_config(hf_dir)
        rules = qwen2vl_rules(model)
        _check_fit(plan, model, rules, where="parallel_config")
        check_source(hf_dir, hf_dir, options)
        source = HfStore.open(hf_dir, rules.aliases)
        source.check(rules)
        check_replicas(source, rules.weights, sources)
        if vision_only:
            rules = rules.only(rule for rule in rules.rules if rule.hf[0].startswith("visual"))
        kinds = kinds_of(source, rules)
        return write_mm(mm_dir, layout.RELEASE, plan, rules, kinds, source, sources, options, facts_of(model), clock)


def mm_to_hf(
    mm_dir: Path,
    reference_hf_dir: Path,
    out_dir: Path,
    cut: Cut = UNSAID,
    *,
    iteration: layout.Iteration | None = None,
    max_shard_bytes: int | None = None,
    is_vit_qkv_in_hf_order: bool = False,
    options: Options | None = None,
) -> Summary:
    """Write MM shards as a Hugging Face checkpoint with the other files of a reference directory.

    Args:
        out_dir: a new or empty directory; it appears complete or not at all.
        cut: the layout of the shards; not needed where a stage plan lies beside them.
        iteration: None for the one that the tracker names.
        max_shard_bytes: size of the weight files; None to deal out tensors as the reference does.
        is_vit_qkv_in_hf_order: the shards come from the converter of MindSpeed-MM 2.2 or 2.3.
    Raises:
        CheckpointError, ConfigError, SetupError, DiskFullError, NumericError: as `hf_to_mm`.
    """
    clock, options = Clock(), options or Options()
    mm_dir, reference, out_dir = Path(mm_dir), Path(reference_hf_dir), Path(out_dir)
    for source_dir in (mm_dir, reference):
        check_apart(source_dir, out_dir)
    check_target(out_dir, overwrite=options.overwrite)
    chosen = choose_iteration(mm_dir, iteration)
    # Other iterations may be written meanwhile: a training run need not stop for an export.
    with stamped(layout.iteration_dir(mm_dir, chosen)) as sources:
        model = read_model_config(reference)
        rules = qwen2vl_rules(model, is_vit_qkv_in_hf_order=is_vit_qkv_in_hf_order)
        source = open_mm(mm_dir, cut, rules, model, chosen, options)
        check_replicas(source, rules.weights, sources)
        kinds = kinds_of(source, rules)
        listed = read_reference(reference, rules)
        shards = split_names(rules, kinds, max_shard_bytes) if max_shard_bytes else listed.shards
        with staging_directory(out_dir, overwrite=options.overwrite) as staging:
            target = plan_hf_target(staging, rules, kinds, shards, listed.metadata)
            files = compile_conversion(rules, source, target, target.layouts)
            check_space(out_dir, sum(file.nbytes for file in files))
            notes = copy_other_files(reference, staging)
            keep = listed.has_hub_names and not max_shard_bytes
            write_index(reference, staging, target.index, keep=keep)
            run_files(files, sources, options, {}, staging)
        notes = [line.replace(str(staging), str(out_dir)) for line in notes]
        return _summary(rules, files, clock, notes)


def resplit(
    source_dir: Path,
    target_dir: Path,
    source_cut: Cut,
    target_cut: Cut,
    *,
    iteration: layout.Iteration | None = None,
    weights_only: bool = False,
    is_tied: bool | None = None,
    num_query_groups: int | None = None,
    options: Options | None = None,
) -> Summary:
    """Cut MM shards another way; a training save keeps its optimizer state, its iteration and the rest.

    Args:
        target_dir: a new or empty directory; it appears complete or not at all.
        source_cut: the layout of the shards; not needed where a stage plan lies beside them.
        iteration: None for the one that the tracker names.
        weights_only: write the weights of a training save as `release`.
        is_tied: whether the output head is the token embedding; None to find out.
        num_query_groups: key-value heads of the text decoder; None to find out.
    Raises:
        CheckpointError, ConfigError, SetupError, DiskFullError, NumericError: as `hf_to_mm`.
    """
    clock, options = Clock(), options or Options()
    source_dir, target_dir = Path(source_dir), Path(target_dir)
    check_apart(source_dir, target_dir)
    check_target(target_dir, overwrite=options.overwrite)
    chosen = choose_iteration(source_dir, iteration)
    with stamped(layout.iteration_dir(source_dir, chosen)) as sources:
        old = plan_of_checkpoint(source_dir, chosen, source_cut, is_tied=is_tied)
        check_source(source_dir, layout.iteration_dir(source_dir, chosen), options)
        source, has_adapters = _open_shards(source_dir, old, chosen)
        rules = source.rules
        check_replicas(source, rules.weights, sources)
        new = build_plan(target_cut, vision_layers=old.vision_layers, text_layers=old.text_layers, is_tied=old.is_tied)
        kinds = kinds_of(source, rules)
        facts = _check_new_tp(source, new, kinds, num_query_groups)
        if chosen == layout.RELEASE or weights_only:
            # The arguments beside adapters say what their product is multiplied by.
            kept = {r: {k: v for k, v in c.items() if k == "args"} for r, c in contents_of(source).items()}
            writer = StateWriter(source, kept, None, new, rules) if has_adapters else None
            return write_mm(
                target_dir, layout.RELEASE, new, rules, kinds, source, sources, options, facts, clock, writer
            )
        state = read_training_state(source, sources)
        writer = StateWriter(source, contents_of(source), state, new, rules)
        return write_mm(target_dir, chosen, new, rules, kinds, source, sources, options, facts, clock, writer)


def _open_shards(root: Path, plan: StagePlan, iteration: layout.Iteration) -> tuple[MmStore, bool]:
    """The checked shards of a model or of LoRA adapters, and which of the two they are."""
    base = qwen2vl_rules_of_plan(plan)
    store = MmStore.open(root, plan, base, iteration)
    names = {name for stage in plan.stages for name in store.tensors(0, stage)}
    has_adapters = any(map(is_adapter, names))
    if has_adapters:
        store = MmStore.open(root, plan, lora_rules(base, adapted_rules(base, names)), iteration)
    store.check()
    return store, has_adapters


def write_mm(
    mm_dir: Path,
    iteration: layout.Iteration,
    plan: StagePlan,
    rules: RuleSet,
    kinds: Mapping[str, Kind],
    source: WeightStore,
    sources: Sources,
    options: Options,
    facts: Mapping[str, Any],
    clock: Clock,
    writer: StateWriter | None = None,
) -> Summary:
    """Write MM shards of `source` under `plan`, with plan file, manifest and tracker."""
    with staging_directory(mm_dir, overwrite=options.overwrite) as staging:
        target = plan_mm_target(staging, iteration, plan, rules, kinds, writer.extend if writer else None)
        layouts = {**target.layouts, **(writer.files() if writer else {})}
        more = writer.transfers(target.shards) if writer else ()
        files = compile_conversion(rules, source, target, layouts, more)
        check_space(mm_dir, sum(file.nbytes for file in files))
        folder = make_dir(layout.iteration_dir(staging, iteration))
        write_file(folder / layout.PLAN_FILE, plan.to_json().encode())
        run_files(files, sources, options, facts, folder)
        layout.write_tracker(staging, iteration)
    return _summary(rules, files, clock)


def open_mm(
    mm_dir: Path, cut: Cut, rules: RuleSet, model: Qwen2VLConfig, chosen: layout.Iteration, options: Options
) -> MmStore:
    """The shards of one iteration of a known model, checked to hold exactly that."""
    text = model.text_decoder
    plan = plan_of_checkpoint(mm_dir, chosen, cut, is_tied=text.is_tied)
    _check_fit(plan, model, rules, where=str(layout.iteration_dir(mm_dir, chosen)))
    check_source(mm_dir, layout.iteration_dir(mm_dir, chosen), options)
    store = MmStore.open(mm_dir, plan, rules, chosen)
    store.check()
    return store


def check_source(root: Path, folder: Path, options: Options) -> None:
    """Compare a source with its manifest where that was asked for."""
    if options.check_hashes:
        check_manifest(folder)
        logger.info("%s holds what its manifest says", root)


def kinds_of(store: WeightStore, rules: RuleSet) -> dict[str, Kind]:
    """Canonical name -> dtype and whole shape."""
    found = {}
    for weight in rules.weights:
        first, *others = store.placements(weight)
        for other in others:
            if other.dtype != first.dtype:
                raise CheckpointError(f"{weight.mm}: its copies have dtypes {first.dtype.name} and {other.dtype.name}.")
        found[weight.mm] = (first.dtype, first.shape)
    return found


def compile_conversion(
    rules: RuleSet,
    source: WeightStore,
    target: WeightStore,
    layouts: Mapping[Path, FileLayout],
    more: Iterable[Transfer] = (),
) -> list[TargetFile]:
    """The files to write so that `target` holds what `source` holds: every tensor, every copy, every byte once.

    Args:
        more: (name, source, target) of what the files hold beside the weights.
    """
    transfers = (
        (weight.mm, source.placements(weight)[0], placement)
        for weight in rules.weights
        for placement in target.placements(weight)
    )
    return compile_files(layouts, chain(transfers, more))


def facts_of(model: Qwen2VLConfig) -> dict[str, Any]:
    """What later re-splits need to know of a model and cannot see in its shards."""
    encoder = model.image_encoder
    return {
        "num_query_groups": model.text_decoder.num_query_groups,
        "vision_num_attention_heads": None if encoder is None else encoder.vision_encoder.num_attention_heads,
    }


def _check_new_tp(
    source: MmStore, plan: StagePlan, kinds: Mapping[str, Kind], num_query_groups: int | None
) -> dict[str, Any]:
    """Check that the new tensor-parallel size divides what it splits; gives what is known of the model.

    Raises:
        ConfigError: with every tensor that it does not divide.
    """
    manifest = read_manifest(source.folder)
    facts = dict(manifest.facts) if manifest else {}
    groups = num_query_groups or facts.get("num_query_groups") or _saved_groups(source)
    problems = []
    if groups is None and plan.tp_size > 1:
        logger.warning(
            "the number of key-value heads is not known here; tp_size %d is not checked against it", plan.tp_size
        )
    elif groups is not None and groups % plan.tp_size:
        problems.append(f"Number of key-value heads ({groups}) must be divisible by TP size ({plan.tp_size}).")
    for rule in source.rules.rules:
        weight = next(weight for weight in source.rules.weights if weight.rule is rule)
        problem = rule.tp.problem(kinds[weight.mm][1], plan.tp_size)
        if problem:
            problems.append(f"{rule}: {problem}.")
    if problems:
        raise ConfigError("target_parallel_config", problems)
    return facts if groups is None else {**facts, "num_query_groups": groups}


def _saved_groups(source: MmStore) -> int | None:
    """The number of key-value heads in the arguments of a training save; None if there is none."""
    args = dict(as_items(source.index((0, 0)).tree, where="shard")).get("args")
    value = args.attributes().get("num_query_groups") if isinstance(args, Call) else None
    return value if isinstance(value, int) and value > 0 else None


def _check_fit(plan: StagePlan, model: Qwen2VLConfig, rules: RuleSet, *, where: str) -> None:
    text = model.text_decoder
    check_plan_of_model(
        plan, vision_layers=model.vision_layers, text_layers=text.num_layers, is_tied=text.is_tied, where=where
    )
    problems = rules.tp_problems(plan.tp_size)
    if problems:
        raise ConfigError(where, problems)


def _summary(rules: RuleSet, files: Iterable[TargetFile], clock: Clock, notes: Iterable[str] = ()) -> Summary:
    written = list(files)
    return Summary(len(rules.weights), sum(file.nbytes for file in written), len(written), clock(), tuple(notes))
