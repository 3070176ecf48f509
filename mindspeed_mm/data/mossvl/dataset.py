"""The records of a fine-tuning file as rendered conversations; media are opened later, by the collator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mindspeed_mm.data.mossvl.conversation import VideoEntry, to_conversation
from mindspeed_mm.data.mossvl.rendering import Span, render
from mindspeed_mm.data.record_index import build_index
from mindspeed_mm.data.records import RecordFile
from mindspeed_mm.errors import DataError


@dataclass(frozen=True, slots=True)
class RenderedSample:
    """A conversation before its media are read.

    Attributes:
        name: file and number, for messages.
        labels_spans: learned character ranges of `text`.
        error: why the record cannot be used; the other fields are then empty.
    """

    name: str
    text: str = ""
    labels_spans: tuple[Span, ...] = ()
    image_paths: tuple[str, ...] = ()
    video_entries: tuple[VideoEntry, ...] = ()
    error: str | None = None


class MossVLDataset(Dataset[RenderedSample]):
    """A JSON list of records of either format (`conversation.to_conversation`), read one at a time.

    Args:
        path: the file. data_dir: what relative media paths are joined to; None: the file's folder.
        tokenizer: renders with its chat template.
        keep_bad: give a sample with `error` instead of raising.
    Raises:
        DataError: the file is no JSON list, or empty; on access, a record that cannot be used.
    """

    def __init__(
        self, path: str | Path, tokenizer: Any, *, data_dir: str | Path | None = None, keep_bad: bool = False
    ) -> None:
        index = build_index(path)
        if index.form != "array":
            raise DataError(f"{path} must be a JSON list of records: [{{...}}, ...]")
        if not len(index):
            raise DataError(f"{path} has no records")
        self._records = RecordFile(index)
        self._media_root = Path(path).absolute().parent if data_dir is None else Path(data_dir).absolute()
        self._tokenizer = tokenizer
        self._keep_bad = keep_bad

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> RenderedSample:
        name = self._records.index.name_of(number)
        try:
            record = self._records.read(number)
            conversation = to_conversation(record.columns, self._media_root)
            text, spans = render(conversation.messages, self._tokenizer)
        except DataError as error:
            message = str(error) if str(error).startswith(name) else f"{name}: {error}"
            if self._keep_bad:
                return RenderedSample(name, error=message)
            raise DataError(message) from None
        return RenderedSample(name, text, spans, conversation.images, conversation.videos)
