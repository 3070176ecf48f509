"""The flags of the command line: one row per flag, most of them read off the settings classes.

A settings field is set by the flag of its name (`train_iters`: `--train-iters`) unless `_NAMES` says otherwise; type,
default and help come from the field. The other tables hold flags of existing launch scripts that set nothing here, each
with the reason.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, Union

from mindspeed_mm.config.base import Settings
from mindspeed_mm.config.run import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RuntimeConfig,
    TrainingConfig,
)

Takes = Literal["nothing", "one value", "values"]

SECTIONS: dict[str, type[Settings]] = {
    "parallel": ParallelConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "runtime": RuntimeConfig,
}

FILE_FLAGS = {
    "--mm-model": "Model settings (model.json). Required.",
    "--mm-data": "Data settings (data.json). Required for training.",
    "--mm-tool": "Profiler settings (tools.json).",
}


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag that sets a field of a settings class."""

    name: str
    section: str
    field: str
    takes: Takes
    kind: type[int] | type[float] | type[str]
    """Type of a value; without meaning when the flag takes nothing."""
    choices: tuple[str, ...] = ()
    constant: bool = True
    """What a flag that takes nothing sets."""


@dataclass(frozen=True, slots=True)
class OtherFlag:
    """A flag that is accepted without effect, or refused."""

    name: str
    takes: Takes
    reason: str
    harmless_value: str = ""
    """The value with which a refused flag asks for nothing, and is let through."""


# Where Megatron's name of a flag is not the field's, or there is a second name.
_NAMES = {
    "parallel.tp_size": ("--tensor-model-parallel-size",),
    "parallel.pp_size": ("--pipeline-model-parallel-size",),
    "parallel.vp_size": ("--virtual-pipeline-model-parallel-size",),
    "parallel.cp_size": ("--context-parallel-size",),
    "training.use_deter_comp": ("--use-deter-comp", "--deterministic-mode"),
    "runtime.local_rank": ("--local-rank", "--local_rank"),
}


def _own_flags() -> dict[str, Flag]:
    flags: dict[str, Flag] = {}
    for section, cls in SECTIONS.items():
        for field, info in cls.model_fields.items():
            takes, kind, choices = _value_of(info.annotation)
            for name in _NAMES.get(f"{section}.{field}", ("--" + field.replace("_", "-"),)):
                flags[name] = Flag(name, section, field, takes, kind, choices)
                if info.default is True:
                    off = name.replace("--", "--no-", 1)
                    flags[off] = Flag(off, section, field, takes, kind, choices, constant=False)
    return flags


