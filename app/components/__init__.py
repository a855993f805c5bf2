"""Our own JavaScript and CSS, and the Python that feeds them."""
