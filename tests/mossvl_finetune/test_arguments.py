"""Every documented argument and its default."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.errors import ConfigError
from mossvl_finetune.arguments import parse_arguments

NEEDED = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o"]


def test_defaults() -> None:
    model, data, training = parse_arguments([*NEEDED, "--use_cpu", "True"])
    assert vars(model) == {
        "model_name_or_path": "m",
        "tune_vision": False,
        "tune_language": True,
        "tune_lm_head": True,
        "attn_implementation": None,
        "trust_remote_code": False,
    }
    assert vars(data) == {
        "data_path": "d.json",
        "data_dir": None,
        "max_length": 4096,
        "video_backend": "pyav",
        "skip_bad_samples": False,
    }
    expected = {
        "cache_dir": None,
        "optim": "adamw_torch",
        "vision_chunked_length": 64,
        "lora_enable": False,
        "lora_r": 64,
        "lora_alpha": 128,
        "lora_dropout": 0.0,
        "lora_target_modules": "q_proj,k_proj,v_proj,o_proj",
        "remove_unused_columns": False,
    }
    assert {name: getattr(training, name) for name in expected} == expected


@pytest.mark.parametrize("missing", ["--model_name_or_path", "--data_path"])
def test_what_is_needed(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = NEEDED.index(missing)
    with pytest.raises(SystemExit) as caught:
        parse_arguments(NEEDED[:place] + NEEDED[place + 2 :])
    assert caught.value.code == 2
    assert missing in capsys.readouterr().err


def test_misspelt_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="tune_visoin"):
        parse_arguments([*NEEDED, "--use_cpu", "True", "--tune_visoin", "True"])


def test_all_problems_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments([*NEEDED, "--use_cpu", "True", "--label_smoothing_factor", "0.1", "--max_length", "-3"])
    assert len(caught.value.problems) == 2


def test_the_scripts_use_arguments_that_exist() -> None:
    import re

    from mossvl_finetune.arguments import DataArguments, ModelArguments, TrainingArguments

    known = {
        name for group in (ModelArguments, DataArguments, TrainingArguments) for name in group.__dataclass_fields__
    }
    scripts = Path(__file__).resolve().parents[2] / "mossvl_finetune" / "scripts"
    for script in ("run_sft.sh", "run_sft_lora.sh"):
        text = (scripts / script).read_text(encoding="utf-8")
        used = set(re.findall(r"--(\w+)", text.split("train.py", 1)[1])) | {"deepspeed"}
        assert used <= known, used - known
