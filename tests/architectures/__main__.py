"""What holds for which architecture: captures, replies, fine-tunes and merges on tiny random models.

    python -m tests.architectures [NAME …] [--write docs/architectures.md] [--json FILE]

A line for each architecture as soon as it is done, on stderr; the table on stdout. Ends with 1 if any cell is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    from tests.architectures.configs import ARCHITECTURES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows of the table, such as llama; by default all")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the page whose tables are written anew")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every cell with its details there")
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.names} - {*ARCHITECTURES}):
        parser.error(f"there is no architecture {unknown[0]!r}; there are {', '.join(ARCHITECTURES)}")
    if arguments.names and arguments.write:
        parser.error("a page has every row; leave out the names or --write")

    from tests.architectures.outcomes import GOOD, markdown
    from tests.architectures.table import adapter_rows, page, row, tables

    rows = []
    for name in arguments.names or ARCHITECTURES:
        rows.append(row(name))
        cells = ", ".join(f"{column} {cell.outcome}" for column, cell in rows[-1].cells.items())
        print(f"{name}: {cells}", file=sys.stderr, flush=True)
        for column, cell in rows[-1].cells.items():
            if cell.detail:
                print(f"    {column}: {cell.detail}", file=sys.stderr, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([one.to_dict() for one in rows], indent=1) + "\n", encoding="utf-8")
    if arguments.write:
        text = arguments.write.read_text(encoding="utf-8")
        arguments.write.write_text(page(text, tables(rows, adapter_rows())), encoding="utf-8")
    print(markdown(rows, "architecture"))
    return int(any(cell.outcome not in GOOD for one in rows for cell in one.cells.values()))


if __name__ == "__main__":
    sys.exit(main())
