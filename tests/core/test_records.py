"""A JSON document beside an archive of arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from es2.core.errors import InputError
from es2.core.records import RecordFiles

FILES = RecordFiles("thing.json", "thing.safetensors", 2, "is no thing", "make it again")


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    turned = np.arange(6.0).reshape(2, 3).T  # not contiguous
    FILES.save(tmp_path, {"name": "a"}, {"x": turned})
    with FILES.load(tmp_path) as (document, arrays):
        assert document == {"format": 2, "name": "a"}
        np.testing.assert_array_equal(arrays["x"], turned)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "two"}', '{"format": 0}'])
def test_a_document_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    FILES.save(tmp_path, {}, {"x": np.zeros(1)})
    (tmp_path / "thing.json").write_text(text)
    with pytest.raises(InputError, match=r"^There is no thing in .*; make it again\.$"), FILES.load(tmp_path):
        pass


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    FILES.save(tmp_path, {}, {"x": np.zeros(1)})
    (tmp_path / "thing.json").write_text(json.dumps({"format": 3}))
    with pytest.raises(InputError, match="newer ES2 Workbench"), FILES.load(tmp_path):
        pass


@pytest.mark.parametrize("array", [np.array([np.nan]), np.array([1])])
def test_arrays_are_of_finite_numbers(tmp_path: Path, array: np.ndarray) -> None:
    FILES.save(tmp_path, {}, {"x": array})
    with pytest.raises(InputError, match="x is not of finite numbers"), FILES.load(tmp_path):
        pass


def test_what_the_block_misses_is_the_same_sentence(tmp_path: Path) -> None:
    FILES.save(tmp_path, {}, {"x": np.zeros(1)})
    with pytest.raises(InputError, match=r"There is no thing in .*'y'"), FILES.load(tmp_path) as (_, arrays):
        arrays["y"]


def test_arrays_that_are_missing_or_cut_short(tmp_path: Path) -> None:
    FILES.save(tmp_path, {}, {"x": np.zeros(100)})
    path = tmp_path / "thing.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="There is no thing"), FILES.load(tmp_path):
        pass
    path.unlink()
    with pytest.raises(InputError, match="There is no thing"), FILES.load(tmp_path):
        pass
