"""The one place where an error becomes a sentence on the page.

Page, sidebar and fragments each run in a `with sentences():` block, because a fragment that reruns by itself is outside
whatever the page wrapped around it. What reaches a person is the error's own sentence; anything else is a bug, goes to
the server's log, and Streamlit says that something went wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import streamlit as st

from app import text
from es2.core.errors import Es2Error


@contextmanager
def sentences() -> Iterator[None]:
    """Show an `Es2Error` raised in the block as its sentence; the rest of the page goes on."""
    try:
        yield
    except Es2Error as error:
        st.error(text.markdown(str(error)), icon=":material/error:")
