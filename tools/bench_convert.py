"""Speed and memory of the converter beside `cp -r` of the same checkpoint, in one run.

    python tools/bench_convert.py --params 2b --layout tp2pp4 [--repeats 5] [--workers 2] [--dir DIR]

Makes a random bfloat16 checkpoint of the model's true shapes (2b: about 4.4 GB) under DIR, then runs `hf_to_mm`,
`mm_to_hf` and a re-split several times, each in a process of its own, start-up included, and `cp -r` of the checkpoint
directly before each of them. All end with `fsync` of every file, read from a warm page cache and start with an idle
disk. The targets stay until newer ones have filled the memory: all then write to memory that is taken from old page
cache. (Freed memory would go back to the host of a virtual machine within seconds, and fetching it again takes longer
than writing it.) Printed are medians of the times and of the paired ratios, and the peak of memory that is not page
cache. At the end, the time to plan a conversion of the 72b model from its index alone. DIR needs room for the size of
the memory and four times that of the checkpoint; with less, older targets go earlier and the figures are noisier.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

# run as a script, the repository root is not on the path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint.convert import compile_conversion
from checkpoint.rules.qwen2vl import qwen2vl_rules
from checkpoint.stores.hf import CONFIG_FILE, INDEX_FILE, HfStore
from checkpoint.stores.targets import plan_hf_target, plan_mm_target, split_names
from mindspeed_mm.config import Qwen2VLConfig
from mindspeed_mm.plan import StagePlan
from mindspeed_mm.storage.tensors import BY_NAME

ROOT = Path(__file__).resolve().parents[1]
_BLOCK_BYTES = 64 << 20
_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "in_channels": 3, "patch_size": 14}
_TEXT = {
    "2b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "72b": {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 28, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 152064, "tie_word_embeddings": True},
}  # fmt: skip
_TINY_VISION = {**_VISION, "embed_dim": 128, "num_heads": 2}

Lists = list[list[int]]
LAYOUTS: dict[str, tuple[Lists, Lists, int]] = {
    "tp1": ([[32]], [[28]], 1),
    "tp1pp4": ([[32, 0, 0, 0]], [[1, 10, 10, 7]], 1),
    "tp1pp4vp3": ([[10, 10, 10, 2], [0] * 4, [0] * 4], [[0, 0, 0, 1], [4, 4, 4, 4], [4, 3, 2, 2]], 1),
    "tp2": ([[32]], [[28]], 2),
    "tp2pp4": ([[32, 0, 0, 0]], [[1, 10, 10, 7]], 2),
    "tp2pp2": ([[32, 0]], [[9, 19]], 2),
}
"""Name -> vision lists, text lists, tp_size; for the models of 28 layers."""


@dataclass(frozen=True)
class Measured:
    """One run of a command."""

    seconds: float
    peak_bytes: int
    """Largest resident memory that is not page cache."""


def hf_config(params: str) -> dict:
    """config.json of a size, in the flat form of the hub."""
    text = _TEXT[params]
    heads = text["num_attention_heads"]
    quarter = text["hidden_size"] // heads // 8
    vision = _TINY_VISION if params == "tiny" else _VISION
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "mrope", "mrope_section": [quarter, quarter * 3 // 2, quarter * 3 // 2]},
        **text,
        "vision_config": {
            **vision,
            "hidden_size": text["hidden_size"],
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
    }


def write_checkpoint(path: Path, params: str) -> int:
    """A Hugging Face directory of random finite bfloat16 weights, in files of at most 4 GB; gives its size in bytes."""
    path.mkdir(parents=True)
    config = hf_config(params)
    (path / CONFIG_FILE).write_text(json.dumps(config, indent=2))
    rules = qwen2vl_rules(Qwen2VLConfig.from_hf(config))
    kinds = {weight.mm: (BY_NAME["bfloat16"], weight.rule.shape or ()) for weight in rules.weights}
    target = plan_hf_target(path, rules, kinds, split_names(rules, kinds, 4_000_000_000), {"format": "pt"})
    noise = np.random.default_rng(0).integers(0, 1 << 16, _BLOCK_BYTES // 2, dtype=np.uint16)
    block = (noise & 0xBFFF).tobytes()  # exponents below 128: numbers between -2 and 2
    for file, layout in target.layouts.items():
        with file.open("wb") as writer:
            writer.write(layout.literals[0][1])
            while writer.tell() < layout.nbytes:
                writer.write(block[: layout.nbytes - writer.tell()])
    if target.index is not None:
        (path / INDEX_FILE).write_bytes(target.index)
    return sum(layout.nbytes for layout in target.layouts.values())


def measure(argv: Sequence[str]) -> Measured:
    """Run `mm-convert` in a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "checkpoint.convert_cli", *argv],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = _Peak(process.pid)
    _, text = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)} failed:\n{text}")
    return Measured(seconds, peak.stop())


