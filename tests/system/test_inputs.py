"""What comes from outside ends in a result or a sentence: properties of the readers, and a short run of the fuzzer.

`python -m tests.system.fuzz --cases 100000` is the long run, and replays what it finds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.state import Choice, read_link
from es2.core.errors import Es2Error, InputError, one_line
from es2.core.files import MAX_JSON_LEVELS, parse_json, read_json, verify_checksum, with_checksum
from es2.core.versions import format_of
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.reply_log import ReplyLog
from es2.jobs.job import HOST, Job
from es2.jobs.queue import list_jobs
from es2.models.adapter_files import check_adapter
from es2.prompts.loading import load_prompts
from es2.prompts.readers import parse_prompts
from es2.store.store import Store
from es2.training.config import FinetuneConfig
from tests.system import fuzz
from tests.system.readers import READERS, Attempt, Reader

SHORT = 2_000

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# -------------------------------------------------------------------------------------------------------------- fuzzing


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", READERS)
def test_no_case_of_a_short_run_escapes(name: str) -> None:
    total = sum(reader.weight for reader in READERS.values())
    (count,) = fuzz.run(round(SHORT * READERS[name].weight / total), readers=[name])
    found = "\n".join(f"{escape.error} at {escape.where}: {escape.replay}" for escape in count.escapes)
    assert not found, found
    assert count.cases == count.results + count.sentences > 5


class TestTheFuzzerItself:
    @pytest.fixture
    def reader(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Attempt], None]:
        """The one reader there is, which does this."""

        def replace(attempt: Attempt) -> None:
            monkeypatch.setattr(fuzz, "READERS", {"mine": Reader(lambda folder: lambda rng: attempt, 1)})

        return replace

    def fails(self) -> None:
        raise KeyError("layers")

    def waits(self) -> None:
        while True:
            time.sleep(0.01)

    def spins(self) -> None:
        while True:
            pass

    def takes_all_memory(self) -> None:
        np.ones(2**31).sum()

    def says_too_much(self) -> None:
        raise InputError("One line.\nAnother.")

    def says_nothing(self) -> None:
        raise InputError("")

    @pytest.mark.parametrize(
        ("does", "error"),
        [
            ("fails", "KeyError: 'layers'"),
            ("waits", "HangError"),
            ("spins", "HangError"),
            ("takes_all_memory", "MemoryError"),
            ("says_too_much", "no sentence"),
            ("says_nothing", "no sentence"),
        ],
    )
    def test_sees_an_escape(
        self, reader: Callable[[Attempt], None], does: str, error: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if does in ("waits", "spins"):
            monkeypatch.setattr(fuzz, "WALL_SECONDS" if does == "waits" else "CPU_SECONDS", 0.3)
        reader(getattr(self, does))
        (count,) = fuzz.run(1, seed=7)
        (escape,) = count.escapes
        assert error in escape.error
        assert escape.replay == "python -m tests.system.fuzz --reader mine --seed 7 --case 0"

    def test_counts_results_and_sentences(self, reader: Callable[[Attempt], None]) -> None:
        def refuse() -> None:
            raise InputError("The file is damaged; fetch it again.")

        reader(lambda: 1)
        assert [(count.cases, count.results) for count in fuzz.run(4)] == [(4, 4)]
        reader(refuse)
        assert [(count.cases, count.sentences) for count in fuzz.run(4)] == [(4, 4)]

    def test_exits_with_1_on_an_escape_and_keeps_what_replays_it(
        self,
        reader: Callable[[Attempt], None],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["fuzz", "--cases", "3", "--json", str(tmp_path / "counts.json")])
        reader(lambda: 1)
        assert fuzz.main() == 0
        reader(self.fails)
        assert fuzz.main() == 1
        kept = json.loads((tmp_path / "counts.json").read_text())
        assert (kept["cases"], kept["escapes"]) == (3, 3)
        assert kept["readers"]["mine"]["escapes"][2]["replay"].endswith("--reader mine --seed 0 --case 2")
        assert "mine" in capsys.readouterr().out

    def test_a_case_is_the_same_whenever_it_is_drawn(self, tmp_path: Path) -> None:
        from tests.system.mutations import mutate_bytes, mutate_json, mutate_safetensors

        tensors = b"\x40\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64) + bytes(8)
        for change, whole in (
            (mutate_bytes, b"a,b\n1,2\n"),
            (mutate_json, {"a": [1, "x"]}),
            (mutate_safetensors, tensors),
        ):
            drawn = [[change(whole, Random(f"0:x:{case}")) for case in range(40)] for _ in range(2)]  # type: ignore[operator]
            assert drawn[0] == drawn[1]
            assert len(set(drawn[0])) > 20


# ----------------------------------------------------------------------------------------------------------- properties


class TestJson:
    @quick
    @given(JSON | st.binary(max_size=60) | st.text(max_size=60))
    def test_what_is_read_can_be_written_and_used_by_every_writer_here(self, value: Any) -> None:
        data = value if isinstance(value, (bytes, str)) else json.dumps(value)
        try:
            found = parse_json(data)
        except ValueError:
            return
        assert parse_json(json.dumps(found, allow_nan=False, ensure_ascii=False).encode()) == found

    @pytest.mark.parametrize("text", ["NaN", "[Infinity]", "1e999", "[" * 65 + "]" * 65, "[" * 100_000, "{", ""])
    def test_what_no_writer_here_writes_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError):  # noqa: PT011 (of many kinds)
            parse_json(text)

    def test_what_is_allowed(self) -> None:
        deep = "[" * (MAX_JSON_LEVELS - 1) + "1" + "]" * (MAX_JSON_LEVELS - 1)
        assert parse_json(deep) is not None
        assert parse_json('["\\ud83d\\ude00", 1763862000000000000, 1e-300]') == ["😀", 1763862000000000000, 1e-300]
        assert parse_json(b"\xef\xbb\xbf{}") == {}

    @quick
    @given(
        st.dictionaries(
            st.text(st.characters(codec="utf-8"), max_size=8), st.integers() | st.text(max_size=5), min_size=1
        )
    )
    def test_a_seal_holds_until_something_changes(self, document: dict[str, Any]) -> None:
        document.pop("digest", None)
        whole = with_checksum(document)
        assert verify_checksum(json.loads(json.dumps(whole)))
        assert verify_checksum(document), "without a digest"
        for name in document:
            assert not verify_checksum(whole | {name: "something else"})
        assert not verify_checksum(whole | {"one more": 1})

    def test_a_file_too_large_for_a_document_is_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("es2.core.files.MAX_JSON_BYTES", 10)
        (tmp_path / "x.json").write_text('{"a": 1}')
        (tmp_path / "y.json").write_text('{"a": 100000}')
        assert read_json(tmp_path / "x.json") == {"a": 1}
        assert read_json(tmp_path / "y.json") is None


class TestSettings:
    @quick
    @given(st.sampled_from((FinetuneConfig(layers=(1, 2)), EvaluateConfig())), st.data())
    def test_of_another_kind_are_a_sentence(self, config: Any, data: st.DataObject) -> None:
        document = config.to_dict()
        name = data.draw(st.sampled_from(sorted(document)))
        document[name] = data.draw(JSON)
        with suppress(InputError):
            json.dumps(type(config).read(document, "The config").to_dict())

    def test_name_the_entry(self) -> None:
        whole = FinetuneConfig(layers=(1, 2)).to_dict()
        FinetuneConfig.read(whole | {"kl_weight": 3, "somebody's own": []}, "It")
        for entry, value in (
            ("layers", 5),
            ("layers", ["1"]),
            ("steps", True),
            ("steps", 2.0),
            ("clip", 10**30),
            ("seed", None),
        ):
            with pytest.raises(InputError, match=f"^It is damaged: {entry} cannot be"):
                FinetuneConfig.read(whole | {entry: value}, "It")
        with pytest.raises(InputError, match="it has no layers"):
            FinetuneConfig.read({}, "It")

    @given(JSON)
    def test_a_version_is_one_or_none_or_a_sentence(self, stated: Any) -> None:
        try:
            assert format_of(stated, 1, "It") in (None, 1)
        except InputError as refused:
            assert "update ES2 Workbench" in one_line(refused)  # noqa: PT017 (most are none)


class TestFiles:
    @quick
    @given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
    def test_any_meta_data_leave_the_list_whole(self, tmp_path: Path, data: bytes) -> None:
        folder = tmp_path / "sets" / "abc"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meta.json").write_bytes(data)
        assert Store(tmp_path / "sets").list() == []

    @quick
    @given(st.lists(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40), max_size=5))
    def test_any_lines_leave_a_reply_log_that_can_be_written_on(self, tmp_path: Path, lines: list[bytes]) -> None:
        path = tmp_path / "log.jsonl"
        path.write_bytes(b"\n".join(lines))
        ReplyLog(path).add([{"key": "mine", "text": "é"}])
        assert ReplyLog(path)["mine"]["text"] == "é"

    @quick
    @given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
    def test_any_job_folder_is_listed_or_passed_over(self, tmp_path: Path, data: bytes) -> None:
        folder = tmp_path / "runs" / "20260101-120000-000000-finetune-0123ab"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text('{"kind": "finetune", "created": ""}')
        for name in ("result.json", "heartbeat.json", "launched.json", "name.json", "events.jsonl"):
            (folder / name).write_bytes(data)
        (job,) = list_jobs(folder.parent)
        assert job.status() in ("interrupted", "queued", "done", "failed", "cancelled", "stopped", "running")
        assert job.progress() is None
        assert isinstance(job.name, str)

    @pytest.mark.parametrize("pid", [0, -1, 1, "12", None, 2.0, True])
    def test_a_damaged_heartbeat_never_names_a_whole_group_of_processes(self, tmp_path: Path, pid: object) -> None:
        """`kill(0)` and `kill(-1)` reach far more than one job."""
        from filelock import FileLock

        (tmp_path / "config.json").write_text('{"kind": "finetune", "created": ""}')
        (tmp_path / "heartbeat.json").write_text(json.dumps({"host": HOST, "pid": pid, "state": "running"}))
        job = Job(tmp_path, {"kind": "finetune", "created": ""})
        with FileLock(tmp_path / "lock"):
            assert job.status() == "running"
            assert job._pid() is None
            job.cancel()
        assert (tmp_path / "cancel").exists()

    def test_what_never_ends_is_not_read(self, tmp_path: Path) -> None:
        """An address may name any file of the machine."""
        os.mkfifo(tmp_path / "pipe.csv")
        for source in ("/dev/zero", str(tmp_path / "pipe.csv"), f"xstest:{tmp_path / 'pipe.csv'}", "xstest:/dev/zero"):
            with pytest.raises(InputError, match=r"no plain file|There is no file"):
                load_prompts(source)

    def test_little_parquet_that_unpacks_to_much_is_read_in_small_pieces(self) -> None:
        import io

        import pyarrow as pa
        import pyarrow.parquet as pq

        file = io.BytesIO()
        rows = 20_000
        texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["a" * 10**6]))
        pq.write_table(pa.table({"prompt": texts, "label": ["harmful"] * rows}), file)
        assert len(file.getvalue()) < 10**6
        with fuzz.bounds(), pytest.raises(InputError, match="1,000,000 characters are too many"):
            parse_prompts(file.getvalue(), "bomb.parquet")


class TestAdapters:
    @pytest.mark.parametrize(
        ("entries", "sentence"),
        [
            ({"r": 10**9}, "states a rank"),
            ({"r": 0}, "states a rank"),
            ({"r": "2"}, "states a rank"),
            ({"rank_pattern": {"q_proj": 10**9}}, "states a rank"),
            ({"rank_pattern": [1]}, "states a rank"),
            ({"layer_replication": [[0, 2]] * 1000}, "repeats layers"),
            ({"peft_type": 1}, "holds no peft adapter"),
        ],
    )
    def test_what_their_weights_do_not_bear_out_is_refused_before_it_is_made(
        self, tmp_path: Path, entries: dict[str, Any], sentence: str
    ) -> None:
        from safetensors.numpy import save_file

        save_file({"a.lora_A.weight": np.zeros((2, 8), np.float32)}, tmp_path / "adapter_model.safetensors")
        whole = {"peft_type": "LORA", "r": 2, "rank_pattern": {}, "layer_replication": None}
        (tmp_path / "adapter_config.json").write_text(json.dumps(whole))
        check_adapter(tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(whole | entries))
        with pytest.raises(InputError, match=sentence):
            check_adapter(tmp_path)


@given(st.dictionaries(st.sampled_from([*Choice(layer=1, run="x", against="y").to_link(), "z"]), st.text(max_size=30)))
def test_any_address_gives_a_choice_whose_own_address_gives_it_again(link: dict[str, str]) -> None:
    choice, _ = read_link(link)
    again, notes = read_link(choice.to_link())
    assert again == choice
    assert notes == []


@given(st.text(max_size=40))
def test_any_name_of_prompts_is_a_result_or_a_sentence(name: str) -> None:
    with fuzz.bounds():
        try:
            load_prompts(name)
        except Es2Error as refused:
            assert "\n" not in str(refused)  # noqa: PT017 (few names are prompts)
