"""The Hugging Face directory that a conversion back takes its names, shards and other files from."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint.rules.base import RuleSet
from checkpoint.stores.base import raise_problems
from checkpoint.stores.hf import INDEX_FILE, SINGLE_FILE, file_without_index, hub_name, read_weight_map
from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage.files import make_dir, open_new, write_errors, write_file
from mindspeed_mm.storage.layout import MANIFEST_FILE
from mindspeed_mm.storage.safetensors_file import index_safetensors

_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class Reference:
    """What a reference directory says about the files to write."""

    shards: Mapping[str, Sequence[str]]
    """File name -> hub names in their order."""
    metadata: Mapping[str, str]
    has_hub_names: bool
    """Its index can be taken over as it is, if the sizes agree."""


def read_reference(root: Path, rules: RuleSet) -> Reference:
    """How the reference directory deals out the tensors; its weight files need not be there where it has an index.

    Raises:
        CheckpointError: it has neither index nor weights, or does not list exactly the tensors of the model.
    """
    weight_map = read_weight_map(root)
    if weight_map is None:
        index = index_safetensors(root / file_without_index(root))
        weight_map = dict.fromkeys(index.tensors, SINGLE_FILE)
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(file, []).append(name)
    metadata = dict(_METADATA)
    for file in shards:
        path = root / (file if (root / INDEX_FILE).is_file() else file_without_index(root))
        if path.is_file():
            index = index_safetensors(path)
            metadata = dict(index.metadata) or metadata
            if set(index.tensors) == set(shards[file]):
                shards[file] = list(index.tensors)
    hub = {file: [hub_name(name, rules.aliases) for name in names] for file, names in sorted(shards.items())}
    _check_names(root, hub, rules)
    return Reference(hub, metadata, hub == {file: shards[file] for file in sorted(shards)})


def _check_names(root: Path, shards: Mapping[str, Sequence[str]], rules: RuleSet) -> None:
    names = [name for group in shards.values() for name in group]
    wanted = {name for weight in rules.weights for name in weight.hf}
    copies = {rule.copy_hf for rule in rules.rules if rule.copy_hf}
    problems = [f"{name} is not listed" for name in sorted(wanted - set(names))]
    problems += [f"{name} has no place in the model" for name in sorted(set(names) - wanted - copies)]
    problems += [f"{name} is listed twice" for name in sorted({name for name in names if names.count(name) > 1})]
    raise_problems(f"{root} does not list the tensors of a {rules.family} model of its configuration", problems)


def copy_other_files(reference: Path, target: Path) -> list[str]:
    """Copy everything but weights, their index and the manifest; the modes are those of a checkpoint.

    Returns:
        One line `Copied: a -> b` per file.
    Raises:
        CheckpointError: a file is no regular file or cannot be read.
    """
    lines = []
    for folder, directories, names in os.walk(reference):
        directories.sort()
        inside = Path(folder).relative_to(reference)
        for name in sorted(names):
            source = Path(folder) / name
            if name.endswith(".safetensors") or (inside == Path() and name in (INDEX_FILE, MANIFEST_FILE)):
                continue
            copy = target / inside / name
            _copy(source, copy)
            lines.append(f"Copied: {source} -> {copy}")
    return lines


def _copy(source: Path, target: Path) -> None:
    try:
        if not stat.S_ISREG(source.stat().st_mode):
            raise CheckpointError(f"{source} is no regular file; remove it from the reference directory.")
        with source.open("rb") as reader:
            make_dir(target.parent)
            with os.fdopen(open_new(target), "wb") as writer, write_errors(target):
                shutil.copyfileobj(reader, writer, 1 << 20)
                writer.flush()
                os.fsync(writer.fileno())
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror}.") from error


def write_index(reference: Path, target: Path, index: bytes | None, *, keep: bool) -> None:
    """Write the index of the target; byte for byte the reference's where that one says the same."""
    if index is None:
        return
    original = reference / INDEX_FILE
    if keep and original.is_file():
        import json

        text = original.read_bytes()
        ours, theirs = json.loads(index), json.loads(text)
        same_size = ours["metadata"]["total_size"] == (theirs.get("metadata") or {}).get("total_size")
        if same_size and ours["weight_map"] == theirs["weight_map"]:
            index = text
    write_file(target / INDEX_FILE, index)
