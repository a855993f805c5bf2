"""Files of embeddings that are laid out first and written into where they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from es2.core.errors import MachineError
from es2.store.embeddings import lay_out, narrow
from es2.store.store import Store


def fill(path: Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(5, 7, 3)).astype(dtype) for name in ("last", "last_instruction")}
    for name, array in lay_out(path, list(values), (5, 7, 3), dtype).items():
        assert not array.any()
        array[:] = values[name]
    return values


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_what_safetensors_reads(tmp_path: Path, dtype: str) -> None:
    values = fill(tmp_path / "a.safetensors", dtype)
    found = load_file(tmp_path / "a.safetensors")
    assert list(found) == list(values)
    for name, array in values.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], array)


def test_narrowed_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    values = fill(path)
    before = path.stat().st_size
    narrow(path)
    assert path.stat().st_size == before - 2 * 2 * 5 * 7 * 3
    with safe_open(path, framework="numpy") as file:
        for name, array in values.items():
            np.testing.assert_array_equal(file.get_tensor(name), array.astype(np.float16))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    fill(tmp_path / "a.safetensors")
    with pytest.raises(MachineError, match="exists"):
        lay_out(tmp_path / "a.safetensors", ["last"], (1, 1, 1))


def test_a_set_is_there_only_when_its_writer_succeeds(tmp_path: Path) -> None:
    store, meta = Store(tmp_path), {"model": "m", "texts_digest": "t"}
    texts = [f"prompt {row}" for row in range(7)]

    def fail() -> None:
        with store.new_set("k", meta, texts) as file:
            fill(file)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert store.get("k") is None
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]
    with store.new_set("k", meta, texts) as file:
        assert file.parent.name.startswith(".tmp-k-")
        values = fill(file)
        narrow(file)
        assert store.get("k") is None
    found = store.open("k")
    assert (found.positions, found.n_layers, found.n_prompts, found.d_model) == (("last", "last_instruction"), 5, 7, 3)
    assert found.meta["dtype"] == "float16"
    np.testing.assert_array_equal(found.layer(4, "last_instruction"), values["last_instruction"][4].astype(np.float16))
