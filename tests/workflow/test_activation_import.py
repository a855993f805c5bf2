"""Embeddings from elsewhere: what an export wrote comes back, and what a file lacks is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from es2.core.errors import InputError
from es2.prompts.loading import load_prompts
from es2.store.store import Store
from es2.workflow.activation_export import export_activations
from es2.workflow.activation_import import import_activations
from es2.workflow.derived import find_activations, find_analysis
from tests.builders_artifacts import MODEL, Artifacts, write_artifacts

Es2 = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return write_artifacts(tmp_path_factory.mktemp("elsewhere"), 40)


@pytest.fixture(autouse=True)
def own_places(places: None) -> None:
    """Everything is below `home`, where nothing of `made` is."""


def write(path: Path, made: Artifacts, *, about: Any = None, **tensors: np.ndarray) -> Path:
    states = np.stack([made.activations.layer(l) for l in range(made.activations.n_layers)])
    if about is None:
        about = {"model": "mine", "texts": list(made.prompts.texts)}
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(tensors or {"last": states}, path, {"es2": text})
    return path


def test_what_was_exported_comes_back(made: Artifacts, tmp_path: Path, es2: Es2) -> None:
    out = tmp_path / "set.safetensors"
    export_activations(str(made.activations.path), out, format="safetensors", prompts=str(made.source))
    assert out.stat().st_mode == made.source.stat().st_mode
    code, document = es2("import", "--activations", out, "--prompts", made.source)
    assert code == 0
    assert document["recommended"] == list(made.analysis.recommended)
    found = find_activations(MODEL, made.prompts, "last_instruction")
    assert found is not None
    assert found.key == document["key"]
    for layer in range(found.n_layers):
        assert np.array_equal(found.layer(layer), made.activations.layer(layer))
    analysis = find_analysis(found, made.prompts, "last")
    assert analysis is not None
    assert analysis.base_layers == made.analysis.base_layers


def test_rows_are_found_by_their_texts(made: Artifacts, tmp_path: Path) -> None:
    """The file holds more prompts than are measured, in another order, in half precision."""
    rng = np.random.default_rng(0)
    texts = ["not asked for", *made.prompts.texts[::-1]]
    states = rng.normal(size=(2, len(texts), 8)).astype(np.float16)
    file = write(tmp_path / "half.safetensors", made, about={"model": "mine", "texts": texts}, mean=states)
    activations, analysis = import_activations(file, load_prompts(str(made.source)))
    assert (activations.model, activations.positions, activations.n_prompts) == ("mine", ("mean",), len(made.prompts))
    assert np.array_equal(activations.layer(1, "mean"), states[1, 1:][::-1].astype(np.float32))
    assert analysis.config.position == "mean"
    assert import_activations(file, load_prompts(str(made.source)))[0].key == activations.key


def test_a_tuned_models_embeddings_do_not_pass_for_its_bases(made: Artifacts, tmp_path: Path) -> None:
    about = {"model": "mine", "run": "2026-finetune", "texts": list(made.prompts.texts)}
    activations, _ = import_activations(
        write(tmp_path / "tuned.safetensors", made, about=about), load_prompts(str(made.source))
    )
    assert activations.models == ("mine, run 2026-finetune",)


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        ("[" * 10**5, "does not say which model and prompts"),
        ("no JSON", "does not say which model and prompts"),
        ([], "does not say which model and prompts"),
        ({"texts": ["a"]}, "does not name its model"),
        ({"model": "m"}, "does not list its prompts"),
        ({"model": "m", "texts": [1]}, "does not list its prompts"),
        ({"model": "m", "texts": ["a"]}, r"is \[6, 54, 24\]; \[layers, 1 prompts, width\] is needed"),
    ],
)
def test_a_file_that_does_not_say_what_it_is_of(made: Artifacts, tmp_path: Path, about: Any, sentence: str) -> None:
    refused(write(tmp_path / "x.safetensors", made, about=about), made, sentence)


def test_tensors_that_are_none_of_a_set(made: Artifacts, tmp_path: Path) -> None:
    n = len(made.prompts)
    good = np.zeros((2, n, 4), dtype=np.float32)
    for tensors, sentence in (
        ({"resid": good}, "'resid' of 'x.safetensors' is named by no token position"),
        ({"last": good.astype(np.float64)}, "is F64; write it as float32 or float16"),
        ({"last": good[0]}, r"is \[54, 4\]; \[layers, 54 prompts, width\]"),
        ({"last": good, "mean": good[:1]}, r"all of one shape and number format; it has last \[2, 54, 4\]"),
        ({"last": good * np.float32("nan")}, "holds values that are not finite"),
    ):
        refused(write(tmp_path / "x.safetensors", made, **tensors), made, sentence)


def test_other_prompts_and_other_files(made: Artifacts, tmp_path: Path, es2: Es2) -> None:
    file = write(tmp_path / "x.safetensors", made)
    with pytest.raises(InputError, match=r"lacks 814 of the 814 probe and test prompts of 'builtin'; give"):
        import_activations(file, load_prompts("builtin"))
    refused(tmp_path / "none.safetensors", made, "There is no file")
    (tmp_path / "text").write_text("x" * 100)
    refused(tmp_path / "text", made, "is no readable safetensors file")
    refused(tmp_path, made, "is not what `Dataset.save_to_disk` wrote")
    code, document = es2("import")
    assert (code, document["error"]) == (2, "Give either --adapter, for weights, or --activations, for embeddings.")


def refused(file: Path, made: Artifacts, sentence: str) -> None:
    before = len(Store().list())
    with pytest.raises(InputError, match=sentence):
        import_activations(file, load_prompts(str(made.source)))
    assert len(Store().list()) == before


def rows(made: Artifacts, **columns: Any) -> dict[str, Any]:
    """A table of `made`: a row for each prompt, its embeddings `[layer, d_model]`."""
    states = np.stack([made.activations.layer(l) for l in range(made.activations.n_layers)], axis=1)
    n = len(made.prompts)
    table = {"model": ["mine"] * n, "prompt": list(made.prompts.texts), "last": states.tolist(), "note": [0] * n}
    return table | columns


def test_a_saved_dataset_and_a_parquet_file_come_in(made: Artifacts, tmp_path: Path, es2: Es2) -> None:
    from datasets import Array2D, Dataset

    whole = Dataset.from_dict(rows(made))
    as_arrays = whole.cast_column("last", Array2D((made.activations.n_layers, made.activations.d_model), "float32"))
    whole.shuffle(seed=1).save_to_disk(tmp_path / "lists", num_shards=2)
    as_arrays.save_to_disk(tmp_path / "arrays")
    whole.to_parquet(tmp_path / "table.parquet")
    for place in ("lists", "arrays", "table.parquet"):
        code, document = es2("import", "--activations", tmp_path / place, "--prompts", made.source)
        assert (code, document["model"], document["recommended"]) == (0, "mine", list(made.analysis.recommended)), place
        found = Store().open(document["key"])
        for layer in range(found.n_layers):
            assert np.array_equal(found.layer(layer), made.activations.layer(layer)), place


def test_a_table_that_lacks_something(made: Artifacts, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    n, file = len(made.prompts), tmp_path / "x.parquet"
    for columns, sentence in (
        ({"last": None}, "has the columns model, prompt, note; it needs columns `model` and `prompt`, and one of"),
        ({"model": None}, "has the columns prompt, last, note; it needs"),
        ({"model": ["a"] * (n - 1) + ["b"]}, "is of 2 models"),
        ({"model": [None] * n}, "does not name its model"),
        ({"prompt": [None] * n}, "does not list its prompts"),
        ({"last": [[1.0]] * n}, r"has not \[layers, width\] numbers in every row"),
        ({"last": [[[1.0]], *[[[1.0], [2.0]]] * (n - 1)]}, r"has not \[layers, width\] numbers in every row"),
        ({"last": [[[1.0]], None, *[[[1.0]]] * (n - 2)]}, r"has not \[layers, width\] numbers in every row"),
        ({"last": [[[1]]] * n}, "holds int64, no floating-point numbers"),
        ({"last": [[[1.0, None]]] * n}, "holds values that are not finite"),
        ({"last": [[[1e300]]] * n}, "holds values that are not finite"),
    ):
        kept = {name: values for name, values in rows(made, **columns).items() if values is not None}
        pq.write_table(pa.table(kept), file)
        refused(file, made, sentence)
    whole = file.read_bytes()
    for damaged in (b"PAR1" + b"x" * 100, whole[:40] + whole[-20:], whole.replace(b"\x15", b"\x7f")):
        file.write_bytes(damaged)
        refused(file, made, "cannot be read")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", made, "of a `DatasetDict` give one split's folder")
