"""Training runs on the nano checkpoint: what is learned, frozen, resumed, exported."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_mm.models.mossvl.hf import MossVLConfig, MossVLForConditionalGeneration
from mindspeed_mm.models.mossvl.hf.checkpoint import load_model, load_processor, newest_checkpoint
from mindspeed_mm.models.mossvl.hf.tuning import LoraSettings, TuneSettings, add_lora, count_parameters, freeze_parts
from mossvl_finetune.data import build_data
from mossvl_finetune.train import main
from tests.mossvl_finetune.conftest import DEMO, losses

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = {"tune_vision": "model.visual.", "tune_language": "model.language_model.", "tune_lm_head": "lm_head."}


def changed_parts(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, set[bool]]:
    """For each part, whether its tensors changed: {True}, {False} or both."""
    changed: dict[str, set[bool]] = {}
    for name, tensor in before.items():
        part = next((part for part in PARTS.values() if name.startswith(part)), name)
        changed.setdefault(part, set()).add(not torch.equal(tensor, after[name]))
    return changed


def test_the_loss_falls_and_the_vision_tower_stays(
    run_training: Callable[..., Any], tmp_path: Path, nano_moss: Path
) -> None:
    trainer = run_training(tmp_path, max_steps=15)
    logged = losses(trainer)
    assert sum(logged[-3:]) / 3 < 0.6 * logged[0]
    changed = changed_parts(load_file(nano_moss / "model.safetensors"), load_file(tmp_path / "model.safetensors"))
    assert changed["model.visual."] == {False}
    assert True in changed["model.language_model."]
    assert changed["lm_head."] == {True}
    assert changed["model.separator_token"] == {True}


def test_the_export_loads_and_answers(run_training: Callable[..., Any], tmp_path: Path) -> None:
    run_training(tmp_path)
    model, processor = load_model(str(tmp_path), dtype="float32").eval(), load_processor(str(tmp_path))
    inputs = processor(text="<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_a_resumed_run_equals_an_uninterrupted_one(run_training: Callable[..., Any], tmp_path: Path) -> None:
    flags = {"save_strategy": "steps", "save_steps": 3, "lora_dropout": 0.0, "lr_scheduler_type": "cosine"}
    whole = run_training(tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    # A checkpoint that was cut short is not resumed from.
    (tmp_path / "resumed" / "checkpoint-5").mkdir()
    assert newest_checkpoint(tmp_path / "resumed") == tmp_path / "resumed" / "checkpoint-3"
    resumed = run_training(tmp_path / "resumed", **flags)
    assert losses(resumed)[:6] == losses(whole)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("flags", list(product([False, True], repeat=3)), ids=str)
def test_only_the_chosen_parts_change(flags: tuple[bool, bool, bool], nano_moss: Path) -> None:
    model = load_model(str(nano_moss), dtype="float32").train()
    freeze_parts(model, TuneSettings(*flags))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    processor = load_processor(str(nano_moss))
    dataset, collate = build_data(data_arguments(DEMO), processor, vision_chunked_length=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    for start in (0, 3):
        model(**collate([dataset[index] for index in range(start, start + 3)])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = changed_parts(before, model.state_dict())
    for part, is_tuned in zip(PARTS.values(), flags, strict=True):
        assert (True in changed[part]) == is_tuned, part
        assert is_tuned or changed[part] == {False}, part
    assert changed["model.separator_token"] == {True}


def data_arguments(path: Path) -> Any:
    from mossvl_finetune.arguments import DataArguments

    return DataArguments(data_path=str(path))


@pytest.fixture(scope="module")
def real_model() -> MossVLForConditionalGeneration:
    config = MossVLConfig.from_pretrained(REPOSITORY / "configs" / "mossvl" / "11b" / "config.json")
    with torch.device("meta"):
        return MossVLForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        (TuneSettings(), 10_506_096_664),
        (TuneSettings(tune_language=False), 622_333_952),
        (TuneSettings(tune_lm_head=False), 9_883_766_808),
        (TuneSettings(tune_vision=True), 11_336_371_208),
        (TuneSettings(False, False, False), 4_096),
    ],
)
def test_trained_parameters_of_the_real_model(
    real_model: MossVLForConditionalGeneration, settings: TuneSettings, trained: int
) -> None:
    freeze_parts(real_model, settings)
    assert count_parameters(real_model) == (trained, 11_336_371_208)


def test_adapters_of_the_real_model() -> None:
    config = MossVLConfig.from_pretrained(REPOSITORY / "configs" / "mossvl" / "11b" / "config.json")
    with torch.device("meta"):
        model = add_lora(MossVLForConditionalGeneration(config), LoraSettings())
    assert count_parameters(model)[0] == 81_788_928
    adapted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(adapted) == 48 * 4 * 2
    assert not any("visual" in name for name in adapted)


def test_lora_learns_loads_and_merges(run_training: Callable[..., Any], tmp_path: Path, nano_moss: Path) -> None:
    from peft import PeftModel

    flags = {"lora_enable": True, "lora_r": 8, "lora_alpha": 16, "learning_rate": 1e-2, "gradient_checkpointing": True}
    trainer = run_training(tmp_path, max_steps=15, **flags)
    logged = losses(trainer)
    assert sum(logged[-3:]) / 3 < 0.8 * logged[0]
    assert not (tmp_path / "model.safetensors").exists()
    base = load_model(str(nano_moss), dtype="float32").eval()
    adapted = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    trained = trainer.model.eval().state_dict()
    for name, tensor in adapted.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    processor = load_processor(str(tmp_path))
    dataset, collate = build_data(data_arguments(DEMO), processor, vision_chunked_length=64)
    batch = collate([dataset[index] for index in range(4)])
    with torch.no_grad():
        separate = adapted(**batch).logits
        merged = adapted.merge_and_unload()
        together = merged(**batch).logits
    torch.testing.assert_close(together, separate, atol=2e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"), dtype="float32").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, together)


def test_accumulation_averages_micro_batches(run_training: Callable[..., Any], tmp_path: Path) -> None:
    """Two micro-batches of one sample: the mean of their means, as the published class has it."""
    options = {"max_steps": 1, "learning_rate": 0.0}
    single = run_training(tmp_path / "a", per_device_train_batch_size=1, gradient_accumulation_steps=2, **options)
    steps = run_training(tmp_path / "b", per_device_train_batch_size=1, max_steps=2, learning_rate=0.0)
    assert losses(single)[0] == pytest.approx(sum(losses(steps)) / 2, abs=2e-3)


def test_recomputation_and_chunks_change_no_loss(run_training: Callable[..., Any], tmp_path: Path) -> None:
    plain = run_training(tmp_path / "a", max_steps=3)
    saving = run_training(
        tmp_path / "b", max_steps=3, gradient_checkpointing=True, vision_chunked_length=1, dataloader_num_workers=1
    )
    assert losses(saving) == pytest.approx(losses(plain), abs=2e-3)


def command(nano_moss: Path, output: Path, *more: str) -> list[str]:
    flags = ["--model_name_or_path", str(nano_moss), "--data_path", str(DEMO), "--output_dir", str(output)]
    flags += ["--use_cpu", "True", "--max_steps", "2", "--report_to", "none", "--save_strategy", "no"]
    return [str(REPOSITORY / "mossvl_finetune" / "train.py"), *flags, *more]


def test_the_documented_command_and_two_processes(nano_moss: Path, tmp_path: Path) -> None:
    """`python` from another folder, then torchrun with two gloo processes; text-only batches included."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONSAFEPATH", None)
    subprocess.run(
        [sys.executable, *command(nano_moss, tmp_path / "one")], check=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert (tmp_path / "one" / "model.safetensors").is_file()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    more = ["--per_device_train_batch_size", "1", "--max_steps", "3", "--ddp_find_unused_parameters", "False"]
    subprocess.run(
        [*launcher, *command(nano_moss, tmp_path / "two", *more)],
        check=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert (tmp_path / "two" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--data_path", "/nowhere/data.json"], 12, "/nowhere/data.json"),
        (["--model_name_or_path", "/nowhere/model"], 13, "/nowhere/model"),
        (["--lora_enable", "True", "--lora_target_modules", "q_prj"], 2, "q_prj"),
        (["--lora_enable", "True", "--lora_r", "0"], 2, "r must be at least 1"),
        (["--label_smoothing_factor", "0.1"], 2, "label_smoothing_factor"),
        (["--max_length", "-1"], 2, "max_length"),
        (["--max_length", "12"], 12, "max_length"),
        (["--video_backend", "vhs"], 11, "vhs"),
        (["--trust_remote_code", "True", "--model_name_or_path", "some/name"], 13, "local directory"),
    ],
)
def test_errors_end_with_their_code(
    flags: list[str], code: int, message: str, nano_moss: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([*command(nano_moss, tmp_path / "out")[1:], *flags]) == code
    assert message in caplog.text


def test_an_error_in_a_worker_is_told_in_one_line(
    nano_moss: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--max_length", "12", "--dataloader_num_workers", "1"]
    assert main([*command(nano_moss, tmp_path / "out")[1:], *flags]) == 12
    assert "Traceback" not in caplog.records[-1].getMessage()
    assert "sft_data.json[" in caplog.records[-1].getMessage()


def test_deepspeed_that_is_not_installed_is_named(
    nano_moss: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    config = REPOSITORY / "configs" / "mossvl" / "ds_config_zero2.json"
    assert main([*command(nano_moss, tmp_path / "out")[1:], "--deepspeed", str(config)]) == 11
    assert "pip install deepspeed" in caplog.text


def test_a_damaged_checkpoint_is_refused(nano_moss: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(nano_moss, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.language_model.layers.1.cross_attn_attn_gate"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert main([*command(broken, tmp_path / "out")[1:]]) == 13
    assert "missing keys: model.language_model.layers.1.cross_attn_attn_gate" in caplog.text


def test_code_of_a_checkpoint_is_copied_but_not_run(
    run_training: Callable[..., Any], nano_moss: Path, tmp_path: Path
) -> None:
    import json

    source = tmp_path / "source"
    shutil.copytree(nano_moss, source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "configuration_moss_vl.MossVLConfig", "AutoModel": "modeling_moss_vl.Model"}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    marker = tmp_path / "was_run"
    for name in ("configuration_moss_vl.py", "modeling_moss_vl.py"):
        (source / name).write_text(f"open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    run_training(tmp_path / "out", model_name_or_path=source, max_steps=1)
    assert not marker.exists()
    assert (tmp_path / "out" / "modeling_moss_vl.py").read_text() == (source / "modeling_moss_vl.py").read_text()
    exported = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert exported["auto_map"] == config["auto_map"]
