"""Files of prompts, read into rows: CSV, JSON lines, Parquet, and data sets of the Hugging Face Hub.

Readers are strict: an unreadable row stops the load with its number and column, since dropping it would silently change
a measurement.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from es2.core.errors import InputError, MachineError, one_line
from es2.core.files import parse_json
from es2.prompts.prompt_set import PromptSet
from es2.prompts.rows import MAX_ROWS, CheckedRows, Row, from_rows

MAX_FILE_BYTES = 200 * 2**20
_PARQUET_BATCH = 256


def read_bounded(path: Path) -> bytes:
    """The content of a file of prompts.

    Raises:
        InputError: for a file that is too large, or a device or pipe, which need never end.
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
    """The prompts in a file's content, whose format the suffix of `file_name` decides. Raises `InputError`."""
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
        yield _json_row(row, number, where)


def _json_row(row: object, number: int, where: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{where!r}, row {number}: expected an object with a key for each column, such as prompt.")
    return f"row {number}", {str(key).strip().lower(): cell for key, cell in row.items()}


def _parquet_rows(data: bytes, where: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        sizes = (file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups))
        if sum(sizes) > MAX_FILE_BYTES or file.metadata.num_rows > MAX_ROWS:
            raise InputError(f"{where!r} is too large once unpacked; give a smaller file of short prompts.")
        # In small batches: one long text in a million rows takes little room in a file.
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            columns = [name.strip().lower() for name in batch.schema.names]
            for row in batch.rename_columns(columns).to_pylist():
                number += 1
                yield f"row {number}", row
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{where!r} is not a readable Parquet file ({one_line(error)}).") from error


_READERS = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


def read_table(data: bytes, file_name: str) -> Iterator[Row]:
    """The rows of a published CSV, JSONL, JSON array or Parquet table, columns in lower case. Raises `InputError`."""
    suffix = Path(file_name).suffix.lower()
    if suffix == ".csv":
        yield from _csv_rows(data, file_name, needed=())
    elif suffix == ".json" and data.lstrip().startswith(b"["):
        try:
            rows = parse_json(_text(data, file_name))
        except ValueError as error:
            raise InputError(f"{file_name!r}: not valid JSON ({one_line(error)}).") from error
        yield from (_json_row(row, number, file_name) for number, row in enumerate(rows, start=1))
    elif suffix in (".json", ".jsonl"):
        yield from _jsonl_rows(data, file_name)
    elif suffix == ".parquet":
        yield from _parquet_rows(data, file_name)
    else:
        raise InputError(f"{file_name!r} is no table: its name must end in .csv, .json, .jsonl or .parquet.")


def read_hub_rows(name: str, split: str) -> list[Row]:
    """Rows of a Hub data set, from the Hub's own Parquet copy of it, so that no data set's code runs.

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


def find_problems(data: bytes, file_name: str, limit: int = 50) -> list[str]:
    """At most `limit` sentences on the wrong rows of a prompt file; empty if it can be read."""
    try:
        parse_prompts(data, file_name)
    except InputError as error:
        first = str(error)
    else:
        return []
    problems: list[str] = []
    taken = CheckedRows(repr(file_name))
    try:
        for place, row in _READERS[Path(file_name).suffix.lower()](data, file_name):
            try:
                taken.take(place, row)
            except InputError as error:
                problems.append(str(error))
                if len(problems) == limit:
                    break
    except (InputError, KeyError) as error:  # the file itself: later rows cannot be read
        problems += [str(error)] if isinstance(error, InputError) else []
    return problems or [first]
