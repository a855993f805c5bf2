"""The workbench's entry: `streamlit run app/main.py`.

It imports neither torch nor transformers, so that it opens at once and cannot be taken down by a model: whatever needs
them is a job in a process of its own (`es2.jobs`), and this side reads the files that jobs leave behind.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

if TYPE_CHECKING:
    from streamlit.navigation.page import StreamlitPage

# Streamlit puts this file's own folder on the path, not the one that holds the package `app`.
ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from app import plotly_library  # noqa: E402

# First of all, since what follows takes Python a second once: the browser has plotly by then.
st.set_page_config(page_title="ES2 Workbench", page_icon=str(Path(__file__).with_name("icon.svg")), layout="wide")
st.html(Path(__file__).with_name("style.css"))
plotly_library.fetch_early()

from app import artifacts, binding, sidebar, state  # noqa: E402
from app.messages import sentences  # noqa: E402


def page(name: str, title: str, icon: str, *, default: bool = False) -> StreamlitPage:
    """A page of `app.views`, imported when somebody turns to it: the first visitor waits for one page, not for six."""

    def show() -> None:
        importlib.import_module(f"app.views.{name}").page()

    return st.Page(show, title=title, icon=f":material/{icon}:", url_path=name, default=default)


def main() -> None:
    """Draw the sidebar and the chosen page; the address follows the choice."""
    known = {
        "compare": page("compare", "Compare", "compare", default=True),
        "layers": page("layers", "Layers", "layers"),
        "runs": page("runs", "Runs", "model_training"),
        "behaviour": page("behaviour", "Behaviour", "chat"),
        "robustness": page("robustness", "Robustness", "shield"),
        "own": page("own", "Your own", "edit_note"),
    }
    state.know_pages(known)
    pages = st.navigation(list(known.values()))
    state.open_link(artifacts.existing, pages.url_path)
    state.settle(**artifacts.of_run(state.current()))
    binding.warn()
    with sentences():
        pages.run()
    # After the page, whose figures are what people wait for.
    with st.sidebar, sentences():
        sidebar.show()
    state.mirror()


main()
