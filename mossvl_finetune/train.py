"""Fine-tune MOSS-VL, in full or with LoRA, on one process or under torchrun.

    python mossvl_finetune/train.py --model_name_or_path DIR --data_path FILE --output_dir DIR [...]
    torchrun --nproc_per_node 8 mossvl_finetune/train.py ... [--deepspeed configs/mossvl/ds_config_zero2.json]

A run whose `output_dir` holds a `checkpoint-*` goes on from the newest complete one. `--help` lists every argument;
`docs/mossvl.md` explains them.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Run as a script: its own folder is on the path, the repository is not.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindspeed_mm.errors import CheckpointError, MindSpeedMMError, SetupError
from mindspeed_mm.models.mossvl.hf.checkpoint import (
    copy_published_code,
    describe_published_code,
    load_model,
    load_processor,
    newest_checkpoint,
)
from mindspeed_mm.models.mossvl.hf.tuning import (
    LoraSettings,
    TuneSettings,
    add_lora,
    count_parameters,
    freeze_parts,
)
from mossvl_finetune.arguments import ModelArguments, TrainingArguments, parse_arguments
from mossvl_finetune.data import build_data

logger = logging.getLogger("mossvl_finetune")


def main(argv: list[str] | None = None) -> int:
    """Train and give the exit code: 0, or that of the error that ended the run."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        train(argv)
    except MindSpeedMMError as error:
        # A DataLoader worker wraps the error in its traceback; the user needs the last part.
        name = type(error).__name__
        logger.error("%s: %s", name, str(error).rpartition(f"mindspeed_mm.errors.{name}: ")[2].strip())
        return error.exit_code
    return 0


def train(argv: list[str] | None = None) -> Any:
    """Everything between the command line and the saved checkpoint; gives the Trainer."""
    from transformers import Trainer, set_seed

    try:
        model_arguments, data_arguments, arguments = parse_arguments(argv)
    except ImportError as error:
        raise SetupError(f"{error}. DeepSpeed is an extra of this project: pip install deepspeed") from None
    set_seed(arguments.seed)
    processor, model = _load(model_arguments, data_arguments.video_backend, arguments)
    dataset, collator = build_data(data_arguments, processor, vision_chunked_length=_chunk_length(arguments))
    model = _choose_parameters(model, model_arguments, arguments)
    if arguments.gradient_checkpointing or getattr(arguments, "activation_checkpointing", False):
        # The model itself makes recomputation non-reentrant, whatever transformers asks for.
        model.enable_input_require_grads()
    trainer = Trainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=collator, processing_class=processor.tokenizer
    )
    output_dir = Path(str(arguments.output_dir))
    checkpoint = newest_checkpoint(output_dir)
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_state()
    trainer.save_model(str(output_dir))
    if trainer.is_world_process_zero():
        processor.save_pretrained(output_dir)
        copy_published_code(model_arguments.model_name_or_path, output_dir)
    return trainer


def _load(model: ModelArguments, video_backend: str, arguments: TrainingArguments) -> tuple[Any, Any]:
    if model.trust_remote_code:
        source = Path(model.model_name_or_path)
        if not source.is_dir():
            raise CheckpointError("trust_remote_code = True runs code of a local directory only; download it first")
        for line in describe_published_code(source):
            logger.warning("running code of the checkpoint: %s", line)
    processor = load_processor(
        model.model_name_or_path,
        video_backend=video_backend,
        cache_dir=arguments.cache_dir,
        trust_remote_code=model.trust_remote_code,
    )
    network = load_model(
        model.model_name_or_path,
        dtype="bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32",
        attn_implementation=model.attn_implementation,
        is_on_cuda=arguments.device.type == "cuda",
        cache_dir=arguments.cache_dir,
        trust_remote_code=model.trust_remote_code,
    )
    return processor, network


def _chunk_length(arguments: TrainingArguments) -> int:
    """`vision_chunked_length`, or 0 (the vision tower runs once) where ranks must run it equally often."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled() or arguments.vision_chunked_length <= 0:
        return arguments.vision_chunked_length
    logger.info("vision_chunked_length = %d is not used: ZeRO-3 needs equally many runs of the vision tower on all "
                "ranks, so it runs once per batch", arguments.vision_chunked_length)  # fmt: skip
    return 0


def _choose_parameters(network: Any, model: ModelArguments, arguments: TrainingArguments) -> Any:
    if arguments.lora_enable:
        targets = tuple(part.strip() for part in arguments.lora_target_modules.split(",") if part.strip())
        lora = LoraSettings(arguments.lora_r, arguments.lora_alpha, arguments.lora_dropout, targets)
        network = add_lora(network, lora)
    else:
        freeze_parts(network, TuneSettings(model.tune_vision, model.tune_language, model.tune_lm_head))
    trained, total = count_parameters(network)
    logger.info("trainable parameters: %s of %s (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / max(total, 1))
    return network


if __name__ == "__main__":
    sys.exit(main())
