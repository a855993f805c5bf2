"""The standard benchmarks by name, read from the files that their authors publish.

Columns, labels, licence and citation of each are data, so that all users read the same rows in the same way. No file is
shipped, and columns of answers, targets or attack strings are not read.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from es2.core.errors import InputError
from es2.core.files import expanded
from es2.prompts.prompt_set import PromptSet
from es2.prompts.readers import read_bounded, read_hub_rows, read_table
from es2.prompts.rows import Row, from_rows


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        prompt: columns that may hold the prompt; the first one found counts. A list's first entry is taken.
        label: `harmful` or `harmless` for all rows; or `file`, by words in the file's name or the Hub's folder; or
            `xstest`, by the column `label` and, where it is missing, by a type that begins with `contrast_`.
        source: address and name of the published file.
        category: columns that may hold the category.
        context: a column whose text goes before the prompt, where it is not empty.
        pair: a column of ids of pairs whose members may be in two files.
        harmless_files, harmful_files: words in a file's name that decide its rows' label (label `file`).
        hub: the data set on the Hugging Face Hub, or None.
        hub_folders: the configurations or splits of it that are read (`configuration/split`); empty for the split
            `train` of every configuration.
        gated: whether the Hub asks for a log-in and consent first.
    """

    name: str
    title: str
    prompt: tuple[str, ...]
    label: str
    licence: str
    citation: str
    source: str
    category: tuple[str, ...] = ("category",)
    context: str | None = None
    pair: str | None = None
    harmless_files: tuple[str, ...] = ()
    harmful_files: tuple[str, ...] = ()
    hub: str | None = None
    hub_folders: tuple[str, ...] = ()
    gated: bool = False


def _known() -> tuple[Benchmark, ...]:
    """The benchmarks of `es2/data/benchmarks.toml`, in their order."""
    entries: Any
    text = (resources.files("es2") / "data" / "benchmarks.toml").read_text(encoding="utf-8")
    entries = (
        {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        for entry in tomllib.loads(text)["benchmark"]
    )
    return tuple(Benchmark(**entry) for entry in entries)


BENCHMARKS = _known()
"""Licences are as the publishers state them; the files decide."""

_BY_NAME: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in BENCHMARKS}


def is_benchmark(source: str) -> bool:
    """Whether a prompt source names a benchmark: `advbench`, or `advbench:` and a path."""
    return source.partition(":")[0].lower() in _BY_NAME


def absolute_source(source: str) -> str:
    """A prompt source with its path made absolute, so that it means the same wherever a job runs."""
    name, _, path = source.partition(":")
    if source == "builtin" or source.startswith("hf:"):
        return source
    if is_benchmark(source):
        return f"{name.lower()}:{Path(expanded(path)).absolute()}" if path else name.lower()
    return str(Path(expanded(source)).absolute())


def load_benchmark(source: str) -> PromptSet:
    """The prompts of a benchmark, under its name.

    Args:
        source: `name:path` for a published file on this machine (CSV, JSON, JSONL or Parquet), or for a folder that
            holds several (JailbreakBench, OR-Bench); the name alone for its copy on the Hub.

    Raises:
        InputError: for an unknown name, a file that is not the benchmark's, and as `load_prompts` does.
        MachineError: when the Hub cannot be reached.
    """
    name, _, path = source.partition(":")
    if name.lower() not in _BY_NAME:
        raise InputError(f"There is no benchmark {name[:40]!r}; there are: {', '.join(_BY_NAME)}.")
    benchmark = _BY_NAME[name.lower()]
    if path:
        rows = list(_path_rows(benchmark, Path(expanded(path))))
        return from_rows(benchmark.name, rows, where=f"{benchmark.title} ({Path(path).name!r})")
    if benchmark.hub is None:
        raise InputError(f"{benchmark.title} is not on the Hub; get {benchmark.source} and give {name}:PATH.")
    rows = [
        _row(benchmark, place, row, place)
        for folder in benchmark.hub_folders or ("train",)
        for place, row in read_hub_rows(benchmark.hub, folder)
    ]
    return from_rows(benchmark.name, rows, where=f"{benchmark.title} (hf:{benchmark.hub})")


def _path_rows(benchmark: Benchmark, path: Path) -> Iterator[Row]:
    shown = repr(str(path)[:300])
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if _stated_label(benchmark, file.name))
            if not files:
                raise InputError(f"The folder {shown} holds no file of {benchmark.title}: {benchmark.source}.")
        elif path.is_file():
            files = [path]
        else:
            raise InputError(f"There is no file {shown}; get {benchmark.source} and give its path.")
        for file in files:
            for place, row in read_table(read_bounded(file), file.name):
                place = f"{file.name}, {place}" if len(files) > 1 else place
                yield _row(benchmark, place, row, file.name)
    except OSError as error:
        raise InputError(f"{shown} cannot be read ({error.strerror or error}); check its permissions.") from error


def _row(benchmark: Benchmark, place: str, row: Mapping[str, Any], file: str) -> Row:
    """One published row as a row of a prompt set."""
    found = next((column for column in benchmark.prompt if column in row), None)
    if found is None:
        raise InputError(
            f"{place} has no column {' or '.join(benchmark.prompt)}, so this is no file of {benchmark.title} "
            f"({benchmark.source})."
        )
    prompt = row[found]
    if isinstance(prompt, (list, tuple)):
        prompt = prompt[0] if prompt else ""
    if benchmark.name == "alpaca" and isinstance(prompt, str) and (more := row.get("input")):
        prompt = f"{prompt}\n\n{more}"
    if benchmark.context and isinstance(prompt, str) and (context := row.get(benchmark.context)):
        prompt = f"{context}\n\n---\n\n{prompt}"  # as HarmBench's own code puts them together
    cells: dict[str, Any] = {"prompt": prompt, "label": _label(benchmark, row, file)}
    category = next((row[column] for column in benchmark.category if isinstance(row.get(column), str)), None)
    if category:
        cells["category"] = category
    if benchmark.pair and row.get(benchmark.pair) not in (None, ""):
        cells["pair"] = f"{benchmark.name}:{row[benchmark.pair]}"
    return place, cells


def _label(benchmark: Benchmark, row: Mapping[str, Any], file: str) -> str:
    if benchmark.label == "xstest":
        stated = str(row.get("label") or "").strip().casefold()
        if stated in ("safe", "unsafe"):
            return "harmless" if stated == "safe" else "harmful"
        return "harmful" if str(row.get("type") or "").startswith("contrast_") else "harmless"
    if benchmark.label == "file":
        if (label := _stated_label(benchmark, file)) is not None:
            return label
        words = ", ".join((*benchmark.harmful_files, *benchmark.harmless_files))
        raise InputError(
            f"The name of {file!r} does not say whether its rows are harmful; {benchmark.title} has them in files "
            f"whose names hold one of {words}."
        )
    return benchmark.label


def _stated_label(benchmark: Benchmark, file: str) -> str | None:
    """The label in a file's name; for benchmarks of one label, `any` for every table."""
    if benchmark.label != "file":
        return "any" if Path(file).suffix.lower() in (".csv", ".json", ".jsonl", ".parquet") else None
    name = file.casefold()
    if any(word in name for word in benchmark.harmless_files):
        return "harmless"
    return "harmful" if any(word in name for word in benchmark.harmful_files) else None
