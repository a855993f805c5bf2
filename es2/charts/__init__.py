"""Figures: pure functions from data to plotly figures, without Streamlit."""
