"""What one training run is told: the settings classes behind the command line, and `RunConfig` that holds them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from mindspeed_mm.config.base import Names, Settings
from mindspeed_mm.config.data import DataConfig
from mindspeed_mm.config.qwen2vl import Qwen2VLConfig
from mindspeed_mm.config.tool import ToolConfig

ParamsDtype = Literal["bf16", "fp16", "fp32"]


class ParallelConfig(Settings):
    """How the model and the batch are spread over processes."""

    tp_size: int = Field(default=1, gt=0)
    """Tensor-parallel ranks that share every layer."""
    pp_size: int = Field(default=1, gt=0)
    """Pipeline ranks."""
    vp_size: int = Field(default=1, gt=0)
    """Virtual chunks per pipeline rank; 1 is no interleaving."""
    cp_size: int = Field(default=1, gt=0)
    """Context-parallel ranks that share every sequence."""
    world_size: int = Field(default=1, gt=0)
    """Processes of the run."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor ranks, along the sequence."""
    context_parallel_algo: Literal[
        "megatron_cp_algo", "ulysses_cp_algo", "hybrid_cp_algo", "hybrid_adaptive_cp_algo", "kvallgather_cp_algo"
    ] = "megatron_cp_algo"
    """How attention works across context ranks; without effect at cp_size 1."""
    ulysses_degree_in_cp: int | None = Field(default=None, gt=0)
    """Ranks of the all-to-all part in the hybrid algorithm."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one replica."""
        return self.tp_size * self.pp_size * self.cp_size

    @property
    def dp_size(self) -> int:
        """Replicas."""
        return self.world_size // self.model_parallel_size


class TrainingConfig(Settings):
    """Batch, length, precision and the loop."""

    micro_batch_size: int = Field(gt=0)
    """Samples per micro-batch and replica."""
    global_batch_size: int = Field(gt=0)
    """Samples per optimizer step, over all replicas."""
    train_iters: int = Field(ge=0)
    """Optimizer steps of the whole run."""
    seq_length: int = Field(gt=0)
    """Longest sample, in tokens; longer ones are cut."""
    seed: int = 1234
    """Seed of weights, data order and dropout."""
    bf16: bool = False
    """Compute in bfloat16, keep fp32 master weights."""
    fp16: bool = False
    """Compute in float16 with loss scaling."""
    loss_scale: float | None = Field(default=None, gt=0)
    """Fixed loss scale for fp16; dynamic when not given."""
    initial_loss_scale: float = Field(default=2.0**32, gt=0)
    """First dynamic loss scale."""
    min_loss_scale: float = Field(default=1.0, gt=0)
    """Smallest dynamic loss scale."""
    loss_scale_window: int = Field(default=1000, gt=0)
    """Good steps before the dynamic loss scale grows."""
    hysteresis: int = Field(default=2, gt=0)
    """Bad steps before the dynamic loss scale shrinks."""
    eval_interval: int = Field(default=1000, gt=0)
    """Optimizer steps between evaluations."""
    eval_iters: int = Field(default=100, ge=0)
    """Global batches per evaluation; 0 evaluates never."""
    num_workers: int = Field(default=2, ge=0)
    """Data-loading processes per replica; 0 loads in the training process."""
    calculate_per_token_loss: bool = False
    """Every token of the global batch weighs the same."""
    calculate_per_sample_loss: bool = False
    """Every sample of the global batch weighs the same."""
    check_for_nan_in_loss_and_grad: bool = True
    """Stop when the loss or a gradient is not finite."""
    use_deter_comp: bool = False
    """Use deterministic kernels only."""
    exit_interval: int | None = Field(default=None, gt=0)
    """Save and stop when the iteration is a multiple of this."""
    exit_duration_in_mins: int | None = Field(default=None, gt=0)
    """Save and stop after this many minutes."""
    exit_signal_handler: bool = True
    """Save and stop on SIGTERM or SIGINT."""
    variable_seq_lengths: bool = False
    """Micro-batches differ in length; always so here, the flag has no effect."""

    @property
    def params_dtype(self) -> ParamsDtype:
        """Precision of weights and activations."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    def num_micro_batches(self, dp_size: int) -> int:
        """Micro-batches per optimizer step of one replica."""
        return self.global_batch_size // (self.micro_batch_size * dp_size)


class OptimizerConfig(Settings):
    """Optimizer, its schedule and its distribution; defaults are Megatron's."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam (decoupled weight decay) or SGD with momentum."""
    lr: float | None = Field(default=None, ge=0)
    """Largest learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate that the decay ends at."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Form of the decay after warm-up."""
    lr_decay_iters: int | None = Field(default=None, gt=0)
    """Iterations until min_lr; all of train_iters when not given."""
    lr_warmup_fraction: float | None = Field(default=None, ge=0, le=1)
    """Part of the decay iterations spent on warm-up; excludes lr_warmup_iters."""
    lr_warmup_iters: int = Field(default=0, ge=0)
    """Iterations of warm-up."""
    lr_warmup_init: float = Field(default=0.0, ge=0)
    """Learning rate that warm-up starts at."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Form of the last phase of WSD."""
    lr_wsd_decay_iters: int | None = Field(default=None, gt=0)
    """Length of the last phase of WSD."""
    override_opt_param_scheduler: bool = False
    """On resume, the schedule of the command line replaces the saved one."""
    use_checkpoint_opt_param_scheduler: bool = False
    """On resume, the saved schedule replaces the command line's."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay, on all parameters but weight_decay_exclude_modules."""
    start_weight_decay: float | None = Field(default=None, ge=0)
    """First weight decay of an increasing schedule."""
    end_weight_decay: float | None = Field(default=None, ge=0)
    """Last weight decay of an increasing schedule."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """Form of the increase."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    sgd_momentum: float = Field(default=0.9, ge=0)
    """Momentum of SGD."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""
    use_distributed_optimizer: bool = False
    """Split optimizer state over the replicas."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while backward still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while forward already runs; needs use_distributed_optimizer and overlap_grad_reduce."""
    accumulate_allreduce_grads_in_fp32: bool = False
    """Keep and reduce gradients in fp32; always on with bf16."""
    weight_decay_exclude_modules: Names = ()
    """Parameters whose name contains one of these have no weight decay (case does not matter)."""
    lr_scale_modules: Names = ()
    """Parameters whose name contains one of these use lr * lr_mult."""
    lr_mult: float = Field(default=1.0, ge=0)
    """See lr_scale_modules."""
    enable_dummy_optimizer: bool = False
    """Allow stages without any trainable parameter."""


