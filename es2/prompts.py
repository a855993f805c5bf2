"""Labelled prompts and their splits.

Everything the workbench claims rests on who may look at which prompt, so the split is a property of the prompt itself:
a stable hash of its contrast pair, computed nowhere else, the same on every machine, and unmoved when other prompts
come or go. Readers are strict for the same reason. A row that cannot be understood stops the load with its number and
column; silently dropping it would change a measurement.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.errors import InputError, MachineError, one_line
from es2.files import parse_json
from es2.likeness import near_duplicates

if TYPE_CHECKING:
    from jaxtyping import Bool, Int8

logger = logging.getLogger(__name__)

HARMFUL = 1
HARMLESS = 0
LABELS = {"harmful": HARMFUL, "harmless": HARMLESS}
LABEL_NAMES = {HARMFUL: "harmful", HARMLESS: "harmless"}

SPLITS = ("tune", "watch", "probe", "test")
_SPLIT_ENDS = (0.5, 0.6, 0.8, 1.0)

MAX_PROMPT_CHARACTERS = 20_000
MAX_FILE_BYTES = 200 * 2**20
MAX_ROWS = 1_000_000
MAX_CELL_CHARACTERS = 1_000
"""Of a pair's id or a category, which stand beside prompts in every table."""
_PARQUET_BATCH = 256

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands (`row 7`), and its cells by column."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts with everything known about them, column by column, in the order in which they were read.

    Attributes:
        name: `builtin`, a file's stem, or `hf:…`; for display only.
        texts: the prompts, without white space at either end.
        labels: 1 harmful, 0 harmless.
        categories: the source's own category, or `unspecified`.
        pairs: the contrast pair's id. A prompt without one has an id of its own, made from its text, so this is
            always the unit of folds, bootstraps and shuffles.
        splits: one of `SPLITS` for each prompt.
    """

    name: str
    texts: tuple[str, ...]
    labels: Int8[np.ndarray, "prompt"]
    categories: tuple[str, ...]
    pairs: tuple[str, ...]
    splits: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def digest(self) -> str:
        """Identifies texts, labels, categories, pairs and splits, whatever their order."""
        rows = sorted(
            zip(self.texts, self.labels.tolist(), self.categories, self.pairs, self.splits, strict=True),
        )
        return _digest(rows)

    @cached_property
    def texts_digest(self) -> str:
        """Identifies the texts in their order: what an activation set depends on."""
        return _digest(self.texts)

    @cached_property
    def leak(self) -> str | None:
        """A warning, when prompts say nearly the same as others in another split; None when none do."""
        found = near_duplicates(self.texts, self.splits)
        if not found:
            return None
        first, second = (f"{self.texts[row][:80]!r} in {self.splits[row]}" for row in found[0])
        return (
            f"{len(found)} prompt(s) of {self.name!r} say nearly the same as one in another split, so that numbers on "
            f"`test` may flatter; give such prompts one pair id (the first: {first}, {second})."
        )

    def in_split(self, split: str) -> Bool[np.ndarray, "prompt"]:
        """Which prompts stand in `split`."""
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; one of {', '.join(SPLITS)}.")
        return np.array([own == split for own in self.splits], dtype=bool)

    def measured(self) -> PromptSet:
        """The prompts that an analysis reads: `probe`, which fits the probes, and `test`, which gives the numbers."""
        keep = self.in_split("probe") | self.in_split("test")
        return self if keep.all() else self.select(keep)

    def select(self, keep: Bool[np.ndarray, "prompt"]) -> PromptSet:
        """The prompts for which `keep` holds, in the same order."""
        rows = np.flatnonzero(keep)

        def pick(column: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(column[row] for row in rows)

        return PromptSet(
            self.name,
            pick(self.texts),
            self.labels[rows],
            pick(self.categories),
            pick(self.pairs),
            pick(self.splits),
        )


def _digest(value: object) -> str:
    data = json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def stable_hash(text: str) -> int:
    """A 64-bit hash of `text` that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def split_of(pair: str) -> str:
    """The split of a contrast pair: `tune` 50 %, `watch` 10 %, `probe` 20 %, `test` 20 % of the hash's range."""
    place = stable_hash("split:" + pair) / 2**64
    return next(split for split, end in zip(SPLITS, _SPLIT_ENDS, strict=True) if place < end)


