"""From the source that a user names to a prompt set: the built-in pairs, a file, a data set, a benchmark."""

from __future__ import annotations

import csv
import io
from functools import cache
from importlib import resources
from pathlib import Path

from es2.core.errors import InputError
from es2.prompts.benchmarks import is_benchmark, load_benchmark
from es2.prompts.prompt_set import LABELS, PromptSet
from es2.prompts.readers import parse_prompts, read_bounded, read_hub_rows
from es2.prompts.rows import from_rows


def load_prompts(source: str) -> PromptSet:
    """The prompt set of a source.

    Args:
        source: `builtin`; the path of a `.csv`, `.jsonl` or `.parquet` file with columns `prompt` and `label`
            (`harmful` or `harmless`) and, where known, `category`, `pair` and `split`; `hf:<dataset>[:split]`
            for a data set of the Hugging Face Hub with those columns; or a benchmark's name, with `:path` for its
            published file (`es2.prompts.benchmarks`).

    Raises:
        InputError: with the row and the column, when the source cannot be read as prompts.
        MachineError: when the Hub cannot be reached.
    """
    if source == "builtin":
        return load_builtin()
    if source.startswith("hf:"):
        name, _, split = source.removeprefix("hf:").partition(":")
        return from_rows(source, read_hub_rows(name, split or "train"), where=f"the data set {name!r}")
    if is_benchmark(source):
        return load_benchmark(source)
    return load_file(Path(source))


@cache
def load_builtin() -> PromptSet:
    """The contrast pairs written for this project (`es2/data/contrast_pairs.csv`, see `docs/prompts.md`)."""
    table = resources.files("es2") / "data" / "contrast_pairs.csv"
    rows = []
    for number, pair in enumerate(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))), start=2):
        for label in LABELS:
            row = {"prompt": pair[label], "label": label, "category": pair["category"], "pair": pair["pair"]}
            rows.append((f"row {number}", row))
    return from_rows("builtin", rows, where="the built-in prompts")


def load_file(path: Path) -> PromptSet:
    """The prompts of a CSV, JSONL or Parquet file. Raises `InputError`."""
    shown = repr(str(path)[:300])
    if "\0" in str(path):
        raise InputError("The prompt file's name holds a NUL byte; give the path of a .csv, .jsonl or .parquet file.")
    try:
        if not path.exists():
            raise InputError(
                f"There is no prompt file {shown}; give builtin, a .csv, .jsonl or .parquet file, or hf:<dataset>."
            )
        if path.is_dir():
            raise InputError(f"{shown} is a folder; give the .csv, .jsonl or .parquet file inside it.")
        data = read_bounded(path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{shown} cannot be read ({reason}); check its name and permissions.") from error
    return parse_prompts(data, path.name)
