from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.config import RunConfig, TrainingConfig, parse_command_line
from mindspeed_mm.config.flags import FLAGS, NO_EFFECT, REFUSED, STRUCTURE_FLAGS
from mindspeed_mm.errors import ConfigError

from .launch import FILES, script_environment, script_words

MODEL, DATA = str(FILES / "model_7b.json"), str(FILES / "data_7b.json")
SMALLEST = ["--mm-model", MODEL, "--mm-data", DATA, "--micro-batch-size", "2", "--seq-length", "64"]
SMALLEST += ["--train-iters", "10", "--lr", "1e-4", "--init-random"]


def parse(*words: str, **environ: str) -> RunConfig:
    return parse_command_line([*SMALLEST, *words], environ)


def problems_of(words: list[str], **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(words, environ)
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


@pytest.mark.parametrize("size", ["2b", "7b", "72b"])
def test_scripts_of_release_26_parse_unchanged(size: str) -> None:
    run = parse_command_line(script_words(size), script_environment(size))
    assert run.parallel.dp_size == {"2b": 8, "7b": 2, "72b": 8}[size]
    assert run.training.num_micro_batches(run.parallel.dp_size) == {"2b": 24, "7b": 96, "72b": 96}[size]
    assert (run.training.params_dtype, run.training.seed, run.training.num_workers) == ("bf16", 42, 8)
    optimizer = run.optimizer
    assert (optimizer.lr, optimizer.lr_decay_style, optimizer.lr_warmup_fraction) == (1e-5, "cosine", 0.1)
    assert (optimizer.weight_decay, optimizer.clip_grad, optimizer.use_distributed_optimizer) == (0, 0, True)
    checkpoint = run.checkpoint
    assert checkpoint.no_load_optim
    assert checkpoint.no_load_rng
    assert checkpoint.no_save_optim
    assert checkpoint.no_save_rng
    assert (checkpoint.save, checkpoint.save_interval, checkpoint.ckpt_format) == ("save_dir", 10000, "torch")
    assert run.logging.log_tps
    assert (run.logging.log_interval, run.training.eval_interval, run.training.eval_iters) == (1, 10000, 5000)
    assert (run.runtime.distributed_timeout_minutes, run.runtime.local_rank) == (20, 7)
    assert any("--use-flash-attn" in note and "the platform chooses kernels" in note for note in run.notes)
    # --vocab-size says the same as model.json, so there is nothing to tell
    assert not any("[INFO]" in note for note in run.notes)


def test_defaults_are_megatrons() -> None:
    run = parse()
    training, optimizer = run.training, run.optimizer
    assert (training.global_batch_size, training.seed, training.num_workers) == (2, 1234, 2)
    assert (training.eval_interval, training.eval_iters, training.params_dtype) == (1000, 100, "fp32")
    assert (optimizer.weight_decay, optimizer.clip_grad, optimizer.lr_decay_style) == (0.01, 1.0, "linear")
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.999, 1e-8)
    assert (run.logging.log_interval, run.checkpoint.save_interval) == (100, None)
    assert training.check_for_nan_in_loss_and_grad


def test_the_global_batch_defaults_to_one_micro_batch_per_replica() -> None:
    assert parse(WORLD_SIZE="3").training.global_batch_size == 6


def test_the_last_of_a_repeated_flag_counts() -> None:
    assert parse("--seed", "1", "--seed=-2").training.seed == -2


def test_lists_take_words_until_the_next_flag() -> None:
    run = parse("--weight-decay-exclude-modules", "norm", "bias", "--bf16")
    assert run.optimizer.weight_decay_exclude_modules == ("norm", "bias")
    assert run.training.bf16


def test_a_setting_that_is_on_can_be_switched_off() -> None:
    assert not parse("--no-check-for-nan-in-loss-and-grad").training.check_for_nan_in_loss_and_grad


def test_the_device_comes_from_the_flag_or_the_environment() -> None:
    assert parse().runtime.device is None
    assert parse(MM_DEVICE="cpu").runtime.device == "cpu"
    assert parse("--device", "cuda", MM_DEVICE="cpu").runtime.device == "cuda"


