"""Which process of pytest-xdist runs what: a file's tests one process, and all files that drive a browser the same.

A browser and its server fill a core and more, and their tests wait for what is drawn: two at once fail on a slow
machine.
"""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

BROWSER = "tests/system/browser/"


class OneBrowser(LoadFileScheduling):
    """By files, as `--dist loadfile`; those of the browser are one file."""

    def _split_scope(self, nodeid: str) -> str:
        return BROWSER if nodeid.startswith(BROWSER) else super()._split_scope(nodeid)
