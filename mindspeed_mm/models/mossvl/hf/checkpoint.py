"""Checkpoint directories of MOSS-VL: loading with our own code, and what an export needs for the published code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.models.mossvl.hf.auto import register_auto_classes
from mindspeed_mm.models.mossvl.hf.configuration import MossVLConfig
from mindspeed_mm.models.mossvl.hf.modeling import MossVLForConditionalGeneration
from mindspeed_mm.models.mossvl.hf.processing import MossVLProcessor

_CONFIG_FILES = ("config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def load_processor(
    name_or_path: str, *, video_backend: str = "pyav", cache_dir: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The checkpoint's processor, by our classes unless its own code is trusted.

    Raises:
        CheckpointError: files are missing or cannot be read.
    """
    try:
        if trust_remote_code:
            from transformers import AutoProcessor

            return AutoProcessor.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=True)
        register_auto_classes()
        return MossVLProcessor.from_pretrained(name_or_path, cache_dir=cache_dir, video_backend=video_backend)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name_or_path}: the processor cannot be loaded: {error}") from error


def load_model(
    name_or_path: str,
    *,
    dtype: str,
    attn_implementation: str | None = None,
    is_on_cuda: bool = False,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model, every tensor of it from the checkpoint.

    Args:
        attn_implementation: None takes flash_attention_2 on CUDA where it is installed and dtype is half, else sdpa.
    Raises:
        CheckpointError: no such checkpoint, another model type, or tensors that are missing, surplus or misshapen.
    """
    if attn_implementation is None:
        has_flash = is_on_cuda and dtype != "float32" and importlib.util.find_spec("flash_attn") is not None
        attn_implementation = "flash_attention_2" if has_flash else "sdpa"
    options: dict[str, Any] = {
        "cache_dir": cache_dir,
        "dtype": dtype,
        "attn_implementation": attn_implementation,
    }
    try:
        if trust_remote_code:
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_pretrained(name_or_path, trust_remote_code=True, **options)
        register_auto_classes()
        config = MossVLConfig.get_config_dict(name_or_path, cache_dir=cache_dir)[0]
        if config.get("model_type") != "moss_vl":
            raise CheckpointError(f"{name_or_path}: model_type is {config.get('model_type')!r}, expected 'moss_vl'")
        loaded: Any = MossVLForConditionalGeneration.from_pretrained(name_or_path, output_loading_info=True, **options)
        model, report = loaded
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{name_or_path}: the model cannot be loaded: {error}") from error
    problems = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for key, names in problems.items():
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(f"{name_or_path}: {key.replace('_', ' ')}: {shown}; this is not a whole MOSS-VL")
    # Under ZeRO-3 transformers 5 keeps renamings for older files here and applies their reverse when it saves, turning
    # model.language_model.* into model.language_model.model.*; MOSS-VL's names are the same in memory and in files.
    model._weight_conversions = []
    return model


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The `checkpoint-N` of a run with the largest N whose saving was finished; None when there is none."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    # Trainer writes trainer_state.json last: a folder without it was cut short.
    complete = [path for path in found if (path / "trainer_state.json").is_file()]
    return max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def published_code(directory: Path) -> list[Path]:
    """Python files that the `auto_map` of a local checkpoint names, as far as they are there."""
    modules = set()
    for name in _CONFIG_FILES:
        path = directory / name
        if path.is_file():
            auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map", {})
            modules |= {str(target).rpartition(".")[0] for target in auto_map.values()}
    files = [directory / f"{module}.py" for module in modules if module.isidentifier()]
    return sorted(path for path in files if path.is_file())


def describe_published_code(directory: Path) -> list[str]:
    """Name and SHA-256 of every Python file of a checkpoint directory."""
    return [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sorted(directory.glob("*.py"))]


def copy_published_code(name_or_path: str, output_dir: Path) -> None:
    """Copy the files that `auto_map` names beside an export, so that the published code loads it; nothing is run."""
    source = Path(name_or_path)
    if source.is_dir() and source.resolve() != output_dir.resolve():
        for path in published_code(source):
            shutil.copyfile(path, output_dir / path.name)
