"""Text from outside on its way to the screen: shown as written, never interpreted."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import text
from es2.report import labels

NASTY = '<b>x</b> <a href="https://example.org">y</a> <script>z</script> &amp; &lt; $x^2$ %{customdata[0]} `c`'


def read_by_plotly(label: str) -> list[str]:
    """The lines that plotly shows for a label: its own line breaks, then entities."""
    return [html.unescape(line) for line in label.split("<br>")]


@given(st.text(max_size=300))
def test_a_label_reads_as_written(written: str) -> None:
    assert read_by_plotly(labels.label(written)) == [" ".join(written.split())]


@given(st.text(max_size=1500))
def test_a_hover_reads_as_written_until_it_is_cut(written: str) -> None:
    label = labels.hover(written)
    lines = read_by_plotly(label)
    assert all(len(line) <= labels.HOVER_WIDTH for line in lines)
    read = re.sub(r"\s", "", "".join(lines))
    whole = re.sub(r"\s", "", written)
    assert read == whole or (
        read.endswith("…") and whole.startswith(read[:-1]) and len(read) <= labels.HOVER_CHARACTERS
    )


def test_no_tag_but_the_line_break_is_left() -> None:
    label = labels.hover(NASTY * 3)
    assert set(re.findall(r"<[^>]*>", label)) == {"<br>"}
    assert "$" not in label


def test_a_word_longer_than_the_line_is_broken() -> None:
    assert max(map(len, labels.hover("a" * 1000).split("<br>"))) == labels.HOVER_WIDTH


@pytest.mark.parametrize(
    "markup", ["**x**", "[x](y)", ":red[x]", ":material/home:", "`x`", "$x$", "# x", "<b>", "a_b_"]
)
def test_markdown_escapes_its_own_marks(markup: str) -> None:
    """Every mark that CommonMark or Streamlit knows has a backslash before it."""
    escaped = text.markdown(markup).replace("\u2060", "")
    assert re.sub(r"\\(.)", r"\1", escaped) == markup
    assert not re.search(r"(?<!\\)[*_`\[\]:$#<]", escaped)


@pytest.mark.parametrize("read", ["--model", "a -> b", "x >= y", "http://x.y", "WWW.x.y", "a@b.c", ":streamlit:"])
def test_what_streamlit_reads_in_spite_of_escapes_is_parted(read: str) -> None:
    """Streamlit looks for these in the text that is left when marks were read; a browser test looks at it."""
    parted = re.sub(r"\\(.)", r"\1", text.markdown(read))
    assert "\u2060" in parted
    assert parted.replace("\u2060", "") == read


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "1 s"), (12.4, "12 s"), (89, "89 s"), (150, "2 min"), (3599, "1 h 00 min"), (6000, "1 h 40 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert text.duration(seconds) == words
