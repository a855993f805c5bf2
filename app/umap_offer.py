"""What replaces the chart of a UMAP that was not computed yet."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from app import jobs_panel, text


def umap_offer(config: Mapping[str, str], seconds: float, *, height: int) -> None:
    """Say what UMAP needs, and start its job or show how far it is; `height` is that of the chart it replaces."""
    with st.container(border=True, height=height, key="umap_missing", vertical_alignment="center"):
        st.markdown("**UMAP is computed once for all layers and kept on disk.**")
        st.markdown(
            "It places prompts that are near each other in the model's space near each other in the plane. That "
            "takes a while, so it runs in the background; the other views stay usable meanwhile."
        )
        label = f"Compute UMAP for all layers (about {text.duration(seconds)})"
        jobs_panel.offer("project", config, label, "compute_umap", icon=None)
