"""The store: whole or absent, checked before use, computed once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from es2.core.errors import InputError, MachineError
from es2.core.files import DamagedError, file_digest, with_checksum
from es2.store.activation_set import FORMAT_VERSION, ActivationSet
from es2.store.store import Store

TEXTS = ("How do I pick a lock?", "Zeile\nzwei — ü", "x\x00y", "🧂")
SHAPE = (3, len(TEXTS), 5)
META = {"model": "tiny", "run": None, "texts_digest": "d1", "templated": True, "decides": {"weights": "w"}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cached_activations")


def arrays(seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {position: generator.normal(size=SHAPE).astype(dtype) for position in ("last", "last_instruction")}


def write(store: Store, key: str = "abc", *, seed: int = 0, **meta: Any) -> ActivationSet:
    return store.write(key, META | meta, TEXTS, arrays(seed))


def visible(store: Store) -> list[str]:
    return sorted(path.name for path in store.root.iterdir() if path.name != ".locks") if store.root.exists() else []


def edit_meta(path: Path, **changes: Any) -> None:
    meta = json.loads((path / "meta.json").read_text()) | changes
    document = {name: value for name, value in meta.items() if value is not ...}
    (path / "meta.json").write_text(json.dumps(with_checksum(document)))


def redigest(path: Path) -> None:
    """Make the digests in `meta.json` agree with the files, as a forger would."""
    names = ("activations.safetensors", "texts.parquet")
    edit_meta(path, files={name: file_digest(path / name) for name in names})


# --------------------------------------------------------------------------------------------------- what is written


def test_round_trip(store: Store) -> None:
    written = write(store)
    read = store.open("abc")
    assert read == written
    assert (read.model, read.run, read.texts_digest) == ("tiny", None, "d1")
    assert (read.n_layers, read.n_prompts, read.d_model) == SHAPE
    assert read.positions == ("last", "last_instruction")
    assert read.texts == TEXTS
    for position, array in arrays().items():
        for l in range(SHAPE[0]):
            layer = read.layer(l, position)
            assert layer.dtype == np.float32
            np.testing.assert_array_equal(layer, array[l])
    np.testing.assert_array_equal(read.layer(1), arrays()["last"][1])


def test_the_files_are_what_the_design_says(store: Store) -> None:
    path = write(store, tokens=7).path
    assert sorted(file.name for file in path.iterdir()) == ["activations.safetensors", "meta.json", "texts.parquet"]
    tensors = load_file(path / "activations.safetensors")
    np.testing.assert_array_equal(tensors["last_instruction"], arrays()["last_instruction"])
    meta = json.loads((path / "meta.json").read_text())
    assert meta["format"] == FORMAT_VERSION
    assert meta["key"] == "abc"
    assert meta["dtype"] == "float32"
    assert meta["decides"] == {"weights": "w"}
    assert meta["tokens"] == 7
    assert meta["files"] == {name: file_digest(path / name) for name in ("activations.safetensors", "texts.parquet")}


def test_half_precision_is_stored_as_such_and_read_as_float32(store: Store) -> None:
    half = arrays(dtype="float16")
    activations = store.write("abc", META, TEXTS, half)
    assert activations.meta["dtype"] == "float16"
    assert load_file(activations.path / "activations.safetensors")["last"].dtype == np.float16
    assert activations.layer(2).dtype == np.float32
    np.testing.assert_array_equal(activations.layer(2), half["last"][2].astype(np.float32))


def test_arrays_in_any_memory_order(store: Store) -> None:
    prompt_major = np.random.default_rng(1).normal(size=(SHAPE[1], SHAPE[0], SHAPE[2])).astype(np.float32)
    activations = store.write("abc", META, TEXTS, {"last": prompt_major.transpose(1, 0, 2)})
    np.testing.assert_array_equal(activations.layer(1), prompt_major[:, 1])


def test_a_set_that_is_there_stays(store: Store) -> None:
    first = write(store)
    assert write(store, seed=1).created == first.created
    np.testing.assert_array_equal(store.open("abc").layer(0), arrays()["last"][0])


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"last": np.zeros((3, 4), np.float32)},
        {"last": np.zeros(SHAPE, np.float64)},
        {"last": np.zeros((3, 5, 5), np.float32)},
        {"last": np.zeros(SHAPE, np.float32), "other": np.zeros((2, 4, 5), np.float32)},
    ],
)
def test_arrays_that_do_not_fit_are_refused(store: Store, bad: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"needed|texts for"):
        store.write("abc", META, TEXTS, bad)
    assert visible(store) == []


def test_layers_and_positions_that_are_not_there(store: Store) -> None:
    activations = write(store)
    for l in (-1, 3):
        with pytest.raises(InputError, match="layers 0 to 2"):
            activations.layer(l)
    with pytest.raises(InputError, match="only last, last_instruction"):
        activations.layer(0, "first")


def test_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))
    assert write(Store()).path == tmp_path / "home" / "cached_activations" / "abc"


# ----------------------------------------------------------------------------------------------- finding and listing


def test_absent(store: Store) -> None:
    assert store.get("abc") is None
    assert store.list() == []
    assert store.find(model="tiny", texts_digest="d1", position="last") is None
    with pytest.raises(InputError, match=r"no activation set abc .*capture it"):
        store.open("abc")
    for use in (store.open, store.get, lambda key: store.write(key, META, TEXTS, arrays())):
        with pytest.raises(InputError, match="no key"):
            use("../abc")


def test_one_set_is_found_under_every_name_of_its_model(store: Store) -> None:
    written = write(store)
    assert store.find(model="/models/tiny", texts_digest="d1", position="last") is None
    named = store.add_name(written, "/models/tiny")
    assert store.add_name(named, "tiny") is named
    found = store.find(model="/models/tiny", texts_digest="d1", position="last")
    assert found == written
    assert found.models == ("tiny", "/models/tiny")
    assert store.find(model="tiny", texts_digest="d1", position="last") == written
    np.testing.assert_array_equal(found.layer(0), arrays()["last"][0])


def test_one_set_is_found_under_every_run_that_left_these_weights(store: Store) -> None:
    written = write(store, run="one")
    assert store.find(model="tiny", texts_digest="d1", position="last", run="another") is None
    named = store.add_name(written, "tiny", "another")
    assert store.add_name(named, "tiny", "one") is named
    assert store.add_name(named, "tiny", None) is named, "no run is no run of that name"
    for run in ("one", "another"):
        assert store.find(model="tiny", texts_digest="d1", position="last", run=run) == written
    assert store.find(model="tiny", texts_digest="d1", position="last") is None


def test_list_and_find_give_the_newest(store: Store) -> None:
    for key in ("one", "two", "three"):
        write(store, key)
    write(store, "tuned", run="r1")
    write(store, "others", texts_digest="d2")
    store.write("positioned", META, TEXTS, {"last": arrays()["last"]})
    assert [found.key for found in store.list()] == ["positioned", "others", "tuned", "three", "two", "one"]

    def key_of(**query: Any) -> str | None:
        found = store.find(**{"model": "tiny", "texts_digest": "d1", "position": "last"} | query)
        return found and found.key

    assert key_of() == "three", "before a newer one of other positions than an analysis captures"
    assert key_of(position="last_instruction") == "three"
    assert key_of(run="r1") == "tuned"
    assert key_of(texts_digest="d2") == "others"
    assert key_of(model="other") is None


def test_every_captured_position_has_the_set_that_find_returns(store: Store) -> None:
    write(store, "both")
    write(store, "tuned", run="r1")
    write(store, "others", texts_digest="d2")
    for positions in (("mean",), ("last-2", "last"), ("made-up",)):
        store.write("-".join(positions), META, TEXTS, dict.fromkeys(positions, arrays()["last"]))
    found = store.by_position(model="tiny", texts_digest="d1")
    assert {position: one.key for position, one in found.items()} == {
        "last": "both",
        "last-2": "last-2-last",
        "last_instruction": "both",
        "mean": "mean",
    }
    assert list(found) == ["last", "last-2", "last_instruction", "mean"], "from the end of the prompt on"
    assert store.by_position(model="other", texts_digest="d1") == {}


def test_find_passes_over_damage(store: Store) -> None:
    write(store, "one")
    newest = write(store, "two")
    (newest.path / "texts.parquet").write_bytes(b"")
    found = store.find(model="tiny", texts_digest="d1", position="last")
    assert found is not None
    assert found.key == "one"
    assert visible(store) == ["one", "two.damaged-1"]


def test_list_skips_what_it_cannot_read_and_moves_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    write(store, "good")
    edit_meta(write(store, "newer").path, format=FORMAT_VERSION + 1)
    (store.root / "foreign").mkdir()
    (store.root / "readme").touch()
    assert [found.key for found in store.list()] == ["good"]
    assert "newer" in caplog.text
    assert "foreign" in caplog.text
    assert visible(store) == ["foreign", "good", "newer", "readme"]


# ------------------------------------------------------------------------------------------------ damage and forgery


def flip(path: Path, before: bytes, after: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(before, after))


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / "activations.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "activations.safetensors").write_bytes(data)


def flip_a_letter_of_meta(path: Path) -> None:
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text.replace('"tiny"', '"tinx"'))


def truncate(path: Path) -> None:
    os.truncate(path / "activations.safetensors", 100)


def empty_texts(path: Path) -> None:
    (path / "texts.parquet").write_bytes(b"")


def lose_a_file(path: Path) -> None:
    (path / "activations.safetensors").unlink()


def lose_meta(path: Path) -> None:
    (path / "meta.json").unlink()


def cut_meta(path: Path) -> None:
    os.truncate(path / "meta.json", 30)


def listed_meta(path: Path) -> None:
    (path / "meta.json").write_text("[]")


def no_format(path: Path) -> None:
    edit_meta(path, format="1")


def no_digests(path: Path) -> None:
    edit_meta(path, files={})


def negative_layers(path: Path) -> None:
    edit_meta(path, n_layers=-3)


def nested_positions(path: Path) -> None:
    edit_meta(path, positions=[["last"]])


def of_another_key(path: Path) -> None:
    edit_meta(path, key="def")


def forged_truncation(path: Path) -> None:
    truncate(path)
    redigest(path)


def forged_shape(path: Path) -> None:
    edit_meta(path, n_layers=SHAPE[0] + 1)


def forged_position(path: Path) -> None:
    edit_meta(path, positions=["last", "first"])


def forged_dtype(path: Path) -> None:
    save_file({"last": np.zeros(SHAPE, np.int64)}, path / "activations.safetensors")
    edit_meta(path, positions=["last"])
    redigest(path)


def lying_header(path: Path) -> None:
    header = json.dumps({"last": {"dtype": "F32", "shape": list(SHAPE), "data_offsets": [0, 2**40]}}).encode()
    (path / "activations.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    edit_meta(path, positions=["last"])
    redigest(path)


def endless_header(path: Path) -> None:
    (path / "activations.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    redigest(path)


DAMAGE = [
    flip_a_byte,
    flip_a_letter_of_meta,
    truncate,
    empty_texts,
    lose_a_file,
    lose_meta,
    cut_meta,
    listed_meta,
    no_format,
    no_digests,
    negative_layers,
    nested_positions,
    of_another_key,
    forged_truncation,
    forged_shape,
    forged_position,
    forged_dtype,
    lying_header,
    endless_header,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_set_aside_and_reads_as_absent(store: Store, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    damage(write(store).path)
    assert store.get("abc") is None
    assert "abc.damaged-1" in caplog.text
    assert visible(store) == ["abc.damaged-1"]
    damage(write(store).path)
    with pytest.raises(DamagedError, match=r"abc is damaged \(.*set aside as abc\.damaged-2; compute it again"):
        store.open("abc")
    assert store.list() == []
    np.testing.assert_array_equal(write(store).layer(0), arrays()["last"][0])


@pytest.mark.parametrize("use", [lambda found: found.layer(0), lambda found: found.texts])
def test_what_list_found_is_checked_on_first_use(store: Store, use: Any) -> None:
    flip_a_byte(write(store).path)
    (found,) = store.list()
    with pytest.raises(DamagedError):
        use(found)
    assert visible(store) == ["abc.damaged-1"]


@pytest.mark.parametrize("texts", [b"PAR1 no parquet", None])
def test_forged_texts(store: Store, texts: bytes | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = write(store).path
    if texts is None:
        pq.write_table(pa.table({"text": ["one too few"]}), path / "texts.parquet")
    else:
        (path / "texts.parquet").write_bytes(texts)
    redigest(path)
    found = store.open("abc")
    np.testing.assert_array_equal(found.layer(0), arrays()["last"][0])
    with pytest.raises(DamagedError):
        _ = found.texts


def test_a_successor_is_not_taken_for_the_damaged_set(store: Store) -> None:
    flip_a_byte(write(store).path)
    (found,) = store.list()
    assert store.get("abc") is None
    write(store, seed=1)
    with pytest.raises(DamagedError):
        found.layer(0)
    np.testing.assert_array_equal(store.open("abc").layer(0), arrays(1)["last"][0])


def test_a_newer_format_is_refused_in_a_sentence_and_left_alone(store: Store) -> None:
    edit_meta(write(store).path, format=FORMAT_VERSION + 1)
    for use in (store.open, store.get):
        with pytest.raises(InputError, match=r"newer ES2 Workbench.*update"):
            use("abc")
    assert visible(store) == ["abc"]


def test_older_and_unknown_entries_are_tolerated(store: Store) -> None:
    path = write(store).path
    edit_meta(path, surprise={"a": 1}, created=..., key=..., run=..., templated=..., decides=...)
    found = store.open("abc")
    assert found.meta["surprise"] == {"a": 1}
    assert found.run is None
    assert found.created == ""
    assert store.find(model="tiny", texts_digest="d1", position="last") == found


def test_a_set_removed_underfoot(store: Store) -> None:
    found = write(store)
    (listed,) = store.list()
    found.check()
    shutil.rmtree(found.path)
    for use in (lambda: found.layer(0), lambda: listed.layer(0), lambda: found.texts):
        with pytest.raises(InputError, match="was removed; capture it again"):
            use()
    assert found.derived("d1") is None
    with pytest.raises(InputError, match="was removed"), found.write_derived("d1"):
        pass
    assert visible(store) == []


# --------------------------------------------------------------------------------------------------- hostile machines


def refuse(number: int) -> Any:
    def refused(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize("where", ["es2.core.files.os.fsync", "pyarrow.parquet.write_table", "pathlib.Path.rename"])
def test_a_full_disk_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, refuse(errno.ENOSPC))
        with pytest.raises(MachineError, match=r"No space is left.*ES2_HOME"):
            write(store)
    assert visible(store) == []
    assert write(store).texts == TEXTS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    store = Store(small_disk / "cached_activations")
    activations = write(store)
    large = {"last": np.random.default_rng(0).normal(size=(100, 4, 1000)).astype(np.float32)}
    with pytest.raises(MachineError, match="No space is left"):
        store.write("large", META, TEXTS, large)
    with pytest.raises(MachineError, match="No space is left"), activations.write_derived("d1") as folder:
        np.save(folder / "x.npy", large["last"])
    assert visible(store) == ["abc"]
    assert activations.derived("d1") is None
    assert [path.name for path in (activations.path / "derived").iterdir()] == []
    write(store, "small")


def test_a_root_that_cannot_be_written(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    below_a_file = Store(tmp_path / "file" / "cached_activations")
    assert below_a_file.get("abc") is None
    with pytest.raises(MachineError, match=r"Cannot write .*ES2_HOME"):
        write(below_a_file)
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EACCES))
    with pytest.raises(MachineError, match=r"No permission to write .*ES2_HOME"):
        write(store)
    with pytest.raises(MachineError, match="No permission to write"), store.lock("abc"):
        pass


def test_what_cannot_be_read_is_not_taken_for_damaged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store)
    for where in ("pathlib.Path.read_bytes", "pathlib.Path.open"):
        with monkeypatch.context() as patch:
            patch.setattr(where, refuse(errno.EACCES))
            with pytest.raises(MachineError, match="Cannot read"):
                store.get("abc")
    assert visible(store) == ["abc"]


def test_a_damaged_set_on_a_read_only_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_a_byte(write(store).path)
    monkeypatch.setattr(Path, "rename", refuse(errno.EROFS))
    with pytest.raises(DamagedError, match="cannot be set aside"):
        store.open("abc")
    assert store.get("abc") is None


HANGING_WRITER = """
import sys, time
from pathlib import Path
import numpy as np
import es2.store.store

