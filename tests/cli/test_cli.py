"""The command line's contract: one JSON document on stdout, sentences on stderr, and the exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from es2.cli import main as cli
from tests.builders import D_MODEL, N_LAYERS, save_tiny_model, tiny_prompts, write_prompts
from tests.models.test_models import write_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 contrast pairs as a CSV file."""
    return write_prompts(tmp_path_factory.mktemp("prompts") / "locks.csv", tiny_prompts(60))


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "home"


def es2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path):
    """Run the command line in this process; returns exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["es2", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *arguments: es2(capsys, monkeypatch, *arguments)


class TestResults:
    def test_models(self, run) -> None:
        code, out, _ = run("models", "--json")
        document = json.loads(out)
        names = {row["name"]: row for row in document["models"]}
        assert code == 0
        assert document["default"] in names
        papers_four = {"llama-2-7b-chat", "llama-3-8b-instruct", "mistral-7b-instruct", "qwen2.5-7b-instruct"}
        assert {name for name, row in names.items() if row["paper"]} == papers_four
        assert 13 < names["llama-2-7b-chat"]["memory_gb"]["bfloat16"] < 20

    def test_a_gguf_without_a_head_of_its_own_is_doubted(self, run, prompts: Path, tmp_path: Path) -> None:
        write_gguf(tmp_path / "lost.gguf", without="output.weight")
        sentence = "The GGUF file 'lost.gguf' has no LM head of its own (output.weight)"
        for json_ in ((), ("--json",)):
            code, out, _ = run("capture", "--model", tmp_path / "lost.gguf", "--prompts", prompts, *json_)
            assert code == 0
            assert sentence in (json.loads(out)["warnings"][0] if json_ else out)

    def test_capture_twice_computes_once(self, run, model: Path, prompts: Path, own_home: Path) -> None:
        code, out, err = run("capture", "--model", model, "--prompts", prompts, "--json")
        first = json.loads(out)
        assert code == 0
        assert "Capturing 120 prompts takes about 0." in err, "said before it begins"
        assert (first["n_prompts"], first["n_layers"], first["d_model"]) == (120, N_LAYERS, D_MODEL)
        assert first["computed"]
        assert first["tokens"] > 120
        assert Path(first["path"]).parent == own_home / "cached_activations"
        _, out, err = run("capture", "--model", model, "--prompts", prompts, "--json")
        again = json.loads(out)
        assert not again["computed"]
        assert "takes about" not in err
        assert again["key"] == first["key"]

    @pytest.mark.parametrize("template", [None, "<user>{{ messages[0].content }}</user>"])
    def test_a_model_without_a_chat_template_says_so_in_every_output(
        self, run, template: str | None, tmp_path: Path, prompts: Path
    ) -> None:
        folder = save_tiny_model(tmp_path / "model", chat_template=template)
        common = ("--model", folder, "--prompts", prompts)
        short = ("--layers", "1,2", "--steps", "2", "--pairs-per-step", "4", "--validate-every", "2", "--no-replies")
        commands = [
            ("capture", *common),
            ("analyze", *common),
            ("finetune", *common, *short),
            ("evaluate", *common, "--suite", "refusal", "--limit", "2", "--new-tokens", "2"),
        ]
        for command in commands:
            code, out, err = run(*command, "--json")
            assert code == 0, err
            assert json.loads(out)["given_as"] == ("plain text" if template is None else "chat template")
            if command[0] == "finetune":  # what was computed is on disk; a run is shown, not made again
                command = ("runs", "show", json.loads(out)["run"])
            code, out, err = run(*command)
            assert code == 0, err
            assert ("plain text" in out) == (template is None)

    def test_analyze(self, run, model: Path, prompts: Path) -> None:
        code, out, err = run("analyze", "--model", model, "--prompts", prompts, "--json")
        assert code == 0, err
        document = json.loads(out)
        assert [layer["layer"] for layer in document["layers"]] == list(range(N_LAYERS))
        assert document["model"] == str(model)
        assert len(document["recommended"]) == 2
        for layer in document["layers"]:
            for name in ("probe_accuracy", "probe_accuracy_control", "margin_mean", "fisher_ratio", "effective_rank"):
                assert layer[name]["low"] <= layer[name]["value"] <= layer[name]["high"]

    def test_analyze_on_prompts_of_other_origin(self, run, model: Path, prompts: Path, tmp_path: Path) -> None:
        rows = prompts.read_text().splitlines()
        other = tmp_path / "other.csv"
        mine = [
            f"Please {'break' if i % 2 else 'mend'} chair {i}.,{'harmful' if i % 2 else 'harmless'}," for i in range(40)
        ]
        other.write_text("\n".join([*rows[:5], *mine]) + "\n")
        code, out, err = run("analyze", "--model", model, "--prompts", prompts, "--test-prompts", other, "--json")
        assert code == 0, err
        layer = json.loads(out)["layers"][0]
        assert {"in_domain_accuracy", "in_domain_auroc"} <= layer.keys()
        assert layer["in_domain_auroc"]["value"] > 0.9  # one word tells the labels

    def test_tables_for_people(self, run, model: Path, prompts: Path) -> None:
        code, out, _ = run("analyze", "--model", model, "--prompts", prompts)
        assert code == 0
        assert "probe accuracy" in out
        code, out, _ = run("models")
        assert code == 0
        assert "llama-3-8b-instruct" in out.replace("\n", "")


class TestRefusals:
    def cases(self, tmp_path: Path) -> dict[str, tuple[list[str], int, str]]:
        def file(name: str, content: bytes) -> str:
            (tmp_path / name).write_bytes(content)
            return str(tmp_path / name)

        one_label = b"prompt,label\n" + b"".join(b"do thing %d,harmful\n" % i for i in range(60))
        (tmp_path / "no-model").mkdir()
        return {
            "missing file": (["--prompts", str(tmp_path / "absent.csv")], 2, "no prompt file"),
            "empty file": (["--prompts", file("empty.csv", b"")], 2, "is empty"),
            "one label only": (["--prompts", file("one.csv", one_label)], 2, "0 harmless"),
            "unknown label": (["--prompts", file("label.csv", b"prompt,label\na,bad\n")], 2, "row 2, column label"),
            "both labels": (
                ["--prompts", file("both.csv", b"prompt,label\na,harmful\na,harmless\n")],
                2,
                "both labels",
            ),
            "long": (["--prompts", file("long.csv", b"prompt,label\n" + b"x" * 100_000 + b",harmful\n")], 2, "100,000"),
            "NUL": (["--prompts", file("nul.csv", b"prompt,label\na\x00,harmful\n")], 2, "row 2"),
            "wrong model": (["--model", "smollm2-135m-instrukt"], 2, "smollm2-135m-instruct"),
            "no model folder": (["--model", str(tmp_path / "no-model")], 2, "config.json"),
            "position": (["--position", "middle"], 2, "middle"),
        }

    @pytest.mark.parametrize(
        "case",
        [
            *("missing file", "empty file", "one label only", "unknown label", "both labels"),
            *("long", "NUL", "wrong model", "no model folder", "position"),
        ],
    )
    def test_one_sentence_and_the_exit_code(self, run, model: Path, tmp_path: Path, case: str) -> None:
        arguments, expected, words = self.cases(tmp_path)[case]
        given = arguments if "--model" in arguments else ["--model", model, *arguments]
        code, out, err = run("analyze", *given, "--json")
        document = json.loads(out)
        assert code == expected, err
        assert document["exit_code"] == expected
        assert words in document["error"]
        assert "Traceback" not in err
        assert err.strip().count("\n") == 0

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; the store's own tests simulate it")
    def test_unwritable_home(self, run, model: Path, prompts: Path, own_home: Path) -> None:
        own_home.mkdir()
        own_home.chmod(0o500)
        code, _, err = run("capture", "--model", model, "--prompts", prompts)
        own_home.chmod(0o700)
        assert code == 1
        assert "permission" in err

    def test_a_home_that_is_a_file(self, run, model: Path, prompts: Path, own_home: Path) -> None:
        own_home.write_text("in the way")
        code, _, err = run("capture", "--model", model, "--prompts", prompts)
        assert code == 1
        assert "Traceback" not in err
        assert "cached_activations" in err

    def test_version(self, run) -> None:
        assert run("--version") == (0, f"es2 {version('es2')}\n", "")

    def test_usage_errors_exit_2(self, run) -> None:
        code, _, err = run("capture", "--no-such-option")
        assert code == 2
        assert "no-such-option" in err

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [(["capture", "--no-such-option"], "no-such-option"), (["nothing"], "nothing"), (["report"], "Missing option")],
    )
    def test_wrong_usage_is_a_document_too(self, es2, arguments: list[str], sentence: str) -> None:
        code, document = es2(*arguments)
        assert (code, document["exit_code"]) == (2, 2)
        assert sentence in document["error"]

    def test_ctrl_c_says_what_is_kept(self, es2, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("es2.models.folders.is_cached", interrupted)
        code, document = es2("models")
        assert (code, document["error"]) == (1, "Cancelled; what was complete is kept.")


class TestProcess:
    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)

    def test_help_explains_itself_and_loads_nothing_heavy(self) -> None:
        done = self.python("-m", "es2", "--help")
        assert done.returncode == 0
        assert all(
            command in done.stdout for command in ("models", "capture", "analyze", "finetune", "runs", "export", "app")
        )
        assert "job" not in done.stdout.split("Commands")[1].split()
        heavy = "('torch', 'transformers', 'umap')"
        program = f"import es2.cli.main, es2.workflow.prepare, sys; sys.exit(any(m in sys.modules for m in {heavy}))"
        assert self.python("-c", program).returncode == 0

    def test_stdout_is_json_and_stderr_has_no_bars_of_libraries(self, prompts: Path, tmp_path: Path) -> None:
        write_gguf(tmp_path / "tiny.gguf")
        source = ("--model", str(tmp_path / "tiny.gguf"), "--prompts", str(prompts))
        done = self.python("-m", "es2", "capture", *source, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["n_layers"] == N_LAYERS
        assert "it/s" not in done.stderr
        assert "\r" not in done.stderr
