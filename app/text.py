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
_CONTROLS = {
    "with --prompts, or name the prompts' column behind the file (FILE:COLUMN)": "as “One file with labels”, or choose "
    "its “Prompt column”",
    "with --prompt-column": "under “Prompt column”",
    "with --label-column": "under “Label column”",
    "with --harmful-values": "under “Harmful values”",
    "with --harmful and --harmless": "as “Harmful prompts” and “Harmless prompts”",
    "with --system-prompt, or --system-prompt default for the template's own": "by one system turn for all chats",
    "--skip-bad-rows leaves such rows out": "“Leave wrong rows out” goes on without them",
}
"""What sentences of `es2.prompts` say of options, and what that is on the page *Your own*."""
_OPTIONS = re.compile("|".join(map(re.escape, _CONTROLS)))
_JOINER = "\u2060"  # has no width and separates nothing


def markdown(text: str) -> str:
    """`text` as Markdown that reads like it: on one line, nothing in it is markup, an icon, a formula or a link."""
    return _MARKDOWN.sub(r"\\\1", _READ_ANYWAY.sub(_JOINER, " ".join(text.split())))


def in_app(sentence: str, page: str = ", on the page Your own") -> str:
    """A sentence about the command line's options for prompts as one about the controls, which are on `page`."""
    said, n = _OPTIONS.subn(lambda found: _CONTROLS[found[0]], sentence)
    return f"{said.removesuffix('.')}{page}." if n else sentence


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
        st.error(markdown(in_app(str(error))), icon=":material/error:")
