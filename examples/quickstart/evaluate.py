"""Ask the held-out questions before and after training, print the accuracies, and write report.html.

Answers come from transformers' own `generate` on the two Hugging Face directories: no training code is involved.
Exit code 1 when any kind of question has fewer than 90 % right answers after training.

    python examples/quickstart/evaluate.py --data DIR --before HF_DIR --after HF_DIR [--loss-plot PNG] --report FILE
"""

from __future__ import annotations

import argparse
import base64
import html
import inspect
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

REQUIRED_ACCURACY = 0.9
BATCH_SIZE = 64
MAX_NEW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one held-out picture; `image` is relative to the data directory."""

    image: str
    kind: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Score:
    """How one kind of question went; all but `number` are shares from 0 to 1."""

    kind: str
    number: int
    chance: float
    """Share of the answer that is right most often: what a model that does not look at the picture can reach."""
    before: float
    after: float


class Answerer:
    """A Hugging Face Qwen2-VL directory that answers questions about pictures, greedily."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        self.image_processor = AutoImageProcessor.from_pretrained(directory)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()

    def answers(self, data: Path, questions: list[Question]) -> list[str]:
        """The text of every answer, in the order of the questions."""
        answers: list[str] = []
        for start in range(0, len(questions), BATCH_SIZE):
            answers += self._answer_batch(data, questions[start : start + BATCH_SIZE])
        return answers

    @torch.no_grad()
    def _answer_batch(self, data: Path, questions: list[Question]) -> list[str]:
        pictures = [Image.open(data / question.image).convert("RGB") for question in questions]
        features = self.image_processor(images=pictures, return_tensors="pt")
        tokens_per_image = (features["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
        prompts = [self._prompt(q.question, n) for q, n in zip(questions, tokens_per_image, strict=True)]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:  # transformers 5 wants it, 4.57 not
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).int()
        output = self.model.generate(**inputs, **features, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _prompt(self, question: str, num_image_tokens: int) -> str:
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text).replace("<|image_pad|>", "<|image_pad|>" * num_image_tokens)


def score(questions: list[Question], before: list[str], after: list[str]) -> list[Score]:
    """The accuracies per kind of question, in order of first appearance."""
    scores = []
    for kind in dict.fromkeys(question.kind for question in questions):
        rows = [i for i, question in enumerate(questions) if question.kind == kind]
        most_common = Counter(questions[i].answer for i in rows).most_common(1)[0][1]
        scores.append(
            Score(
                kind=kind,
                number=len(rows),
                chance=most_common / len(rows),
                before=sum(before[i] == questions[i].answer for i in rows) / len(rows),
                after=sum(after[i] == questions[i].answer for i in rows) / len(rows),
            )
        )
    return scores


def choose_examples(questions: list[Question], number: int = 12) -> list[int]:
    """Row numbers of different pictures, the kinds of questions taking turns."""
    kinds = list(dict.fromkeys(question.kind for question in questions))
    chosen: list[int] = []
    seen: set[str] = set()
    for row, question in enumerate(questions):
        if question.kind == kinds[len(chosen) % len(kinds)] and question.image not in seen:
            chosen.append(row)
            seen.add(question.image)
        if len(chosen) == number:
            break
    return chosen


def render_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Aligned columns for a terminal."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )


def render_html(
    scores: list[Score], examples: list[tuple[Question, str, str]], data: Path, loss_plot: Path | None
) -> str:
    """One page with everything embedded: accuracies, example pictures with answers, the loss curve."""
    score_rows = "".join(
        f"<tr><td>{s.kind}</td><td>{s.number}</td><td>{s.chance:.0%}</td><td>{s.before:.1%}</td>"
        f"<td><b>{s.after:.1%}</b></td></tr>"
        for s in scores
    )
    cards = "".join(
        f'<figure><img class="picture" src="{_data_url(data / q.image)}" alt="{html.escape(q.image)}">'
        f"<figcaption>{html.escape(q.question)}<br>right: <b>{html.escape(q.answer)}</b><br>"
        f'before: {html.escape(old) or "&mdash;"}<br>after: <span class="{"good" if new == q.answer else "bad"}">'
        f"{html.escape(new) or '&mdash;'}</span></figcaption></figure>"
        for q, old, new in examples
    )
    loss = f'<h2>Loss</h2><img src="{_data_url(loss_plot)}" alt="loss over iterations">' if loss_plot else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Quick start: before and after training</title>
<style>
 body {{ font: 16px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
 table {{ border-collapse: collapse }}
 th, td {{ padding: .3rem .9rem; border-bottom: 1px solid #ccc; text-align: left }}
 .cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem }}
 figure {{ margin: 0; padding: .8rem; border: 1px solid #ddd; border-radius: .4rem }}
 .picture {{ height: 112px; image-rendering: pixelated }} .good {{ color: #17803d; font-weight: bold }}
 .bad {{ color: #b91c1c; font-weight: bold }} img {{ max-width: 100% }}
</style></head><body>
<h1>Quick start: before and after training</h1>
<p>Answers to questions about pictures that were not in the training data, given by transformers' <code>generate</code>.
<i>Chance</i> is what always giving the most frequent answer would reach.</p>
<table><tr><th>question about</th><th>questions</th><th>chance</th><th>before</th><th>after</th></tr>
{score_rows}</table>
<h2>Examples</h2><div class="cards">{cards}</div>
{loss}
</body></html>
"""


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def main(argv: list[str] | None = None) -> int:
    """The command line; gives back 0, or 1 when the trained model is not good enough."""
    parser = argparse.ArgumentParser(description="Compare answers before and after training on held-out pictures.")
    parser.add_argument("--data", type=Path, required=True, help="directory of make_pictures.py")
    parser.add_argument("--before", type=Path, required=True, help="Hugging Face directory that training started from")
    parser.add_argument("--after", type=Path, required=True, help="Hugging Face directory that training exported")
    parser.add_argument("--loss-plot", type=Path, help="PNG of the loss curve to embed")
    parser.add_argument("--report", type=Path, required=True, help="HTML file to write")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    questions = [Question(**entry) for entry in json.loads((args.data / "questions.json").read_text(encoding="utf-8"))]
    before = Answerer(args.before).answers(args.data, questions)
    after = Answerer(args.after).answers(args.data, questions)
    scores = score(questions, before, after)
    examples = [(questions[row], before[row], after[row]) for row in choose_examples(questions)]
    args.report.write_text(render_html(scores, examples, args.data, args.loss_plot), encoding="utf-8")

    print("\nAccuracy on held-out pictures (chance: always the most frequent answer)\n")
    header: tuple[str, ...] = ("question about", "questions", "chance", "before", "after")
    print(
        render_table(
            header,
            [(s.kind, str(s.number), f"{s.chance:.1%}", f"{s.before:.1%}", f"{s.after:.1%}") for s in scores],
        )
    )
    print("\nExamples\n")
    header = ("picture", "question", "right", "before", "after")
    print(render_table(header, [(q.image, q.question, q.answer, old[:24], new[:24]) for q, old, new in examples[:8]]))
    print(f"\nReport with the pictures: {args.report}")
    failed = [s for s in scores if s.after < REQUIRED_ACCURACY]
    for s in failed:
        print(
            f"questions about {s.kind}: {s.after:.1%} right, at least {REQUIRED_ACCURACY:.0%} wanted", file=sys.stderr
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
