"""A Hugging Face directory of safetensors files, with an index or a single file, under any generation's names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.rules.base import RuleSet, Weight
from checkpoint.stores.base import Placement, check_dtypes, place, raise_problems
from mindspeed_mm.config import Qwen2VLConfig, read_json
from mindspeed_mm.errors import CheckpointError, ConfigError
from mindspeed_mm.storage.safetensors_file import SafetensorsIndex, index_safetensors
from mindspeed_mm.storage.tensors import StoredTensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors\Z")


@dataclass(frozen=True, slots=True)
class HfStore:
    """The tensors of a Hugging Face directory under the names of the hub."""

    root: Path
    files: Mapping[str, SafetensorsIndex]
    """By file name, in the order of the names."""
    tensors: Mapping[str, StoredTensor]
    """By hub name."""

    @classmethod
    def open(cls, root: Path, aliases: Sequence[tuple[str, str]] = ()) -> HfStore:
        """Read the headers of all files.

        Args:
            aliases: (prefix in a file, prefix of the hub).
        Raises:
            CheckpointError: no weights, a file that the index names is missing or damaged, the index and the files
                disagree, or two names mean the same tensor.
        """
        root = Path(root)
        weight_map = read_weight_map(root)
        names = sorted(set(weight_map.values()) if weight_map is not None else {file_without_index(root)})
        missing = [name for name in names if not (root / name).is_file()]
        raise_problems(f"{root} lacks files that {INDEX_FILE} names", missing)
        files = {name: index_safetensors(root / name) for name in names}
        if weight_map is not None:
            raise_problems(f"{root / INDEX_FILE} and the files disagree", _index_problems(weight_map, files))
        tensors: dict[str, StoredTensor] = {}
        twice = []
        for index in files.values():
            for name, tensor in index.tensors.items():
                hub = hub_name(name, aliases)
                if hub in tensors:
                    twice.append(f"{hub} (as {name} in {index.path.name})")
                tensors[hub] = tensor
        raise_problems(f"{root} holds tensors twice", twice)
        return cls(root, files, tensors)

    def check(self, rules: RuleSet, *, ignored: frozenset[str] = frozenset()) -> None:
        """Check that the files hold exactly the tensors of the rules, in the right shapes.

        Args:
            ignored: hub names that may be there without being used.
        Raises:
            CheckpointError: with every tensor that is missing, left over, or of another shape or dtype.
        """
        wanted = {name for weight in rules.weights for name in weight.hf}
        allowed = wanted | ignored | {rule.copy_hf for rule in rules.rules if rule.copy_hf}
        problems = [f"{name} is missing" for name in _sorted(wanted - self.tensors.keys())]
        problems += [
            f"{name} has no place in the model ({self.tensors[name].path.name})"
            for name in _sorted(self.tensors.keys() - allowed)
        ]
        raise_problems(
            f"{self.root} does not hold the tensors of a {rules.family} model of this configuration", problems
        )
        check_dtypes((weight, placement) for weight in rules.weights for placement in self.placements(weight))

    def placements(self, weight: Weight) -> tuple[Placement, ...]:
        """The tensors of a weight; a second copy where the file of a tied model holds the output head, too."""
        rule, copy = weight.rule, weight.rule.copy_hf
        if rule.shape is None:
            raise ConfigError("weight rules", "Hugging Face tensors need rules of a model of known sizes.")
        missing = [name for name in weight.hf if name not in self.tensors]
        raise_problems(f"{self.root} lacks tensors", missing)
        found = [place(weight, weight.hf, [self.tensors[name] for name in weight.hf], rule.pack, rule.shape)]
        if copy is not None and copy in self.tensors:
            found.append(place(weight, [copy], [self.tensors[copy]], rule.pack, rule.shape))
        return tuple(found)


def hub_name(name: str, aliases: Sequence[tuple[str, str]]) -> str:
    """The name that the hub's files have for a tensor."""
    for prefix, hub in aliases:
        if name.startswith(prefix):
            return hub + name[len(prefix) :]
    return name


def read_weight_map(root: Path) -> dict[str, str] | None:
    """Tensor name -> file name of the index; None where there is no index.

    Raises:
        CheckpointError: the index is damaged, or names files outside the directory.
    """
    path = root / INDEX_FILE
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = read_json(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; it is not the index of a safetensors checkpoint.")
    outside = [
        f"{name}: {file!r}"
        for name, file in weight_map.items()
        if not isinstance(file, str) or not _FILE_NAME.match(file)
    ]
    raise_problems(f"{path} names files that are not plain *.safetensors names in its own directory", outside)
    return weight_map


def file_without_index(root: Path) -> str:
    """The name of the only safetensors file of a directory without an index.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a directory.")
    names = sorted(path.name for path in root.glob("*.safetensors"))
    if not names:
        raise CheckpointError(f"No *.safetensors files found in {root}")
    if len(names) > 1:
        raise CheckpointError(
            f"{root} holds {len(names)} safetensors files ({names[0]}, ...) but no {INDEX_FILE} that lists them."
        )
    return names[0]


def read_model_config(root: Path) -> Qwen2VLConfig:
    """The settings that the directory's config.json describes.

    Raises:
        ConfigError: there is no config.json, or it describes another model.
    """
    path = Path(root) / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(str(root), f"No config.json in {root}")
    return Qwen2VLConfig.from_hf(read_json(path), where=str(path))


def _index_problems(weight_map: Mapping[str, str], files: Mapping[str, SafetensorsIndex]) -> list[str]:
    problems = [
        f"{name} is not in {file}, where the index says it is"
        for name, file in weight_map.items()
        if name not in files[file].tensors
    ]
    for file, index in files.items():
        problems += [
            f"{name} is in {file}, but the index does not say so"
            for name in index.tensors
            if weight_map.get(name) != file
        ]
    return problems


def _sorted(names: Any) -> list[str]:
    """Names with their numbers in numeric order."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