class _Peak:
    """Watches the anonymous memory of a process, 50 times a second."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._largest = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            found = [line.split()[1] for line in lines if line.startswith("RssAnon")]
            self._largest = max(self._largest, *(int(kilobytes) * 1024 for kilobytes in found), 0)

    def stop(self) -> int:
        """The largest value that was seen."""
        self._done.set()
        self._thread.join()
        return self._largest


def copy(source: Path, target: Path) -> Measured:
    """`cp -r`, with `fsync` of what it wrote."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for folder, _, names in os.walk(target):
        for path in (folder, *(os.path.join(folder, name) for name in names)):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return Measured(time.perf_counter() - start, 0)


def options_of(layout: str, prefix: str) -> list[str]:
    """The options that describe a layout."""
    vision, text, tp_size = LAYOUTS[layout]
    values = {"llm_pp_layers": text, "vit_pp_layers": vision, "tp_size": tp_size}
    return [f"--cfg.{prefix}.{name}={value}" for name, value in values.items()]


def plan_of_72b() -> float:
    """Seconds to plan the conversion of the 72b model to tp8 pp8 from its index alone."""
    start = time.perf_counter()
    model = Qwen2VLConfig.from_hf(hf_config("72b"))
    rules = qwen2vl_rules(model)
    plan = StagePlan.from_lists(
        "qwen2vl", [[32, *[0] * 7]], [[5, *[11] * 6, 9]], tp_size=8, vision_layers=32, text_layers=80, is_tied=False
    )
    kinds = {weight.mm: (BY_NAME["bfloat16"], weight.rule.shape or ()) for weight in rules.weights}
    hf = plan_hf_target(Path("hf"), rules, kinds, split_names(rules, kinds, 4_000_000_000), {})
    source = HfStore(Path("hf"), {}, hf.tensors)
    target = plan_mm_target(Path("mm"), "release", plan, rules, kinds)
    compile_conversion(rules, source, target, target.layouts)
    return time.perf_counter() - start


