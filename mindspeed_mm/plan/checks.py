"""The rules that stage lists and sizes must keep; every broken rule gives its own sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mindspeed_mm.errors import ConfigError

if TYPE_CHECKING:
    from mindspeed_mm.config import Qwen2VLConfig
    from mindspeed_mm.plan.stage import Stage, StagePlan

Lists = Sequence[Sequence[int]]
"""Layers per stage: one inner list per virtual chunk, one entry per pipeline rank."""

VISION_KEY = "image_encoder.vision_encoder.pipeline_num_layers"
TEXT_KEY = "text_decoder.pipeline_num_layers"
PIPELINE_KEYS = (VISION_KEY, TEXT_KEY)


def shape_problems(vision_lists: Lists, text_lists: Lists, names: tuple[str, str] = PIPELINE_KEYS) -> list[str]:
    """What keeps two nested lists from describing the same stages."""
    problems = []
    for name, lists in zip(names, (vision_lists, text_lists), strict=True):
        if not lists or not lists[0]:
            problems.append(f"{name} is empty; give one layer count per pipeline rank.")
        elif len({len(row) for row in lists}) > 1:
            lengths = ", ".join(str(len(row)) for row in lists)
            problems.append(
                f"{name} has inner lists of unequal length ({lengths}); all have one entry per pipeline rank."
            )
    if problems:
        return problems
    vision_shape, text_shape = (len(vision_lists), len(vision_lists[0])), (len(text_lists), len(text_lists[0]))
    if vision_shape != text_shape:
        return [
            f"{names[0]} has {vision_shape[0]} x {vision_shape[1]} entries and {names[1]} {text_shape[0]} x "
            f"{text_shape[1]} (virtual chunks x pipeline ranks); both describe the same stages."
        ]
    return []


def layer_list_problems(
    vision_lists: Lists,
    text_lists: Lists,
    vision_layers: int,
    text_layers: int,
    names: tuple[str, str] = PIPELINE_KEYS,
) -> list[str]:
    """The rules on sums and order that two nested lists of the same shape break.

    Pictures enter on the first stage and the loss is computed on the last; in between, every stage takes one tensor
    from the stage before it. So vision fills stages from the first on, text follows without a gap and reaches the last.
    """
    vision, text = _flat(vision_lists), _flat(text_lists)
    label = _Labels(len(text_lists), len(text_lists[0]))
    problems = []
    for name, lists, counts, num_layers in (
        (names[0], vision_lists, vision, vision_layers),
        (names[1], text_lists, text, text_layers),
    ):
        if sum(counts) != num_layers:
            problems.append(_sum_problem(name, lists, sum(counts), num_layers))
    vision_at = [number for number, count in enumerate(vision) if count]
    text_at = [number for number, count in enumerate(text) if count]
    if vision_at:
        problems += _vision_order_problems(vision_at, names[0], label)
    if text_at:
        problems += _text_order_problems(vision_at, text_at, len(text), names, label)
    return problems


def _sum_problem(name: str, lists: Lists, total: int, num_layers: int) -> str:
    missing = num_layers - total
    layers = "layer" if abs(missing) == 1 else "layers"
    advice = f"add {missing} {layers}" if missing > 0 else f"take away {-missing} {layers}"
    return f'{name} = {shown(lists)} adds up to {total}, but num_layers = {num_layers}: {advice}, or write "auto".'


def _vision_order_problems(vision_at: list[int], name: str, label: _Labels) -> list[str]:
    problems = []
    if vision_at[0] != 0:
        problems.append(f"{name}: vision starts on {label(vision_at[0])}, but pictures enter on {label(0)}.")
    holes = sorted(set(range(vision_at[0], vision_at[-1])) - set(vision_at))
    if holes:
        problems.append(
            f"{name}: vision has no layer on {label.several(holes)} and goes on after that; vision stages must follow "
            "each other."
        )
    return problems


def _text_order_problems(
    vision_at: list[int], text_at: list[int], num_stages: int, names: tuple[str, str], label: _Labels
) -> list[str]:
    problems = []
    first, last = text_at[0], text_at[-1]
    if not vision_at:
        if first != 0:
            problems.append(
                f"{names[1]}: text starts on {label(first)}, but without vision it must start on {label(0)}."
            )
    elif first < vision_at[-1]:
        problems.append(
            f"vision is not finished where text starts: {names[1]} starts on {label(first)}, but {names[0]} ends on "
            f"{label(vision_at[-1])}. Text may start on {label(vision_at[-1])} at the earliest."
        )
    elif first > vision_at[-1] + 1:
        problems.append(
            f"{names[1]}: text starts on {label(first)}, but vision ends on {label(vision_at[-1])}, so that "
            f"{label.several(range(vision_at[-1] + 1, first))} would hold nothing. Text must start on "
            f"{label(vision_at[-1])} or on {label(vision_at[-1] + 1)}."
        )
    if last != num_stages - 1:
        problems.append(
            f"{names[1]}: text ends on {label(last)}, but the loss is computed on the last one, "
            f"{label(num_stages - 1)}, which needs at least one text layer."
        )
    empty = sorted(set(range(first, last)) - set(text_at) - set(vision_at))
    if empty:
        problems.append(f"{label.several(empty)} would hold no layer at all; every stage needs at least one.")
    return problems


def tp_problems(model: Qwen2VLConfig, tp_size: int) -> list[str]:
    """The sizes of `model` that `tp_size` does not divide."""
    text = model.text_decoder
    sizes = {
        "text_decoder.num_attention_heads": text.num_attention_heads,
        "text_decoder.num_query_groups": text.num_query_groups,
        "text_decoder.ffn_hidden_size": text.ffn_hidden_size,
        "text_decoder.vocab_size": text.vocab_size,
    }
    if model.image_encoder is not None:
        tower, projector = model.image_encoder.vision_encoder, model.image_encoder.vision_projector
        sizes["image_encoder.vision_encoder.num_attention_heads"] = tower.num_attention_heads
        sizes["image_encoder.vision_encoder.ffn_hidden_size"] = tower.ffn_hidden_size
        sizes["image_encoder.vision_projector.ffn_hidden_size"] = projector.ffn_hidden_size
    reasons = {
        "text_decoder.num_query_groups": " Every tensor rank holds whole key-value heads.",
        "text_decoder.vocab_size": " The vocabulary is split evenly and never padded.",
    }
    return [
        f"{name} = {size} is not divisible by the tensor-parallel size {tp_size}.{reasons.get(name, '')}"
        for name, size in sizes.items()
        if size % tp_size
    ]


def holds_trainable(model: Qwen2VLConfig, plan: StagePlan, stage: Stage) -> bool:
    """Whether anything on `stage` is trained."""
    # a stage holds patch embedding only beside vision layers, embedding and head only beside text layers
    if stage.text and not model.text_decoder.freeze:
        return True
    encoder = model.image_encoder
    if encoder is None or not stage.vision:
        return False
    holds_projector = plan.vision_layers - 1 in stage.vision
    return not encoder.vision_encoder.freeze or (holds_projector and not encoder.vision_projector.freeze)


def input_needs_gradient(model: Qwen2VLConfig, plan: StagePlan, stage: Stage) -> bool:
    """Whether anything before `stage` is trained: only then its backward pass has to go on to the stage before."""
    return any(holds_trainable(model, plan, earlier) for earlier in plan.stages[: plan.number_of(stage)])


def check_trainable(model: Qwen2VLConfig, plan: StagePlan, enable_dummy_optimizer: bool) -> None:
    """Check that every pipeline rank has something to train.

    Raises:
        ConfigError: a rank has not, and `enable_dummy_optimizer` is off; or nothing at all is trained.
    """
    trained = {stage.pp_rank for stage in plan.stages if holds_trainable(model, plan, stage)}
    if not trained:
        raise ConfigError("stage plan", "every module is frozen (freeze = true): there is nothing to train.")
    idle = [rank for rank in range(plan.pp_size) if rank not in trained]
    if not idle or enable_dummy_optimizer:
        return
    problems = []
    for rank in idle:
        stages = plan.stages_of_rank(rank)
        held = [kind for kind in ("vision", "text") if any(getattr(stage, kind) for stage in stages)]
        problems.append(
            f"pipeline rank {rank} has nothing to train: it holds only {' and '.join(held)} layers, and what it holds "
            "is frozen (freeze = true)."
        )
    problems.append(
        "Give each of these ranks a trained layer, for example by moving text layers to the rank where vision ends "
        "(pipeline_num_layers), train the frozen module, or pass --enable-dummy-optimizer to allow it."
    )
    raise ConfigError("stage plan", problems)


def shown(lists: Lists) -> str:
    """Lists as a user writes them: flat without virtual chunks."""
    return str(list(lists[0])) if len(lists) == 1 else str([list(row) for row in lists])


def _flat(lists: Lists) -> list[int]:
    return [count for row in lists for count in row]


class _Labels:
    """Names of stages in messages."""

    def __init__(self, vp_size: int, pp_size: int) -> None:
        self.vp_size = vp_size
        self.pp_size = pp_size

    def __call__(self, number: int) -> str:
        if self.vp_size == 1:
            return f"stage {number}"
        return f"stage {number} (chunk {number // self.pp_size} of pipeline rank {number % self.pp_size})"

    def several(self, numbers: Sequence[int]) -> str:
        return " and ".join(self(number) for number in numbers)
