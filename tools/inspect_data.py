"""Show one training sample as the model will see it: every token with its label and its positions.

    python tools/inspect_data.py --data data.json --model model.json [--index 0] [--seq-length 4096]

Runs of vision tokens are shown as their first and last row. Exits with 12 when the record cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# run as a script, the repository root is not on the path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindspeed_mm.config.base import load_settings
from mindspeed_mm.config.data import DataConfig
from mindspeed_mm.config.qwen2vl import Qwen2VLConfig
from mindspeed_mm.config.run import TrainingConfig
from mindspeed_mm.data.build import build_collator_for, build_preparer, open_records
from mindspeed_mm.data.describe import describe_example
from mindspeed_mm.data.features import IGNORE_INDEX
from mindspeed_mm.data.prepare import Note
from mindspeed_mm.data.tokenizer import TextTokenizer
from mindspeed_mm.errors import ConfigError, MindSpeedMMError
from mindspeed_mm.ops.batch import Batch


def inspect(data: DataConfig, model: Qwen2VLConfig, *, index: int, seq_length: int) -> Iterator[str]:
    """The lines of the report on one record of the training data."""
    training = TrainingConfig(micro_batch_size=1, global_batch_size=1, train_iters=0, seq_length=seq_length)
    records = open_records(data, part="train", seed=training.seed)
    assert records is not None, "training data are always set"
    if not 0 <= index < len(records):
        raise ConfigError("--index", f"{index} is not a record; there are {len(records)}, numbered from 0.")
    preparer = build_preparer(data, model, training, records)
    notes: list[Note] = []
    sample = preparer.prepare(index, notes)
    tokenizer = preparer.template.tokenizer
    batch = build_collator_for(data, model, preparer)([sample])
    for note in notes:
        yield f"note: {note.name} was {note.reason} ({note.detail})"
    yield describe_example(sample, tokenizer)
    if batch.pixel_values is not None and not batch.is_text_only:
        low, high = batch.pixel_values.min(), batch.pixel_values.max()
        yield f"pixel_values: {list(batch.pixel_values.shape)}, from {low:.3f} to {high:.3f}"
    yield f"{'row':>6} {'id':>7} {'t':>6} {'h':>6} {'w':>6}  {'token':<28} must predict"
    yield from _rows(batch, tokenizer)


def _rows(batch: Batch, tokenizer: TextTokenizer) -> Iterator[str]:
    ids, labels, positions = batch.input_ids.tolist(), batch.labels.tolist(), batch.position_ids.T.tolist()
    for row, (token, label, (t, h, w)) in enumerate(zip(ids, labels, positions, strict=True)):
        if 0 < row < len(ids) - 1 and token in tokenizer.special.media and ids[row - 1] == token == ids[row + 1]:
            if ids[row - 2] != token:
                yield f"{'...':>6}"
            continue
        shown = repr(tokenizer.decode([token]))
        predicted = "-" if label == IGNORE_INDEX else repr(tokenizer.decode([label]))
        yield f"{row:>6} {token:>7} {t:>6} {h:>6} {w:>6}  {shown:<28} {predicted}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", required=True, help="data.json")
    parser.add_argument("--model", required=True, help="model.json")
    parser.add_argument("--index", type=int, default=0, help="number of the record over all files, from 0")
    parser.add_argument("--seq-length", type=int, default=4096, help="most tokens of a sample, as in training")
    options = parser.parse_args(arguments)
    try:
        data, model = load_settings(DataConfig, options.data), load_settings(Qwen2VLConfig, options.model)
        for line in inspect(data, model, index=options.index, seq_length=options.seq_length):
            print(line)
    except MindSpeedMMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
