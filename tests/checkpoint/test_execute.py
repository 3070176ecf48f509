"""Carrying out a plan: any piece size, any number of threads, and what goes wrong on the way."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import execute, ranges
from checkpoint.convert import hf_to_mm, mm_to_hf, resplit
from checkpoint.execute import is_finite
from checkpoint.job import Options
from checkpoint.plans import UNSAID, Cut
from mindspeed_mm.errors import CheckpointError, DiskFullError
from tests.checkpoint.samples import LAYOUTS, layout_plan, same_trees

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("chunk", "span", "waste", "workers"),
    [(97, 64, 1, 1), (1000, 300, 6, 4), (4096, 100, 2, 3), (1 << 14, 1 << 12, 6, 8)],
)
@pytest.mark.parametrize("name", ["tp2_pp2_vp2", "tp2_pp1", "tp1_pp2"])
def test_any_piece_size_and_number_of_threads_gives_the_same_files(
    chunk: int,
    span: int,
    waste: int,
    workers: int,
    name: str,
    hf_tied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hf_to_mm(hf_tied, tmp_path / "expected", layout_plan(name, hf_tied))
    monkeypatch.setattr(execute, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(ranges, "MAX_SPAN_BYTES", span)
    monkeypatch.setattr(ranges, "MAX_WASTE", waste)
    options = Options(workers=workers)
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan(name, hf_tied), options=options)
    same_trees(tmp_path / "mm", tmp_path / "expected", ignored=())
    resplit(tmp_path / "mm", tmp_path / "one", UNSAID, Cut(*LAYOUTS["tp1_pp1"]), options=options)
    resplit(tmp_path / "one", tmp_path / "again", UNSAID, Cut(*LAYOUTS[name]), options=options)
    same_trees(tmp_path / "again", tmp_path / "expected", ignored=())
    mm_to_hf(tmp_path / "mm", hf_tied, tmp_path / "back", options=options)
    same_trees(tmp_path / "back", hf_tied)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_numbers_that_are_not_finite_are_seen(dtype: str) -> None:
    kind = getattr(torch, dtype)
    fine = torch.tensor(
        [0.0, -0.0, 1.5, -1.5, torch.finfo(kind).max, torch.finfo(kind).min, torch.finfo(kind).tiny], dtype=kind
    )

    def seen(tensor: torch.Tensor) -> bool:
        return is_finite(tensor.view(torch.uint8).numpy().data, dtype)

    assert seen(fine)
    for value in (torch.inf, -torch.inf, torch.nan):
        assert not seen(torch.cat([fine, torch.tensor([value], dtype=kind)]))
    negative_nan = fine.clone()
    negative_nan.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[kind.itemsize])[0] = -1
    assert not seen(negative_nan)
    assert is_finite(memoryview(b"\xff" * 8), "int64")
    assert is_finite(memoryview(b""), dtype)


def test_progress_counts_every_byte(hf_tied: Path, tmp_path: Path) -> None:
    seen = []

    class Counter:
        def __init__(self, total: int) -> None:
            self.total = total

        def add(self, nbytes: int) -> None:
            seen.append((nbytes, self.total))

    summary = hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp2_pp1", hf_tied), options=Options(progress=Counter))
    assert sum(nbytes for nbytes, _ in seen) == seen[0][1] == summary.nbytes
    assert summary.nbytes == sum(path.stat().st_size for path in (tmp_path / "mm").rglob("*.pt"))


def test_too_little_space_is_said_before_anything_is_written(
    hf_tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*real[:4], 10, *real[5:]]))
    with pytest.raises(DiskFullError, match=r"needs [\d,]+ bytes, but only [\d,]+ are free"):
        hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp2_pp1", hf_tied))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    hf_tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    written = 0

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(execute, "CHUNK_BYTES", 10_000)
    with pytest.raises(DiskFullError, match="disk full"):
        hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp2_pp1", hf_tied))
    assert list(tmp_path.iterdir()) == []


def run_cli(*argv: object, setup: str = "", **options: object) -> subprocess.Popen[str]:
    """Start `mm-convert` in a process of its own; `setup` is code that runs in it before."""
    code = f"import sys; {setup}\nfrom checkpoint.convert_cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def arguments(source: Path, target: Path) -> list[object]:
    return [
        *("Qwen2VLConverter", "hf_to_mm", "--cfg.hf_config.hf_dir", source, "--cfg.mm_dir", target),
        *("--cfg.parallel_config.llm_pp_layers", "[1,5]", "--cfg.parallel_config.vit_pp_layers", "[4,0]"),
    ]


def test_a_file_size_limit_of_the_system_is_a_full_disk(hf_tied: Path, tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = run_cli(*arguments(hf_tied, tmp_path / "mm"), preexec_fn=limit)
    _, text = process.communicate()
    assert process.returncode == 19
    assert "disk full (or over quota) while writing" in text
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_system_leaves_what_was_there(hf_tied: Path, tmp_path: Path) -> None:
    """A real one of 300 KB, in a mount namespace of its own; where none can be made, a limit on files stands for it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = " ".join(map(str, arguments(hf_tied, disk / "mm")))
    script = (
        f"mount -t tmpfs -o size=300k tmpfs {disk} || exit 77; echo precious > {disk}/mine; "
        f"{sys.executable} -m checkpoint.convert_cli {words}; code=$?; ls -A {disk}; cat {disk}/mine; exit $code"
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        done = subprocess.CompletedProcess(command, 77, "", "")
    if done.returncode not in (1, 77):
        assert done.returncode == 19, done.stderr
        assert "disk full" in done.stderr
        assert done.stdout.split() == ["mine", "precious"]
    else:
        test_a_file_size_limit_of_the_system_is_a_full_disk(hf_tied, disk)


SLOW = (
    "import os, time; import checkpoint.execute as e; e.CHUNK_BYTES = 30000; w = os.pwrite; "
    "os.pwrite = lambda *a: (time.sleep(0.02), w(*a))[1]"
)


def written_below(root: Path) -> int:
    """Bytes of the shards below a directory that another process is writing to; -1 before there are any."""
    try:
        sizes = [path.stat().st_size for path in root.rglob("*.pt")]
    except FileNotFoundError:
        return -1
    return sum(sizes) if sizes else -1


def test_a_killed_run_leaves_no_target_and_can_be_started_again(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "expected", layout_plan("tp1_pp2", hf_tied))
    target, halfway = tmp_path / "work" / "mm", 0
    for number in range(10):
        process = run_cli(*arguments(hf_tied, target), setup=SLOW)
        # Wait for a different amount of written data each time.
        deadline = time.monotonic() + 30
        wanted = number * 60_000
        while time.monotonic() < deadline and process.poll() is None:
            if written_below(tmp_path / "work") > wanted:
                break
            time.sleep(0.01)
        process.kill()
        process.communicate()
        if target.exists():
            same_trees(target, tmp_path / "expected", ignored=())
            break
        halfway += 1
    assert halfway >= 5
    process = run_cli(*arguments(hf_tied, target), "--cfg.overwrite", "true")
    assert process.communicate()[0]
    assert process.returncode == 0
    same_trees(target, tmp_path / "expected", ignored=())
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["mm"]


def test_an_interrupt_stops_at_once_and_cleans_up(hf_tied: Path, tmp_path: Path) -> None:
    slower = SLOW.replace("0.02", "0.5")
    process = run_cli(*arguments(hf_tied, tmp_path / "work" / "mm"), setup=slower)
    deadline = time.monotonic() + 30
    while written_below(tmp_path / "work") < 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, text = process.communicate()
    assert process.returncode == 130
    assert "interrupted; nothing was written" in text
    assert time.monotonic() - start < 5
    assert list((tmp_path / "work").iterdir()) == []


def test_a_source_that_changes_meanwhile_is_noticed(
    hf_tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    source = tmp_path / "hf"
    shutil.copytree(hf_tied, source)
    plan = layout_plan("tp2_pp1", source)

    class Touch:
        def __init__(self, total: int) -> None:
            os.utime(source / "model-00002-of-00002.safetensors")

        def add(self, nbytes: int) -> None:
            pass

    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors changed while it was read"):
        hf_to_mm(source, tmp_path / "mm", plan, options=Options(progress=Touch))
    assert not (tmp_path / "mm").exists()


def test_other_iterations_may_be_written_while_one_is_exported(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp2_pp1", hf_tied))

    class Training:
        def __init__(self, total: int) -> None:
            (tmp_path / "mm" / "iter_0000020").mkdir()
            (tmp_path / "mm" / "latest_checkpointed_iteration.txt").write_text("20")

        def add(self, nbytes: int) -> None:
            pass

    mm_to_hf(tmp_path / "mm", hf_tied, tmp_path / "back", options=Options(progress=Training))
    same_trees(tmp_path / "back", hf_tied)


def test_a_source_that_is_cut_off_meanwhile_is_noticed(hf_tied: Path, tmp_path: Path) -> None:
    import shutil

    source = tmp_path / "hf"
    shutil.copytree(hf_tied, source)
    plan = layout_plan("tp2_pp1", source)

    class Cutting:
        def __init__(self, total: int) -> None:
            os.truncate(source / "model-00001-of-00002.safetensors", 20_000)

        def add(self, nbytes: int) -> None:
            pass

    with pytest.raises(CheckpointError, match="was cut off while it was read"):
        hf_to_mm(source, tmp_path / "mm", plan, options=Options(progress=Cutting))
    assert not (tmp_path / "mm").exists()


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """A conversion of 600 MB of zeros (a file with holes) may add little to what the process has anyway."""
    from tests.checkpoint.sparse import write_sparse_hf

    peaks = []
    for name, vocab_size in (("small", 1_000), ("large", 2_000_000)):
        source = write_sparse_hf(tmp_path / name, vocab_size=vocab_size)
        report = "import atexit, checkpoint.job as j; atexit.register(lambda: print('peak', anonymous()))"
        setup = f"from tests.checkpoint.sparse import anonymous; {report}"
        process = run_cli(*arguments(source, tmp_path / f"{name}_mm"), "--cfg.workers", 2, setup=setup)
        out, err = process.communicate()
        assert process.returncode == 0, err
        peaks.append(int(out.rpartition("peak")[2]))
    assert peaks[1] - peaks[0] < 30 << 20
    assert np.less(peaks, 200 << 20).all()
