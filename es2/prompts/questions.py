"""Multiple-choice questions, from our own set or from files as published sets have them.

Layouts are recognised by their columns: MMLU-Pro's, GPQA's, and our own. A row that cannot be read stops the load.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from es2.core.errors import InputError
from es2.core.files import expanded, parse_json
from es2.prompts.hub import read_hub_rows
from es2.prompts.prompt_set import stable_hash
from es2.prompts.rows import MAX_PROMPT_CHARACTERS, MAX_ROWS, Row
from es2.prompts.tables import ENDINGS, read_bounded, read_table

logger = logging.getLogger(__name__)

LETTERS = "ABCDEFGHIJ"
"""The names of the options: MMLU-Pro has up to ten."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: without its options.
        options: two to ten.
        answer: the place of the right one in `options`.
        subject: for tables.
    """

    text: str
    options: tuple[str, ...]
    answer: int
    subject: str


@dataclass(frozen=True)
class QuestionSet:
    """Questions and what they are called."""

    name: str
    questions: tuple[Question, ...]

    @property
    def digest(self) -> str:
        """Identifies the questions, their options and their answers."""
        data = json.dumps([[one.text, one.options, one.answer, one.subject] for one in self.questions])
        return hashlib.blake2b(data.encode(), digest_size=16).hexdigest()

    def choose(self, limit: int) -> tuple[Question, ...]:
        """At most `limit` questions, those of the smallest hash: a larger limit adds questions and moves none."""
        order = sorted(self.questions, key=lambda one: (stable_hash("question:" + one.text), one.text, one.options))
        return tuple(order[:limit])


def load_questions(source: str) -> QuestionSet:
    """The questions of `builtin`, of a file, or of `hf:<dataset>[:[configuration/]split]`.

    Raises:
        InputError: with the row and the column, when the source cannot be read as questions.
        MachineError: when the Hub cannot be reached.
    """
    if source == "builtin":
        name = "ability_questions.csv"
        data = (resources.files("es2") / "data" / name).read_bytes()
        return QuestionSet("builtin", _read(list(read_table(data, name)), repr(name)))
    if source.startswith("hf:"):
        name, _, split = source.removeprefix("hf:").partition(":")
        return QuestionSet(source, _read(read_hub_rows(name, split or "test"), f"the data set {name!r}"))
    shown = repr(source[:300])
    if not source.strip() or "\0" in source:
        raise InputError(f"{shown} is no file of questions; give builtin, a file ({ENDINGS}), or hf:<dataset>:<split>.")
    path = Path(expanded(source))
    try:
        if not path.exists():
            raise InputError(f"There is no question file {shown}; give builtin, a file ({ENDINGS}), or hf:<dataset>.")
        if path.is_dir():
            raise InputError(f"{shown} is a folder; give the file of questions inside it.")
        data = read_bounded(path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{shown} cannot be read ({reason}); check its name and permissions.") from error
    name = path.name.removesuffix(".gz")
    return QuestionSet(Path(name).stem, _read(list(read_table(data, path.name)), repr(path.name)))


def absolute_questions(source: str) -> str:
    """A source of questions with its path made absolute, so that it means the same wherever a job runs."""
    return source if source == "builtin" or source.startswith("hf:") else str(Path(expanded(source)).absolute())


def _read(rows: Sequence[Row], where: str) -> tuple[Question, ...]:
    """The questions of checked rows, exact duplicates merged."""
    if len(rows) > MAX_ROWS:
        raise InputError(f"{where}: more than {MAX_ROWS:,} rows are not read; give fewer questions.")
    if not rows:
        raise InputError(f"{where} holds no question; it needs at least one row.")
    columns = dict.fromkeys(name for _, row in rows if isinstance(row, Mapping) for name in row if name)
    parse = next((parse for needed, parse in _LAYOUTS if needed <= set(columns)), None)
    if parse is None and columns:
        raise InputError(
            f"{where}: its columns ({', '.join(columns)[:200]}) are those of no layout of questions; it needs "
            "question, A, B, C, D and answer, or question, options and answer as MMLU-Pro has them, or Question, "
            "Correct Answer and Incorrect Answer 1 to 3 as GPQA has them."
        )
    found: dict[Question, None] = {}
    for place, row in rows:
        if isinstance(row, InputError):
            raise row
        assert parse is not None
        found[parse(row, f"{where}, {place}")] = None
    if len(found) < len(rows):
        logger.warning("%s: %d exact duplicate(s) merged.", where, len(rows) - len(found))
    return tuple(found)


# ------------------------------------------------------------------------------------------------------------- layouts


def _own(row: Mapping[str, Any], at: str) -> Question:
    """`question, A, B, …, answer` (a letter) and, where there is one, `subject`; the last options may be empty."""
    names = [letter for letter in LETTERS if letter.lower() in row]
    cells = {name: _text(row, name, at, needed=False) for name in names}
    given = [name for name in names if cells[name]]
    if gap := next((name for name, letter in zip(given, LETTERS, strict=False) if name != letter), None):
        raise InputError(f"{at}, column {LETTERS[given.index(gap)]}: empty, while {gap} is an option; fill it.")
    options = _counted([cells[name] for name in given], at, names[0])
    return _question(row, options, _letter(row, len(options), at), at)


def _mmlu_pro(row: Mapping[str, Any], at: str) -> Question:
    """`question, options` (a list), `answer` (a letter, or a place from 0 as in MMLU), `answer_index`, `category`."""
    column = "options" if "options" in row else "choices"
    listed = row.get(column)
    if isinstance(listed, str):
        listed = _written_list(listed)
    if not isinstance(listed, list):
        raise InputError(f"{at}, column {column}: no list of options; give the set as Parquet or JSON lines.")
    options = _counted([_text({column: option}, column, at) for option in listed], at, column)
    places = []
    if row.get("answer") not in (None, ""):
        is_place = str(row["answer"]).strip().isdigit()
        places.append(("answer", (_place if is_place else _letter)(row, len(options), at)))
    if row.get("answer_index") not in (None, ""):
        places.append(("answer_index", _place(row, len(options), at, "answer_index")))
    if not places:
        raise InputError(f"{at}, column answer: empty; every question needs the letter of its right option.")
    if len({place for _, place in places}) > 1:
        raise InputError(f"{at}, column answer_index: it names another option than the column answer; correct one.")
    return _question(row, options, places[0][1], at)


def _gpqa(row: Mapping[str, Any], at: str) -> Question:
    """`Question, Correct Answer, Incorrect Answer 1 … 3`; options in an order by their hash, the same on every day."""
    text = _text(row, "Question", at)
    options = [_text(row, name, at) for name in _GPQA]
    order = sorted(range(len(options)), key=lambda place: (stable_hash(f"option:{text}\n{options[place]}"), place))
    return _question(row, [options[place] for place in order], order.index(0), at)


_GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_SUBJECTS = ("subject", "category", "high-level domain", "subdomain")
_LAYOUTS: Sequence[tuple[set[str], Callable[[Mapping[str, Any], str], Question]]] = (
    ({"question", *(name.lower() for name in _GPQA)}, _gpqa),
    ({"question", "options"}, _mmlu_pro),
    ({"question", "choices"}, _mmlu_pro),
    ({"question", "a", "b", "answer"}, _own),
)


def _counted(options: list[str], at: str, column: str) -> list[str]:
    """The options, which must be two to ten."""
    if not 2 <= len(options) <= len(LETTERS):
        raise InputError(f"{at}, column {column}: {len(options)} option(s); a question has 2 to {len(LETTERS)}.")
    return options


def _question(row: Mapping[str, Any], options: Sequence[str], answer: int, at: str) -> Question:
    named = next((name for name in _SUBJECTS if row.get(name)), None)
    subject = "unspecified" if named is None else _text(row, named, at)
    return Question(_text(row, "question", at), tuple(options), answer, subject)


def _letter(row: Mapping[str, Any], n_options: int, at: str) -> int:
    """The place of the option that the column `answer` names by its letter."""
    letter = _text(row, "answer", at).upper()
    if letter not in LETTERS[:n_options] or len(letter) != 1:
        raise InputError(
            f"{at}, column answer: {letter[:60]!r} is no option; write a letter from A to {LETTERS[n_options - 1]}."
        )
    return LETTERS.index(letter)


def _place(row: Mapping[str, Any], n_options: int, at: str, column: str = "answer") -> int:
    """The place of the right option that a column names by a number from 0."""
    cell = row[column]
    text = str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell).strip()
    if not text.isdecimal() or int(text) >= n_options:
        raise InputError(
            f"{at}, column {column}: {text[:60]!r} is no option; write a number from 0 to {n_options - 1}."
        )
    return int(text)


def _written_list(cell: str) -> object:
    """A list written as text, in JSON or as pandas writes it into CSV; the text itself where it is none."""
    for read in (parse_json, ast.literal_eval):
        try:
            return read(cell.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return cell


def _text(row: Mapping[str, Any], column: str, at: str, *, needed: bool = True) -> str:
    """The text or number in a cell, stripped; empty only where it is not `needed`."""
    cell = row.get(column.lower() if column.lower() in row else column)
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        cell = str(cell)
    if cell is None:
        cell = ""
    if not isinstance(cell, str):
        raise InputError(f"{at}, column {column}: expected text, found {type(cell).__name__}.")
    text = cell.strip()
    if needed and not text:
        raise InputError(f"{at}, column {column}: empty; fill it or remove the row.")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InputError(f"{at}, column {column}: at most {MAX_PROMPT_CHARACTERS:,} characters; shorten it.")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{at}, column {column}: holds a NUL byte or half of a surrogate pair; remove it.")
    return text
