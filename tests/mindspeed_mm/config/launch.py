"""Command lines and files of the launch scripts of MindSpeed-MM 26.0.0, for tests."""

from __future__ import annotations

from pathlib import Path

FILES = Path(__file__).parent / "files_26_0_0"

COMMON = """
    --use-mcore-models --tokenizer-type NullTokenizer --seq-length 1024 --make-vocab-size-divisible-by 1
    --normalization RMSNorm --use-fused-rmsnorm --swiglu --use-fused-swiglu --no-masked-softmax-fusion
    --lr-decay-style cosine --weight-decay 0 --lr-warmup-fraction 0.1 --clip-grad 0.0 --adam-beta1 0.9
    --adam-beta2 0.999 --no-gradient-accumulation-fusion --seed 42 --bf16 --use-distributed-optimizer --use-flash-attn
    --no-load-optim --no-load-rng --no-save-optim --no-save-rng --num-workers 8
    --log-interval 1 --save-interval 10000 --eval-interval 10000 --eval-iters 5000 --save save_dir --ckpt-format torch
    --distributed-backend nccl --micro-batch-size 1 --context-parallel-size 1
"""

OF_SIZE = {
    "2b": """
        --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --global-batch-size 192 --vocab-size 151936
        --lr 1.0e-5 --train-iters 10000 --context-parallel-algo ulysses_cp_algo --distributed-timeout-minutes 20
        --log-tps --load ckpt/mm_path/Qwen2-VL-2B-Instruct
    """,
    "7b": """
        --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --global-batch-size 192 --vocab-size 152064
        --lr 1.0e-5 --train-iters 10000 --variable-seq-lengths --context-parallel-algo ulysses_cp_algo
        --distributed-timeout-minutes 20 --log-tps --load ckpt/mm_path/Qwen2-VL-7B-Instruct
    """,
    "72b": """
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 8 --global-batch-size 768 --vocab-size 152064
        --lr 1.0e-5 --train-iters 10000 --variable-seq-lengths --reuse-fp32-param
        --context-parallel-algo ulysses_cp_algo --distributed-timeout-minutes 20 --log-tps
        --load ckpt/mm_path/Qwen2-VL-72B-Instruct
    """,
}

WORLD_SIZES = {"2b": 8, "7b": 8, "72b": 128}


def script_words(size: str) -> list[str]:
    """The words that the 26.0.0 script of a size passes to pretrain_vlm.py, with our copies of its files."""
    words = (COMMON + OF_SIZE[size]).split()
    files = {"model": f"model_{size}.json", "data": f"data_{size}.json", "tool": "tools.json"}
    for kind, name in files.items():
        words += [f"--mm-{kind}", str(FILES / name)]
    return words


def script_environment(size: str) -> dict[str, str]:
    """What torchrun sets on the last process."""
    return {"WORLD_SIZE": str(WORLD_SIZES[size]), "LOCAL_RANK": "7"}
