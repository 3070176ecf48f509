"""The command line of the converter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from checkpoint.commands import ProgressLine, as_bytes
from checkpoint.convert import hf_to_mm
from checkpoint.convert_cli import QWEN2VL, main
from mindspeed_mm.errors import ConfigError
from tests.checkpoint.samples import layout_plan, rewrite_tensors, same_trees

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [name for name in QWEN2VL if name != "_help"]


def run(*words: object, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "checkpoint.convert_cli", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from checkpoint.convert_cli import main\n"
        "try: main(['-h'])\n"
        "except SystemExit: print([name for name in ('torch', 'pydantic') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_sentence(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["Qwen2VLConverter", command, "-h"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = re.findall(r"^  (--cfg\.[\w.]+) [A-Z{]+", text, re.MULTILINE)
    assert options
    for option in options:
        if "CONFIG" in re.search(rf"{re.escape(option)} (\S+)", text)[1]:  # type: ignore[index]
            continue
        help_text = re.search(rf"^  {re.escape(option)} .*?\n((?:    +\S.*\n)+|)", text, re.MULTILINE)
        assert help_text is not None
        assert "." in help_text[0].partition(" ")[2], option


def test_parsing_and_converting_need_no_torch(hf_tied: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from checkpoint.convert_cli import main; c = main(sys.argv[1:]); print('torch' in sys.modules, c)"
    )
    hf, target, back = f"--cfg.hf_config.hf_dir={hf_tied}", tmp_path / "mm", tmp_path / "back"
    lists = ["--cfg.parallel_config.llm_pp_layers=[6]", "--cfg.parallel_config.vit_pp_layers=[4]"]
    for words in (
        ["hf_to_mm", hf, f"--cfg.mm_dir={target}", *lists],
        ["mm_to_hf", hf, f"--cfg.mm_dir={target}", f"--cfg.save_hf_dir={back}"],
        ["verify", f"--cfg.first_dir={hf_tied}", f"--cfg.second_dir={target}"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, "Qwen2VLConverter", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.splitlines()[-1] == "False 0", done.stderr


def test_a_configuration_can_be_printed_with_comments_filled_in_and_used(hf_tied: Path, tmp_path: Path) -> None:
    printed = run("Qwen2VLConverter", "hf_to_mm", "--print_config=comments")
    assert printed.returncode == 0
    assert "# Threads that copy" in printed.stdout
    config = yaml.safe_load(printed.stdout)
    config["cfg"]["hf_config"]["hf_dir"] = str(hf_tied)
    config["cfg"]["mm_dir"] = str(tmp_path / "mm")
    config["cfg"]["parallel_config"].update(llm_pp_layers=[[1, 5]], vit_pp_layers=[[4, 0]], tp_size=2)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    done = run("Qwen2VLConverter", "hf_to_mm", "--config", tmp_path / "c.yaml")
    assert done.returncode == 0, done.stderr
    hf_to_mm(hf_tied, tmp_path / "expected", layout_plan("tp2_pp2", hf_tied))
    same_trees(tmp_path / "mm", tmp_path / "expected")


def test_a_configuration_file_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "c.yaml").write_text(f"cfg: !!python/object/apply:os.system ['touch {marker}']\n")
    assert run("Qwen2VLConverter", "hf_to_mm", "--config", tmp_path / "c.yaml").returncode == 2
    assert not marker.exists()


def test_options_come_from_the_environment_when_asked(hf_tied: Path, tmp_path: Path) -> None:
    prefix = "MM_CONVERT_QWEN2VLCONVERTER__HF_TO_MM__CFG__"
    environ = {
        "JSONARGPARSE_DEFAULT_ENV": "true",
        f"{prefix}PARALLEL_CONFIG__LLM_PP_LAYERS": "[[1,5]]",
        f"{prefix}PARALLEL_CONFIG__VIT_PP_LAYERS": "[[4,0]]",
        f"{prefix}PARALLEL_CONFIG__TP_SIZE": "2",
        f"{prefix}MM_DIR": str(tmp_path / "mm"),
        f"{prefix}HF_CONFIG__HF_DIR": str(hf_tied),
    }
    done = run("Qwen2VLConverter", "hf_to_mm", environ=environ)
    assert done.returncode == 0, done.stderr
    hf_to_mm(hf_tied, tmp_path / "expected", layout_plan("tp2_pp2", hf_tied))
    same_trees(tmp_path / "mm", tmp_path / "expected")


def test_verify_prints_a_table_and_exits_with_1_at_a_difference(
    hf_tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp2_pp2", hf_tied))
    words = ["Qwen2VLConverter", "verify", f"--cfg.second_dir={tmp_path / 'mm'}", "--cfg.check_hashes=true"]
    hf_to_mm(hf_tied, tmp_path / "two", layout_plan("tp1_pp1", hf_tied))
    assert main([*words, f"--cfg.first_dir={tmp_path / 'two'}"]) == 0
    assert "the weights are the same" in capsys.readouterr().out

    def change(tensors: dict) -> dict:
        tensors["model.layers.2.mlp.up_proj.weight"][1, 1] = 9.0
        return tensors

    other = rewrite_tensors(hf_tied, tmp_path / "other", change)
    assert main([*words[:3], f"--cfg.first_dir={other}"]) == 1
    name = "text_decoder.decoder.layers.2.mlp.linear_fc1.weight"
    assert f"first difference: {name}: values differ by up to" in capsys.readouterr().out


def test_a_summary_is_printed_and_progress_is_quiet_when_nobody_watches(hf_tied: Path, tmp_path: Path) -> None:
    done = run(
        *("Qwen2VLConverter", "hf_to_mm", "--cfg.hf_config.hf_dir", hf_tied, "--cfg.mm_dir", tmp_path / "mm"),
        *("--cfg.parallel_config.llm_pp_layers", "[1,5]", "--cfg.parallel_config.vit_pp_layers", "[4,0]"),
    )
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path / 'mm'))}: 99 tensors, [\d,]+ bytes in 2 files, \d+\.\d s \([\d.]+ GB/s\), "
        r"peak memory \d+ MiB\n",
        done.stdout,
    )
    assert "\r" not in done.stderr
    assert "GB/s" not in done.stderr
    assert "patch_embed, projector, token_embed" in done.stderr


def test_progress_shows_bytes_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(4_000_000_000)
    line.add(1_000_000_000)
    line.add(3_000_000_000)
    text = capsys.readouterr().err
    assert re.search(r"\r1\.00 / 4\.00 GB   25%  [\d.]+ GB/s  \d+ s left", text)
    assert text.endswith("0 s left \n")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5e9), ("200 MB", 2e8), ("1.5kb", 1500), ("7", 7), ("1GiB", 2**30)])
def test_sizes_are_read(text: str, size: float) -> None:
    assert as_bytes(text) == int(size)


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5XB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        as_bytes(text)
