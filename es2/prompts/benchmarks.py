"""The standard benchmarks by name, read from the files that their authors publish.

Columns, labels, licence and citation of each are data, so that all users read the same rows in the same way. No file is
shipped, and columns of answers, targets or attack strings are not read.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from es2.core.errors import InputError
from es2.core.files import expanded
from es2.prompts.hub import read_hub_rows
from es2.prompts.prompt_set import PromptSet, Reading
from es2.prompts.rows import Row, from_rows
from es2.prompts.sources import Source, read_source, write_source
from es2.prompts.tables import is_table, read_bounded, read_table


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
        layout: the columns by which a file is recognised without the benchmark's name.
        layout_only: whether such a file has no other column.
        file_name: a word that the file's name has to hold besides.
    """

    name: str
    title: str
    prompt: tuple[str, ...]
    label: str
    licence: str
    citation: str
    source: str
    layout: tuple[str, ...]
    category: tuple[str, ...] = ("category",)
    context: str | None = None
    pair: str | None = None
    harmless_files: tuple[str, ...] = ()
    harmful_files: tuple[str, ...] = ()
    hub: str | None = None
    hub_folders: tuple[str, ...] = ()
    gated: bool = False
    layout_only: bool = False
    file_name: str = ""


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

_AS_FOUND = Source("")

_BY_NAME: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in BENCHMARKS}


def is_benchmark(source: str) -> bool:
    """Whether a prompt source names a benchmark: `advbench`, or `advbench:` and a path."""
    return source.partition(":")[0].lower() in _BY_NAME


def absolute_source(source: str) -> str:
    """A prompt source with its paths made absolute, so that it means the same wherever a job runs."""
    found = read_source(source)
    places = [_absolute(place) for place in found.places]
    return write_source(replace(found, place=places[0], harmless=places[1] if len(places) > 1 else None))


def _absolute(place: str) -> str:
    name, _, path = place.partition(":")
    if place == "builtin" or place.startswith("hf:"):
        return place
    if is_benchmark(place):
        return f"{name.lower()}:{Path(expanded(path)).absolute()}" if path else name.lower()
    return str(Path(expanded(place)).absolute())


def source_files(source: str) -> tuple[Path, ...]:
    """The files or folders of this machine that a prompt source names."""
    files = []
    for place in read_source(absolute_source(source)).places:
        path = place.partition(":")[2] if is_benchmark(place) else place
        if path and place != "builtin" and not place.startswith("hf:"):
            files.append(Path(path))
    return tuple(files)


def is_remote(source: str) -> bool:
    """Whether a prompt source is fetched from the Hub."""
    places = read_source(source).places
    return any(place.startswith("hf:") or (is_benchmark(place) and ":" not in place) for place in places)


def recognised(columns: Collection[str], file_name: str) -> Benchmark | None:
    """The benchmark whose published file has these columns (in lower case), or None."""
    present = {column for column in columns if column and not column.startswith("unnamed:")}
    for benchmark in BENCHMARKS:
        layout = set(benchmark.layout)
        is_whole = not benchmark.layout_only or present <= layout | {"reference"}
        if layout <= present and is_whole and benchmark.file_name in file_name.casefold():
            return benchmark
    return None


def load_benchmark(source: str, how: Source = _AS_FOUND) -> PromptSet:
    """The prompts of a benchmark, under its name.

    Args:
        source: `name:path` for a published file on this machine, or for a folder that holds several (JailbreakBench,
            OR-Bench); the name alone for its copy on the Hub.
        how: whether wrong rows are left out.

    Raises:
        InputError: for an unknown name, a file that is not the benchmark's, and as `load_prompts` does.
        MachineError: when the Hub cannot be reached.
    """
    rows, about = benchmark_rows(source)
    benchmark, path = _named(source)
    where = f"{benchmark.title} ({Path(path).name!r})" if path else f"{benchmark.title} (hf:{benchmark.hub})"
    reading = Reading((about,))
    return from_rows(benchmark.name, rows, where=where, reading=reading, skip_bad_rows=how.skip_bad_rows)


def benchmark_rows(source: str, label: str | None = None) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a benchmark and how they were understood (`Reading.tables`); with `label`, all have that one.

    Raises as `load_benchmark` does.
    """
    benchmark, path = _named(source)
    if path:
        rows = list(_path_rows(benchmark, Path(expanded(path)), label))
    elif benchmark.hub is None:
        raise InputError(f"{benchmark.title} is not on the Hub; get {benchmark.source} and give {benchmark.name}:PATH.")
    else:
        rows = [
            benchmark_row(benchmark, place, row, place, label)
            for folder in benchmark.hub_folders or ("train",)
            for place, row in read_hub_rows(benchmark.hub, folder)
        ]
    about: dict[str, Any] = {
        "file": Path(path).name if path else f"hf:{benchmark.hub}",
        "prompt_column": " or ".join(benchmark.prompt),
        "label_column": None,
        "label_from": f"the layout of {benchmark.title}" if label is None else "the file given",
        "values": {},
    }
    return rows, about


def _named(source: str) -> tuple[Benchmark, str]:
    name, _, path = source.partition(":")
    if name.lower() not in _BY_NAME:
        raise InputError(f"There is no benchmark {name[:40]!r}; there are: {', '.join(_BY_NAME)}.")
    return _BY_NAME[name.lower()], path


def _path_rows(benchmark: Benchmark, path: Path, label: str | None) -> Iterator[Row]:
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
                yield benchmark_row(benchmark, place, row, file.name, label)
    except OSError as error:
        raise InputError(f"{shown} cannot be read ({error.strerror or error}); check its permissions.") from error


def benchmark_row(
    benchmark: Benchmark, place: str, row: Mapping[str, Any] | InputError, file: str, label: str | None = None
) -> Row:
    """One published row as a row of a prompt set. Raises `InputError` for a file of something else."""
    if isinstance(row, InputError):
        return place, row
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
    cells: dict[str, Any] = {"prompt": prompt, "label": label or _label(benchmark, row, file)}
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
        return "any" if is_table(file) else None
    name = file.casefold()
    if any(word in name for word in benchmark.harmless_files):
        return "harmless"
    return "harmful" if any(word in name for word in benchmark.harmful_files) else None
