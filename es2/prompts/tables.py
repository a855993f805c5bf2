"""Tables as people have them, read into rows: CSV, TSV, JSON, JSON lines, plain text and Parquet, each also gzipped.

The columns are not interpreted here (`es2.prompts.readers`). A row that cannot be read is an `InputError` in its place,
for the caller to raise or to count.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from es2.core.errors import InputError, one_line
from es2.core.files import parse_json
from es2.prompts.columns import LABEL_COLUMNS, PROMPT_COLUMNS, is_chat, labels_of
from es2.prompts.rows import MAX_ROWS, Row

MAX_FILE_BYTES = 200 * 2**20
_PARQUET_BATCH = 256
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
_KNOWN = {*PROMPT_COLUMNS, *LABEL_COLUMNS, "category", "pair", "split", "id"}
_BOMS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip


def read_bounded(path: Path) -> bytes:
    """The content of a file of prompts.

    Raises:
        InputError: for a file that is too large, or a device or pipe, which need never end.
        OSError: as the machine gives it.
    """
    shown = repr(str(path)[:300])
    if not path.is_file():
        raise InputError(f"{shown} is no plain file; give a file whose name ends in {ENDINGS}.")
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{shown} is larger than {MAX_FILE_BYTES >> 20} MB; give a smaller file of short prompts.")
    return data


def read_table(data: bytes, file_name: str) -> Iterator[Row]:
    """The rows of a table, whose format the ending of `file_name` decides, column names in lower case.

    Raises:
        InputError: for a file that cannot be read as its format, once its rows are asked for.
    """
    name = Path(file_name)
    if is_packed := name.suffix.lower() == ".gz":
        name = name.with_suffix("")
    reader = _READERS.get(name.suffix.lower())
    if reader is None:
        raise InputError(f"{file_name[:200]!r} is no prompt file: its name must end in {ENDINGS}.")
    if is_packed:
        data = _unpacked(data, file_name)
    if not data.strip():
        raise InputError(f"{file_name!r} is empty; it needs rows of prompts with a label.")
    yield from reader(data, file_name)


def is_table(file_name: str) -> bool:
    """Whether the ending of a file's name is one that is read."""
    name = file_name.lower().removesuffix(".gz")
    return Path(name).suffix in _READERS


def _column(name: str) -> str:
    """A column's name in lower case and one line."""
    return " ".join(name.split()).lower()


def _unpacked(data: bytes, where: str) -> bytes:
    """The content of a gzip file of one or several members, of which no more than `MAX_FILE_BYTES` are unpacked."""
    parts: list[bytes] = []
    room = MAX_FILE_BYTES
    try:
        while data.strip(b"\0"):
            member = zlib.decompressobj(wbits=31)
            parts.append(member.decompress(data, room + 1))
            room -= len(parts[-1])
            if room < 0:
                raise InputError(
                    f"{where!r} is larger than {MAX_FILE_BYTES >> 20} MB once unpacked; give fewer, shorter prompts."
                )
            if not member.eof:
                raise InputError(f"{where!r} is no whole gzip file: its end is missing.")
            data = member.unused_data
    except zlib.error as error:
        raise InputError(f"{where!r} is no readable gzip file ({one_line(error)}).") from error
    return b"".join(parts)


