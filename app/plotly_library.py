"""The plotly.js that the plotly package ships, for components of our own.

It is 4.8 MB: the server offers it under an address of its own and a page loads it once, whichever component asks first.
"""

from __future__ import annotations

from pathlib import Path

import plotly
import streamlit as st
from streamlit.components.v1 import declare_component

# Never mounted: declaring it makes the server offer the files of its folder.
_PACKAGE = declare_component("plotly", path=Path(plotly.__file__).with_name("package_data"))

ADDRESS = f"component/{_PACKAGE.name}/plotly.min.js"
"""Where the server offers it; what `library` in the component's script takes."""

_LOADER = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
_early = st.components.v2.component(
    "es2_plotly", js=_LOADER + "export default ({ data }) => void library(data.library);"
)


def fetch_early() -> None:
    """Let the browser fetch and compile it while the page's figures are still on their way."""
    with st.container(key="plotly_library"):
        _early(key="plotly", data={"library": ADDRESS})


def script(path: Path) -> str:
    """A component's script with `library(address)` before it, which resolves to plotly."""
    return _LOADER + path.read_text(encoding="utf-8")
