"""The command line of the training programs: flags and JSON files in, one checked `RunConfig` out."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from mindspeed_mm.config.base import S, did_you_mean, load_settings, render_validation_error
from mindspeed_mm.config.data import DataConfig
from mindspeed_mm.config.flags import FILE_FLAGS, FLAGS, NO_EFFECT, REFUSED, SECTIONS, STRUCTURE_FLAGS, Flag, Takes
from mindspeed_mm.config.help import help_text
from mindspeed_mm.config.qwen2vl import Qwen2VLConfig
from mindspeed_mm.config.run import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    RuntimeConfig,
    TrainingConfig,
)
from mindspeed_mm.config.tool import ToolConfig
from mindspeed_mm.config.validation import RunSections, model_notes, model_problems, section_notes, section_problems
from mindspeed_mm.errors import ConfigError

WHERE = "command line"


@dataclass(slots=True)
class _Words:
    """The command line, sorted by what the flags are."""

    settings: dict[str, dict[str, Any]] = field(default_factory=lambda: {section: {} for section in SECTIONS})
    files: dict[str, str] = field(default_factory=dict)
    structure: dict[str, str] = field(default_factory=dict)
    without_effect: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_command_line(argv: Sequence[str], environ: Mapping[str, str]) -> RunConfig:
    """Everything that a run is told, from the command line, the JSON files that it names, and the environment.

    `-h` and `--help` print the flags and end the program with exit code 0.

    Args:
        argv: the words after the program's name.
        environ: read are WORLD_SIZE and LOCAL_RANK (set by torchrun) and MM_DEVICE (see --device).
    Raises:
        ConfigError: with every problem of the command line and of all files.
    """
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(help_text())
        raise SystemExit(0)
    words = _sort_words(argv)
    _read_environment(words, environ)
    if "--mm-model" not in words.files:
        words.problems.append("--mm-model is missing; it names the model.json.")
    sections = _build_sections(words)
    if sections is not None:
        words.problems += section_problems(sections, has_data="--mm-data" in words.files)
    errors: list[ConfigError] = []
    file_notes: list[str] = []
    model = _load(Qwen2VLConfig, words, "--mm-model", errors, file_notes)
    data = _load(DataConfig, words, "--mm-data", errors, file_notes)
    tool = _load(ToolConfig, words, "--mm-tool", errors, file_notes)
    if model is not None and sections is not None:
        words.problems += model_problems(model, sections)
    if words.problems:
        errors.insert(0, ConfigError(WHERE, words.problems))
    if errors or model is None or sections is None:
        raise _joined(errors)
    notes = [
        *_no_effect_notes(words.without_effect),
        *words.notes,
        *file_notes,
        *section_notes(sections),
        *model_notes(model, sections.training, words.structure),
    ]
    return RunConfig(model=model, data=data, tool=tool or ToolConfig(), notes=tuple(notes), **sections._asdict())


# ---------------------------------------------------------------------------------------------------------------------
# Words


def _sort_words(argv: Sequence[str]) -> _Words:
    """Every flag with its values where it belongs; a flag that stands twice counts the last time."""
    words = _Words()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.problems.append(f"{word!r} is not a flag and belongs to none.")
            continue
        name, has_value, value = word.partition("=")
        values = [value] if has_value else []
        takes = _takes(name)
        if takes is None:
            words.problems.append(f"{name} is not a flag{did_you_mean(name, _all_names())}")
            # a flag that is not known may have had values; they are no problem of their own
            _values_of(rest, "values")
            continue
        if not has_value:
            values = _values_of(rest, takes)
        _file_flag(words, name, takes, values, has_value=bool(has_value))
    return words


def _all_names() -> list[str]:
    return [*FILE_FLAGS, *FLAGS, *STRUCTURE_FLAGS, *NO_EFFECT, *REFUSED, "--help"]


def _takes(name: str) -> Takes | None:
    """How many values a flag takes; None if there is no such flag."""
    if name in FILE_FLAGS or name in STRUCTURE_FLAGS:
        return "one value"
    flag = FLAGS.get(name) or NO_EFFECT.get(name) or REFUSED.get(name)
    return None if flag is None else flag.takes


def _values_of(rest: list[str], takes: Takes) -> list[str]:
    """Take the values of a flag off the front of `rest`."""
    most = {"nothing": 0, "one value": 1, "values": len(rest)}[takes]
    values: list[str] = []
    while rest and len(values) < most and not rest[0].startswith("--"):
        values.append(rest.pop(0))
    return values


def _file_flag(words: _Words, name: str, takes: Takes, values: list[str], *, has_value: bool) -> None:
    """Put a known flag where it belongs, or say what is wrong with it."""
    if takes == "nothing" and has_value:
        words.problems.append(f"{name} takes no value, but has {values[0]!r}.")
    elif takes != "nothing" and not values:
        words.problems.append(f"{name} needs a value.")
    elif name in REFUSED and values and values[0] == REFUSED[name].harmless_value:
        return
    elif name in REFUSED:
        words.problems.append(f"{name} cannot be used: {REFUSED[name].reason}.")
    elif name in NO_EFFECT:
        words.without_effect.append(name)
    elif name in FILE_FLAGS:
        if values[0]:
            words.files[name] = values[0]
    elif name in STRUCTURE_FLAGS:
        words.structure[name] = values[0]
    else:
        flag = FLAGS[name]
        converted = [_convert(flag, value, words.problems) for value in values]
        section = words.settings[flag.section]
        if takes == "nothing":
            section[flag.field] = flag.constant
        else:
            section[flag.field] = tuple(converted) if takes == "values" else converted[0]


def _convert(flag: Flag, value: str, problems: list[str]) -> int | float | str:
    if flag.kind is str:
        return value
    try:
        number = int(value) if flag.kind is int else float(value)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return number
    problems.append(f"{flag.name} = {value!r} should be {'a whole number' if flag.kind is int else 'a number'}.")
    return 1


def _read_environment(words: _Words, environ: Mapping[str, str]) -> None:
    """Fill in what the launcher says; the command line wins, except that --world-size is for --dry-run only."""
    runtime, parallel = words.settings["runtime"], words.settings["parallel"]
    if "world_size" in parallel and not runtime.get("dry_run"):
        words.problems.append("--world-size is only for --dry-run; otherwise torchrun sets WORLD_SIZE.")
    for variable, section, name in (("WORLD_SIZE", parallel, "world_size"), ("LOCAL_RANK", runtime, "local_rank")):
        if variable not in environ or name in section:
            continue
        if environ[variable].isdecimal():
            section[name] = int(environ[variable])
        else:
            words.problems.append(f"environment variable {variable} = {environ[variable]!r} should be a whole number.")
    if environ.get("MM_DEVICE"):
        runtime.setdefault("device", environ["MM_DEVICE"])


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def _build_sections(words: _Words) -> RunSections | None:
    """The sections of the command line; None when a value in them is wrong, which is then among the problems."""
    before = len(words.problems)
    if words.settings["parallel"].get("tp_size", 1) == 1 and words.settings["parallel"].pop("sequence_parallel", False):
        words.notes.append("no effect: --sequence-parallel (TP is 1).")
    parallel = _build(ParallelConfig, "parallel", words)
    training_words = words.settings["training"]
    micro_batch_size = training_words.get("micro_batch_size")
    if parallel is not None and micro_batch_size is not None:
        # Megatron's default: one micro-batch per step
        training_words.setdefault("global_batch_size", micro_batch_size * max(1, parallel.dp_size))
    elif micro_batch_size is None:
        training_words.setdefault("global_batch_size", 1)
    training = _build(TrainingConfig, "training", words)
    optimizer = _build(OptimizerConfig, "optimizer", words)
    checkpoint = _build(CheckpointConfig, "checkpoint", words)
    logging = _build(LoggingConfig, "logging", words)
    runtime = _build(RuntimeConfig, "runtime", words)
    if len(words.problems) > before or not (parallel and training and optimizer and checkpoint and logging and runtime):
        return None
    return RunSections(parallel, training, optimizer, checkpoint, logging, runtime)


def _build(cls: type[S], section: str, words: _Words) -> S | None:
    names = {flag.field: name for name, flag in FLAGS.items() if flag.section == section and flag.constant}
    try:
        return cls.model_validate(words.settings[section])
    except ValidationError as error:
        words.problems += render_validation_error(error, names)
    return None


def _load(cls: type[S], words: _Words, name: str, errors: list[ConfigError], notes: list[str]) -> S | None:
    """The settings of the file that a flag names; None when it is not given or has problems, which go to `errors`."""
    if name not in words.files:
        return None
    try:
        return load_settings(cls, words.files[name], notes)
    except ConfigError as error:
        errors.append(error)
    return None


def _joined(errors: Sequence[ConfigError]) -> ConfigError:
    """One error that shows them all."""
    if len(errors) == 1:
        return errors[0]
    return ConfigError("configuration", [str(error) for error in errors])


def _no_effect_notes(names: Sequence[str]) -> list[str]:
    """One line per reason, with the flags that it concerns."""
    by_reason: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        by_reason.setdefault(NO_EFFECT[name].reason, []).append(name)
    return [f"no effect: {' '.join(flags)} ({reason})." for reason, flags in by_reason.items()]
