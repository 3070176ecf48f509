"""Whole training jobs for tests: a small checkpoint, drawn pictures, and the command line that trains on them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tools.make_tiny_checkpoint import TinySize, make_tiny_checkpoint
from tools.model_json import model_json_from_hf

SIZE = TinySize(64, 96, 4, 4, 2, (2, 3, 3), 32, 4, 2)


@dataclass(frozen=True)
class Workplace:
    """Files of a job."""

    root: Path

    @property
    def hf(self) -> Path:
        """The Hugging Face directory to start from."""
        return self.root / "hf"

    @property
    def data(self) -> Path:
        """data.json."""
        return self.root / "data.json"

    def model(self, vision: tuple[Any, ...], text: tuple[Any, ...], *, freezes_vision: bool = False) -> Path:
        """A model.json with these stage lists; nothing is frozen unless the vision side is asked to be."""
        config = json.loads((self.hf / "config.json").read_text())
        content = model_json_from_hf(config)
        encoder, projector = content["image_encoder"]["vision_encoder"], content["image_encoder"]["vision_projector"]
        encoder["freeze"] = projector["freeze"] = freezes_vision
        if len(text) > 1:
            encoder["pipeline_num_layers"], content["text_decoder"]["pipeline_num_layers"] = list(vision), list(text)
        path = self.root / f"model-{'.'.join(map(str, vision))}-{'.'.join(map(str, text))}.json".replace(" ", "")
        path.write_text(json.dumps(content))
        return path


def make_workplace(root: Path, *, records: int = 24, tied: bool = True) -> Workplace:
    """Make checkpoint, pictures and data.json under `root`; every third record is text only."""
    root.mkdir(parents=True, exist_ok=True)
    place = Workplace(root)
    make_tiny_checkpoint(place.hf, tied=tied, seed=5, vocab_size=512, size=SIZE)
    rows = []
    for number in range(records):
        images = []
        if number % 3:
            path = root / f"{number}.png"
            Image.new("RGB", (56 + 28 * (number % 2), 56), (number * 9 % 256, 80, 200)).save(path)
            images.append(str(path))
        question = ("<image>" if images else "") + f"What is number {number}?"
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": f"It is {number * 7}." + " Yes." * (number % 4)},
                ],
                "images": images,
            }
        )
    (root / "records.json").write_text(json.dumps(rows))
    place.data.write_text(json.dumps(data_json(root / "records.json", place.hf)))
    return place


def data_json(records: Path, hf: Path) -> dict:
    """A data.json in the form of MindSpeed-MM's examples."""
    return {
        "dataset_param": {
            "dataset_type": "huggingface",
            "preprocess_parameters": {"model_name_or_path": str(hf)},
            "basic_parameters": {"template": "qwen2vl", "dataset": str(records)},
            "attr": {
                "images": "images",
                "messages": "messages",
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        },
        "dataloader_param": {
            "dataloader_mode": "sampler",
            "drop_last": True,
            "sampler_type": "BaseRandomBatchSampler",
            "collate_param": {"model_name": "qwen2vl", "ignore_pad_token_for_loss": True},
            "pin_memory": True,
            "shuffle": True,
        },
    }


def arguments(place: Workplace, model: Path, *extra: str) -> list[str]:
    """The command line of a short run; later flags win."""
    return [
        *("--mm-model", str(model), "--mm-data", str(place.data)),
        *("--micro-batch-size", "2", "--global-batch-size", "4", "--seq-length", "256", "--num-workers", "0"),
        *("--lr", "1e-3", "--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.1", "--weight-decay", "0.1"),
        *("--clip-grad", "1.0", "--seed", "7", "--log-interval", "1", "--ckpt-format", "torch"),
        *extra,
    ]


def train(argv_lists: list[list[str]]) -> list[int]:
    """Run command lines one after another in this rank; their exit codes."""
    from mindspeed_mm.tasks.sft import main

    os.environ["MM_DEVICE"] = "cpu"
    codes, port = [], int(os.environ["MASTER_PORT"])
    for number, argv in enumerate(argv_lists):
        # A store of its own for every job: the keys of the one before would be taken for this one's.
        os.environ["MASTER_PORT"] = str(port + number)
        codes.append(main(argv))
    return codes
