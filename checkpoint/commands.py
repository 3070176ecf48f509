"""From the settings of `mm-convert` to conversions, and what they print."""

from __future__ import annotations

import logging
import re
import sys
import time
from pathlib import Path

from checkpoint import convert, lora
from checkpoint.job import Options, Summary
from checkpoint.options import (
    CommonModelConfig,
    ExportAdapterConfig,
    HfToMmConfig,
    ImportAdapterConfig,
    MergeConfig,
    MmToHfConfig,
    ParallelConfig,
    ResplitConfig,
    VerifyConfig,
)
from checkpoint.plans import Cut, build_plan
from checkpoint.rules.qwen2vl import qwen2vl_rules
from checkpoint.stores.hf import read_model_config
from checkpoint.verify import Comparison, Subject
from checkpoint.verify import verify as compare
from mindspeed_mm.config import Qwen2VLConfig
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.plan import StagePlan
from mindspeed_mm.storage.layout import RELEASE, Iteration

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\Z", re.IGNORECASE)


logger = logging.getLogger(__name__)


def hf_to_mm(cfg: HfToMmConfig) -> Summary:
    """Run `hf_to_mm`."""
    hf_dir = existing_dir(cfg.hf_config.hf_dir, "cfg.hf_config.hf_dir")
    model = read_model_config(hf_dir)
    check_common(cfg.common_model_config, model)
    check_parallel(cfg.parallel_config)
    plan = plan_of(model, cfg.parallel_config)
    return convert.hf_to_mm(hf_dir, Path(cfg.mm_dir), plan, vision_only=cfg.save_vit_only, options=as_options(cfg))


def mm_to_hf(cfg: MmToHfConfig) -> Summary:
    """Run `mm_to_hf`."""
    mm_dir = existing_dir(cfg.mm_dir, "cfg.mm_dir")
    reference = existing_dir(cfg.hf_config.hf_dir, "cfg.hf_config.hf_dir")
    check_common(cfg.common_model_config, read_model_config(reference))
    check_parallel(cfg.parallel_config)
    return convert.mm_to_hf(
        mm_dir,
        reference,
        Path(cfg.save_hf_dir),
        as_cut(cfg.parallel_config),
        iteration=as_iteration(cfg.iteration),
        max_shard_bytes=as_bytes(cfg.max_shard_size),
        is_vit_qkv_in_hf_order=cfg.vit_qkv_from_v2_3,
        options=as_options(cfg),
    )


def resplit(cfg: ResplitConfig) -> Summary:
    """Run `resplit`."""
    source = existing_dir(cfg.source_dir, "cfg.source_dir")
    check_parallel(cfg.source_parallel_config, "cfg.source_parallel_config")
    check_parallel(cfg.target_parallel_config, "cfg.target_parallel_config")
    return convert.resplit(
        source,
        Path(cfg.target_dir),
        as_cut(cfg.source_parallel_config),
        as_cut(cfg.target_parallel_config),
        iteration=as_iteration(cfg.iteration),
        weights_only=cfg.weights_only,
        is_tied=cfg.common_model_config.tie_word_embeddings,
        num_query_groups=cfg.common_model_config.num_key_value_heads,
        options=as_options(cfg),
    )


def verify(cfg: VerifyConfig) -> Comparison:
    """Run `verify`."""
    subjects: list[Subject] = []
    for name, path, parallel, iteration in (
        ("first", cfg.first_dir, cfg.first_parallel_config, cfg.first_iteration),
        ("second", cfg.second_dir, cfg.second_parallel_config, cfg.second_iteration),
    ):
        check_parallel(parallel, f"cfg.{name}_parallel_config")
        subjects.append(Subject(existing_dir(path, f"cfg.{name}_dir"), as_cut(parallel), as_iteration(iteration)))
    return compare(subjects[0], subjects[1], Options(check_hashes=cfg.check_hashes))


def merge(cfg: MergeConfig) -> Summary:
    """Run `merge`."""
    return lora.merge(
        existing_dir(cfg.base_dir, "cfg.base_dir"),
        existing_dir(cfg.lora_dir, "cfg.lora_dir"),
        Path(cfg.target_dir),
        as_cut(cfg.base_parallel_config),
        as_cut(cfg.lora_parallel_config),
        iteration=as_iteration(cfg.base_iteration),
        lora_iteration=as_iteration(cfg.lora_iteration),
        alpha=cfg.lora_alpha,
        rank=cfg.lora_r,
        options=Options(workers=cfg.workers, overwrite=cfg.overwrite),
    )


def export_adapter(cfg: ExportAdapterConfig) -> Summary:
    """Run `export_adapter`."""
    return lora.export_adapter(
        existing_dir(cfg.lora_dir, "cfg.lora_dir"),
        existing_dir(cfg.hf_config.hf_dir, "cfg.hf_config.hf_dir"),
        Path(cfg.adapter_dir),
        as_cut(cfg.lora_parallel_config),
        iteration=as_iteration(cfg.iteration),
        alpha=cfg.lora_alpha,
        rank=cfg.lora_r,
        has_hub_names=cfg.hub_names,
        options=Options(overwrite=cfg.overwrite),
    )


