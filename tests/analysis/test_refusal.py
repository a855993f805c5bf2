"""The refusal rules against replies that were labelled by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from es2.analysis.refusal import REPLY_CLASSES, judge_reply, normalise_reply, opening
from tests.labelled_replies import REPLIES


def rates(label: str) -> tuple[float, float]:
    """Precision and recall of one verdict over all labelled replies."""
    pairs = [(expected, judge_reply(reply)) for _, expected, reply in REPLIES]
    right = sum(expected == found == label for expected, found in pairs)
    precision = right / sum(found == label for _, found in pairs)
    return precision, right / sum(expected == label for expected, _ in pairs)


def test_there_are_enough_labelled_replies_of_every_kind() -> None:
    assert len(REPLIES) >= 60
    assert {label for _, label, _ in REPLIES} == {*REPLY_CLASSES} - {"unfinished"}  # which no text alone tells
    assert len({reply for _, _, reply in REPLIES}) == len(REPLIES)
    assert min(Counter(label for _, label, _ in REPLIES).values()) >= 5


@pytest.mark.parametrize(
    ("label", "precision", "recall"),
    [("refusal", 0.95, 0.93), ("answer", 0.9, 0.95), ("empty", 1.0, 1.0), ("degenerate", 1.0, 0.9)],
)
def test_precision_and_recall(label: str, precision: float, recall: float) -> None:
    found = rates(label)
    wrong = [(judge_reply(reply), reply[:80]) for _, expected, reply in REPLIES if judge_reply(reply) != expected]
    assert found[0] >= precision, (found, wrong)
    assert found[1] >= recall, (found, wrong)


def test_no_loop_and_no_empty_reply_counts_as_a_refusal() -> None:
    for _, label, reply in REPLIES:
        if label in ("empty", "degenerate"):
            assert judge_reply(reply) != "refusal", reply


@pytest.mark.parametrize(
    ("form", "label", "reply"), [entry for entry in REPLIES if entry[0] in ("plain", "look-alike")]
)
def test_plain_refusals_and_their_look_alikes_are_told_apart(form: str, label: str, reply: str) -> None:
    assert judge_reply(reply) == label


PARTS = ("flour", "water", "salt", "yeast", "rye", "milk", "butter", "honey", "oats", "seeds", "malt", "oil")
RECIPE = " ".join(f"The {part} goes in at minute {i}, and then you stir the bowl." for i, part in enumerate(PARTS * 4))


def test_a_long_answer_is_no_loop_because_words_come_back() -> None:
    assert judge_reply(RECIPE) == "answer"


def test_a_refusal_far_behind_the_opening_does_not_count() -> None:
    assert judge_reply(RECIPE + " I can't help with the oven, though.") == "answer"


def test_what_is_searched() -> None:
    assert normalise_reply("**I’m** [sorry](http://x.org)\n\n1. I CAN’T") == "i'm sorry i can't"
    assert opening('She wrote "I cannot help" twice.') == "she wrote twice."
    assert opening('"I cannot help."') == "i cannot help."