def test_a_dry_run_needs_no_data_no_checkpoint_and_any_world_size() -> None:
    words = ["--mm-model", MODEL, "--micro-batch-size", "1", "--seq-length", "64", "--train-iters", "1", "--dry-run"]
    run = parse_command_line([*words, "--world-size", "16"], {"WORLD_SIZE": "1"})
    assert (run.parallel.world_size, run.data) == (16, None)


def test_a_structure_flag_that_differs_from_the_model_is_a_note() -> None:
    notes = parse("--num-layers", "24", "--hidden-size", "3584", "--rotary-base", "1000000").notes
    assert [note for note in notes if "[INFO]" in note and "--" in note.split()[1]] == [
        "[INFO] --num-layers 24 has no effect: model.json says text_decoder.num_layers = 28."
    ]


def test_a_precision_that_differs_from_the_model_is_a_note() -> None:
    assert sum("says bf16" in note and "fp32" in note for note in parse().notes) == 3
    assert not any("says bf16" in note for note in parse("--bf16").notes)


def test_flags_without_effect_are_reported_once_per_reason() -> None:
    notes = parse("--swiglu", "--use-flash-attn", "--use-flash-attn", "--jit-compile").notes
    assert "no effect: --use-flash-attn --jit-compile (the platform chooses kernels and fusions)." in notes
    assert "no effect: --swiglu (model.json describes the model)." in notes


def test_sequence_parallel_needs_tensor_ranks() -> None:
    run = parse("--sequence-parallel")
    assert not run.parallel.sequence_parallel
    assert "no effect: --sequence-parallel (TP is 1)." in run.notes
    words = ["--sequence-parallel", "--tensor-model-parallel-size", "2"]
    assert parse(*words, WORLD_SIZE="2").parallel.sequence_parallel


