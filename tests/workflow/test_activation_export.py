"""Activation sets as tables and tensors for other tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import SafetensorError, safe_open

from es2.analysis.projection import UmapCoordinates
from es2.core.errors import InputError, MachineError
from es2.workflow.activation_export import export_activations
from es2.workflow.derived import umap_key
from tests.builders_artifacts import BEST_LAYER, D_MODEL, DISTANCES, MODEL, Compared, write_comparison

Es2 = Callable[..., tuple[int, dict]]


@pytest.fixture(scope="module")
def compared(home: Path) -> Compared:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ES2_HOME", str(home))
        return write_comparison(home, 40)


@pytest.fixture(autouse=True)
def own_places(places: None) -> None:
    """Everything is below `home`."""


def test_a_table_has_a_row_for_each_prompt(compared: Compared, tmp_path: Path, es2: Es2) -> None:
    made = compared.artifacts
    options = ("--prompts", made.source, "--out", tmp_path / "base.parquet")
    code, document = es2("export", "--activations", made.activations.key, *options, "--embeddings")
    assert code == 0
    layer = made.analysis.recommended[0]
    about = {"model": MODEL, "layer": layer, "coordinates": "pca", "margins": True, "n_prompts": len(made.prompts)}
    assert about.items() <= document.items()
    table = pq.read_table(tmp_path / "base.parquet")
    assert json.loads(table.schema.metadata[b"es2"])["key"] == made.activations.key
    assert table["prompt"].to_pylist() == list(made.prompts.texts)
    assert [label == "harmful" for label in table["label"].to_pylist()] == list(made.prompts.labels == 1)
    assert set(table["split"].to_pylist()) == {"probe", "test"}
    assert [name for name in table.column_names if name.startswith("margin_")] == [
        f"margin_{l}" for l in range(len(DISTANCES))
    ]
    margin, harmful = np.array(table[f"margin_{BEST_LAYER}"]), made.prompts.labels == 1
    assert margin[harmful].mean() > 0 > margin[~harmful].mean()
    states = made.activations.layer(layer)
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), states)
    centred = states - states.mean(axis=0)
    singular = np.linalg.svd(centred, compute_uv=False)[:2]
    points = np.stack([np.array(table["x"]), np.array(table["y"])], axis=1)
    assert np.linalg.norm(points, axis=0) == pytest.approx(singular, rel=1e-4)


def test_a_tuned_set_has_its_runs_margins_and_map(compared: Compared, tmp_path: Path) -> None:
    base, tuned, prompts = compared.artifacts.activations, compared.tuned, compared.artifacts.prompts
    points = np.zeros((len(DISTANCES), 2, len(prompts), 2), dtype=np.float32)
    points[:, 1] = np.arange(len(prompts))[:, None]
    with tuned.write_derived(umap_key(base, prompts, "last", tuned)) as folder:
        UmapCoordinates(points, "umap", "both").save(folder)
    document = export_activations(tuned.key, tmp_path / "t.parquet", prompts=str(compared.artifacts.source), layer=2)
    assert document["coordinates"] == "umap"
    table = pq.read_table(tmp_path / "t.parquet")
    assert table["x"].to_pylist() == list(range(len(prompts)))
    assert compared.analysis.tuned_probes is not None
    expected = compared.analysis.tuned_probes.margin(tuned.layer(2), 2)
    assert np.array(table["margin_2"]) == pytest.approx(expected, rel=1e-5)


def test_hugging_face_datasets_reads_the_table(compared: Compared, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = compared.artifacts
    out = tmp_path / "base.parquet"
    export_activations(made.activations.key, out, prompts=str(made.source), embeddings=True)
    read = datasets.Dataset.from_parquet(str(out), cache_dir=str(tmp_path / "cache"))
    assert read[5]["prompt"] == made.prompts.texts[5]
    assert len(read[5]["embedding"]) == D_MODEL


def test_tensors_come_with_what_describes_them(compared: Compared, tmp_path: Path) -> None:
    made = compared.artifacts
    out = tmp_path / "base.safetensors"
    export_activations(str(made.activations.path), out, format="safetensors", prompts=str(made.source))
    with safe_open(out, "numpy") as file:
        about = json.loads(file.metadata()["es2"])
        assert set(file.keys()) == {"last", "last_instruction"}
        found = file.get_tensor("last")
    assert found.shape == (len(DISTANCES), len(made.prompts), D_MODEL)
    assert np.array_equal(found[3], made.activations.layer(3))
    assert (about["model"], about["texts"]) == (MODEL, list(made.prompts.texts))
    assert about["splits"] == list(made.prompts.splits)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "csv"}, "Unknown format 'csv'; one of parquet, safetensors"),
        ({"position": "mean"}, "has no position 'mean'; one of last, last_instruction"),
        ({"layer": 6}, "There is no layer 6: the set's layers are 0 to 5"),
        ({"prompts": "builtin"}, "are not in the prompts 'builtin'; give the ones that were captured"),
        ({"key": "0" * 24}, "There is no activation set 0000"),
        ({"key": "../x"}, "x"),
        ({"out": "."}, "exists; give another name"),
    ],
)
def test_what_cannot_be_exported(compared: Compared, tmp_path: Path, changes: dict, sentence: str) -> None:
    made = compared.artifacts
    given = {"key": made.activations.key, "out": tmp_path / "new", "prompts": str(made.source)} | changes
    with pytest.raises(InputError, match=sentence):
        export_activations(given.pop("key"), Path(given.pop("out")), **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        Path(str(arguments[1])).write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    monkeypatch.setattr("pyarrow.parquet.write_table", fail)
    made = compared.artifacts
    with pytest.raises(MachineError, match="No space is left"):
        export_activations(made.activations.key, tmp_path / "new", prompts=str(made.source), format=format)
    assert list(tmp_path.iterdir()) == []


def test_either_a_run_or_activations(es2: Es2, tmp_path: Path) -> None:
    for options in ((), ("--run", "a", "--activations", "b")):
        code, document = es2("export", *options, "--out", tmp_path / "x")
        assert (code, document["error"]) == (2, "Give either --run, for weights, or --activations, for embeddings.")