def hang(*_):
    print("writing", flush=True)
    time.sleep(60)

es2.store.store.write_json = hang
store = es2.store.store.Store(Path(sys.argv[1]))
store.write("abc", {"model": "tiny", "texts_digest": "d1"}, ["a"], {"last": np.zeros((2, 1, 3), np.float32)})
"""


@pytest.fixture
def hanging_writer(store: Store) -> Iterator[subprocess.Popen[str]]:
    """A process that hangs in the middle of writing `abc`: arrays and texts are there, `meta.json` is not."""
    command = [sys.executable, "-c", HANGING_WRITER, str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        yield writer
        writer.kill()


@pytest.mark.parametrize("next_key", ["abc", "other"])
def test_a_writer_killed_midway_leaves_nothing_visible(
    store: Store, hanging_writer: subprocess.Popen[str], next_key: str
) -> None:
    hanging_writer.send_signal(signal.SIGKILL)
    hanging_writer.wait()
    (left,) = visible(store)
    assert left.startswith(".tmp-abc-")
    assert store.list() == []
    assert store.get("abc") is None
    assert write(store, next_key).texts == TEXTS
    assert visible(store) == [next_key]


def test_a_living_writer_is_left_in_peace(store: Store, hanging_writer: subprocess.Popen[str]) -> None:
    write(store, "other")
    assert len(visible(store)) == 2
    assert hanging_writer.poll() is None


COMPUTER = """
import sys, time
from pathlib import Path
import numpy as np
from es2.store.store import Store

