"""Which columns hold the prompt and the label, by the names and the values that published sets use.

Nothing here reads a file. Names are in lower case, with `_` for spaces and hyphens.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from es2.core.errors import InputError
from es2.core.files import parse_json

_CHATS = ("messages", "conversations", "conversation", "turns", "chat", "dialogue", "dialog")
_TEXTS = (
    "text",
    "prompts",
    "instruction",
    "instructions",
    "goal",
    "behavior",
    "behaviour",
    "question",
    "forbidden_prompt",
    "query",
    "request",
    "user_prompt",
    "user_input",
    "user_query",
    "user_message",
    "user_request",
    "input_prompt",
    "prompt_text",
    "harmful_prompt",
    "harmful_behavior",
    "harmful_question",
    "harmful_request",
    "harmful_instruction",
    "jailbreak_query",
    "jailbreak_prompt",
    "adversarial_prompt",
    "attack_prompt",
    "malicious_prompt",
)
_WEAK = ("input", "content", "user", "human", "message", "sentence", "utterance", "task")
_TRANSCRIPTS = ("transcript", "chosen")
_LAST = (*_TRANSCRIPTS, "adversarial", "vanilla")
PROMPT_COLUMNS = ("prompt", *_TEXTS, *_CHATS, *_WEAK, *_LAST)
"""Usual names of the prompt's column: `prompt` before all others, the last few only where there is none of these."""
FALLBACKS = {"adversarial": "vanilla"}
"""Where the prompt is if its own column's cell is empty (WildJailbreak)."""

_HARM = (
    "label",
    "labels",
    "harmful",
    "is_harmful",
    "harmfulness",
    "harm_label",
    "prompt_harm_label",
    "prompt_harmfulness",
    "prompt_label",
    "prompt_safety",
    "prompt_is_harmful",
    "prompt_toxicity",
    "toxicity",
    "toxic",
    "is_toxic",
    "unsafe",
    "is_unsafe",
    "malicious",
    "is_malicious",
    "jailbreak",
    "is_jailbreak",
    "safety_label",
    "flagged",
)
_NO_HARM = ("is_safe", "safe", "harmless", "is_harmless", "benign", "is_benign", "prompt_is_safe", "is_prompt_safe")
_MAYBE = ("type", "data_type", "prompt_type", "category", "class", "safety", "target", "kind")
LABEL_COLUMNS = (*_HARM, *_NO_HARM, *_MAYBE)
"""Usual names of the label's column: where 1 is harmful, where 1 is harmless, and what may be something else."""

_HARMFUL_WORDS = {"harmful", "unsafe", "toxic", "malicious", "jailbreak", "dangerous", "injection"}
_HARMFUL_WORDS |= {"vanilla_harmful", "adversarial_harmful", "harmful_behavior", "harmful_behaviors"}
_HARMLESS_WORDS = {"harmless", "safe", "unharmful", "benign", "normal", "nontoxic", "not_harmful", "non_harmful"}
_HARMLESS_WORDS |= {"not_toxic", "non_toxic", "vanilla_benign", "adversarial_benign", "legitimate", "harmless_alpaca"}
_KINDS_OF_HARM = {"harm_category", "harm_categories", "harm_area", "harm_type", "types_of_harm", "specific_harms"}
_KINDS_OF_HARM |= {"hazard", "hazard_category", "risk_area", "risk_category", "risk_type", "content_policy_name"}
_NO_KIND = {"", "none", "null", "n/a", "na", "nan", "[]", "other"}
_YES, _NO = {"1", "true", "yes"}, {"0", "false", "no"}

_ROLES = dict.fromkeys(("role", "from", "speaker", "author")).keys()
_CONTENTS = dict.fromkeys(("content", "value", "text")).keys()
_TRANSCRIPT = re.compile(r"\s*(?:Human|User):(.*?)(?=\n\s*(?:Human|User|Assistant):|\Z)", re.DOTALL)


def folded(name: str) -> str:
    """A column's name or a label's word, whatever its case, spaces and hyphens."""
    return re.sub(r"[\s\-]+", "_", name.strip().casefold())


