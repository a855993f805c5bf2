"""Text from outside, made safe for the three places that interpret it.

Prompts, file names and error sentences come from users and data sets, and each place they are shown has a small
language of its own: plotly's labels read HTML-like tags and entities, Streamlit's messages read Markdown, and a tooltip
of 20,000 characters hides the chart. What is shown must be what was written, so everything passes through here on its
way out.
"""

from __future__ import annotations

import html
import re
import textwrap

HOVER_WIDTH = 60
HOVER_CHARACTERS = 400

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~<>$:&^=])")


def markdown(text: str) -> str:
    """`text` as Markdown that reads exactly like it: on one line, nothing in it is markup, an icon or a formula."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def label(text: str) -> str:
    """`text` as one line of a plotly label: no tag, entity or formula in it is interpreted."""
    return html.escape(" ".join(text.split()), quote=False).replace("$", "&#36;")


def hover(text: str, *, width: int = HOVER_WIDTH, limit: int = HOVER_CHARACTERS) -> str:
    """`text` as a plotly hover label: cut after `limit` characters, wrapped at `width`, escaped as `label` does."""
    text = " ".join(text.split())
    if len(text) > limit:
        text = text[: limit - 1].rstrip() + "…"
    return "<br>".join(label(line) for line in textwrap.wrap(text, width) or [""])


def duration(seconds: float) -> str:
    """Seconds in words that are no more exact than an estimate is: `12 s`, `3 min`, `1 h 40 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
