"""The options about prompts: what goes together, and that a job keeps what was given."""

from __future__ import annotations

from pathlib import Path

import pytest

from es2.cli.prompt_options import _source
from es2.core.errors import InputError
from es2.prompts.loading import load_prompts

NOTHING = {
    "prompts": None,
    "harmful": None,
    "harmless": None,
    "prompt_column": None,
    "label_column": None,
    "harmful_values": None,
    "skip_bad_rows": False,
}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"harmful": "a.csv"}, "--harmful alone"),
        ({"harmless": "a.csv"}, "--harmless alone"),
        ({"prompts": "a.csv", "harmful": "b.csv", "harmless": "c.csv"}, "not both"),
        ({"harmful": "b.csv", "harmless": "c.csv", "label_column": "x"}, "the files are the labels"),
        ({"skip_bad_rows": True}, "give the file with --prompts"),
    ],
)
def test_what_does_not_go_together(given: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        _source(**NOTHING | given)  # type: ignore[arg-type]


def test_what_is_given_is_one_source(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("frage,art\nBreak it,S1\nOil it,S2\n,S2\n")
    given = {"prompts": str(tmp_path / "m.csv"), "prompt_column": "frage", "label_column": "art"}
    source = _source(**NOTHING | given | {"harmful_values": "S1, S9", "skip_bad_rows": True})  # type: ignore[arg-type]
    assert load_prompts(source).labels.tolist() == [1, 0]
    again = _source(**NOTHING | {"prompts": source})  # type: ignore[arg-type]
    assert again == source
    pair = _source(**NOTHING | {"harmful": f"{tmp_path / 'm.csv'}:frage", "harmless": "b.txt"})  # type: ignore[arg-type]
    assert pair == f"pair:{tmp_path / 'm.csv'}|b.txt?prompt-column=frage"
