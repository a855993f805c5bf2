"""A report: one HTML file that shows what a fine-tune did and loads nothing from anywhere.

The page itself is made in `es2.report.page`.
"""

from __future__ import annotations

from pathlib import Path

from es2.core.errors import InputError
from es2.core.files import output_path, write_text, writing
from es2.report.page import Compared, report_html


def write_report(compared: Compared, out: Path, *, force: bool = False) -> Path:
    """The absolute path of the report, which is written whole or not at all; `force` replaces a file.

    Raises:
        InputError: when the file exists and is not to be replaced, or is a folder.
        MachineError: when the machine refuses; an old file stays as it was.
    """
    out = output_path(out)
    if out.is_dir():
        raise InputError(f"{str(out)!r} is a folder; give the name of an HTML file.")
    if out.exists() and not force:
        raise InputError(f"{str(out)!r} exists; give another name, or --force to replace it.")
    page = report_html(compared)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page, errors="replace")
    return out