def test_a_refused_flag_may_ask_for_nothing() -> None:
    assert parse("--expert-model-parallel-size", "1").parallel.tp_size == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--micro-batch", "1"], "--micro-batch is not a flag; did you mean --micro-batch-size?"),
        (["--use_flash_attn"], "--use_flash_attn is not a flag; did you mean --use-flash-attn?"),
        (
            ["--tensor-parallel-size", "2"],
            "--tensor-parallel-size is not a flag; did you mean --tensor-model-parallel-size?",
        ),
        (["--zzz", "1"], "--zzz is not a flag."),
        (["--seed"], "--seed needs a value."),
        (["--seed", "1.5"], "--seed = '1.5' should be a whole number."),
        (["--lr", "fast"], "--lr = 'fast' should be a number."),
        (["--lr", "nan"], "--lr = 'nan' should be a number."),
        (["--bf16=1"], "--bf16 takes no value, but has '1'."),
        (["--bf16", "true"], "'true' is not a flag and belongs to none."),
        (["--optimizer", "muon"], "--optimizer = \"muon\" is not supported; expected 'adam' or 'sgd'."),
        (["--save-interval", "0"], "--save-interval = 0 should be greater than 0."),
        (["--log-interval", "0"], "--log-interval = 0 should be greater than 0."),
        (["--eval-interval", "0"], "--eval-interval = 0 should be greater than 0."),
        (["--bf16", "--fp16"], "--bf16 and --fp16 exclude each other."),
        (
            ["--calculate-per-sample-loss", "--calculate-per-token-loss"],
            "--calculate-per-sample-loss and --calculate-per-token-loss exclude each other.",
        ),
        (
            ["--seq-length", "40000"],
            "--seq-length = 40000 is greater than text_decoder.max_position_embeddings = 32768, the longest "
            "sequence of the model.",
        ),
        (
            ["--num-layers-per-virtual-pipeline-stage", "2"],
            "--num-layers-per-virtual-pipeline-stage cannot be used: it is deprecated; use "
            "--virtual-pipeline-model-parallel-size with nested pipeline_num_layers.",
        ),
        (
            ["--lora-target-modules", "linear_qkv", "linear_proj"],
            "--lora-target-modules cannot be used: LoRA is not available in this program.",
        ),
        (
            ["--global-batch-size", "3"],
            "--global-batch-size = 3 is not divisible by 2, which is --micro-batch-size 2 x 1 data-parallel replicas.",
        ),
        (
            ["--pipeline-model-parallel-size", "4"],
            "the world size 1 is not divisible by 4, the processes of one replica: TP 1 x PP 4 x CP 1.",
        ),
        (["--min-lr", "1"], "--min-lr = 1 is greater than --lr = 0.0001."),
        (
            ["--lr-warmup-fraction", "0.1", "--lr-warmup-iters", "5"],
            "--lr-warmup-fraction and --lr-warmup-iters exclude each other.",
        ),
        (["--lr-decay-style", "WSD"], "--lr-decay-style WSD needs --lr-wsd-decay-iters."),
        (
            ["--overlap-param-gather", "--overlap-grad-reduce"],
            "--overlap-param-gather needs --use-distributed-optimizer.",
        ),
        (
            ["--weight-decay-incr-style", "linear"],
            "--weight-decay-incr-style linear needs --start-weight-decay and --end-weight-decay.",
        ),
        (["--load", "x"], "--load and --init-random exclude each other."),
        (["--ckpt-step", "5"], "--ckpt-step names an iteration of --load, which is not given."),
        (["--world-size", "8"], "--world-size is only for --dry-run; otherwise torchrun sets WORLD_SIZE."),
        (["--lr-scale-modules", "vision"], "--lr-scale-modules has an effect only with --lr-mult other than 1."),
        (["--mm-model", "absent.json"], "there is no such file."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_gets_its_own_message(words: list[str], expected: str) -> None:
    assert problems_of([*SMALLEST, *words]) == [expected]


def test_what_is_missing_is_said_together() -> None:
    assert problems_of([]) == [
        "--mm-model is missing; it names the model.json.",
        "--micro-batch-size is missing.",
        "--train-iters is missing.",
        "--seq-length is missing.",
    ]
    words = ["--mm-model", MODEL, "--micro-batch-size", "1", "--seq-length", "64", "--train-iters", "1"]
    assert [problem.split()[0] for problem in problems_of(words)] == ["--mm-data", "--load", "--lr"]


def test_a_launcher_variable_must_be_a_number() -> None:
    assert problems_of(SMALLEST, WORLD_SIZE="two") == [
        "environment variable WORLD_SIZE = 'two' should be a whole number."
    ]


def test_virtual_chunks_need_a_multiple_of_the_pipeline_size() -> None:
    words = ["--pipeline-model-parallel-size=4", "--virtual-pipeline-model-parallel-size=3", "--global-batch-size=12"]
    (problem,) = problems_of([*SMALLEST, *words], WORLD_SIZE="4")
    assert "need a multiple of PP = 4 micro-batches per step, but --global-batch-size 12 gives 6" in problem


def test_problems_of_several_files_are_shown_together(tmp_path: Path) -> None:
    for name in ("model", "data"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"modle_id": 1}))
    words = ["--mm-model", str(tmp_path / "model.json"), "--mm-data", str(tmp_path / "data.json"), "--sed", "1"]
    with pytest.raises(ConfigError) as caught:
        parse_command_line([*SMALLEST, *words], {})
    text = str(caught.value)
    assert "--sed is not a flag; did you mean --seed?" in text
    assert "model.json\n" in text
    assert "modle_id is not a setting; did you mean model_id?" in text
    assert "dataset_param is missing." in text


def test_help_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--seed", "--help"], {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    words = set(text.replace(",", " ").split())
    assert {*FLAGS, *NO_EFFECT, *REFUSED, *STRUCTURE_FLAGS, "--mm-model"} <= words
    assert "None" not in text


def test_no_flag_stands_in_two_tables() -> None:
    names = [*FLAGS, *NO_EFFECT, *REFUSED, *STRUCTURE_FLAGS]
    assert len(names) == len(set(names))


def test_micro_batches_fill_the_global_batch() -> None:
    training = TrainingConfig(micro_batch_size=2, global_batch_size=24, train_iters=1, seq_length=8)
    assert training.num_micro_batches(3) * 3 * 2 == 24


def test_settings_and_plan_import_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, mindspeed_mm.config, mindspeed_mm.plan\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[3]).returncode == 0
