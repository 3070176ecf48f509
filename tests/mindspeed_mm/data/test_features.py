"""Label masks and truncation: small literal in, exact literal out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_mm.data.features import Features, LabelRule, split_budget, to_features
from mindspeed_mm.data.sample import UnusableSampleError
from mindspeed_mm.data.template import Block, Tokens, Turn


def turn(source: int, target: int, first: int, *, block: tuple[int, int, int] | None = None) -> Turn:
    """A turn whose ids count up from `first`; `block` is a vision block in its prompt."""
    ids = tuple(range(first, first + source + target))
    blocks = () if block is None else (Block(*block),)
    return Turn(Tokens(ids[:source], blocks), Tokens(ids[source:], ()))


def literal(features: Features) -> tuple[list[int], list[int]]:
    return features.input_ids.tolist(), features.labels.tolist()


def test_answers_are_learned_and_labels_shifted() -> None:
    features = to_features("r", [turn(3, 2, 10), turn(2, 2, 20)], LabelRule(100))
    assert literal(features) == (
        [10, 11, 12, 13, 14, 20, 21, 22, 23],
        [-100, -100, 13, 14, -100, -100, 22, 23, -100],
    )
    assert features.num_cut_tokens == 0


def test_train_on_prompt_learns_everything_but_the_first_token() -> None:
    features = to_features("r", [turn(3, 2, 10)], LabelRule(100, train_on_prompt=True))
    assert literal(features) == ([10, 11, 12, 13, 14], [11, 12, 13, 14, -100])


def test_mask_history_learns_the_last_answer_only() -> None:
    features = to_features("r", [turn(3, 2, 10), turn(2, 2, 20)], LabelRule(100, mask_history=True))
    assert literal(features) == (
        [10, 11, 12, 13, 14, 20, 21, 22, 23],
        [-100, -100, -100, -100, -100, -100, 22, 23, -100],
    )


@pytest.mark.parametrize(
    ("source", "target", "budget", "expected"),
    [
        (5, 5, 100, (5, 5)),
        (90, 20, 50, (30, 20)),  # a short answer stays whole, the prompt gives way
        (10, 90, 50, (10, 40)),  # a short prompt stays whole, the answer gives way
        (60, 60, 50, (25, 25)),  # both are long: in proportion
        (70, 30, 50, (35, 15)),
        (0, 10, 4, (0, 4)),
    ],
)
def test_budget_is_shared_by_the_rule_of_llama_factory(
    source: int, target: int, budget: int, expected: tuple[int, int]
) -> None:
    assert split_budget(source, target, budget) == expected


@given(st.integers(0, 500), st.integers(1, 500), st.integers(1, 500))
def test_budget_is_never_exceeded_and_never_wasted(source: int, target: int, budget: int) -> None:
    kept_source, kept_target = split_budget(source, target, budget)
    assert 0 <= kept_source <= source
    assert 0 <= kept_target <= target
    assert kept_source + kept_target <= budget
    if source + target <= budget:
        assert (kept_source, kept_target) == (source, target)


def test_last_turn_is_cut_at_its_right_ends_and_later_turns_vanish() -> None:
    features = to_features("r", [turn(3, 2, 10), turn(4, 4, 20), turn(1, 1, 30)], LabelRule(9))
    # 4 tokens are left for the second turn: prompt and answer get 2 each
    assert literal(features) == (
        [10, 11, 12, 13, 14, 20, 21, 24, 25],
        [-100, -100, 13, 14, -100, -100, 24, 25, -100],
    )
    assert features.num_cut_tokens == 6


def test_mask_history_keeps_the_last_turns() -> None:
    features = to_features("r", [turn(9, 2, 10), turn(3, 2, 30)], LabelRule(8, mask_history=True))
    # 3 tokens are left for the first turn, which are shared in proportion
    assert literal(features) == (
        [10, 11, 12, 30, 31, 32, 33, 34],
        [-100, -100, -100, -100, -100, 33, 34, -100],
    )


def test_conversation_ends_before_a_picture_that_does_not_fit() -> None:
    turns = [turn(3, 2, 10, block=(0, 2, 0)), turn(9, 2, 20, block=(3, 8, 1))]
    assert to_features("r", turns, LabelRule(16)).media == (0, 1)
    features = to_features("r", turns, LabelRule(13))
    assert features.input_ids.tolist() == [10, 11, 12, 13, 14]
    assert features.media == (0,)
    assert features.num_cut_tokens == 11


def test_text_behind_a_picture_may_be_cut() -> None:
    features = to_features("r", [turn(9, 2, 10, block=(0, 5, 0))], LabelRule(8))
    assert features.input_ids.tolist() == [10, 11, 12, 13, 14, 15, 19, 20]
    assert features.media == (0,)


@pytest.mark.parametrize(
    ("turns", "rule", "reason"),
    [
        ([turn(9, 2, 10, block=(3, 8, 0))], LabelRule(8), "a picture or video does not fit into seq_length"),
        (
            [turn(9, 2, 10, block=(0, 8, 0)), turn(3, 2, 30)],
            LabelRule(8, mask_history=True),
            "a picture or video does not fit into seq_length",
        ),
        (
            [turn(5, 2, 10, block=(0, 3, 0)), turn(1, 1, 30), turn(3, 3, 40)],
            LabelRule(6, mask_history=True),
            "a picture or video does not fit into seq_length",
        ),
        ([turn(50, 1, 10)], LabelRule(1), "no token of an answer fits into seq_length"),
    ],
    ids=["no turn left", "history with the picture", "history beyond the budget", "no answer left"],
)
def test_samples_that_lose_what_matters_are_dropped(turns: list[Turn], rule: LabelRule, reason: str) -> None:
    with pytest.raises(UnusableSampleError) as caught:
        to_features("r[3]", turns, rule)
    assert caught.value.reason == reason
    assert f"seq_length = {rule.seq_length}" in caught.value.detail


lengths = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.booleans()), min_size=1, max_size=4)


@given(lengths, st.integers(1, 60), st.booleans())
def test_no_block_is_ever_cut_and_the_length_is_kept(
    sizes: list[tuple[int, int, bool]], seq_length: int, mask_history: bool
) -> None:
    turns = []
    for number, (source, target, has_block) in enumerate(sizes):
        block = (source // 2, source, number) if has_block else None
        turns.append(turn(source, target, 1000 * (number + 1), block=block))
    try:
        features = to_features("r", turns, LabelRule(seq_length, mask_history=mask_history))
    except UnusableSampleError:
        return
    ids = features.input_ids.tolist()
    assert 0 < len(ids) <= seq_length
    for number, (source, _, has_block) in enumerate(sizes):
        held = [token in ids for token in range(1000 * (number + 1) + source // 2, 1000 * (number + 1) + source)]
        if has_block:
            assert all(held) == (number in features.media)
            assert all(held) or not any(held)
    for position, label in enumerate(features.labels.tolist()):
        assert label in (-100, ids[position + 1] if position + 1 < len(ids) else -100)