class CheckpointConfig(Settings):
    """What is loaded and saved."""

    load: str | None = None
    """Checkpoint directory to start from: ours or a Hugging Face one."""
    save: str | None = None
    """Directory that checkpoints are written to."""
    save_interval: int | None = Field(default=None, gt=0)
    """Optimizer steps between saves; only at the end when not given."""
    save_hf: str | None = None
    """Directory for a Hugging Face export at the end."""
    ckpt_step: int | None = Field(default=None, gt=0)
    """Iteration to load; the latest when not given."""
    ckpt_format: Literal["torch", "torch_dist"] = "torch"
    """Format of saves: the converter's layout, or megatron-core's distributed one."""
    no_load_optim: bool = False
    """Do not load optimizer state."""
    no_load_rng: bool = False
    """Do not load random states."""
    no_save_optim: bool = False
    """Do not save optimizer state."""
    no_save_rng: bool = False
    """Do not save random states."""
    finetune: bool = False
    """Load weights only and start at iteration 0."""
    init_random: bool = False
    """Start from random weights on purpose."""
    exit_on_missing_checkpoint: bool = False
    """Always so here: a missing checkpoint is an error."""


class LoggingConfig(Settings):
    """What is reported, and where."""

    log_interval: int = Field(default=100, gt=0)
    """Optimizer steps between log lines."""
    log_tps: bool = False
    """Report tokens per sample."""
    log_throughput: bool = False
    """Report TFLOP/s per device."""
    log_params_norm: bool = False
    """Report the norm of all parameters."""
    log_num_zeros_in_grad: bool = False
    """Report how many gradient values are zero."""
    tensorboard_dir: str | None = None
    """Directory for TensorBoard files."""
    tensorboard_log_interval: int = Field(default=1, gt=0)
    """Optimizer steps between TensorBoard points."""
    wandb_project: str | None = None
    """Weights & Biases project; off when not given."""
    wandb_exp_name: str | None = None
    """Weights & Biases run name."""
    wandb_save_dir: str | None = None
    """Directory for Weights & Biases files."""
    swanlab_project: str | None = None
    """SwanLab project; off when not given."""
    swanlab_exp_name: str | None = None
    """SwanLab run name."""
    swanlab_save_dir: str | None = None
    """Directory for SwanLab files."""


class RuntimeConfig(Settings):
    """Processes and devices."""

    device: Literal["cpu", "cuda", "npu"] | None = None
    """Device kind; the best one present when not given."""
    distributed_backend: str = "nccl"
    """Collective library wanted on an accelerator; gloo is used where there is none."""
    distributed_timeout_minutes: float = Field(default=10, gt=0)
    """Minutes before a collective that a peer did not join fails; 0.5 is half a minute."""
    dry_run: bool = False
    """Check everything, print the plan and stop."""
    local_rank: int = Field(default=0, ge=0)
    """Number of this process on its machine."""
    trust_remote_code: bool = False
    """Allow tokenizer and processor code from the checkpoint directory."""


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything that a run is told, checked."""

    model: Qwen2VLConfig
    data: DataConfig | None
    tool: ToolConfig
    parallel: ParallelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    runtime: RuntimeConfig
    notes: tuple[str, ...]
    """Things to say once in the log: flags without effect, accepted keys, values that the JSON files override."""
