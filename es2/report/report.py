"""A report: one HTML file that shows what a fine-tune did and loads nothing from anywhere.

The page itself is made in `es2.report.page`.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from es2.core.errors import InputError
from es2.core.files import machine_error, output_path
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
    temporary = out.with_name(f".tmp-{out.name}-{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    except OSError as error:
        raise machine_error(error, out) from error
    finally:
        temporary.unlink(missing_ok=True)
    return out
