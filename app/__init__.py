"""The Streamlit app: it reads artifacts, draws them, starts and cancels jobs; the analysis itself lives in `es2`."""
