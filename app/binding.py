"""Whether other machines can reach this server; if so, every page and the log warn.

There is no password: every visitor can read prompts and runs, name files of this account, start jobs and delete runs.
"""

from __future__ import annotations

import ipaddress
import logging

import streamlit as st

from app import text

logger = logging.getLogger(__name__)


def is_exposed(address: str | None) -> bool:
    """Whether a server that listens on this address can be reached from other machines; None is every address."""
    if address is None or address == "":
        return True
    if address == "localhost":
        return False
    try:
        return not ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return True  # a host's name: nothing is known of it


def warn() -> None:
    """Warn on the page, and once in the log, when other machines can reach this server."""
    address = st.get_option("server.address")
    if is_exposed(address):
        sentence = _logged(address or "every address of this machine")
        st.error(f"**{text.markdown(sentence)}**", icon=":material/lock_open:")


@st.cache_resource(show_spinner=False)
def _logged(where: str) -> str:
    sentence = (
        f"This server listens on {where} and has no password: every visitor can read, start and delete what you "
        "can. Start it without --server.address, and use an SSH tunnel to reach it from elsewhere."
    )
    logger.warning("%s", sentence)
    return sentence
