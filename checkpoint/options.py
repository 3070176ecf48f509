"""What `mm-convert` asks for: one class per command. The docstrings are the help texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

Layers = list[NonNegativeInt] | list[list[NonNegativeInt]]
"""Layers per stage, like [1, 10, 10, 7]; or one such list per virtual chunk, like [[0, 0, 0, 1], [4, 4, 4, 4]]."""


@dataclass(frozen=True)
class HfConfig:
    """A Hugging Face directory.

    Args:
        hf_dir: Hugging Face directory with config.json and *.safetensors files.
    """

    hf_dir: str


@dataclass(frozen=True)
class LanguageHfConfig:
    """A Hugging Face directory of the language model alone.

    Args:
        hf_dir: Accepted so that existing commands work; Qwen2-VL directories hold the language model.
    """

    hf_dir: str | None = None


@dataclass(frozen=True)
class ParallelConfig:
    """How a checkpoint is cut.

    Args:
        llm_pp_layers: Text layers per pipeline rank, e.g. [1,10,10,7]; nested once more for virtual chunks. Not needed
            to read a checkpoint that holds stage_plan.json.
        vit_pp_layers: Vision layers per pipeline rank, e.g. [32,0,0,0]; nested once more for virtual chunks.
        audio_pp_layers: Must stay null; this family has no audio tower.
        tp_size: Tensor-parallel size, 1 where nothing is said.
        vit_tp_size: Tensor-parallel size of the vision tower; 0 or tp_size, others are not supported.
        audio_tp_size: Must stay 0; this family has no audio tower.
        ep_size: Must stay 1; this family has no experts.
    """

    llm_pp_layers: Layers | None = None
    vit_pp_layers: Layers | None = None
    audio_pp_layers: Any = None
    tp_size: PositiveInt | None = None
    vit_tp_size: NonNegativeInt = 0
    audio_tp_size: NonNegativeInt = 0
    ep_size: PositiveInt = 1


@dataclass(frozen=True)
class CommonModelConfig:
    """Facts about the model; where config.json or the checkpoint knows them they must agree.

    Args:
        num_experts: Must stay null; this family has no experts.
        num_key_value_heads: Key-value heads of the text decoder.
        tie_word_embeddings: Whether the output head is the token embedding.
        llm_hf_dir: Accepted so that existing commands work.
        llm_num_layers: Layers of the text decoder.
        vit_num_layers: Layers of the vision tower.
        audio_num_layers: Must stay null; this family has no audio tower.
        enable_canonical_hf_struct: Must stay false; un-fused linears are not supported.
        new_transformers_weight_key: Accepted so that existing commands work; all generations of names are read.
        model_prefix: Accepted so that existing commands work.
    """

    num_experts: int | None = None
    num_key_value_heads: PositiveInt | None = None
    tie_word_embeddings: bool | None = None
    llm_hf_dir: str | None = None
    llm_num_layers: PositiveInt | None = None
    vit_num_layers: PositiveInt | None = None
    audio_num_layers: int | None = None
    enable_canonical_hf_struct: bool = False
    new_transformers_weight_key: bool = False
    model_prefix: str | None = None


@dataclass(frozen=True)
class HfToMmConfig:
    """Hugging Face to MM.

    Args:
        mm_dir: Directory to write; it appears complete or not at all.
        hf_config: The Hugging Face directory to read.
        parallel_config: How to cut the model.
        llm_hf_config: Not used by this family.
        common_model_config: Facts about the model.
        save_vit_only: Write only the vision tower and the projector.
        trust_remote_code: Accepted so that existing commands work; code in a checkpoint is never run.
        overwrite: Replace mm_dir if it holds something.
        workers: Threads that copy.
        check_hashes: Compare the source with its manifest.json first.
        allow_nan: Convert weights that hold NaN or infinity instead of stopping.
    """

    mm_dir: str
    hf_config: HfConfig
    parallel_config: ParallelConfig
    llm_hf_config: LanguageHfConfig = field(default_factory=LanguageHfConfig)
    common_model_config: CommonModelConfig = field(default_factory=CommonModelConfig)
    save_vit_only: bool = False
    trust_remote_code: bool = False
    overwrite: bool = False
    workers: PositiveInt = 2
    check_hashes: bool = False
    allow_nan: bool = False


@dataclass(frozen=True)
class MmToHfConfig:
    """MM to Hugging Face.

    Args:
        mm_dir: MM checkpoint to read.
        save_hf_dir: Directory to write; it appears complete or not at all.
        hf_config: Reference directory, whose shard index and other files are taken over.
        parallel_config: How the checkpoint is cut; not needed where it holds stage_plan.json.
        llm_hf_config: Not used by this family.
        common_model_config: Facts about the model.
        trust_remote_code: Accepted so that existing commands work; code in a checkpoint is never run.
        iteration: Iteration to read, or "release"; otherwise the one that the tracker file names.
        max_shard_size: Size of the weight files, e.g. 5GB; otherwise tensors are dealt out as in the reference.
        vit_qkv_from_v2_3: MindSpeed-MM 2.2 or 2.3 converted the checkpoint; vision qkv rows are in another order.
        overwrite: Replace save_hf_dir if it holds something.
        workers: Threads that copy.
        check_hashes: Compare the source with its manifest.json first.
        allow_nan: Convert weights that hold NaN or infinity instead of stopping.
    """

    mm_dir: str
    save_hf_dir: str
    hf_config: HfConfig
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    llm_hf_config: LanguageHfConfig = field(default_factory=LanguageHfConfig)
    common_model_config: CommonModelConfig = field(default_factory=CommonModelConfig)
    trust_remote_code: bool = False
    iteration: NonNegativeInt | str | None = None
    max_shard_size: str | None = None
    vit_qkv_from_v2_3: bool = False
    overwrite: bool = False
    workers: PositiveInt = 2
    check_hashes: bool = False
    allow_nan: bool = False


@dataclass(frozen=True)
class ResplitConfig:
    """MM to MM, cut another way.

    Args:
        source_dir: MM checkpoint to read.
        target_dir: Directory to write; it appears complete or not at all.
        target_parallel_config: How to cut it.
        source_parallel_config: How the source is cut; not needed where it holds stage_plan.json.
        common_model_config: Facts about the model, where the checkpoint does not show them.
        iteration: Iteration to read, or "release"; otherwise the one that the tracker file names.
        weights_only: Write the weights of a training save as a release checkpoint, without optimizer state.
        overwrite: Replace target_dir if it holds something.
        workers: Threads that copy.
        check_hashes: Compare the source with its manifest.json first.
        allow_nan: Convert weights that hold NaN or infinity instead of stopping.
    """

    source_dir: str
    target_dir: str
    target_parallel_config: ParallelConfig
    source_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    common_model_config: CommonModelConfig = field(default_factory=CommonModelConfig)
    iteration: NonNegativeInt | str | None = None
    weights_only: bool = False
    overwrite: bool = False
    workers: PositiveInt = 2
    check_hashes: bool = False
    allow_nan: bool = False


@dataclass(frozen=True)
class VerifyConfig:
    """Two checkpoints to compare.

    Args:
        first_dir: Hugging Face or MM directory.
        second_dir: Hugging Face or MM directory.
        first_parallel_config: How the first is cut, if it is an MM directory without stage_plan.json.
        second_parallel_config: How the second is cut, if it is an MM directory without stage_plan.json.
        first_iteration: Iteration of the first, or "release"; otherwise the one that its tracker file names.
        second_iteration: Iteration of the second, or "release"; otherwise the one that its tracker file names.
        check_hashes: Compare both with their manifest.json, too.
    """

    first_dir: str
    second_dir: str
    first_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    second_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    first_iteration: NonNegativeInt | str | None = None
    second_iteration: NonNegativeInt | str | None = None
    check_hashes: bool = False


@dataclass(frozen=True)
class MergeConfig:
    """A base and LoRA adapters to merge into it.

    Args:
        base_dir: MM checkpoint of the base.
        lora_dir: MM checkpoint that holds adapters only; it may be cut in another way.
        target_dir: Directory to write, cut as the base; it appears complete or not at all.
        base_parallel_config: How the base is cut; not needed where it holds stage_plan.json.
        lora_parallel_config: How the adapters are cut; not needed where they come with stage_plan.json.
        base_iteration: Iteration of the base, or "release"; otherwise the one that its tracker file names.
        lora_iteration: Iteration of the adapters, or "release"; otherwise the one that their tracker file names.
        lora_alpha: Alpha of the adapters; needed where the checkpoint does not say it.
        lora_r: Rank of the adapters; checked.
        overwrite: Replace target_dir if it holds something.
        workers: Threads that copy.
    """

    base_dir: str
    lora_dir: str
    target_dir: str
    base_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    lora_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    base_iteration: NonNegativeInt | str | None = None
    lora_iteration: NonNegativeInt | str | None = None
    lora_alpha: float | None = None
    lora_r: PositiveInt | None = None
    overwrite: bool = False
    workers: PositiveInt = 2


@dataclass(frozen=True)
class ExportAdapterConfig:
    """MM adapters to a peft directory.

    Args:
        lora_dir: MM checkpoint that holds adapters only.
        hf_config: Hugging Face directory of the base model.
        adapter_dir: Directory to write; it appears complete or not at all.
        lora_parallel_config: How the adapters are cut; not needed where they come with stage_plan.json.
        iteration: Iteration to read, or "release"; otherwise the one that the tracker file names.
        lora_alpha: Alpha of the adapters; needed where the checkpoint does not say it.
        lora_r: Rank of the adapters; checked.
        hub_names: Name modules as transformers before 4.52 does.
        overwrite: Replace adapter_dir if it holds something.
    """

    lora_dir: str
    hf_config: HfConfig
    adapter_dir: str
    lora_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    iteration: NonNegativeInt | str | None = None
    lora_alpha: float | None = None
    lora_r: PositiveInt | None = None
    hub_names: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class ImportAdapterConfig:
    """A peft directory to MM adapters.

    Args:
        adapter_dir: Directory that peft wrote.
        hf_config: Hugging Face directory of the base model.
        mm_dir: Directory to write; it appears complete or not at all.
        parallel_config: How to cut the adapters: as the base that they are trained or merged with.
        overwrite: Replace mm_dir if it holds something.
    """

    adapter_dir: str
    hf_config: HfConfig
    mm_dir: str
    parallel_config: ParallelConfig
    overwrite: bool = False
