"""Files of prompts for the fuzzer: every layout that is read, alone or in twos, damaged, misnamed and overruled."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from tests.prompts.test_as_people_have_them import LAYOUTS
from tests.prompts.test_published_layouts import ALL_LABELLED, OF_NO_LABEL, ONE_LABEL
from tests.system.mutations import TOKENS, change_json, dump, mutate_bytes, mutate_lines, mutate_text

OF_ONE_LABEL = [own[:2] for own in ONE_LABEL.values()]
ALONE = [*LAYOUTS.values(), *ALL_LABELLED.values(), *OF_ONE_LABEL]
IN_TWOS = [*OF_NO_LABEL.values(), *OF_ONE_LABEL]
NAMES = ("m.csv", "m.TSV", "m.json", "m.jsonl", "m.ndjson", "harmful.txt", "m.parquet", "m.csv.gz", "safe.txt.gz", "m")
COLUMNS = ("prompt", "label", "text", "goal", "is_safe", "type", "messages", "turns", "split", "harmful", "adversarial")
VALUES = ("1", "true", "harmful", "safe", "theft", "x,y", "?=&|", "ü")


def prompt_files(folder: Path) -> Callable[[Random], Callable[[], object]]:
    """Draws one or two files and how they are to be read; they are written, read and shown as the app does it."""
    from es2.core.errors import Es2Error
    from es2.prompts.loading import load_prompts, table_columns
    from es2.prompts.sources import read_source, write_source

    def draw(rng: Random) -> Callable[[], object]:
        places = []
        n_files = rng.choice((1, 1, 1, 2))
        for number in range(n_files):
            name, data = _file(rng.choice(ALONE if n_files == 1 or rng.random() < 0.2 else IN_TWOS), rng)
            places.append(folder / str(number) / name)
            places[-1].parent.mkdir(exist_ok=True)
            places[-1].write_bytes(data)
        source = _source(rng, *map(str, places))

        def read() -> object:
            written = write_source(source)
            assert read_source(written) == source, "the source string loses something"
            for place in source.places:
                with suppress(Es2Error):
                    assert all(value for counts in table_columns(place).values() for value in counts)
            prompts = load_prompts(written)
            assert len(prompts) > 0
            assert prompts.reading is not None
            json.dumps(prompts.reading.to_dict(), allow_nan=False)
            assert "\n" not in prompts.reading.sentence
            return prompts.digest, prompts.measured().texts_digest, prompts.leak

        return read

    return draw


def _source(rng: Random, place: str, harmless: str | None = None) -> Any:
    from es2.prompts.sources import Source

    def column() -> str | None:
        return None if rng.random() < 0.85 else rng.choice((rng.choice(COLUMNS), mutate_text("goal", rng) or None))

    values = tuple(dict.fromkeys(rng.choice(VALUES) for _ in range(rng.choice((0, 0, 0, 0, 1, 3)))))
    skip = rng.random() < 0.6
    if harmless is not None:
        return Source(place, harmless, _utf8(column()), _utf8(column()), skip_bad_rows=skip)
    return Source(place, None, _utf8(column()), None, _utf8(column()), values, skip)


def _utf8(text: str | None) -> str | None:
    return text.encode("utf-8", "replace").decode() if text else None


def _file(original: tuple[str, bytes], rng: Random) -> tuple[str, bytes]:
    name, data = original
    kind = rng.random()
    if kind < 0.05:
        data = rng.randbytes(rng.choice((0, 1, 4, 300)))
    elif kind < 0.1:
        data = b"".join(rng.choice((*TOKENS, b"prompt", b"label", b"harmful", b"1")) for _ in range(rng.randrange(60)))
    elif kind < 0.24:
        data = mutate_bytes(data, rng)  # a gzip file or Parquet as it lies on the disk
    else:
        data = _changed(name, data, rng)
    return (rng.choice(NAMES) if rng.random() < 0.1 else name), data


def _changed(name: str, data: bytes, rng: Random) -> bytes:
    """A file that is changed in its own terms: what is packed is unpacked, and JSON stays JSON."""
    is_packed = name.endswith(".gz")
    if is_packed:
        data = gzip.decompress(data)
        name = name.removesuffix(".gz")
    if name.endswith(".parquet"):
        data = _parquet(data, rng)
    elif not name.endswith((".json", ".jsonl")):
        data = mutate_bytes(data, rng)
    else:
        try:
            data = dump(change_json(json.loads(data), rng), rng)
        except ValueError:
            data = mutate_lines([json.loads(line) for line in data.splitlines()], rng)
    return gzip.compress(data, 1) if is_packed else data


def _parquet(data: bytes, rng: Random) -> bytes:
    """Valid Parquet with values of another kind in a column, which may have another name."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    column = rng.randrange(table.num_columns)
    name = rng.choice((table.column_names[column], rng.choice(COLUMNS), "", "A\nb"))
    kinds: tuple[Any, ...] = (
        None,
        True,
        1,
        -7.5,
        float("nan"),
        b"\xff\0",
        [1, None],
        {"role": "user"},
        [[]],
        "",
        "x\0",
    )
    values = [rng.choice(kinds)] * table.num_rows
    file = io.BytesIO()
    pq.write_table(table.set_column(column, name, pa.array(values)), file)
    return file.getvalue()
