"""Text from outside, made safe where Streamlit reads Markdown; durations and notes in words; errors as sentences.

Page, sidebar and fragments each run in a `with sentences():` block, since a fragment that reruns by itself is outside
of the page's block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import streamlit as st

from es2.core.errors import Es2Error
from es2.store.activation_set import ActivationSet
from es2.store.sources import OWN_HOOKS, OWN_HOOKS_NOTE, PLAIN_TEXT, PLAIN_TEXT_NOTE

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~<>$:&^=])")
_READ_ANYWAY = re.compile(
    r"(?<=[-<>=~])(?=[-<>=~])|(?<=:)(?=//|material/|streamlit:)|(?<=www)(?=\.)|(?<=@)(?=\w)", re.IGNORECASE
)
"""Between which characters Streamlit sees an arrow, a dash, an icon or an address although every mark is escaped."""
_JOINER = "\u2060"  # has no width and separates nothing


def markdown(text: str) -> str:
    """`text` as Markdown that reads like it: on one line, nothing in it is markup, an icon, a formula or a link."""
    return _MARKDOWN.sub(r"\\\1", _READ_ANYWAY.sub(_JOINER, " ".join(text.split())))


def duration(seconds: float) -> str:
    """Seconds in words that are no more exact than an estimate is: `12 s`, `3 min`, `1 h 40 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def given_as(how: str | None) -> None:
    """Show that the model was given plain text, where it was; nothing is said of a chat template."""
    if how == PLAIN_TEXT:
        st.caption(f":material/info: {PLAIN_TEXT_NOTE}")


def how_read(activations: ActivationSet) -> None:
    """Show how prompts were given and embeddings read, where that is not the usual way."""
    given_as(activations.given_as)
    if activations.hooks == OWN_HOOKS:
        st.caption(f":material/info: {OWN_HOOKS_NOTE}")


def warn(sentence: str | None) -> None:
    """Show a sentence as a warning, where there is one."""
    if sentence is not None:
        st.warning(markdown(sentence), icon=":material/warning:")


@contextmanager
def sentences() -> Iterator[None]:
    """Show an `Es2Error` raised in the block as its sentence; the rest of the page goes on."""
    try:
        yield
    except Es2Error as error:
        st.error(markdown(str(error)), icon=":material/error:")
