"""Multiple-choice questions: our own, and files in the layouts that published sets have."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from es2.core.errors import InputError
from es2.prompts.prompt_set import normalised
from es2.prompts.questions import LETTERS, Question, load_questions

OWN = {"question": "What is 1 + 1?", "A": "3", "B": "2", "C": "1", "D": "0", "answer": "B", "subject": "sums"}
MMLU_PRO = {
    "question_id": 70,
    "question": "Which of these is a colour?",
    "options": ["a chair", "a stone", "blue", "a song", "a road"],
    "answer": "C",
    "answer_index": 2,
    "cot_content": "",
    "category": "other",
    "src": "ours",
}
GPQA = {
    "Record ID": "rec1",
    "Question": "Which metal is liquid at room temperature?",
    "Correct Answer": "mercury\n",
    "Incorrect Answer 1": "iron",
    "Incorrect Answer 2": "lead",
    "Incorrect Answer 3": "tin",
    "Subdomain": "Inorganic chemistry",
    "High-level domain": "Chemistry",
}


def write(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> str:
    path = folder / name
    if name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(path)
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        pd.DataFrame(rows).to_csv(path, index=False)
    return str(path)


class TestOwn:
    def test_two_hundred_over_ten_subjects_with_the_answers_evenly_spread(self) -> None:
        questions = load_questions("builtin").questions
        assert len(questions) == 200
        assert Counter(one.subject for one in questions) == dict.fromkeys({one.subject for one in questions}, 20)
        assert len({one.subject for one in questions}) == 10
        assert Counter(LETTERS[one.answer] for one in questions) == dict.fromkeys("ABCD", 50)
        for subject in {one.subject for one in questions}:
            assert Counter(one.answer for one in questions if one.subject == subject) == dict.fromkeys(range(4), 5)

    def test_no_question_comes_twice_and_no_option_twice_in_one(self) -> None:
        questions = load_questions("builtin").questions
        assert len({normalised(one.text) for one in questions}) == 200
        for one in questions:
            assert len(one.options) == 4
            assert len(set(map(normalised, one.options))) == 4

    def test_every_line_of_the_file_has_every_column(self) -> None:
        from importlib import resources

        text = (resources.files("es2") / "data" / "ability_questions.csv").read_text(encoding="utf-8")
        rows = list(csv.DictReader(text.splitlines()))
        assert list(rows[0]) == ["question", "A", "B", "C", "D", "answer", "subject"]
        assert all(cell == cell.strip() and cell for row in rows for cell in row.values())

    def test_a_larger_limit_adds_questions_and_moves_none(self) -> None:
        questions = load_questions("builtin")
        assert questions.choose(50) == questions.choose(120)[:50]
        assert len(questions.choose(1000)) == 200


class TestLayouts:
    @pytest.mark.parametrize("name", ["own.csv", "own.jsonl", "own.parquet", "own.json", "own.csv.gz"])
    def test_our_own(self, tmp_path: Path, name: str) -> None:
        (one,) = load_questions(write(tmp_path, name, [OWN])).questions
        assert one == Question("What is 1 + 1?", ("3", "2", "1", "0"), 1, "sums")

    @pytest.mark.parametrize("name", ["test.parquet", "test.jsonl", "test.json", "test.csv"])
    def test_mmlu_pro(self, tmp_path: Path, name: str) -> None:
        (one,) = load_questions(write(tmp_path, name, [MMLU_PRO])).questions
        assert one == Question("Which of these is a colour?", tuple(MMLU_PRO["options"]), 2, "other")

    def test_mmlu_names_the_right_choice_by_its_place(self, tmp_path: Path) -> None:
        row = {"question": "Which is a fish?", "subject": "zoo", "choices": ["cow", "carp"], "answer": 1}
        for name in ("mmlu.parquet", "mmlu.jsonl", "mmlu.csv"):
            (one,) = load_questions(write(tmp_path, name, [row])).questions
            assert one == Question("Which is a fish?", ("cow", "carp"), 1, "zoo")

    def test_gpqa_in_an_order_of_its_own_for_every_question(self, tmp_path: Path) -> None:
        rows = [GPQA | {"Question": f"Which metal is liquid, asked for time {number}?"} for number in range(200)]
        path = write(tmp_path, "gpqa_main.csv", rows)
        questions = load_questions(path).questions
        assert all(one.options[one.answer] == "mercury" for one in questions)
        assert {frozenset(one.options) for one in questions} == {frozenset(("mercury", "iron", "lead", "tin"))}
        places = Counter(one.answer for one in questions)
        assert min(places[place] for place in range(4)) > 30, "the right one is as often in every place"
        assert load_questions(path) == load_questions(path)
        assert questions[0].subject == "Chemistry"

    def test_fewer_options_and_exact_duplicates(self, tmp_path: Path) -> None:
        rows = [OWN, OWN, {**OWN, "question": "What is 2 − 1?", "C": "", "D": "", "answer": "a"}]
        first, second = load_questions(write(tmp_path, "own.csv", rows)).questions
        assert (len(first.options), second.options, second.answer) == (4, ("3", "2"), 0)

    def test_the_digest_is_of_the_questions(self, tmp_path: Path) -> None:
        one = load_questions(write(tmp_path, "one.csv", [OWN]))
        assert one.digest == load_questions(write(tmp_path, "two.jsonl", [OWN])).digest
        assert one.digest != load_questions(write(tmp_path, "three.csv", [OWN | {"answer": "A"}])).digest

    def test_a_data_set_of_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from es2.prompts import questions

        asked = []

        def rows(name: str, split: str) -> list[tuple[str, dict[str, Any]]]:
            asked.append((name, split))
            return [("row 1", MMLU_PRO)]

        monkeypatch.setattr(questions, "read_hub_rows", rows)
        assert len(load_questions("hf:TIGER-Lab/MMLU-Pro").questions) == 1
        assert len(load_questions("hf:TIGER-Lab/MMLU-Pro:validation").questions) == 1
        assert asked == [("TIGER-Lab/MMLU-Pro", "test"), ("TIGER-Lab/MMLU-Pro", "validation")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (OWN | {"answer": "E"}, "row 2, column answer: 'E' is no option; write a letter from A to D"),
        (OWN | {"answer": ""}, "row 2, column answer: empty"),
        (OWN | {"question": " "}, "row 2, column question: empty"),
        (OWN | {"B": ""}, "row 2, column B: empty, while C is an option"),
        (OWN | {"B": "", "C": "", "D": ""}, "row 2, column A: 1 option(s)"),
        (OWN | {"A": True}, "row 2, column A: expected text, found bool"),
        (OWN | {"A": "x" * 20_001}, "row 2, column A: at most 20,000 characters"),
        (OWN | {"A": "\0"}, "row 2, column A: holds a NUL byte"),
        (MMLU_PRO | {"answer": "F"}, "row 2, column answer: 'F' is no option"),
        (MMLU_PRO | {"answer": None, "answer_index": 5}, "row 2, column answer_index: '5' is no option"),
        (MMLU_PRO | {"answer": None, "answer_index": None}, "row 2, column answer: empty"),
        (MMLU_PRO | {"answer_index": 1}, "row 2, column answer_index: it names another option"),
        (MMLU_PRO | {"options": ["one"]}, "row 2, column options: 1 option(s)"),
        (MMLU_PRO | {"options": list("abcdefghijk")}, "row 2, column options: 11 option(s)"),
        (MMLU_PRO | {"options": "blue, green"}, "row 2, column options: no list of options"),
        (MMLU_PRO | {"options": "['blue' 'green']"}, "row 2, column options: 1 option(s)"),  # as numpy prints them
        (MMLU_PRO | {"options": ["a", None]}, "row 2, column options: empty"),
        (GPQA | {"Incorrect Answer 3": ""}, "row 2, column Incorrect Answer 3: empty"),
        (GPQA | {"Question": None}, "row 2, column Question: empty"),
    ],
)
def test_a_wrong_row_is_one_sentence_with_its_row_and_column(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    whole = next(layout for layout in (OWN, MMLU_PRO, GPQA) if layout.keys() == row.keys())
    with pytest.raises(InputError) as refused:
        load_questions(write(tmp_path, "wrong.jsonl", [whole, row]))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("gone.csv", "There is no question file"),
        ("", "is no file of questions"),
        (".", "is a folder"),
        ("prompts.csv", "its columns (prompt, label) are those of no layout of questions"),
        ("none.jsonl", "is empty"),
        ("empty.csv", "holds no question"),
        ("notes.pdf", "its name must end in"),
        ("lines.txt", "are those of no layout of questions"),
    ],
)
def test_what_holds_no_questions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.csv").write_text("prompt,label\nHi,harmless\n")
    Path("none.jsonl").write_text(" ")
    Path("empty.csv").write_text("question,A,B,answer\n")
    Path("notes.pdf").write_text("x")
    Path("lines.txt").write_text("What is this?\n")
    with pytest.raises(InputError, match=r"^[^\n]*$") as refused:
        load_questions(source)
    assert words in str(refused.value)
