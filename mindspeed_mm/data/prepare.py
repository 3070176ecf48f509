"""From a record number to a prepared sample: what a data worker does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed_mm.config.data import Attributes
from mindspeed_mm.data.collate import PreparedSample
from mindspeed_mm.data.features import Features, LabelRule, to_features
from mindspeed_mm.data.image import Grid, ImageSettings, load_patches, measure_image
from mindspeed_mm.data.records import RecordSet
from mindspeed_mm.data.sample import MediaKind, Medium, Sample, UnusableSampleError, to_sample
from mindspeed_mm.data.template import Qwen2VLTemplate
from mindspeed_mm.errors import DataError

_MAX_REPLACEMENTS = 1000


@dataclass(frozen=True, slots=True)
class Note:
    """Something that happened to a sample without stopping the run; counted by `reason`."""

    reason: str
    name: str
    detail: str


class SamplePreparer:
    """Prepares records of a set, one at a time, in any process.

    A record that is dropped by rule (see `UnusableSampleError`) is replaced by the next usable one in file order: the
    same one on every run and every replica, without a pass over the set before training.

    Args:
        images: None for a model without vision tower, which takes no media.
    """

    def __init__(
        self,
        records: RecordSet,
        attr: Attributes,
        dataset_dir: Path,
        template: Qwen2VLTemplate,
        rule: LabelRule,
        images: ImageSettings | None,
    ) -> None:
        self.records = records
        self.attr = attr
        self.dataset_dir = dataset_dir
        self.template = template
        self.rule = rule
        self.images = images

    def __len__(self) -> int:
        return len(self.records)

    def prepare(self, number: int, notes: list[Note]) -> PreparedSample:
        """The sample of this record, or of the next usable one.

        Args:
            notes: receives what was dropped or cut.
        Raises:
            DataError: the record or one of its media cannot be used (the text names both), or no record of the set can.
        """
        for candidate in self._from(number):
            try:
                sample, grids = self._measured(candidate)
                features = to_features(sample.name, self.template.encode(sample, grids), self.rule)
            except UnusableSampleError as error:
                notes.append(Note(f"dropped: {error.reason}", error.name, error.detail))
                continue
            return self._with_pixels(sample, grids, features, notes)
        tried = min(len(self), _MAX_REPLACEMENTS)
        first = notes[-tried]
        raise DataError(
            f"none of {tried} records from {first.name} on is usable; the first was {first.reason} ({first.detail})"
        )

    def _from(self, number: int) -> Iterator[int]:
        for step in range(min(len(self), _MAX_REPLACEMENTS)):
            yield (number + step) % len(self)

    def _measured(self, number: int) -> tuple[Sample, list[Grid]]:
        """The sample and the grids of its media, from the headers of their files."""
        sample = to_sample(self.records[number], self.attr, self.dataset_dir)
        return sample, [self._grid(sample, medium) for medium in sample.media]

    def _grid(self, sample: Sample, medium: Medium) -> Grid:
        if medium.kind is MediaKind.VIDEO:
            raise DataError(f"{sample.name}: {medium.path} is a video; videos come with the complete data path")
        if self.images is None:
            raise DataError(f"{sample.name}: has a picture ({medium.path}), but the model has no image_encoder")
        with _named(sample):
            return measure_image(medium.path, self.images)

    def _with_pixels(self, sample: Sample, grids: list[Grid], features: Features, notes: list[Note]) -> PreparedSample:
        special = self.template.tokenizer.special
        merge = self.template.merge_size
        kept = [grids[medium] for medium in features.media]
        needed = sum(time * height * width // merge**2 for time, height, width in kept)
        found = int(torch.isin(features.input_ids, torch.tensor(special.media)).sum())
        if found != needed:
            raise DataError(
                f"{sample.name}: its texts hold the special token <|image_pad|> or <|video_pad|>, which only stands "
                "for media; remove it, or set split_special_tokens to read it as text"
            )
        if features.num_cut_tokens:
            detail = f"{features.num_cut_tokens} of {features.num_cut_tokens + len(features.input_ids)} tokens"
            notes.append(Note("cut to seq_length", sample.name, detail))
        return PreparedSample(
            name=sample.name,
            input_ids=features.input_ids,
            labels=features.labels,
            grid_thw=torch.tensor(kept, dtype=torch.int64).reshape(-1, 3),
            pixel_values=tuple(self._patches(sample, medium, grids[medium]) for medium in features.media),
        )

    def _patches(self, sample: Sample, medium: int, grid: Grid) -> torch.Tensor:
        assert self.images is not None, "a sample with media was refused before"
        with _named(sample):
            return load_patches(sample.media[medium].path, self.images, grid)


@contextmanager
def _named(sample: Sample) -> Iterator[None]:
    """Puts the sample's name before errors of its media."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{sample.name}: {error}") from None