def _value_of(annotation: Any) -> tuple[Takes, Any, tuple[str, ...]]:
    """What a field of this type takes on the command line: how many values, of which type, out of which."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (option for option in typing.get_args(annotation) if option is not type(None))
    if annotation is bool:
        return "nothing", bool, ()
    if typing.get_origin(annotation) is tuple:
        return "values", typing.get_args(annotation)[0], ()
    if typing.get_origin(annotation) is Literal:
        return "one value", str, typing.get_args(annotation)
    return "one value", annotation, ()


FLAGS = _own_flags()

STRUCTURE_FLAGS: dict[str, str] = {
    "--num-layers": "num_layers",
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "ffn_hidden_size",
    "--num-attention-heads": "num_attention_heads",
    "--num-query-groups": "num_query_groups",
    "--kv-channels": "kv_channels",
    "--max-position-embeddings": "max_position_embeddings",
    "--vocab-size": "vocab_size",
    "--padded-vocab-size": "vocab_size",
    "--normalization": "normalization",
    "--norm-epsilon": "layernorm_epsilon",
    "--position-embedding-type": "position_embedding_type",
    "--rotary-base": "rope_theta",
    "--attention-dropout": "attention_dropout",
    "--hidden-dropout": "hidden_dropout",
    "--init-method-std": "init_method_std",
    "--recompute-granularity": "recompute_granularity",
    "--recompute-method": "recompute_method",
    "--recompute-num-layers": "recompute_num_layers",
}
"""Flags for what model.json says, with the text_decoder field; a value that differs is reported and has no effect."""


def _others(
    reason: str, *, switches: str = "", valued: str = "", listed: str = "", harmless_value: str = ""
) -> list[OtherFlag]:
    kinds: list[tuple[str, Takes]] = [(switches, "nothing"), (valued, "one value"), (listed, "values")]
    return [OtherFlag(f"--{name}", takes, reason, harmless_value) for names, takes in kinds for name in names.split()]


def _by_name(*groups: list[OtherFlag]) -> dict[str, OtherFlag]:
    return {flag.name: flag for group in groups for flag in group}


NO_EFFECT = _by_name(
    _others(
        "it is always so here",
        switches="use-mcore-models no-create-attention-mask-in-dataloader unaligned-linear auto-detect-ckpt-format "
        "use-rotary-position-embeddings no-position-embedding attention-softmax-in-fp32 no-data-sharding "
        "ckpt-fully-parallel-load no-scatter-gather-tensors-in-pipeline",
    ),
    _others(
        "model.json describes the model",
        switches="swiglu group-query-attention disable-bias-linear add-qkv-bias untie-embeddings-and-output-weights "
        "use-checkpoint-args recompute-activations",
        valued="rotary-percent rotary-seq-len-interpolation-factor encoder-num-layers decoder-num-layers "
        "encoder-seq-length decoder-seq-length attention-mask-type",
    ),
    _others("the vocabulary is never padded", valued="make-vocab-size-divisible-by"),
    _others(
        "tokenizer and records come from --mm-data",
        switches="eod-mask-loss reset-position-ids reset-attention-mask legacy-tokenizer",
        valued="tokenizer-type tokenizer-model tokenizer-name-or-path vocab-file merge-file split data-cache-path "
        "dataloader-type max-seq-len dynamic-batch-buffer-size",
        listed="data-path train-data-path valid-data-path test-data-path",
    ),
    _others(
        "the platform chooses kernels and fusions",
        switches="use-flash-attn use-fused-rmsnorm use-fused-swiglu use-fused-rotary-pos-emb no-masked-softmax-fusion "
        "no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion "
        "no-gradient-accumulation-fusion no-async-tensor-model-parallel-allreduce no-persist-layer-norm "
        "cross-entropy-loss-fusion jit-compile allow-tf32 allow-internal-format use-cp-send-recv-overlap "
        "tp-comm-overlap use-ascend-mc2 use-ascend-coc",
        valued="transformer-impl pre-tockens next-tockens sparse-mode cp-window-size optimization-level ai-framework "
        "optimize-recomp-communication-level",
    ),
    _others(
        "memory and communication are handled by megatron-core's defaults",
        switches="reuse-fp32-param downcast-to-bf16 distribute-saved-activations manual-gc use-cpu-initialization "
        "no-delay-grad-reduce delay-grad-reduce ddp-average-in-collective align-grad-reduce no-align-grad-reduce "
        "no-overlap-p2p-communication overlap-p2p-communication-warmup-flush "
        "recompute-skip-core-attention swap-attention no-ckpt-fully-parallel-save ckpt-assume-constant-structure",
        valued="manual-gc-interval empty-unused-memory-level ddp-num-buckets ddp-bucket-size "
        "recompute-num-layers-skip-core-attention",
    ),
    _others(
        "it balances batches of other models",
        switches="encoder-dp-balance use-data-balance use-image-mbs-data-balance use-txt-dynamic-batching",
        valued="data_balance_sorting_algo mbs_data_balance_sorting_algo data-balance-sorting-algo "
        "mbs-data-balance-sorting-algo",
    ),
    _others("the loss has the three forms of the settings", switches="calculate-square-loss calculate-token-loss"),
    _others("only the muon optimizer reads it", valued="matched-adamw-rms muon-momentum ns-steps"),
    _others(
        "only LoRA training reads it",
        switches="lora-save-full-weight",
        valued="lora-mixed-training load-base-model lora-dropout lora-r lora-alpha",
        listed="lora-apply-modules lora-register-forward-hook",
    ),
    _others(
        "only preference training reads it", valued="dpo-beta dpo-loss-type dpo-label-smoothing ref-model pref-ftx"
    ),
    _others(
        "it belongs to a parallel search of another code base",
        switches="profile-subgraph-seg",
        valued="profile-stage simulated-nnodes simulated-nproc-per-node hetero-encoder-mbs-scale",
    ),
    _others(
        "metrics go to the log line, metrics.jsonl and the chosen trackers",
        switches="log-timers-to-tensorboard log-validation-ppl-to-tensorboard log-memory-to-tensorboard "
        "log-batch-size-to-tensorboard log-world-size-to-tensorboard log-learning-rate-to-tensorboard "
        "log-loss-scale-to-tensorboard no-log-learnig-rate-to-tensorboard no-log-loss-scale-to-tensorboard "
        "log-progress log-straggler",
        valued="timing-log-level timing-log-option tensorboard-queue-size logging-level",
    ),
)
"""Flags of existing launch scripts that change nothing here."""

REFUSED = _by_name(
    _others(
        "it is deprecated; use --virtual-pipeline-model-parallel-size with nested pipeline_num_layers",
        valued="num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank",
    ),
    _others(
        "layers per stage are written as pipeline_num_layers in model.json",
        valued="decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers pipeline-model-parallel-layout "
        "pipeline-model-parallel-split-rank",
    ),
    _others("LoRA is not available in this program", listed="lora-target-modules lora-target-parameters"),
    _others("each module has the same parallel sizes here", switches="hetero-parallel"),
    _others("this model has no experts", valued="num-experts"),
    _others(
        "this model has no experts",
        valued="expert-model-parallel-size expert-tensor-parallel-size",
        harmless_value="1",
    ),
    _others("residuals have the precision of the run", switches="fp32-residual-connection"),
    _others("ranks are ordered TP, CP, DP, PP here", switches="use-tp-pp-dp-mapping"),
    _others(
        "length is counted in iterations here; use --train-iters, --lr-decay-iters, --lr-warmup-iters or "
        "--lr-wsd-decay-iters",
        valued="train-samples lr-decay-samples lr-warmup-samples lr-wsd-decay-samples",
    ),
    _others("the global batch size is constant here", listed="rampup-batch-size"),
    _others(
        "weights are split by tensor and pipeline parallelism; --use-distributed-optimizer splits the optimizer",
        switches="use-torch-fsdp2 use-custom-fsdp use-megatron-fsdp",
    ),
    _others("there is no reinforcement learning here", valued="stage"),
)
"""Flags that would change the run, and that this program cannot honour."""
