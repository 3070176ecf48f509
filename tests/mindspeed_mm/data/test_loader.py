"""From files and settings to batches: content, order, resume, dropped and bad records."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import fields
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mindspeed_mm.config.data import DataConfig
from mindspeed_mm.config.qwen2vl import Qwen2VLConfig
from mindspeed_mm.data import loader as loader_module
from mindspeed_mm.data.loader import BatchLoader, build_train_loader, build_valid_loader
from mindspeed_mm.data.prepare import SamplePreparer
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.ops.batch import Batch
from tests.mindspeed_mm.data.helpers import record, training

MakeData = Callable[..., DataConfig]


def numbered(count: int) -> list[dict[str, Any]]:
    """Records of which every third has a picture; the answer says the number."""
    return [
        record("<image>What?" if n % 3 == 0 else "What?", f"It is {n}.", *(["0.png"] if n % 3 == 0 else []))
        for n in range(count)
    ]


def train_loader(
    data: DataConfig, model: Qwen2VLConfig, *, dp: tuple[int, int] = (0, 1), at: int = 0, **changes: Any
) -> BatchLoader:
    return build_train_loader(data, model, training(**changes), dp_rank=dp[0], dp_size=dp[1], consumed_samples=at)


def assert_equal(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        torch.testing.assert_close(getattr(one, field.name), getattr(other, field.name), rtol=0, atol=0)


def answers(batch: Batch, loader: BatchLoader) -> list[str]:
    """The learned text of every sample."""
    tokenizer = loader.dataset.preparer.template.tokenizer
    bounds = batch.cu_seqlens.tolist()
    rows = [batch.labels[start:end].tolist() for start, end in pairwise(bounds)]
    return [tokenizer.decode([label for label in row if label != -100]) for row in rows]


def test_batch_holds_the_samples_with_their_pictures(data_config: MakeData, model: Qwen2VLConfig) -> None:
    records = [
        record("<image>\nWhat?", "A.", "1.png"),
        record("Who?", "B."),
        record("<image><image>", "C.", "0.png", "2.png"),
    ]
    loader = train_loader(
        data_config(records, loader={"shuffle": False}), model, micro_batch_size=3, global_batch_size=3
    )
    batch = next(loader)
    assert batch.num_samples == 3
    assert answers(batch, loader) == ["A.<|im_end|>\n", "B.<|im_end|>\n", "C.<|im_end|>\n"]
    assert batch.grid_thw.tolist() == [[1, 4, 6], [1, 4, 4], [1, 8, 4]]
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (24 + 16 + 32, 1176)
    assert batch.image_rows.numel() == (24 + 16 + 32) // 4
    media = loader.dataset.preparer.template.tokenizer.special.media
    assert all(int(token) in media for token in batch.input_ids[batch.image_rows])
    assert loader.consumed_samples == 3


def test_workers_do_not_change_the_batches(data_config: MakeData, model: Qwen2VLConfig) -> None:
    data = data_config(numbered(7))
    alone, helped = train_loader(data, model), train_loader(data, model, num_workers=2)
    for _ in range(5):
        assert_equal(next(alone), next(helped))


def test_preparing_batches_leaves_the_global_random_state_alone(data_config: MakeData, model: Qwen2VLConfig) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    next(train_loader(data_config(numbered(5)), model))
    assert torch.equal(torch.get_rng_state(), before)


def test_resume_goes_on_exactly_with_other_replicas_and_workers(data_config: MakeData, model: Qwen2VLConfig) -> None:
    data = data_config(numbered(11))
    uninterrupted = train_loader(data, model)
    expected = [text for batch in islice(uninterrupted, 9) for text in answers(batch, uninterrupted)]
    first = train_loader(data, model)
    seen = [text for batch in islice(first, 2) for text in answers(batch, first)]
    replicas = [
        train_loader(data, model, dp=(rank, 2), at=first.consumed_samples, micro_batch_size=1, num_workers=1)
        for rank in range(2)
    ]
    for _ in range(7):
        for replica in replicas:
            seen += answers(next(replica), replica)
    assert seen == expected
    assert replicas[0].consumed_samples == 18


def test_restart_goes_back(data_config: MakeData, model: Qwen2VLConfig) -> None:
    loader = train_loader(data_config(numbered(5)), model)
    batches = list(islice(loader, 3))
    loader.restart(2)
    assert_equal(next(loader), batches[1])


def test_long_samples_are_cut_and_counted(
    data_config: MakeData, model: Qwen2VLConfig, caplog: pytest.LogCaptureFixture
) -> None:
    records = [record("What?", "word " * 300)]
    with caplog.at_level(logging.INFO):
        loader = train_loader(data_config(records), model, seq_length=64, micro_batch_size=1)
        batches = list(islice(loader, 12))
    assert all(batch.num_tokens == 64 for batch in batches)
    assert loader.counts == {"cut to seq_length": 12}
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert [text.split(";")[0] for text in warnings] == [
        "data: 1 records so far were cut to seq_length",
        "data: 10 records so far were cut to seq_length",
    ]


def test_dropped_records_are_replaced_by_the_next_and_counted(data_config: MakeData, model: Qwen2VLConfig) -> None:
    broken = {"messages": [{"role": "assistant", "content": "No question."}]}
    huge = record("<image>What?", "Lost.", "2.png")
    data = data_config([record("a", "A."), broken, huge, record("d", "D.")], loader={"shuffle": False})
    loader = train_loader(data, model, micro_batch_size=4, global_batch_size=4, seq_length=30)
    batch = next(loader)
    assert [text[0] for text in answers(batch, loader)] == ["A", "D", "D", "D"]
    assert loader.counts == {
        "dropped: prompts and answers do not alternate": 1,
        "dropped: a picture or video does not fit into seq_length": 2,
    }


def test_set_without_a_usable_record_stops_with_the_reason(data_config: MakeData, model: Qwen2VLConfig) -> None:
    data = data_config([record("a", "A."), record("b", "B.")], attr={"user_tag": "human"})
    with pytest.raises(
        DataError, match=r'none of 2 records .* \(message 0 is from "user" where "human" or "observation"'
    ):
        train_loader(data, model)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_record_stops_the_run_and_is_named(
    data_config: MakeData, data_dir: Path, model: Qwen2VLConfig, num_workers: int
) -> None:
    good = (data_dir / "0.png").read_bytes()
    (data_dir / "cut.png").write_bytes(good[: len(good) // 2])
    records = [record("a", "A."), record("b", "B."), record("<image>c", "C.", "cut.png"), record("d", "D.")]
    loader = train_loader(data_config(records, loader={"shuffle": False}), model, num_workers=num_workers)
    assert answers(next(loader), loader)[0].startswith("A")
    with pytest.raises(DataError) as caught:
        next(loader)
    assert str(caught.value).startswith(f"{data_dir}/records.json[2]: {data_dir}/cut.png cannot be decoded")
    assert "Traceback" not in str(caught.value)
    assert caught.value.exit_code == 12


def test_missing_picture_and_video_are_named(data_config: MakeData, data_dir: Path, model: Qwen2VLConfig) -> None:
    with pytest.raises(DataError, match=r"records.json\[0\]: nowhere.png does not exist"):
        train_loader(data_config([record("<image>", "A.", "nowhere.png")]), model)
    with pytest.raises(DataError, match=r"records.json\[0\]: .* is a video; videos come with the complete data path"):
        train_loader(data_config([record("<video>", "A.", videos=["a.mp4"])], attr={"videos": "videos"}), model)


def test_media_tokens_written_into_texts_are_refused(data_config: MakeData, model: Qwen2VLConfig) -> None:
    with pytest.raises(DataError, match=r"records.json\[0\]: its texts hold the special token <\|image_pad\|>"):
        train_loader(data_config([record("what is <|image_pad|>?", "A.")]), model)


def test_worker_that_dies_is_reported_with_its_records(
    data_config: MakeData, data_dir: Path, model: Qwen2VLConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = os.getpid()
    prepare = SamplePreparer.prepare

    def die_at_two(self: SamplePreparer, number: int, notes: Any) -> Any:
        if number == 2 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return prepare(self, number, notes)

    monkeypatch.setattr(SamplePreparer, "prepare", die_at_two)
    loader = train_loader(data_config(numbered(4), loader={"shuffle": False}), model, num_workers=1)
    with pytest.raises(DataError, match=r"a data worker failed at .*records.json\[[02]\].* next 2 micro-batches: "):
        list(islice(loader, 2))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_defect_in_a_worker_names_the_records(
    data_config: MakeData, model: Qwen2VLConfig, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    loader = train_loader(data_config(numbered(4), loader={"shuffle": False}), model, num_workers=num_workers)

    def break_down(self: SamplePreparer, number: int, notes: Any) -> Any:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(SamplePreparer, "prepare", break_down)
    with pytest.raises(
        DataError, match=r"(?s)unexpected error .*records.json\[0\].*records.json\[1\].*break_down.*oops"
    ):
        next(loader)


def test_one_example_is_logged_decoded(
    data_config: MakeData, data_dir: Path, model: Qwen2VLConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        train_loader(data_config([record("<image>What?", "A dog.", "0.png")]), model)
        train_loader(data_config([record("<image>What?", "A dog.", "0.png")]), model, dp=(1, 2), micro_batch_size=1)
    (text,) = [entry.getMessage() for entry in caplog.records if "training example" in entry.getMessage()]
    assert text.startswith(f"1 training records. training example: {data_dir}/records.json[0] (")
    assert "inputs: <|im_start|>system\nYou are" in text
    assert "<|vision_start|><|image_pad|> (x4) <|vision_end|>What?<|im_end|>" in text
    assert "labels: A dog.<|im_end|>\n" in text
    assert "patch grids: 1x4x4" in text


def test_evaluation_sees_the_whole_set_at_every_restart(
    data_config: MakeData, data_dir: Path, model: Qwen2VLConfig
) -> None:
    """Five samples on two replicas with micro-batches of two: the last one is alone, its partner runs a filler."""
    valid_file = data_dir / "valid.jsonl"
    valid_file.write_text("".join(json.dumps(row) + "\n" for row in numbered(5)))
    data = data_config(numbered(1), val_dataset=str(valid_file))
    loaders = [build_valid_loader(data, model, training(), dp_rank=rank, dp_size=2) for rank in range(2)]
    for _ in range(2):
        seen = []
        for _ in range(2 * training().num_micro_batches(2)):
            for loader in loaders:
                assert loader is not None
                assert loader.num_iterations == 2
                seen += answers(next(loader), loader)
        assert seen == [f"It is {n}.<|im_end|>\n" for n in range(5)] + [""]
        for loader in loaders:
            assert loader is not None
            loader.restart()


def test_evaluation_set_may_be_part_of_the_training_set(data_config: MakeData, model: Qwen2VLConfig) -> None:
    data = data_config(numbered(10), val_rate=0.2)
    valid = build_valid_loader(data, model, training(), dp_rank=0, dp_size=1)
    assert valid is not None
    held_out = answers(next(valid), valid)
    train = train_loader(data, model)
    learned = [text for batch in islice(train, 4) for text in answers(batch, train)]
    assert len(held_out) == 2
    assert sorted(held_out + learned) == sorted(f"It is {n}.<|im_end|>\n" for n in range(10))
    assert build_valid_loader(data_config(numbered(3)), model, training(), dp_rank=0, dp_size=1) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"loader": {"drop_last": False}}, "drop_last = false is not implemented"),
        ({"loader": {"data_sharding": True}}, "data_sharding = true is not implemented"),
        ({"streaming": True}, "streaming = true is not implemented"),
        ({"packing": True}, "packing = true is not implemented"),
        ({"attr": {"formatting": "alpaca"}}, 'formatting = "alpaca" is not implemented'),
        ({"attr": {"ranking": True}}, "ranking = true belongs to preference training"),
        ({"attr": {"role_tag": None}}, "role_tag, content_tag, user_tag and assistant_tag must not be null"),
        ({"mask_history": True, "train_on_prompt": True}, "mask_history and train_on_prompt exclude each other"),
        ({"template": "qwen"}, 'template = "qwen" does not exist'),
        ({"loader": {"collate_param": {"model_name": "qwen2vl_dpo"}}}, "qwen2vl_dpo"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(
    data_config: MakeData, model: Qwen2VLConfig, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        train_loader(data_config([record("a", "A.")], **changes), model)


def test_all_refusals_are_shown_together(data_config: MakeData, model: Qwen2VLConfig) -> None:
    data = data_config([record("a", "A.")], loader={"drop_last": False}, streaming=True)
    with pytest.raises(ConfigError) as caught:
        train_loader(data, model)
    assert len(caught.value.problems) == 2


def test_checkpoint_whose_patches_are_not_the_models_is_refused(data_config: MakeData, model: Qwen2VLConfig) -> None:
    assert model.image_encoder is not None
    tower = model.image_encoder.vision_encoder.model_copy(update={"patch_size": 16})
    other = model.model_copy(update={"image_encoder": model.image_encoder.model_copy(update={"vision_encoder": tower})})
    with pytest.raises(ConfigError, match=r"image processor's patch_size is 14, but the vision_encoder .* says 16"):
        train_loader(data_config([record("a", "A.")]), other)


def test_model_without_vision_tower_takes_text_only(data_config: MakeData, model: Qwen2VLConfig) -> None:
    text_model = model.model_copy(update={"image_encoder": None})
    batch = next(train_loader(data_config([record("a", "A.")]), text_model))
    assert batch.pixel_values is None
    assert batch.grid_thw.shape == (0, 3)
    with pytest.raises(DataError, match="the model has no image_encoder"):
        train_loader(data_config([record("<image>", "A.", "0.png")]), text_model)


def test_pinned_memory_keeps_the_batch() -> None:
    """Without an accelerator torch pins nothing; the seam is that both classes offer the method."""
    prepared = loader_module.MicroBatch(None, (), "why")
    assert prepared.pin_memory() is prepared


def test_sizes_are_read_before_pixels_are_decoded(
    data_config: MakeData, data_dir: Path, model: Qwen2VLConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture whose turn does not fit is measured and never decoded; the others are decoded once."""
    opened: list[str] = []
    convert = Image.Image.convert

    def counted(self: Image.Image, *args: Any, **options: Any) -> Image.Image:
        opened.append(str(getattr(self, "filename", "")))
        return convert(self, *args, **options)

    monkeypatch.setattr(Image.Image, "convert", counted)
    turns = [("user", "<image>a"), ("assistant", "A."), ("user", "<image>b"), ("assistant", "B.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns], "images": ["0.png", "2.png"]}
    loader = train_loader(data_config([row]), model, dp=(1, 2), micro_batch_size=1, global_batch_size=2, seq_length=40)
    next(loader)
    assert [Path(name).name for name in opened] == ["0.png"]
