"""The two ways in which work can end without a result, each with one sentence that names the thing and the fix.

The command line turns them into exit codes, the app into a message, and neither shows a traceback.
"""

from __future__ import annotations


class Es2Error(Exception):
    """A failure whose message is one clear sentence for the user. `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(Es2Error):
    """Bad input that the user can mend: a wrong name, a damaged file, an impossible setting."""

    exit_code = 2


class MachineError(Es2Error):
    """The machine or the network refused: no space, no memory, no permission, no connection."""


def one_line(error: object) -> str:
    """An error's message as a part of a sentence: on one line, not long, without its own full stop."""
    return " ".join(str(error).split())[:200].rstrip(". ")
