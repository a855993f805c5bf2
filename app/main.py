"""The workbench's entry: `streamlit run app/main.py`.

It imports neither torch nor transformers, so that it opens at once and cannot be taken down by a model: whatever needs
them is a job in a process of its own (`es2.jobs.queue`), and this side reads the files that jobs leave behind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import streamlit as st

# Streamlit puts this file's own folder on the path, not the one that holds the package `app`.
ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from app.components import plotly_library  # noqa: E402

# First of all, since what follows takes Python a second once: the browser has plotly by then.
st.set_page_config(page_title="ES2 Workbench", page_icon=str(Path(__file__).with_name("icon.svg")), layout="wide")
plotly_library.begin()

from app import artifacts, binding, sidebar, state  # noqa: E402
from app.text import sentences  # noqa: E402

# The module below `app.views` (also the address), the title, the icon. No docstring: Streamlit would show it.
PAGES = (
    ("compare", "Compare", "compare"),
    ("layers", "Layers", "layers"),
    ("series", "Series", "stacked_line_chart"),
    ("runs", "Runs", "model_training"),
    ("sweep", "Sweep", "scatter_plot"),
    ("behaviour", "Behaviour", "chat"),
    ("robustness", "Robustness", "shield"),
    ("own", "Your own", "edit_note"),
)


def page(name: str) -> Callable[[], None]:
    """Renders a page, which is imported on its first visit: the first visitor waits for one page, not for all."""

    def render() -> None:
        match name:
            case "compare":
                from app.views.compare import page as show
            case "layers":
                from app.views.layers import page as show
            case "series":
                from app.views.series import page as show
            case "runs":
                from app.views.runs import page as show
            case "sweep":
                from app.views.sweep import page as show
            case "behaviour":
                from app.views.behaviour import page as show
            case "robustness":
                from app.views.robustness import page as show
            case "own":
                from app.views.own import page as show
        show()

    render.__name__ = name
    return render


def main() -> None:
    """Render the sidebar and the chosen page; the address follows the choice."""
    known = {
        name: st.Page(page(name), title=title, icon=f":material/{icon}:", default=name == "compare")
        for name, title, icon in PAGES
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
