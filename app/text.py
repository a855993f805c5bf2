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
from es2.core.progress import duration as duration
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
    "with --prompt-column (of two files: FILE:COLUMN)": "under “Prompt column”",
    "with --prompt-column": "under “Prompt column”",
    "with --label-column": "under “Label column”",
    "with --harmful-values": "under “Harmful values”",
    "with --harmful and --harmless": "as “Harmful prompts” and “Harmless prompts”",
    "--skip-bad-rows leaves such rows out": "“Leave wrong rows out” goes on without them",
}
"""What sentences of `es2.prompts` say of options, and what that is on the page *Your own*."""
_RENDERING = {
    "leave --system-prompt, --thinking and --template-arg out": "leave all of them “Automatic”, without arguments",
    "leave out --system-prompt none, or give another text in its place": "choose “Automatic” or “Own text” under "
    "“System prompt”",
    "leave out --system-prompt none": "choose another “System prompt”",
    "leave --system-prompt out": "choose “Automatic” under “System prompt”",
    "for which there is --thinking": "for which there is “Thinking”",
    "--thinking and the template argument": "“Thinking” and the template argument",
    "leave out --thinking, or --template-arg": "choose “Automatic” under “Thinking”, or take out the argument",
    "leave --thinking out": "choose “Automatic” under “Thinking”",
    "with --template-arg": "under “Template arguments”",
    "correct --template-arg, or leave it out": "correct it under “Template arguments”, or take it out",
    "with --system-prompt, or --system-prompt default for the template's own": "under “How the model reads them”, or "
    "choose “Template's own” there",
    "with --system-prompt, --thinking and --template-arg": "under “How the model reads them”",
    "leave it out of --template-arg": "take it out of “Template arguments”",
}
"""What sentences about a rendering say of options, and what that is in the panel of `app.rendering_panel`."""
_OF_RENDERING = re.compile("|".join(map(re.escape, _RENDERING)))
_OPTIONS = re.compile("|".join(map(re.escape, _CONTROLS)))
_JOINER = "\u2060"  # has no width and separates nothing


def markdown(text: str) -> str:
    """`text` as Markdown that reads like it: on one line, nothing in it is markup, an icon, a formula or a link."""
    return _MARKDOWN.sub(r"\\\1", _READ_ANYWAY.sub(_JOINER, " ".join(text.split())))


def in_app(sentence: str, page: str = ", on the page Your own") -> str:
    """A sentence about the command line's options as one about the controls; those for prompts are on `page`."""
    sentence = _OF_RENDERING.sub(lambda found: _RENDERING[found[0]], sentence)
    said, n = _OPTIONS.subn(lambda found: _CONTROLS[found[0]], sentence)
    return f"{said.removesuffix('.')}{page}." if n else sentence


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