def normalised(text: str) -> str:
    """The text as duplicates are looked for: Unicode-composed, case-folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def own_pair(text: str) -> str:
    """The pair id of a prompt that belongs to no pair."""
    return "text:" + hashlib.blake2b(normalised(text).encode(), digest_size=8).hexdigest()


def warn_of_likeness(prompts: PromptSet, others: PromptSet) -> None:
    """Log a warning when some of `prompts`, which are to judge by, say nearly the same as some of `others`."""
    groups = ["others"] * len(others) + ["prompts"] * len(prompts)
    texts = (*others.texts, *prompts.texts)
    found = [pair for pair in near_duplicates(texts, groups) if pair[0] >= len(others)]
    if found:
        first, second = (repr(texts[row][:80]) for row in found[0])
        logger.warning(
            "%d prompt(s) of %r say nearly the same as one of %r, so numbers on them may flatter (the first: %s, %s).",
            len(found),
            prompts.name,
            others.name,
            first,
            second,
        )


def load_prompts(source: str) -> PromptSet:
    """Read a prompt set.

    Args:
        source: `builtin`; the path of a `.csv`, `.jsonl` or `.parquet` file with columns `prompt` and `label`
            (`harmful` or `harmless`) and, where known, `category`, `pair` and `split`; `hf:<dataset>[:split]`
            for a data set of the Hugging Face Hub with those columns; or a benchmark's name, with `:path` for its
            published file (`es2.benchmark_sets`).

    Raises:
        InputError: with the row and the column, when the source cannot be read as prompts.
        MachineError: when the Hub cannot be reached.
    """
    if source == "builtin":
        return load_builtin()
    if source.startswith("hf:"):
        return _load_hub(source)
    from es2.benchmark_sets import is_benchmark, load_benchmark

    if is_benchmark(source):
        return load_benchmark(source)
    return load_file(Path(source))


@cache
def load_builtin() -> PromptSet:
    """The contrast pairs written for this project (`es2/data/contrast_pairs.csv`; `docs/prompts.md` tells how)."""
    table = resources.files("es2") / "data" / "contrast_pairs.csv"
    rows = []
    for number, pair in enumerate(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))), start=2):
        for label in LABELS:
            row = {"prompt": pair[label], "label": label, "category": pair["category"], "pair": pair["pair"]}
            rows.append((f"row {number}", row))
    return from_rows("builtin", rows, where="the built-in prompts")


def load_file(path: Path) -> PromptSet:
    """Read prompts from a CSV, JSONL or Parquet file; raises as `load_prompts` does."""
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
        raise InputError(
            f"{shown} cannot be read ({error.strerror or error}); check its name and permissions."
        ) from error
    return parse_prompts(data, path.name)


def read_bounded(path: Path) -> bytes:
    """The content of a file of prompts: a plain one (a device or a pipe need never end) that is not too large.

    Raises:
        InputError: for any other.
        OSError: as the machine gives it.
    """
    shown = repr(str(path)[:300])
    if not path.is_file():
        raise InputError(f"{shown} is no plain file; give a .csv, .jsonl or .parquet file.")
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{shown} is larger than {MAX_FILE_BYTES >> 20} MB; give a smaller file of short prompts.")
    return data


def parse_prompts(data: bytes, file_name: str) -> PromptSet:
    """Read prompts from a file's content; the ending of `file_name` tells the format. Raises as `load_prompts` does."""
    suffix = Path(file_name).suffix.lower()
    if suffix not in _READERS:
        raise InputError(f"{file_name[:200]!r} is no prompt file: its name must end in {', '.join(_READERS)}.")
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{file_name[:200]!r} is larger than {MAX_FILE_BYTES >> 20} MB; give fewer, shorter prompts.")
    if not data.strip():
        raise InputError(f"{file_name!r} is empty; it needs rows with the columns prompt and label.")
    return from_rows(Path(file_name).stem, _READERS[suffix](data, file_name), where=repr(file_name))


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{where!r} is not UTF-8 text (line {line}); save it as UTF-8.") from error


def _csv_rows(data: bytes, where: str, needed: Sequence[str] = ("prompt", "label")) -> Iterator[Row]:
    text = _text(data, where)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in reader.fieldnames or []]
        reader.fieldnames = header
        for column in needed:
            if header.count(column) != 1:
                raise InputError(
                    f"{where!r} needs exactly one column {column!r} in its header (found: {', '.join(header)[:200]})."
                )
        for row in reader:
            place = f"row {reader.line_num}"
            if None in row:
                raise InputError(f"{where!r}, {place}: more cells than the header has; quote prompts that hold commas.")
            yield place, row
    except csv.Error as error:
        raise InputError(f"{where!r}, row {reader.line_num + 1}: not valid CSV ({one_line(error)}).") from error


