"""The stage plan: which layers and parts every (pp_rank, vp_stage) holds. Layers are counted here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.plan.checks import PIPELINE_KEYS, layer_list_problems, shape_problems, tp_problems
from mindspeed_mm.plan.lists import stage_lists

if TYPE_CHECKING:
    from mindspeed_mm.config import ParallelConfig, Qwen2VLConfig

FORMAT = 1
"""Version of the JSON form."""


class Part(StrEnum):
    """A piece of the model that is not a layer."""

    PATCH_EMBED = "patch_embed"
    PROJECTOR = "projector"
    TOKEN_EMBED = "token_embed"
    FINAL_NORM = "final_norm"
    LM_HEAD = "lm_head"


class Stream(StrEnum):
    """What crosses the border between two stages."""

    VISION_HIDDEN = "vision_hidden"
    IMAGE_EMBEDS = "image_embeds"
    TEXT_HIDDEN = "text_hidden"
    CROSS_STATES = "cross_states"


class Tower(StrEnum):
    """A stack of layers."""

    VISION = "vision"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Stage:
    """What one model chunk holds and what reaches it."""

    pp_rank: int
    vp_stage: int
    vision: range
    """Global vision-layer numbers; empty if it holds none."""
    text: range
    """Global text-layer numbers; empty if it holds none."""
    parts: frozenset[Part]
    inputs: frozenset[Stream]

    def layers(self, tower: Tower) -> range:
        """Global numbers of the layers of `tower` that this stage holds."""
        return self.vision if tower is Tower.VISION else self.text


@dataclass(frozen=True, slots=True)
class StagePlan:
    """All stages of a model, in forward order (`vp_stage * pp_size + pp_rank`)."""

    family: str
    tp_size: int
    """Ranks that the weights of every stage are split over."""
    pp_size: int
    vp_size: int
    vision_layers: int
    """Layers of the vision tower; 0 without one."""
    text_layers: int
    is_tied: bool
    """The output head is the token embedding."""
    stages: tuple[Stage, ...]

    @classmethod
    def build(cls, model: Qwen2VLConfig, parallel: ParallelConfig) -> StagePlan:
        """The plan of `model` under `parallel`: from its stage lists, or balanced by FLOPs where they say "auto".

        At pipeline size 1 the lists have no effect.

        Raises:
            ConfigError: with every rule that the lists break, and every size that TP does not divide.
        """
        vision_layers, text_layers = model.vision_layers, model.text_decoder.num_layers
        problems: list[str] = []
        lists = stage_lists(model, parallel.pp_size, parallel.vp_size, problems)
        if lists is not None:
            problems += layer_list_problems(*lists, vision_layers, text_layers, PIPELINE_KEYS)
        problems += tp_problems(model, parallel.tp_size)
        if problems or lists is None:
            raise ConfigError("stage plan", problems)
        return cls._deal(
            model.model_id,
            *lists,
            tp_size=parallel.tp_size,
            vision_layers=vision_layers,
            text_layers=text_layers,
            is_tied=model.text_decoder.is_tied,
        )

    @classmethod
    def from_lists(
        cls,
        family: str,
        vision_lists: Sequence[Sequence[int]],
        text_lists: Sequence[Sequence[int]],
        *,
        tp_size: int,
        vision_layers: int,
        text_layers: int,
        is_tied: bool,
        names: tuple[str, str] = PIPELINE_KEYS,
    ) -> StagePlan:
        """The plan of nested lists (one inner list per virtual chunk, one entry per pipeline rank).

        Args:
            vision_lists: all zeros for a model without vision tower.
            names: what the two lists are called in errors.
        Raises:
            ConfigError: with every rule that the lists break.
        """
        problems = shape_problems(vision_lists, text_lists, names)
        if not problems:
            problems = layer_list_problems(vision_lists, text_lists, vision_layers, text_layers, names)
        if problems:
            raise ConfigError("stage plan", problems)
        return cls._deal(
            family,
            vision_lists,
            text_lists,
            tp_size=tp_size,
            vision_layers=vision_layers,
            text_layers=text_layers,
            is_tied=is_tied,
        )

    @classmethod
    def _deal(
        cls,
        family: str,
        vision_lists: Sequence[Sequence[int]],
        text_lists: Sequence[Sequence[int]],
        *,
        tp_size: int,
        vision_layers: int,
        text_layers: int,
        is_tied: bool,
    ) -> StagePlan:
        """Number the layers of lists that are known to be in order."""
        vp_size, pp_size = len(text_lists), len(text_lists[0])
        stages: list[Stage] = []
        vision_start = text_start = 0
        stream: Stream | None = None
        for vp_stage in range(vp_size):
            for pp_rank in range(pp_size):
                vision = range(vision_start, vision_start + vision_lists[vp_stage][pp_rank])
                text = range(text_start, text_start + text_lists[vp_stage][pp_rank])
                vision_start, text_start = vision.stop, text.stop
                parts = _parts_of(vision, text, vision_layers, text_layers)
                inputs = frozenset() if stream is None else frozenset({stream})
                stages.append(Stage(pp_rank, vp_stage, vision, text, parts, inputs))
                stream = Stream.TEXT_HIDDEN if text else _vision_stream(parts)
        return cls(family, tp_size, pp_size, vp_size, vision_layers, text_layers, is_tied, tuple(stages))

    # ---- questions ----------------------------------------------------------------------------------------------

    def at(self, pp_rank: int, vp_stage: int = 0) -> Stage:
        """The stage of a pipeline rank and virtual chunk."""
        if not (0 <= pp_rank < self.pp_size and 0 <= vp_stage < self.vp_size):
            raise IndexError(f"no stage ({pp_rank}, {vp_stage}) in a plan of {self.pp_size} x {self.vp_size} stages")
        return self.stages[vp_stage * self.pp_size + pp_rank]

    def number_of(self, stage: Stage) -> int:
        """Place of `stage` in forward order, from 0."""
        return stage.vp_stage * self.pp_size + stage.pp_rank

    def stages_of_rank(self, pp_rank: int) -> tuple[Stage, ...]:
        """The stages (virtual chunks) of one pipeline rank, in forward order."""
        return tuple(self.at(pp_rank, vp_stage) for vp_stage in range(self.vp_size))

    def locate(self, tower: Tower, layer: int) -> tuple[Stage, int]:
        """The stage that holds a layer, and the layer's number within that stage, from 0."""
        for stage in self.stages:
            if layer in stage.layers(tower):
                return stage, layer - stage.layers(tower).start
        raise IndexError(f"no {tower} layer {layer} in this plan")

    def stage_of(self, part: Part) -> Stage:
        """The stage that holds a part."""
        for stage in self.stages:
            if part in stage.parts:
                return stage
        raise KeyError(f"no stage holds {part}: the model has no vision tower")

    def next_of(self, stage: Stage) -> Stage | None:
        """The stage that receives this one's output; None after the last."""
        number = self.number_of(stage) + 1
        return self.stages[number] if number < len(self.stages) else None

    def previous_of(self, stage: Stage) -> Stage | None:
        """The stage whose output this one receives; None before the first."""
        number = self.number_of(stage) - 1
        return self.stages[number] if number >= 0 else None

    def output_of(self, stage: Stage) -> Stream | None:
        """What this stage sends on; None for the last, which computes the loss."""
        following = self.next_of(stage)
        return None if following is None else next(iter(following.inputs))

    def lists_of(self, tower: Tower) -> tuple[tuple[int, ...], ...]:
        """Layers of `tower` per stage: one inner tuple per virtual chunk, one entry per pipeline rank."""
        return tuple(
            tuple(len(self.at(pp_rank, vp_stage).layers(tower)) for pp_rank in range(self.pp_size))
            for vp_stage in range(self.vp_size)
        )

    def has_head_copy(self, stage: Stage) -> bool:
        """This stage holds an output head that is a second copy of a tied token embedding."""
        return self.is_tied and Part.LM_HEAD in stage.parts and Part.TOKEN_EMBED not in stage.parts

    def difference_from(self, other: StagePlan) -> str | None:
        """The first difference between this plan and `other`, as "what: this, other"; None when they are equal."""
        for name in ("family", "tp_size", "pp_size", "vp_size", "vision_layers", "text_layers", "is_tied"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name}: {ours}, {theirs}"
        for ours, theirs in zip(self.stages, other.stages, strict=True):
            for tower in Tower:
                if ours.layers(tower) != theirs.layers(tower):
                    place = f"{tower} layers of pp_rank {ours.pp_rank}, vp_stage {ours.vp_stage}"
                    return f"{place}: {_numbers(ours.layers(tower))}, {_numbers(theirs.layers(tower))}"
        return None

    def check(self) -> None:
        """Check that the stages are what the lists and the ordering rules say.

        Raises:
            ConfigError: with every rule that is broken.
        """
        lists = self.lists_of(Tower.VISION), self.lists_of(Tower.TEXT)
        rebuilt = StagePlan.from_lists(
            self.family,
            *lists,
            tp_size=self.tp_size,
            vision_layers=self.vision_layers,
            text_layers=self.text_layers,
            is_tied=self.is_tied,
        )
        if rebuilt != self:
            raise ConfigError(
                "stage plan", "layer numbers, parts or inputs of the stages do not follow from their layer counts."
            )

    # ---- other forms --------------------------------------------------------------------------------------------

    def table(self) -> str:
        """The plan as a text table, one line per stage."""
        rows = [("stage", "pp", "vp", "vision", "text", "parts")]
        for number, stage in enumerate(self.stages):
            parts = ", ".join(part for part in Part if part in stage.parts) or "-"
            numbers = (str(number), str(stage.pp_rank), str(stage.vp_stage))
            rows.append((*numbers, _numbers(stage.vision), _numbers(stage.text), parts))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join(
            "  ".join(
                [
                    *(row[column].rjust(widths[column]) for column in range(3)),
                    *(row[column].ljust(widths[column]) for column in range(3, 5)),
                    row[5],
                ]
            )
            for row in rows
        )

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` is the inverse."""
        content = {
            "format": FORMAT,
            "family": self.family,
            "tp_size": self.tp_size,
            "pp_size": self.pp_size,
            "vp_size": self.vp_size,
            "vision_layers": self.vision_layers,
            "text_layers": self.text_layers,
            "is_tied": self.is_tied,
            "vision_lists": self.lists_of(Tower.VISION),
            "text_lists": self.lists_of(Tower.TEXT),
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "stage_plan.json") -> StagePlan:
        """The plan in a JSON text.

        Args:
            where: the file named in errors.
        Raises:
            ConfigError: the text is not a plan, or the plan breaks a rule.
        """
        try:
            content = json.loads(text)
            form, pp_size, vp_size = content.pop("format"), content.pop("pp_size"), content.pop("vp_size")
            lists = _int_lists(content.pop("vision_lists")), _int_lists(content.pop("text_lists"))
            if form != FORMAT:
                raise ConfigError(where, f"format {form} is not known; this version reads format {FORMAT}.")
            plan = cls.from_lists(content.pop("family"), *lists, **content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(where, f"this is not a stage plan ({error}).") from None
        except ConfigError as error:
            raise ConfigError(where, error.problems) from None
        if (plan.pp_size, plan.vp_size) != (pp_size, vp_size):
            raise ConfigError(
                where, f"the lists are for {plan.pp_size} x {plan.vp_size} stages, not {pp_size} x {vp_size}."
            )
        return plan


def _parts_of(vision: range, text: range, vision_layers: int, text_layers: int) -> frozenset[Part]:
    """The parts that stand beside the first and the last layer of each tower."""
    parts: set[Part] = set()
    if 0 in vision:
        parts.add(Part.PATCH_EMBED)
    if vision_layers - 1 in vision:
        parts.add(Part.PROJECTOR)
    if 0 in text:
        parts.add(Part.TOKEN_EMBED)
    if text_layers - 1 in text:
        parts |= {Part.FINAL_NORM, Part.LM_HEAD}
    return frozenset(parts)


def _vision_stream(parts: frozenset[Part]) -> Stream:
    """What a stage without text sends on."""
    return Stream.IMAGE_EMBEDS if Part.PROJECTOR in parts else Stream.VISION_HIDDEN


def _int_lists(value: Any) -> tuple[tuple[int, ...], ...]:
    lists = tuple(tuple(row) for row in value)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for row in lists for n in row):
        raise ValueError("layer counts must be whole numbers, 0 or more")
    return lists


def _numbers(layers: range) -> str:
    return f"{layers.start}-{layers.stop - 1}" if layers else "-"
