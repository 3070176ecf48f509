"""The text of `--help`, made from the settings classes and the tables of flags."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from mindspeed_mm.config.flags import FILE_FLAGS, FLAGS, NO_EFFECT, REFUSED, SECTIONS, STRUCTURE_FLAGS, Flag, OtherFlag

WIDTH = 110
INDENT = 4

_INTRODUCTION = """\
Fine-tune Qwen2-VL. Model, data and profiler settings come from JSON files; everything else from the flags below.
torchrun sets WORLD_SIZE and LOCAL_RANK; MM_DEVICE may name the device.
"""


def help_text() -> str:
    """All flags with what they mean, grouped; ends with a newline."""
    blocks = [_INTRODUCTION, _block("Files", ((f"{name} FILE", text) for name, text in FILE_FLAGS.items()))]
    for section, cls in SECTIONS.items():
        title = (cls.__doc__ or section).splitlines()[0].rstrip(".")
        blocks.append(_block(title, _rows(section)))
    blocks.append(_paragraph("Said by model.json; a different value is reported and has no effect", STRUCTURE_FLAGS))
    blocks.append(_reasons("Accepted without effect", NO_EFFECT.values()))
    blocks.append(_reasons("Refused", REFUSED.values()))
    return "\n".join(blocks)


def _rows(section: str) -> list[tuple[str, str]]:
    """Usage and meaning of every flag of a section; names of the same flag share a row."""
    same: dict[tuple[str, bool], list[Flag]] = {}
    for flag in FLAGS.values():
        if flag.section == section:
            same.setdefault((flag.field, flag.constant), []).append(flag)
    return [(", ".join(map(_usage, flags)), _meaning(flags[0])) for flags in same.values()]


def _usage(flag: Flag) -> str:
    if flag.takes == "nothing":
        return flag.name
    value = "{" + ",".join(flag.choices) + "}" if flag.choices else flag.field.rsplit("_", 1)[-1].upper()
    return f"{flag.name} {value}{' ...' if flag.takes == 'values' else ''}"


def _meaning(flag: Flag) -> str:
    info = SECTIONS[flag.section].model_fields[flag.field]
    text = " ".join((info.description or "").split())
    if not flag.constant:
        return f"Switch this off: {text}"
    if flag.takes == "nothing" or info.is_required() or info.default in (None, ()):
        return f"{text} Required." if info.is_required() and flag.field != "global_batch_size" else text
    return f"{text} Default: {info.default}."


def _block(title: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"{title}:"]
    for usage, meaning in rows:
        lines.append(" " * INDENT + usage)
        lines += textwrap.wrap(meaning, WIDTH, initial_indent=" " * 3 * INDENT, subsequent_indent=" " * 3 * INDENT)
    return "\n".join(lines) + "\n"


def _paragraph(title: str, names: Iterable[str]) -> str:
    indent = " " * INDENT
    # flags must not be broken at their hyphens
    lines = textwrap.wrap(
        " ".join(names), WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return "\n".join([f"{title}:", *lines]) + "\n"


def _reasons(title: str, flags: Iterable[OtherFlag]) -> str:
    by_reason: dict[str, list[str]] = {}
    for flag in flags:
        by_reason.setdefault(flag.reason, []).append(flag.name)
    return f"{title}:\n" + "".join(
        textwrap.indent(_paragraph(reason, names), " " * INDENT) for reason, names in by_reason.items()
    )
