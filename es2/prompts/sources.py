"""The one string that names prompts, in a command, in a job's `config.json` and in the app's address.

It is `builtin`, a path, `hf:<dataset>[:split]`, a benchmark with or without a path, or `pair:HARMFUL|HARMLESS` for two
of these; behind it may stand what overrules the reading of columns: `mine.csv?prompt-column=goal&skip-bad-rows=yes`.
`write_source` alone writes it and `read_source` alone takes it apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from urllib.parse import parse_qs, quote, urlencode

_KEYS = ("prompt-column", "harmless-column", "label-column", "harmful-values", "skip-bad-rows")
_SUFFIX = re.compile(rf"\?((?:(?:{'|'.join(_KEYS)})=[^?&\n]+&?)+)\Z")
_PAIR = "pair:"


@dataclass(frozen=True)
class Source:
    """A prompt source in its parts.

    Attributes:
        place: a path, or another name of prompts; of two files the harmful one.
        harmless: the other one of two files, or None.
        prompt_column: the column of the prompts; None where it is to be found.
        harmless_column: the same of the other file.
        label_column: the column of the labels; None where it is to be found.
        harmful_values: its values that are harmful, all others being harmless; empty where that is to be found.
        skip_bad_rows: whether wrong rows are left out and counted.
    """

    place: str
    harmless: str | None = None
    prompt_column: str | None = None
    harmless_column: str | None = None
    label_column: str | None = None
    harmful_values: tuple[str, ...] = ()
    skip_bad_rows: bool = False

    @property
    def places(self) -> tuple[str, ...]:
        """The one or two places."""
        return (self.place,) if self.harmless is None else (self.place, self.harmless)


def write_source(source: Source) -> str:
    """The string of a source."""
    text = source.place
    if source.harmless is not None:
        text = _PAIR + "|".join(place.replace("%", "%25").replace("|", "%7C") for place in source.places)
    given = (source.prompt_column, source.harmless_column, source.label_column, source.harmful_values or None)
    values = [(key, value) for key, value in zip(_KEYS, given, strict=False) if value]
    values += [("skip-bad-rows", "yes")] * source.skip_bad_rows
    return f"{text}?{urlencode(values, doseq=True, quote_via=quote)}" if values else text


def read_source(text: str) -> Source:
    """The parts of a source's string; a string of another form is a place as it stands."""
    found = _SUFFIX.search(text)
    place = text[: found.start()] if found else text
    values = parse_qs(found[1]) if found else {}
    one = {key: values[key][-1] for key in _KEYS if key in values}
    places = place.removeprefix(_PAIR).split("|") if place.startswith(_PAIR) else []
    harmless = None
    if len(places) == 2 and all(places):
        place, harmless = (own.replace("%7C", "|").replace("%25", "%") for own in places)
    return Source(
        place,
        harmless,
        one.get("prompt-column"),
        one.get("harmless-column"),
        one.get("label-column"),
        tuple(values.get("harmful-values", ())),
        one.get("skip-bad-rows") == "yes",
    )


def source_title(text: str) -> str:
    """A source in few words: its file names, and what was chosen about their columns."""
    source = read_source(text)
    names = [place if place.startswith("hf:") else PurePath(place).name or place for place in source.places]
    chosen = [source.prompt_column, source.harmless_column, source.label_column, *source.harmful_values]
    chosen += ["wrong rows left out"] * source.skip_bad_rows
    return " and ".join(names) + (f" ({', '.join(filter(None, chosen))})" if any(chosen) else "")
