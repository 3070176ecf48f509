from __future__ import annotations

from pathlib import Path

import pytest

from tools.compare_checkpoints import main
from tools.make_tiny_checkpoint import make_tiny_checkpoint


def test_the_exit_code_tells_whether_the_weights_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, same, other = (
        str(make_tiny_checkpoint(tmp_path / name, tied=True, seed=seed, size="nano", vocab_size=640))
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert main([one, same]) == 0
    assert "the weights are the same" in capsys.readouterr().out
    assert main([one, other]) == 1
    assert "first difference: image_encoder.encoder.patch_embed.proj.weight" in capsys.readouterr().out


def test_hashes_need_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = str(make_tiny_checkpoint(tmp_path / "one", tied=True, seed=0, size="nano", vocab_size=640))
    assert main([one, one, "--check-hashes"]) == 13
    assert "has no manifest.json" in capsys.readouterr().err
