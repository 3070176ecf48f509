"""A simulated schedule as a picture: one lane per pipeline rank, blocks numbered by micro-batch. SVG, plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mindspeed_mm.plan.schedule import Block, Timeline

FORWARD_COLOURS = ("#4c78a8", "#7fa7cf", "#a9c6e3", "#cfe0f0")
BACKWARD_COLOURS = ("#f58518", "#f8a654", "#fbc58c", "#fde0c2")
"""By virtual chunk, the first one darkest."""

WIDTH = 1400
LABEL_WIDTH = 230
LANE_HEIGHT = 34
BLOCK_HEIGHT = 26
PANEL_GAP = 58
IDEAL_TEXT = "end of the schedule with the work dealt evenly"
DIGIT_WIDTH = 7.0
"""Of a number in a block, in pixels at its font size."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One schedule with what is written beside it."""

    title: str
    timeline: Timeline
    lanes: tuple[str, ...]
    """What each pipeline rank holds."""


def colour(block: Block) -> str:
    """The fill of a block: blue forward, orange backward, lighter for later chunks."""
    colours = FORWARD_COLOURS if block.step.is_forward else BACKWARD_COLOURS
    return colours[min(block.step.vp_stage, len(colours) - 1)]


def longest(panels: Sequence[Panel]) -> float:
    """The time that the axis shows: all panels share one scale."""
    return max(max(panel.timeline.length, panel.timeline.ideal_length) for panel in panels)


def render_svg(panels: Sequence[Panel]) -> str:
    """The panels one below the other, to one time scale, as an SVG document."""
    scale = (WIDTH - LABEL_WIDTH - 20) / longest(panels)
    body: list[str] = []
    top = 0.0
    for panel in panels:
        body += _panel(panel, top, scale)
        top += PANEL_GAP + LANE_HEIGHT * panel.timeline.pp_size
    body += _legend(max(panel.timeline.vp_size for panel in panels), top + 26)
    height = top + 44
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>', *body, "</svg>", ""])


def _panel(panel: Panel, top: float, scale: float) -> list[str]:
    lines = [f'<text x="10" y="{top + 24:.1f}" font-size="15" font-weight="bold">{escape(panel.title)}</text>']
    lanes_top = top + 40
    for rank, label in enumerate(panel.lanes):
        lane = lanes_top + rank * LANE_HEIGHT
        width = panel.timeline.length * scale
        lines.append(f'<text x="10" y="{lane + 17:.1f}">{escape(label)}</text>')
        lines.append(
            f'<rect x="{LABEL_WIDTH}" y="{lane:.1f}" width="{width:.2f}" height="{BLOCK_HEIGHT}" fill="#eeeeee"/>'
        )
    for block in panel.timeline.blocks:
        lines += _block(block, lanes_top, scale)
    ideal = LABEL_WIDTH + panel.timeline.ideal_length * scale
    bottom = lanes_top + panel.timeline.pp_size * LANE_HEIGHT
    lines.append(
        f'<line x1="{ideal:.2f}" x2="{ideal:.2f}" y1="{lanes_top - 6:.1f}" y2="{bottom:.1f}" stroke="#333333" '
        'stroke-dasharray="5 4"/>'
    )
    return lines


def _block(block: Block, lanes_top: float, scale: float) -> list[str]:
    width = (block.end - block.start) * scale
    if width <= 0:
        return []
    left, top = LABEL_WIDTH + block.start * scale, lanes_top + block.pp_rank * LANE_HEIGHT
    lines = [
        f'<rect x="{left:.2f}" y="{top:.1f}" width="{width:.2f}" height="{BLOCK_HEIGHT}" fill="{colour(block)}" '
        'stroke="white" stroke-width="0.7"/>'
    ]
    number = str(block.step.micro_batch)
    if width > DIGIT_WIDTH * len(number) + 2:
        lines.append(f'<text x="{left + width / 2:.2f}" y="{top + 17:.1f}" text-anchor="middle">{number}</text>')
    return lines


def legend_entries(vp_size: int) -> list[tuple[str, str]]:
    """Colour and meaning of every kind of block."""
    shown = min(vp_size, len(FORWARD_COLOURS))
    entries = []
    for name, colours in (("forward", FORWARD_COLOURS), ("backward", BACKWARD_COLOURS)):
        entries += [(colours[chunk], name if vp_size == 1 else f"{name}, chunk {chunk}") for chunk in range(shown)]
    return [*entries, ("#eeeeee", "waiting")]


def _legend(vp_size: int, y: float) -> list[str]:
    lines, left = [], 10.0
    for fill, name in legend_entries(vp_size):
        lines.append(f'<rect x="{left:.0f}" y="{y - 11:.1f}" width="16" height="14" fill="{fill}"/>')
        lines.append(f'<text x="{left + 22:.0f}" y="{y:.1f}">{name}</text>')
        left += 50 + 7 * len(name)
    lines.append(f'<text x="{left:.0f}" y="{y:.1f}">dashed line: {IDEAL_TEXT}</text>')
    return lines
