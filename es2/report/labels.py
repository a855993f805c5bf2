"""Text from users and data sets, made harmless: plotly's labels interpret tags, entities and formulas, a terminal
control characters.
"""

from __future__ import annotations

import html
import re
import textwrap

HOVER_WIDTH = 60
HOVER_CHARACTERS = 400

_COLOUR_CODE = re.compile(r"\x1b\[[0-9;]*m")
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_OTHER_CONTROLS = dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)
_SHOWN = _PICTURES | _OTHER_CONTROLS


def plain(text: str) -> str:
    """`text` for a terminal or a log, without colour codes and with other control characters visible, such as ␛."""
    return _COLOUR_CODE.sub("", text).translate(_SHOWN)


def label(text: str) -> str:
    """`text` as one line of a plotly label: no tag, entity or formula in it is interpreted."""
    return html.escape(" ".join(text.split()), quote=False).replace("$", "&#36;")


def hover(text: str, *, width: int = HOVER_WIDTH, limit: int = HOVER_CHARACTERS) -> str:
    """`text` as a plotly hover label: cut after `limit` characters, wrapped at `width`, escaped as `label` does."""
    return "<br>".join(label(line) for line in textwrap.wrap(shortened(text, limit), width) or [""])


def shortened(text: str, limit: int) -> str:
    """`text` on one line, cut after `limit` characters with an ellipsis."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