def _text(data: bytes, where: str) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 as their marks say or as zero bytes at every other place tell."""
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    if encoding is None and len(data) >= 4 and len(data) % 2 == 0:
        head = data[: min(len(data), 200) & ~1]
        zeros = head[1::2].count(0), head[::2].count(0)
        if max(zeros) > 0.7 * len(head) / 2 and min(zeros) == 0:
            encoding = "utf-16-le" if zeros[0] else "utf-16-be"
    try:
        return data.decode(encoding or "utf-8-sig")
    except UnicodeDecodeError as error:
        if encoding is not None:
            raise InputError(f"{where!r} is not whole {encoding.upper()} text; save it as UTF-8.") from error
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{where!r} is not UTF-8 text (line {line}); save it as UTF-8.") from error


# ------------------------------------------------------------------------------------------------------ delimited text


def _csv_rows(data: bytes, where: str) -> Iterator[Row]:
    text = _text(data, where)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(text, where), strict=True)
    try:
        header = [_column(name) for name in reader.fieldnames or []]
        reader.fieldnames = header
        twice = {name for name in header if name and header.count(name) > 1}
        for row in reader:
            place = f"row {reader.line_num}"
            if None in row:
                yield (
                    place,
                    InputError(f"{where!r}, {place}: more cells than the header has; quote prompts that hold commas."),
                )
                continue
            yield place, {name: Twice() if name in twice else cell for name, cell in row.items()}
    except csv.Error as error:
        raise InputError(f"{where!r}, row {reader.line_num + 1}: not valid CSV ({one_line(error)}).") from error


class Twice:
    """The cell of a column whose name the header has more than once."""


def _delimiter(text: str, where: str) -> str:
    """What separates the cells: the separator under which the header has most known names, then most columns."""

    def worth(delimiter: str) -> tuple[int, int]:
        try:
            header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
        except csv.Error:
            return 0, 0
        return sum(name.strip().lower() in _KNOWN for name in header), len(header)

    if Path(where.lower().removesuffix(".gz")).suffix == ".tsv":
        return "\t"
    return max(_DELIMITERS, key=worth)


def _txt_rows(data: bytes, where: str) -> Iterator[Row]:
    for number, line in enumerate(re.split(r"\r\n|\n|\r", _text(data, where)), start=1):
        if line.strip():
            yield f"row {number}", {"prompt": line}


# ---------------------------------------------------------------------------------------------------------------- JSON


def _jsonl_rows(data: bytes, where: str) -> Iterator[Row]:
    text = _text(data, where)
    if text.lstrip().startswith("["):  # an array under the name of lines
        try:
            whole = parse_json(text)
        except ValueError:
            whole = None
        if isinstance(whole, list) and (all(isinstance(row, dict) for row in whole) or all(map(is_chat, whole))):
            yield from _array_rows(whole, where)
            return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            yield f"row {number}", InputError(f"{where!r}, row {number}: not valid JSON ({one_line(error)}).")
        else:
            yield _json_row(row, number, where)


def _json_rows(data: bytes, where: str) -> Iterator[Row]:
    """A JSON array of rows, an object of columns, or, under the name of JSON, lines of it."""
    try:
        value = parse_json(_text(data, where))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            yield from _jsonl_rows(data, where)
            return
        raise InputError(f"{where!r}: not valid JSON ({one_line(error)}).") from error
    except ValueError as error:
        raise InputError(f"{where!r}: not valid JSON ({one_line(error)}).") from error
    if isinstance(value, dict):
        yield from _object_rows(value, where)
    elif isinstance(value, list):
        yield from _array_rows(value, where)
    else:
        raise InputError(f"{where!r}: expected an array of prompts, or an object of arrays.")


def _array_rows(value: list[Any], where: str) -> Iterator[Row]:
    """The rows of an array, which is one chat if it is made of the turns of both sides."""
    rows = [value] if is_chat(value, of_both_sides=True) else value
    yield from (_json_row(row, number, where) for number, row in enumerate(rows, start=1))


def _object_rows(value: dict[str, Any], where: str) -> Iterator[Row]:
    """The rows of an object of columns (arrays, or objects by row as pandas writes them), or of an array a label."""
    columns = {_column(str(key)): cells for key, cells in value.items()}
    arrays = {name: cells for name, cells in columns.items() if isinstance(cells, list)}
    labels = labels_of("", list(arrays))
    if set(labels.values()) == {"harmful", "harmless"} and all(_is_row(row) for name in labels for row in arrays[name]):
        for name, label in labels.items():
            for number, row in enumerate(arrays[name], start=1):
                _, own = _json_row(row, number, where)
                yield f"{name}, row {number}", {**own, "label": label} if isinstance(own, Mapping) else own
        return
    if len(arrays) == 1:
        (cells,) = arrays.values()
        if is_chat(cells):  # {"messages": [turn, turn]}
            yield _json_row(value, 1, where)
            return
        if all(isinstance(cell, dict) or is_chat(cell) for cell in cells):  # {"data": [row, row]}
            yield from _array_rows(cells, where)
            return
    if columns and len(arrays) == len(columns):
        lengths = {name: len(cells) for name, cells in arrays.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise InputError(f"{where!r}: its arrays are not of one length ({found[:200]}), so they are no columns.")
        names = list(arrays)
        for number, row in enumerate(zip(*arrays.values(), strict=True), start=1):
            yield f"row {number}", dict(zip(names, row, strict=True))
        return
    if columns and all(isinstance(cells, dict) for cells in columns.values()):
        keys = dict.fromkeys(key for cells in columns.values() for key in cells)
        for number, key in enumerate(keys, start=1):
            yield f"row {number}", {name: cells.get(key) for name, cells in columns.items()}
        return
    yield _json_row(value, 1, where)


def _is_row(cell: object) -> bool:
    return isinstance(cell, (str, dict)) or is_chat(cell)


def _json_row(row: object, number: int, where: str) -> Row:
    if isinstance(row, str):
        return f"row {number}", {"prompt": row}
    if is_chat(row):
        return f"row {number}", {"messages": row}
    if not isinstance(row, dict):
        return f"row {number}", InputError(
            f"{where!r}, row {number}: expected an object with a key for each column, such as prompt, or a text."
        )
    return f"row {number}", {_column(str(key)): cell for key, cell in row.items()}


# ------------------------------------------------------------------------------------------------------------- Parquet


def _parquet_rows(data: bytes, where: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        sizes = (file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups))
        if sum(sizes) > MAX_FILE_BYTES or file.metadata.num_rows > MAX_ROWS:
            raise InputError(f"{where!r} is too large once unpacked; give a smaller file of short prompts.")
        classes = _class_names(file.schema_arrow.metadata or {})
        # In small batches: one long text in a million rows takes little room in a file.
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            columns = [_column(name) for name in batch.schema.names]
            twice = {name for name in columns if columns.count(name) > 1}
            for row in batch.rename_columns(columns).to_pylist():
                number += 1
                row |= {name: Twice() for name in twice}
                for name, names in classes.items():
                    if isinstance(place := row.get(name), int) and 0 <= place < len(names):
                        row[name] = names[place]
                yield f"row {number}", row
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{where!r} is not a readable Parquet file ({one_line(error)}).") from error


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The words that the library `datasets` keeps beside a column of numbers (`ClassLabel`), in any order."""
    try:
        features = parse_json(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {
            _column(str(name)): [str(word) for word in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature["names"], list)
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


_READERS = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".txt": _txt_rows,
    ".parquet": _parquet_rows,
}
SUFFIXES = tuple(_READERS)
ENDINGS = f"{', '.join(_READERS)}, or one of these and .gz"
