"""The workbench's entry: `streamlit run app/main.py`.

It imports neither torch nor transformers, so that it opens at once and cannot be taken down by a model: whatever needs
them is a job in a process of its own (`es2.jobs.queue`), and this side reads the files that jobs leave behind.
"""

from __future__ import annotations

import sys
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

# A page is imported when somebody turns to it: the first visitor waits for one, not for six.


def compare() -> None:
    from app.views import compare

    compare.page()


def layers() -> None:
    from app.views import layers

    layers.page()


def runs() -> None:
    from app.views import runs

    runs.page()


def behaviour() -> None:
    from app.views import behaviour

    behaviour.page()


def robustness() -> None:
    from app.views import robustness

    robustness.page()


def own() -> None:
    from app.views import own

    own.page()


def main() -> None:
    """Draw the sidebar and the chosen page; the address follows the choice."""
    known = {
        "compare": st.Page(compare, title="Compare", icon=":material/compare:", default=True),
        "layers": st.Page(layers, title="Layers", icon=":material/layers:", url_path="layers"),
        "runs": st.Page(runs, title="Runs", icon=":material/model_training:", url_path="runs"),
        "behaviour": st.Page(behaviour, title="Behaviour", icon=":material/chat:", url_path="behaviour"),
        "robustness": st.Page(robustness, title="Robustness", icon=":material/shield:", url_path="robustness"),
        "own": st.Page(own, title="Your own", icon=":material/edit_note:", url_path="own"),
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
