"""Embeddings in a table with a row for each prompt: a Parquet file, or a folder that the library `datasets` saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.core.errors import InputError, one_line
from es2.core.files import parse_json
from es2.store.sources import is_position

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Float

_NEEDED = "it needs columns `model` and `prompt`, and one of [layers, width] for each position (docs/interop.md)"


def is_table(path: Path) -> bool:
    """Whether embeddings in this place are a table rather than tensors."""
    return path.is_dir() or path.suffix.lower() == ".parquet"


def table_files(path: Path) -> list[Path]:
    """The files that hold a table's rows, in their order; raises `InputError` for a folder that is no saved dataset."""
    if not path.is_dir():
        return [path]
    try:
        state = parse_json((path / "state.json").read_text(encoding="utf-8"))
        files = [path / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        files = []
    if not files or not all(file.is_file() for file in files):
        raise InputError(
            f"The folder {path.name!r} is not what `Dataset.save_to_disk` wrote; of a `DatasetDict` give one split's "
            "folder."
        )
    return files


def read_table(path: Path) -> tuple[dict[str, Any], dict[str, Float[np.ndarray, "layer prompt d_model"]]]:
    """What a table is of (`model`, `texts`), and its embeddings by position.

    Raises:
        InputError: for a file that cannot be read, or a table without these columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = repr(path.name)
    try:
        if path.is_dir():
            files = (pa.memory_map(str(file)) for file in table_files(path))
            table = pa.concat_tables(pa.ipc.open_stream(file).read_all() for file in files)
        else:
            table = pq.ParquetFile(path).read()
        table.validate(full=True)
        twice = len(set(table.column_names)) < len(table.column_names)
        positions = [column for column in table.column_names if is_position(column)]
        if twice or not positions or not {"model", "prompt"} <= set(table.column_names):
            raise InputError(f"The table {name} has the columns {', '.join(table.column_names)[:200]}; {_NEEDED}.")
        models, texts = set(table["model"].to_pylist()), table["prompt"].to_pylist()
        arrays = {position: _array(table[position], position, name) for position in positions}
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if getattr(error, "errno", None):  # the machine's; of a damaged Parquet file Arrow raises one without a number
            raise
        raise InputError(f"The table {name} cannot be read ({one_line(error)}).") from error
    if len(models) != 1:
        raise InputError(f"The table {name} is of {len(models)} models; each needs a table of its own.")
    return {"model": models.pop(), "texts": texts}, arrays


def _array(column: pa.ChunkedArray, position: str, name: str) -> Float[np.ndarray, "layer prompt d_model"]:
    import pyarrow as pa
    import pyarrow.compute as pc

    values: Any = column.combine_chunks()
    shape = [len(values)]
    for _ in range(2):
        values = values.storage if isinstance(values, pa.ExtensionArray) else values
        lengths = pc.list_value_length(values).unique().to_pylist() if pa.types.is_nested(values.type) else []
        if len(lengths) != 1 or not lengths[0]:
            raise InputError(f"The column {position} of {name} has not [layers, width] numbers in every row.")
        shape.append(lengths[0])
        values = values.flatten()
    if not pa.types.is_floating(values.type):
        raise InputError(f"The column {position} of {name} holds {values.type}, no floating-point numbers.")
    flat = values.to_numpy(zero_copy_only=False)
    if flat.dtype != np.float16:
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            flat = flat.astype(np.float32)
    return flat.reshape(shape).transpose(1, 0, 2)