def value_of(cell: object) -> str:
    """The value of a label's cell, by which rows are counted: 1, 1.0, `1` and ` 1 ` are one value; empty for none."""
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    value = str(cell).strip().casefold()
    return {"1.0": "1", "0.0": "0"}.get(value, value)


def labels_of(column: str, values: Sequence[str], harmful: Sequence[str] = ()) -> dict[str, str]:
    """The labels (`harmful` or `harmless`) of those of a column's values that have one.

    Args:
        column: its name.
        values: its distinct values, as `value_of` gives them.
        harmful: the values that are harmful, all others being harmless; empty where that is to be found.
    """
    if harmful:
        wanted = {value_of(value) for value in harmful}
        return {value: "harmful" if value in wanted else "harmless" for value in values if value}
    column = folded(column)
    if column == "type" and any(value.startswith("contrast_") for value in values):  # XSTest
        return {v: "harmful" if v.startswith("contrast_") else "harmless" for v in values if v}
    yes, no = ("harmless", "harmful") if column in _NO_HARM else ("harmful", "harmless")
    numbers_count = column != "safety"  # where 1 may be either
    found = {}
    for value in values:
        word = folded(value)
        if word in _HARMFUL_WORDS:
            found[value] = "harmful"
        elif word in _HARMLESS_WORDS:
            found[value] = "harmless"
        elif numbers_count and word in _YES:
            found[value] = yes
        elif numbers_count and word in _NO:
            found[value] = no
    return found


def named_label_columns(columns: Sequence[str]) -> list[str]:
    """The columns whose names say that they hold the label."""
    return [column for column in columns if folded(column) in (*_HARM, *_NO_HARM)]


def find_prompt_column(columns: Sequence[str], chosen: str | None, where: str) -> str:
    """The column of the prompts. Raises `InputError` where there is none, or several that it may be."""
    if chosen is not None:
        return _chosen(columns, chosen, where)
    by_name: dict[str, list[str]] = {}
    for column in columns:
        by_name.setdefault(folded(column), []).append(column)
    for names in (("prompt",), (*_TEXTS, *_CHATS), _WEAK):
        found = [column for name in names for column in by_name.get(name, ())]
        if len(found) > 1:
            raise InputError(
                f"{where} has several columns that may hold the prompt: {', '.join(found)}; "
                "name one with --prompt-column (of two files: FILE:COLUMN)."
            )
        if found:
            return found[0]
    for name in _LAST:
        if name in by_name:
            return by_name[name][0]
    raise InputError(
        f"{where} has no column of prompts under a usual name (columns: {_listed(columns)}); "
        "name it with --prompt-column (of two files: FILE:COLUMN)."
    )


def find_label_column(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], chosen: str | None, where: str
) -> str | None:
    """The column of the labels, or None where there is none; a usual name counts before what its values say.

    Raises `InputError` for several columns that disagree, and for a column that is not there.
    """
    if chosen is not None:
        return _chosen(columns, chosen, where)
    named = named_label_columns(columns)
    readable = {column: labels for column in named if (labels := readable_labels(rows, column))}
    if "label" in named and (len(named) == 1 or set(readable.get("label", {})) & {"harmful", "harmless"}):
        return "label"
    if readable:
        first, *others = readable
        for other in others:
            for row in rows:
                mine, theirs = value_of(row.get(first)), value_of(row.get(other))
                if mine and theirs and readable[first][mine] != readable[other][theirs]:
                    raise InputError(
                        f"{where} has several columns that may hold the label and that disagree: "
                        f"{', '.join(readable)}; name one with --label-column."
                    )
        return first
    maybe = [column for column in columns if folded(column) in _MAYBE and readable_labels(rows, column)]
    if len(maybe) > 1:
        raise InputError(
            f"{where} has several columns that may hold the label: {', '.join(maybe)}; name one with --label-column."
        )
    if maybe:
        return maybe[0]
    return named[0] if named else None