def _jsonl_rows(data: bytes, where: str) -> Iterator[Row]:
    for number, line in enumerate(_text(data, where).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise InputError(f"{where!r}, row {number}: not valid JSON ({one_line(error)}).") from error
        if not isinstance(row, dict):
            raise InputError(f"{where!r}, row {number}: expected an object with the keys prompt and label.")
        yield f"row {number}", {str(key).strip().lower(): cell for key, cell in row.items()}


def _parquet_rows(data: bytes, where: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        sizes = (file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups))
        if sum(sizes) > MAX_FILE_BYTES or file.metadata.num_rows > MAX_ROWS:
            raise InputError(f"{where!r} is too large once unpacked; give a smaller file of short prompts.")
        # In small batches: one long text that stands in a million rows takes little room in a file.
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            columns = [name.strip().lower() for name in batch.schema.names]
            for row in batch.rename_columns(columns).to_pylist():
                number += 1
                yield f"row {number}", row
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{where!r} is not a readable Parquet file ({one_line(error)}).") from error


_READERS = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


def read_table(data: bytes, file_name: str) -> Iterator[Row]:
    """The rows of a published table of any columns (lower-case here); CSV, JSONL, JSON array or Parquet.

    Raises:
        InputError: with the row, for a file that is none of these.
    """
    suffix = Path(file_name).suffix.lower()
    if suffix == ".csv":
        yield from _csv_rows(data, file_name, needed=())
    elif suffix == ".json" and data.lstrip().startswith(b"["):
        try:
            rows = parse_json(_text(data, file_name))
        except ValueError as error:
            raise InputError(f"{file_name!r}: not valid JSON ({one_line(error)}).") from error
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise InputError(f"{file_name!r}, row {number}: expected an object.")
            yield f"row {number}", {str(key).strip().lower(): cell for key, cell in row.items()}
    elif suffix in (".json", ".jsonl"):
        yield from _jsonl_rows(data, file_name)
    elif suffix == ".parquet":
        yield from _parquet_rows(data, file_name)
    else:
        raise InputError(f"{file_name!r} is no table: its name must end in .csv, .json, .jsonl or .parquet.")


def _load_hub(source: str) -> PromptSet:
    name, _, split = source.removeprefix("hf:").partition(":")
    return from_rows(source, read_hub_rows(name, split or "train"), where=f"the data set {name!r}")


def read_hub_rows(name: str, split: str) -> list[Row]:
    """Rows of a Hub data set, from the Parquet copy that the Hub keeps of it, so that no data set's own code runs.

    Args:
        name: `owner/name`.
        split: a split, or `configuration/split`.

    Raises:
        InputError: when there is no such data set or split, or it may not be read.
        MachineError: when the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

    branch = "refs/convert/parquet"
    try:
        files = HfApi().list_repo_files(name, repo_type="dataset", revision=branch)
        wanted = sorted(file for file in files if file.endswith(".parquet") and f"/{split}/" in f"/{file}")
        if not wanted:
            found = sorted({Path(file).parent.name for file in files if file.endswith(".parquet")})
            raise InputError(f"The data set {name!r} has no split {split!r}; it has: {', '.join(found) or 'none'}.")
        rows: list[Row] = []
        for file in wanted:
            local = hf_hub_download(name, file, repo_type="dataset", revision=branch)
            rows += [(f"{file}, {place}", row) for place, row in _parquet_rows(Path(local).read_bytes(), file)]
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"The Hugging Face Hub has no data set {name!r} that you may read; "
            "check the name, or log in if it is a gated one."
        ) from error
    except (HTTPError, OSError) as error:
        raise MachineError(
            f"The Hugging Face Hub cannot be reached for the data set {name!r} ({type(error).__name__}); "
            "check the network, or download the data set and give the file's path."
        ) from error
    return rows


def from_rows(name: str, rows: Iterable[Row], *, where: str) -> PromptSet:
    """Check rows one by one and make a prompt set of them.

    Args:
        name: the set's name.
        rows: where each row stands (`row 7`), and its cells by column.
        where: the source as an error message should call it.

    Returns:
        The set: texts stripped, exact duplicates merged with a warning, splits assigned. Prompts that say nearly the
        same in different splits are warned of, too.

    Raises:
        InputError: for the first row that is wrong, with its place and column; when one text stands under both
            labels; when a pair stands in two splits; when there is no row at all.
    """
    taken = _Rows(where)
    for place, row in rows:
        taken.take(place, row)
    if not taken.texts:
        raise InputError(f"{where} holds no prompt; it needs at least one row under the columns prompt and label.")
    if taken.merged:
        logger.warning("%s: %d exact duplicate(s) merged.", where, taken.merged)
    labels = np.array(taken.labels, dtype=np.int8)
    columns = (tuple(column) for column in (taken.categories, taken.pairs, taken.splits))
    prompts = PromptSet(name, tuple(taken.texts), labels, *columns)
    if prompts.leak:
        logger.warning("%s", prompts.leak)
    return prompts


def find_problems(data: bytes, file_name: str, limit: int = 50) -> list[str]:
    """Everything that is wrong with a prompt file, row by row, at most `limit` sentences; empty if it can be read."""
    try:
        parse_prompts(data, file_name)
    except InputError as error:
        first = str(error)
    else:
        return []
    problems: list[str] = []
    taken = _Rows(repr(file_name))
    try:
        for place, row in _READERS[Path(file_name).suffix.lower()](data, file_name):
            try:
                taken.take(place, row)
            except InputError as error:
                problems.append(str(error))
                if len(problems) == limit:
                    break
    except (InputError, KeyError) as error:  # the file itself: what comes after cannot be told
        problems += [str(error)] if isinstance(error, InputError) else []
    return problems or [first]


class _Rows:
    """Rows that were checked one by one, by column."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.texts: list[str] = []
        self.labels: list[int] = []
        self.categories: list[str] = []
        self.pairs: list[str] = []
        self.splits: list[str] = []
        self.merged = 0
        self._seen: dict[str, tuple[int, str]] = {}
        self._exact: set[str] = set()
        self._split_of_pair: dict[str, tuple[str, str]] = {}

    def take(self, place: str, row: Mapping[str, Any]) -> None:
        """Take in one more row, or raise `InputError` and leave it out."""
        at = f"{self.where}, {place}"
        if len(self.texts) + self.merged >= MAX_ROWS:
            raise InputError(f"{at}: more than {MAX_ROWS:,} rows are not read; give fewer prompts.")
        text = _cell(row, "prompt", at)
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise InputError(
                f"{at}, column prompt: {len(text):,} characters are too many; "
                f"prompts are short requests of at most {MAX_PROMPT_CHARACTERS:,} characters."
            )
        label_name = _cell(row, "label", at).casefold()
        if label_name not in LABELS:
            raise InputError(f"{at}, column label: {label_name[:60]!r} is unknown; write harmful or harmless.")
        label = LABELS[label_name]
        other_label, other_place = self._seen.setdefault(normalised(text), (label, place))
        if other_label != label:
            raise InputError(
                f"{at}: this text stands under both labels (the other at {other_place}); keep one: {text[:80]!r}."
            )
        if text in self._exact:
            self.merged += 1
            return
        pair = _cell(row, "pair", at, needed=False) or own_pair(text)
        split = _cell(row, "split", at, needed=False).casefold() or split_of(pair)
        if split not in SPLITS:
            raise InputError(f"{at}, column split: {split[:60]!r} is unknown; write one of {', '.join(SPLITS)}.")
        other_split, other_place = self._split_of_pair.setdefault(pair, (split, place))
        if other_split != split:
            raise InputError(
                f"{at}, column split: the pair {pair[:60]!r} stands in {split} here and in {other_split} at "
                f"{other_place}; both members of a pair belong to one split."
            )
        category = _cell(row, "category", at, needed=False) or "unspecified"
        for column, cell in (("pair", pair), ("category", category)):
            if len(cell) > MAX_CELL_CHARACTERS:
                raise InputError(f"{at}, column {column}: at most {MAX_CELL_CHARACTERS:,} characters; shorten it.")
        self._exact.add(text)
        self.texts.append(text)
        self.labels.append(label)
        self.categories.append(category)
        self.pairs.append(pair)
        self.splits.append(split)


def _cell(row: Mapping[str, Any], column: str, at: str, *, needed: bool = True) -> str:
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        if needed:
            raise InputError(f"{at}, column {column}: empty; every row needs a prompt and a label.")
        return ""
    if not isinstance(value, str):
        if not needed and isinstance(value, int):
            return str(value)
        raise InputError(f"{at}, column {column}: expected text, found {type(value).__name__}.")
    text = value.strip()
    if "\0" in text:
        raise InputError(f"{at}, column {column}: holds a NUL byte; remove it.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{at}, column {column}: holds half of a surrogate pair, which is no character; remove it.")
    return text