def import_adapter(cfg: ImportAdapterConfig) -> Summary:
    """Run `import_adapter`."""
    hf_dir = existing_dir(cfg.hf_config.hf_dir, "cfg.hf_config.hf_dir")
    check_parallel(cfg.parallel_config)
    return lora.import_adapter(
        existing_dir(cfg.adapter_dir, "cfg.adapter_dir"),
        hf_dir,
        Path(cfg.mm_dir),
        plan_of(read_model_config(hf_dir), cfg.parallel_config),
        options=Options(overwrite=cfg.overwrite),
    )


def plan_of(model: Qwen2VLConfig, parallel: ParallelConfig) -> StagePlan:
    """The plan of lists for a model, every problem of theirs in one error."""
    plan = build_plan(
        as_cut(parallel),
        vision_layers=model.vision_layers,
        text_layers=model.text_decoder.num_layers,
        is_tied=model.text_decoder.is_tied,
        rules=qwen2vl_rules(model),
    )
    logger.info("%s", plan.table())
    return plan


def existing_dir(path: str, name: str) -> Path:
    """The path of a directory that must be there.

    Raises:
        ConfigError: it is not.
    """
    if not Path(path).is_dir():
        raise ConfigError(name, f"{path} is not a directory.")
    return Path(path)


def as_cut(parallel: ParallelConfig) -> Cut:
    """The layout that the options describe; what they leave out is None."""
    return Cut(parallel.vit_pp_layers, parallel.llm_pp_layers, parallel.tp_size)


def as_options(cfg: HfToMmConfig | MmToHfConfig | ResplitConfig) -> Options:
    """How the conversion runs; progress is shown on a terminal only."""
    return Options(
        workers=cfg.workers,
        overwrite=cfg.overwrite,
        allow_nan=cfg.allow_nan,
        check_hashes=cfg.check_hashes,
        progress=ProgressLine if sys.stderr.isatty() else None,
    )


def as_iteration(value: int | str | None) -> Iteration | None:
    """An iteration of the command line.

    Raises:
        ConfigError: neither a number nor `release`.
    """
    if value is None or isinstance(value, int):
        return value
    if value == RELEASE:
        return RELEASE
    raise ConfigError("cfg.iteration", f'"{value}" is neither a number nor "release".')


def as_bytes(text: str | None) -> int | None:
    """A size such as 5GB in bytes.

    Raises:
        ConfigError: no such size.
    """
    if text is None:
        return None
    match = _SIZE.match(text.strip())
    base = 1024 if match and match[3] else 1000
    size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size <= 0:
        raise ConfigError("cfg.max_shard_size", f'"{text}" is no size; expected something like 5GB.')
    return size


def check_parallel(parallel: ParallelConfig, name: str = "cfg.parallel_config") -> None:
    """Refuse what this family cannot do.

    Raises:
        ConfigError: with every such option.
    """
    problems = []
    if parallel.audio_pp_layers or parallel.audio_tp_size:
        problems.append("audio_pp_layers and audio_tp_size: Qwen2-VL has no audio tower; leave them out.")
    if parallel.ep_size != 1:
        problems.append(f"ep_size = {parallel.ep_size}: Qwen2-VL has no experts; leave it at 1.")
    if parallel.vit_tp_size not in (0, parallel.tp_size or 1):
        problems.append(
            f"vit_tp_size = {parallel.vit_tp_size} differs from tp_size = {parallel.tp_size or 1}: both towers are "
            "split alike."
        )
    if problems:
        raise ConfigError(name, problems)


def check_common(common: CommonModelConfig, model: Qwen2VLConfig) -> None:
    """Check facts about the model against the one that is there.

    Raises:
        ConfigError: with every fact that is wrong, or asks for what does not exist here.
    """
    text = model.text_decoder
    facts = {
        "num_key_value_heads": (common.num_key_value_heads, text.num_query_groups),
        "tie_word_embeddings": (common.tie_word_embeddings, text.is_tied),
        "llm_num_layers": (common.llm_num_layers, text.num_layers),
        "vit_num_layers": (common.vit_num_layers, model.vision_layers),
    }
    problems = [
        f"{name} = {given}, but config.json says {found}."
        for name, (given, found) in facts.items()
        if given not in (None, found)
    ]
    if common.num_experts:
        problems.append(f"num_experts = {common.num_experts}: Qwen2-VL has no experts.")
    if common.audio_num_layers:
        problems.append(f"audio_num_layers = {common.audio_num_layers}: Qwen2-VL has no audio tower.")
    if common.enable_canonical_hf_struct:
        problems.append("enable_canonical_hf_struct = true: un-fused linears are not supported.")
    if problems:
        raise ConfigError("cfg.common_model_config", problems)


class ProgressLine:
    """One line on the terminal that shows bytes, rate and time left."""

    def __init__(self, total: int) -> None:
        self._total = max(total, 1)
        self._done = 0
        self._start = time.monotonic()
        self._shown = 0.0

    def add(self, nbytes: int) -> None:
        """Count bytes; the line is drawn at most five times a second."""
        self._done += nbytes
        now = time.monotonic()
        is_complete = self._done >= self._total
        if now - self._shown < 0.2 and not is_complete:
            return
        self._shown = now
        rate = self._done / max(now - self._start, 1e-6)
        left = (self._total - self._done) / max(rate, 1.0)
        done, total = self._done / 1e9, self._total / 1e9
        text = f"{done:.2f} / {total:.2f} GB  {done / total:4.0%}  {rate / 1e9:.2f} GB/s  {left:.0f} s left "
        sys.stderr.write(f"\r{text}" + ("\n" if is_complete else ""))
        sys.stderr.flush()