def run(params: str, layout: str, again: str, repeats: int, workers: int, root: Path) -> None:
    """The whole benchmark; prints its table."""
    hf, mm = root / "hf", root / "mm"
    size = write_checkpoint(hf, params)
    print(f"{params}, {size / 1e9:.2f} GB: {layout}, re-split to {again}")
    print(f"medians of {repeats} runs, {workers} workers, {os.cpu_count()} cores")

    def convert(command: str, *argv: str) -> Measured:
        return measure(["Qwen2VLConverter", command, f"--cfg.workers={workers}", *argv])

    def hf_to_mm(target: Path) -> Measured:
        options = options_of(layout, "parallel_config")
        return convert("hf_to_mm", f"--cfg.hf_config.hf_dir={hf}", f"--cfg.mm_dir={target}", *options)

    def mm_to_hf(target: Path) -> Measured:
        return convert("mm_to_hf", f"--cfg.hf_config.hf_dir={hf}", f"--cfg.mm_dir={mm}", f"--cfg.save_hf_dir={target}")

    def resplit(target: Path) -> Measured:
        options = options_of(again, "target_parallel_config")
        return convert("resplit", f"--cfg.source_dir={mm}", f"--cfg.target_dir={target}", *options)

    jobs: dict[str, tuple[Callable[[Path], Measured], Path]] = {
        f"hf_to_mm {layout}": (hf_to_mm, hf),
        f"mm_to_hf {layout}": (mm_to_hf, mm),
        f"resplit {layout} -> {again}": (resplit, mm),
    }
    hf_to_mm(mm)
    shelf = _Shelf(root / "targets", size, fills_memory=params != "tiny")
    for _ in range(shelf.room):
        copy(hf, shelf.place())
    found: dict[str, list[tuple[Measured, Measured]]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, (job, source) in jobs.items():
            base = _from_warm(hf, partial(copy, hf), shelf)
            found[name].append((_from_warm(source, job, shelf), base))
    _print_row("cp -r", [base for runs in found.values() for _, base in runs], size)
    for name, runs in found.items():
        ratio = statistics.median(run.seconds / base.seconds for run, base in runs)
        _print_row(name, [run for run, _ in runs], size, f"{ratio:5.2f} x cp")
    print(f"allowed memory: {64 + 0.02 * size / 2**20:.0f} MiB")
    print(f"plan of a 72b index, tp8 pp8: {plan_of_72b():.2f} s")


class _Shelf:
    """Places for targets; what lies there longest is deleted when they would take more than memory or disk have."""

    def __init__(self, root: Path, size: int, *, fills_memory: bool) -> None:
        root.mkdir()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if fills_memory else 0
        disk = shutil.disk_usage(root).free
        self.room = max(1, min(memory // size + 1, disk // (size * 5 // 4) - 1))
        self._root = root
        self._kept: deque[Path] = deque()
        self._count = 0

    def place(self) -> Path:
        """A path for the next target."""
        while len(self._kept) >= self.room:
            shutil.rmtree(self._kept.popleft())
        self._count += 1
        self._kept.append(self._root / str(self._count))
        return self._kept[-1]


def _from_warm(source: Path, job: Callable[[Path], Measured], shelf: _Shelf) -> Measured:
    """A run with its source in the page cache and an idle disk."""
    target = shelf.place()
    for folder, _, names in os.walk(source):
        for name in names:
            with open(os.path.join(folder, name), "rb", buffering=0) as reader:
                while reader.read(_BLOCK_BYTES):
                    pass
    os.sync()
    return job(target)


def _print_row(name: str, runs: Sequence[Measured], size: int, ratio: str = "") -> None:
    times = [run.seconds for run in runs]
    seconds, peak = statistics.median(times), max(run.peak_bytes for run in runs)
    memory = f"peak {peak / 2**20:4.0f} MiB" if peak else ""
    spread = f"({min(times):.2f}-{max(times):.2f})"
    print(f"{name:32s} {seconds:7.2f} s {spread:14s} {size / seconds / 1e9:5.2f} GB/s  {ratio:10s}  {memory}".rstrip())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives back its exit code."""
    parser = argparse.ArgumentParser(description="Speed and memory of the converter beside cp -r.")
    parser.add_argument("--params", choices=sorted(set(_TEXT) - {"72b"}), default="2b", help="size of the model")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="tp2pp4", help="what hf_to_mm writes")
    parser.add_argument("--resplit-to", choices=sorted(LAYOUTS), default="tp1pp4", help="what resplit writes")
    parser.add_argument("--repeats", type=int, default=5, help="runs of everything; medians are printed")
    parser.add_argument("--workers", type=int, default=2, help="threads of the converter")
    parser.add_argument("--dir", type=Path, help="where to work; a temporary directory otherwise")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        run(options.params, options.layout, options.resplit_to, options.repeats, options.workers, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
