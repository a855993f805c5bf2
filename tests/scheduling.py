"""How many processes of pytest-xdist there are, and which of them runs what."""

from __future__ import annotations

import os
from collections.abc import Sequence

from xdist.scheduler import LoadFileScheduling

BROWSER = "tests/system/browser/"
AT_MOST = 4
"""Each holds torch and a gigabyte."""


def n_workers(markers: str, paths: Sequence[str]) -> int:
    """A process for each core, at most `AT_MOST`; 0 is the one process alone.

    That one starts sooner, so it runs single files; and the long tests, which load the machine and time it themselves.
    """
    if "not long" not in markers or any(".py" in path for path in paths):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, AT_MOST) if cores > 1 else 0


class OneBrowser(LoadFileScheduling):
    """A file's tests run in one process, and all files that drive a browser in the same.

    A browser and its server fill a core and more, and their tests wait for what is drawn: two at once fail on a slow
    machine.
    """

    def _split_scope(self, nodeid: str) -> str:
        return BROWSER if nodeid.startswith(BROWSER) else super()._split_scope(nodeid)
