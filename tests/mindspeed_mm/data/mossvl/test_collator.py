"""Batches: padding, independence of the samples, samples that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_mm.data.mossvl.collator import MossVLCollator
from mindspeed_mm.data.mossvl.dataset import MossVLDataset, RenderedSample
from mindspeed_mm.errors import DataError
from mindspeed_mm.models.mossvl.hf import MossVLProcessor
from mindspeed_mm.models.mossvl.hf.checkpoint import load_model
from tests.mindspeed_mm.models.mossvl.media import write_grey_clip, write_picture

RECORDS = [
    {"prompt": "Say it.", "response": "It."},
    {"prompt": "What is this?", "response": "A picture.", "images": ["a.png"]},
    {
        "conversations": [
            {"role": "user", "content": "<|video|> or <|image|>?"},
            {"role": "assistant", "content": "Both."},
        ],
        "images": ["b.png"],
        "videos": [{"video_path": "c.mp4", "segments": [[0, 2]]}],
    },
    {"prompt": "And the clip?", "response": "Grey.", "videos": ["c.mp4"]},
]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    write_picture(folder / "a.png", (96, 64), seed=1)
    write_picture(folder / "b.png", (64, 64), seed=2)
    write_grey_clip(folder / "c.mp4", [4 * index for index in range(40)])
    (folder / "records.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    return folder / "records.json"


@pytest.fixture
def samples(records: Path, processor: MossVLProcessor) -> list[RenderedSample]:
    dataset = MossVLDataset(records, processor.tokenizer)
    return [dataset[index] for index in range(len(dataset))]


def collator(processor: MossVLProcessor, **options: Any) -> MossVLCollator:
    return MossVLCollator(processor, **{"max_length": 4096, "vision_chunked_length": 64, **options})


def test_keys_shapes_and_types(samples: list[RenderedSample], processor: MossVLProcessor) -> None:
    batch = collator(processor)(samples)
    length = batch["input_ids"].shape[1]
    assert batch["media_nums_per_sample"] == [1, 1, 2, 1]
    assert batch["vision_chunked_length"] == 64
    assert batch["grid_thw"].tolist() == [[1, 8, 8], [1, 4, 6], [2, 4, 4], [1, 4, 4], [4, 4, 4]]
    assert batch["pixel_values"].shape == (64 + 24 + 32 + 16 + 64, 768)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["cross_attention_mask"].shape == (4, 1, length, 4)
    assert batch["cross_attention_mask"].dtype == torch.bool
    for name in ("input_ids", "attention_mask", "labels"):
        assert (batch[name].shape, batch[name].dtype) == ((4, length), torch.int64)
    padding = batch["attention_mask"] == 0
    assert bool((padding[:, 1:] >= padding[:, :-1]).all()), "padding is on the right"
    assert batch["labels"][padding].unique().tolist() == [-100]
    assert batch["input_ids"][padding].unique().tolist() == [processor.tokenizer.pad_token_id]
    learned = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == [f"{answer}<|im_end|>" for answer in ("It.", "A picture.", "Both.", "Grey.")]


def test_a_sample_does_not_depend_on_its_batch(samples: list[RenderedSample], processor: MossVLProcessor) -> None:
    together = collator(processor)(samples)
    start = 0
    for row, sample in enumerate(samples):
        alone = collator(processor)([sample])
        length, size = alone["input_ids"].shape[1], alone["pixel_values"].shape[0]
        assert torch.equal(together["input_ids"][row, :length], alone["input_ids"][0])
        assert torch.equal(together["pixel_values"][start : start + size], alone["pixel_values"])
        start += size


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 2, 1], [1, 2, 3, 0]])
def test_the_order_of_a_mixed_batch_changes_no_loss(
    order: list[int], samples: list[RenderedSample], processor: MossVLProcessor, nano_moss: Path
) -> None:
    model = load_model(str(nano_moss), dtype="float32").eval()
    collate = collator(processor)
    with torch.no_grad():
        tokens = [int((collate([sample])["labels"] != -100).sum()) for sample in samples]
        alone = [float(model(**collate([sample])).loss) for sample in samples]
        together = float(model(**collate([samples[index] for index in order])).loss)
    expected = sum(loss * count for loss, count in zip(alone, tokens, strict=True)) / sum(tokens)
    assert together == pytest.approx(expected, abs=2e-5)


def test_too_long_texts_are_cut_on_the_right_but_not_to_nothing(
    samples: list[RenderedSample], processor: MossVLProcessor
) -> None:
    whole = collator(processor, max_length=None)([samples[1]])["input_ids"]
    size = whole.shape[1]
    cut = collator(processor, max_length=size - 2)([samples[1]])["input_ids"]
    assert torch.equal(cut, whole[:, : size - 2])
    with pytest.raises(DataError, match=r"records.json\[1\]: the first 8 tokens hold nothing that is learned"):
        collator(processor, max_length=8)([samples[1]])
    with pytest.raises(DataError, match=r"records.json\[3\]: .*frames would be cut off"):
        collator(processor, max_length=30)([samples[3]])


def test_bad_samples_can_be_skipped(
    samples: list[RenderedSample], processor: MossVLProcessor, nano_moss: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = RenderedSample("records.json[9]", error="records.json[9]: an answer of the assistant is empty")
    missing = RenderedSample("records.json[8]", samples[1].text, samples[1].labels_spans, ("/nowhere/a.png",))
    for sample, message in ((bad, "is empty"), (missing, r"records.json\[8\]: /nowhere/a.png does not exist")):
        with pytest.raises(DataError, match=message):
            collator(processor)([sample])
    batch = collator(processor, skip_bad=True)([bad, samples[1], missing])
    assert caplog.text.count("skipped a sample") == 2
    assert batch["media_nums_per_sample"] == [1, 1, 1]
    assert (batch["labels"] != -100).any(1).tolist() == [False, True, False]
    model = load_model(str(nano_moss), dtype="float32").eval()
    with torch.no_grad():
        alone = model(**collator(processor)([samples[1]])).loss
        assert model(**batch).loss.item() == pytest.approx(alone.item(), abs=1e-5)


def test_a_broken_picture_names_the_record(
    samples: list[RenderedSample], processor: MossVLProcessor, tmp_path: Path
) -> None:
    whole = Path(samples[1].image_paths[0]).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    for name in ("cut.png", "text.png"):
        sample = RenderedSample("r[1]", samples[1].text, samples[1].labels_spans, (str(tmp_path / name),))
        with pytest.raises(DataError, match=rf"r\[1\]: .*{name}"):
            collator(processor)([sample])
