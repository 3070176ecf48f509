"""Write a small random LoRA adapter in peft's form for a Qwen2-VL directory: something to try the converter with.

    python tools/make_tiny_adapter.py HF_DIR OUT_DIR [--rank 4] [--alpha 8] [--seed 0]

Adapts the query and value projections of every text layer, as many recipes do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# run as a script, the repository root is not on the path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint.peft_files import PeftAdapter, write_peft
from checkpoint.rules.qwen2vl import ALIASES
from checkpoint.stores.hf import read_model_config


def make_tiny_adapter(hf_dir: Path, out_dir: Path, *, rank: int = 4, alpha: float = 8, seed: int = 0) -> Path:
    """Write the adapter directory and give its path back; the same seed gives the same bytes."""
    import torch

    text = read_model_config(hf_dir).text_decoder
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for layer in range(text.num_layers):
        for name, heads in (("q_proj", text.num_attention_heads), ("v_proj", text.num_query_groups)):
            matrix_a = 0.02 * torch.randn((rank, text.hidden_size), generator=generator)
            matrix_b = 0.02 * torch.randn((heads * text.kv_channels, rank), generator=generator)
            modules[f"model.layers.{layer}.self_attn.{name}"] = (matrix_a, matrix_b)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_peft(out_dir, PeftAdapter(rank, alpha, modules), str(hf_dir), ALIASES, has_hub_names=False)
    return out_dir


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives back its exit code."""
    parser = argparse.ArgumentParser(description="Write a small random LoRA adapter.")
    parser.add_argument("hf_dir", type=Path, help="Hugging Face directory of the base")
    parser.add_argument("out_dir", type=Path, help="directory to write")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    path = make_tiny_adapter(options.hf_dir, options.out_dir, rank=options.rank, alpha=options.alpha, seed=options.seed)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
