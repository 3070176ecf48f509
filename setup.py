"""Package metadata.

Ranges are open on purpose: accelerators bring their own torch. `constraints/cpu.txt` pins the CPU set-up.
"""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = [
    "torch>=2.4",
    "megatron-core>=0.12.1,<0.17",
    "transformers>=4.57,<6",
    "safetensors>=0.4.3",
    "tokenizers>=0.20",
    "pydantic>=2.7,<3",
    "jsonargparse>=4.32",
    "docstring_parser>=0.15",  # without it the help of mm-convert has no texts
    "numpy>=1.26",
    "packaging>=23",
    "pillow>=10",
    "pyyaml>=6",
    "xxhash>=3.4",
    "matplotlib>=3.8",
]

EXTRAS = {
    "video": ["av>=12"],
    "npu": ["torch_npu>=2.1"],
    "lora": ["peft>=0.12"],
    "mossvl": ["accelerate>=1.1", "peft>=0.12", "av>=12"],
    "logging": ["tensorboard>=2.14", "wandb>=0.16", "swanlab>=0.3"],
    "test": [
        "pytest>=8",
        "hypothesis>=6.100",
        "ruff>=0.11",
        "mypy>=1.15",
        'decord>=0.6; platform_machine == "x86_64" and sys_platform == "linux"',
        "ruamel.yaml>=0.18",
    ],
}

setup(
    name="mindspeed-mm",
    version="0.1.0",
    description="Fine-tune Qwen2-VL with tensor and pipeline parallelism on megatron-core, on CPU, CUDA and Ascend NPU",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["mindspeed_mm*", "checkpoint*", "mossvl_finetune*"]),
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mm-convert=checkpoint.convert_cli:main"]},
)
