"""Share of right answers of a MOSS-VL checkpoint on a file of records, question by question.

    python examples/mossvl/evaluate.py CHECKPOINT RECORDS.json [--batch-size 16]

The answer is generated greedily and compared with the record's response. For a LoRA output folder give the checkpoint
that it was trained on as well: `--base CHECKPOINT`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402  (the path above comes first)

from mindspeed_mm.data.image import read_image  # noqa: E402
from mindspeed_mm.data.mossvl.conversation import to_conversation  # noqa: E402
from mindspeed_mm.models.mossvl.hf.checkpoint import load_model, load_processor  # noqa: E402


def answers(model: Any, processor: Any, records: list[dict[str, Any]], root: Path, max_new_tokens: int) -> list[str]:
    """What the model says to the questions of the records, one batch."""
    processor.tokenizer.padding_side = "left"
    conversations = [to_conversation(record, root) for record in records]
    texts = [
        processor.tokenizer.apply_chat_template(list(c.messages[:-1]), tokenize=False, add_generation_prompt=True)
        for c in conversations
    ]
    inputs = processor(
        text=texts,
        images=[read_image(Path(path)) for c in conversations for path in c.images],
        videos=[entry for c in conversations for entry in c.videos],
        padding=True,
    )
    with torch.no_grad():
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """The command line: one line per question, and one for all."""
    parser = argparse.ArgumentParser(description="Share of right answers on a file of records, question by question.")
    parser.add_argument("checkpoint")
    parser.add_argument("records", type=Path)
    parser.add_argument("--base", help="the checkpoint that the LoRA adapters in CHECKPOINT belong to")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=4)
    args = parser.parse_args()
    processor = load_processor(args.checkpoint)
    # Budgets are shared by the clips of a call; here each clip of the batch gets what it would get alone.
    processor.video_processor.max_frames *= args.batch_size
    model = load_model(args.base or args.checkpoint, dtype="float32")
    if args.base:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.checkpoint)
    model.eval()
    records = json.loads(args.records.read_text(encoding="utf-8"))
    asked: Counter[str] = Counter(record["prompt"] for record in records)
    right: Counter[str] = Counter()
    records.sort(key=lambda record: record["prompt"])
    for start in range(0, len(records), args.batch_size):
        batch = records[start : start + args.batch_size]
        given = answers(model, processor, batch, args.records.absolute().parent, args.max_new_tokens)
        for record, answer in zip(batch, given, strict=True):
            right[record["prompt"]] += answer.strip() == record["response"]
    for prompt, count in sorted(asked.items()):
        print(f"{right[prompt] / count:7.1%}  of {count:4d}  {prompt}")
    print(f"{sum(right.values()) / len(records):7.1%}  of {len(records):4d}  all questions")


if __name__ == "__main__":
    main()
