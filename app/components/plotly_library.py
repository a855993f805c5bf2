"""The plotly.js that the plotly package ships, for components of our own: 4.8 MB that a page loads once."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly
import streamlit as st
from streamlit.components.v1 import declare_component

if TYPE_CHECKING:
    from streamlit.components.v2.types import ComponentRenderer


# Or streamlit's `inspect.getmodule` resolves the paths of a thousand modules to find this one, 0.06 s.
inspect.modulesbyfile[__file__] = __name__
# Never mounted: declaring it makes the server offer the files of its folder.
_PACKAGE = declare_component("plotly", path=Path(plotly.__file__).with_name("package_data"))

ADDRESS = f"component/{_PACKAGE.name}/plotly.min.js"  # on the server, for `library` in a component's script

_LOADER = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
_early = st.components.v2.component(
    "es2_plotly",
    css=Path(__file__).with_name("style.css").read_text(encoding="utf-8"),
    js=_LOADER + "export default ({ data }) => fetchAhead(data.library);",
    isolate_styles=False,
)


def begin() -> None:
    """Have the browser fetch plotly.js while the page's figures are still on their way, and load the page's style."""
    with st.container(key="plotly_library"):
        _early(key="plotly", data={"library": ADDRESS})


def component(name: str, file: Path, html: str, **settings: Any) -> ComponentRenderer:
    """A component whose script may call `library(address)`, which resolves to plotly.

    Args:
        file: a path beside its script and style, which end in `.js` and `.css`.
        html: its initial content.
    """
    css = file.with_suffix(".css").read_text(encoding="utf-8")
    js = _LOADER + file.with_suffix(".js").read_text(encoding="utf-8")
    return st.components.v2.component(name, html=html, css=css, js=js, **settings)
