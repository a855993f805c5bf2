"""The app's pages, one module each, joined in `app/main.py`."""