store = Store(Path(sys.argv[1]))
with store.lock("abc"):
    found = store.get("abc")
    if found is None:
        with open(sys.argv[2], "a") as file:
            file.write("computed\\n")
        time.sleep(0.3)
        array = np.full((2, 1, 3), 7, np.float32)
        found = store.write("abc", {"model": "tiny", "texts_digest": "d1"}, ["a"], {"last": array})
print(found.layer(1).sum())
"""


def test_eight_ask_and_one_computes(store: Store, tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMPUTER, str(store.root), str(tmp_path / "computed")]
    askers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    answers = [asker.communicate(timeout=60)[0] for asker in askers]
    assert answers == ["21.0\n"] * 8
    assert (tmp_path / "computed").read_text() == "computed\n"
    assert visible(store) == ["abc"]


# ----------------------------------------------------------------------------------------------------------- derived


def write_derived(activations: ActivationSet, key: str = "d1", text: str = "x") -> Path:
    with activations.write_derived(key) as folder:
        (folder / "analysis.json").write_text(text)
        (folder / "parts").mkdir()
        (folder / "parts" / "layer.npy").write_bytes(b"123")
    found = activations.derived(key)
    assert found is not None
    return found


def test_derived_round_trip(store: Store) -> None:
    activations = write(store)
    assert activations.derived("d1") is None
    path = write_derived(activations)
    assert path == activations.path / "derived" / "d1"
    assert (path / "analysis.json").read_text() == "x"
    write_derived(activations, text="y")
    assert (path / "analysis.json").read_text() == "x", "what is there stays"
    assert activations.derived("d2") is None
    for use in (activations.derived, lambda key: activations.write_derived(key).__enter__()):
        with pytest.raises(InputError, match="no key"):
            use("../../abc")


def test_a_derived_folder_that_fails_is_removed(store: Store) -> None:
    activations = write(store)

    def fail_midway() -> None:
        with activations.write_derived("d1") as folder:
            (folder / "analysis.json").write_text("x")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert activations.derived("d1") is None
    assert [path.name for path in (activations.path / "derived").iterdir()] == []


def test_a_derived_folder_that_cannot_be_listed_is_not_damaged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    activations = write(store)
    path = write_derived(activations)

    def refused(folder: Any = ".") -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused)
        with pytest.raises(MachineError, match="Permission denied"):
            activations.derived("d1")
    assert activations.derived("d1") == path


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "analysis.json").write_text("y"),
        lambda path: (path / "analysis.json").unlink(),
        lambda path: (path / "extra").touch(),
        lambda path: (path / "digests.json").unlink(),
        lambda path: (path / "digests.json").write_text('{"format": 1}'),
        lambda path: flip(path / "digests.json", b'"format": 1', b'"format": 3'),
    ],
)
def test_derived_damage_is_set_aside(store: Store, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    activations = write(store)
    damage(write_derived(activations))
    assert activations.derived("d1") is None
    assert "abc/d1 is damaged" in caplog.text
    assert (activations.path / "derived" / "d1.damaged-1").is_dir()
    assert (write_derived(activations) / "analysis.json").read_text() == "x"


def test_a_newer_derived_folder_is_refused(store: Store) -> None:
    activations = write(store)
    digests = write_derived(activations) / "digests.json"
    digests.write_text(json.dumps(with_checksum(json.loads(digests.read_text()) | {"format": 2})))
    with pytest.raises(InputError, match="newer ES2 Workbench"):
        activations.derived("d1")