def kind_of_harm(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str | None:
    """The column that names a kind of harm in every row, as sets of harmful requests alone have one; or None."""
    for column in columns:
        if folded(column) in _KINDS_OF_HARM:
            values = {value_of(row.get(column)) for row in rows}
            if not any(value in _NO_KIND or value in _NO or folded(value) in _HARMLESS_WORDS for value in values):
                return column
    return None


def readable_labels(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, str]:
    """The labels of a column's values, where all have one; else nothing."""
    values = list(dict.fromkeys(value_of(row.get(column)) for row in rows))
    labels = labels_of(column, values)
    return labels if labels and all(value in labels for value in values if value) else {}


def _chosen(columns: Sequence[str], chosen: str, where: str) -> str:
    for column in columns:
        if folded(column) == folded(chosen):
            return column
    raise InputError(f"{where} has no column {chosen[:60]!r}; it has: {_listed(columns)}.")


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(column or "(no name)" for column in columns)[:300] or "none"


# --------------------------------------------------------------------------------------------------------------- chats


_USER = ("user", "human", "prompter", "")
_SYSTEM = ("system", "developer")


def is_chat(value: object, *, of_both_sides: bool = False) -> bool:
    """Whether a value is a list of turns, each with a role and a content; `of_both_sides`: and nothing else, by two."""
    if not isinstance(value, list) or not value:
        return False
    if not all(
        isinstance(turn, dict) and not _ROLES.isdisjoint(turn) and not _CONTENTS.isdisjoint(turn) for turn in value
    ):
        return False
    return not of_both_sides or (all(len(turn) == 2 for turn in value) and len(set(map(_role, value))) > 1)


def text_of(cell: object, column: str) -> object:
    """The prompt in a cell: a text as it is; of a chat (a list, a struct, or one written as text) the first user turn.

    Raises `ValueError` with what is missing; anything else is given back as it is.
    """
    turns = _turns(cell, column)
    if not isinstance(turns, (list, tuple)):
        return turns
    if not turns:
        raise ValueError("a chat without turns")
    if all(isinstance(turn, str) for turn in turns):
        return turns[0]
    for turn in turns:
        if isinstance(turn, dict) and _role(turn) in _USER:
            return _content(turn)
    raise ValueError("a chat without a user's turn")


def system_of(cell: object, column: str, row: Mapping[str, Any]) -> str:
    """The system turns of a chat before its first user turn, or the row's own column of that name; empty for none."""
    texts = []
    try:
        turns = _turns(cell, column)
    except ValueError:
        return ""
    beside = [cell, row] if isinstance(cell, dict) else [row] if folded(column) in _CHATS else []
    for turn in turns if isinstance(turns, (list, tuple)) else ():
        if isinstance(turn, dict) and _role(turn) in _USER:
            break
        if isinstance(turn, dict) and _role(turn) in _SYSTEM:
            texts.append(_content(turn))
    texts += [named[name] for named in beside for name in ("system", "system_prompt") if name in named]
    return "\n\n".join(text.strip() for text in texts if isinstance(text, str) and text.strip())


def _turns(cell: object, column: str) -> object:
    """The turns of a chat in a cell; a cell that holds none as it is."""
    if isinstance(cell, str):
        if folded(column) in _TRANSCRIPTS:
            spoken = _TRANSCRIPT.match(cell)
            return spoken[1] if spoken else cell
        if folded(column) not in _CHATS or not cell.strip().startswith(("[", "{")):
            return cell
        cell = _written(cell)
    if isinstance(cell, dict):
        lists = [name for name, inner in cell.items() if isinstance(inner, list)]
        nested = next((cell[name] for name in _CHATS if isinstance(cell.get(name), list)), None)
        if nested is not None:
            return _turns(nested, column)
        if len(lists) > 1:  # a struct of arrays
            length = min(len(cell[name]) for name in lists)
            return [{name: cell[name][number] for name in lists} for number in range(length)]
        return [cell]
    return cell


def _content(turn: Mapping[str, Any]) -> object:
    content = next((turn[name] for name in _CONTENTS if name in turn), None)
    if isinstance(content, list):  # parts of a message
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "\n".join(part for part in parts if isinstance(part, str))
    return content


def _role(turn: Mapping[str, Any]) -> str:
    role = next((turn[name] for name in _ROLES if name in turn), "")
    return str(role).strip().casefold()


def _written(cell: str) -> object:
    try:
        return parse_json(cell)
    except ValueError:
        pass
    try:
        return ast.literal_eval(cell.strip())  # as pandas writes a list into CSV
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise ValueError("neither a text nor a chat in JSON") from None
