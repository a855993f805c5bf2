"""Makes `tests/data/b0b27d8/`: artifacts of every kind as commit b0b27d8 wrote them. README.md says how to run it."""

# ruff: noqa: I001 - which modules are es2's own is b0b27d8's to say

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

HOST = "example"
MODEL = "example/tiny-llama"
REVISION = "0" * 40
PROTOCOL = f"""models = ["{MODEL}"]
tuned_on = "prompts.csv"
evaluated_on = ["prompts.csv", "harmful.csv"]

[finetune]
steps = 4
pairs_per_step = 4
kl_prompts = 2
rank = 2
alpha = 16
warmup_steps = 1
learning_rate = 0.02
kl_budget = 5.0
reply_tokens = 4
watch_every = 2
watch_prompts = 6
device = "cpu"
dtype = "float32"

[evaluate]
limit = 4
new_tokens = 5
kl_tokens = 4
push_limit = 2
directions = ["repe", "scav"]
budgets = [0.2]
p0s = [0.01]
device = "cpu"
dtype = "float32"
"""
SPLITS = ("tune",) * 8 + ("watch",) * 4 + ("probe",) * 12 + ("test",) * 12


def write_sources(home: Path) -> None:
    """The prompts, the protocol and the model, in the form in which the Hub's cache holds one."""
    from tests.builders import save_tiny_model

    pairs = [(f"pair-{number}", split) for number, split in enumerate(SPLITS)]
    rows = [(f"Break lock number {pair[5:]} open.", "harmful", pair, split) for pair, split in pairs]
    rows += [(f"Oil lock number {pair[5:]}, please.", "harmless", pair, split) for pair, split in pairs]
    harmful = [(f"Force door {number}.", "harmful", f"door-{number}", "test") for number in range(6)]
    others = [(f"Smash window {number}.", "harmful", f"window-{number}", "") for number in range(20)]
    others += [(f"Clean window {number}.", "harmless", f"window-{number}", "") for number in range(20)]
    for name, table in (("prompts", rows), ("harmful", harmful), ("others", others)):
        with (home / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("prompt", "label", "pair", "split"), *table])
    (home / "protocol.toml").write_text(PROTOCOL, encoding="utf-8")
    kept = home / "hub" / f"models--{MODEL.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(REVISION)
    save_tiny_model(kept / "snapshots" / REVISION)


def settings(**changes: Any) -> dict[str, Any]:
    """The config of a run like the protocol's."""
    from es2.reproduce import read_protocol

    own = read_protocol("protocol.toml").finetune.to_dict()
    return own | {"model": MODEL, "layers": [1, 2], "prompts": "prompts.csv"} | changes


def run(kind: str, config: dict[str, Any], name: str = "") -> Any:
    """Run a job here to its end, whatever that is."""
    from es2.jobs import lay_down, run_job
    from es2.tasks import JOBS

    job = lay_down(kind, config)
    job.rename(name)
    run_job(job.path, JOBS)
    return job


def interrupt() -> None:
    """What `make` starts as another process: a run that is killed in its third step, after a checkpoint."""
    from es2.jobs import lay_down, run_job
    from es2.tasks import JOBS

    def kill(stage: str, done: int, total: int, **numbers: float) -> None:
        if (stage, done) == ("finetune", 3):
            os.kill(os.getpid(), signal.SIGKILL)

    job = lay_down("finetune", settings(seed=1))
    job.rename("killed")
    run_job(job.path, JOBS, kill)


def es2(*arguments: str) -> dict[str, Any]:
    """What a command prints with `--json`."""
    from es2 import cli

    sys.argv = ["es2", *arguments, "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        cli.main()
    found: dict[str, Any] = json.loads(printed.getvalue())
    return found


def make() -> dict[str, Any]:
    """All artifacts below the current folder; returns what the old code reads from them, for `expected.json`."""
    from es2 import models, reader, reproduce, tasks
    from es2.evaluate import EvaluateConfig
    from es2.finetune import FinetuneConfig
    from es2.jobs import lay_down, list_jobs, run_job
    from es2.layer_views import LayerViews
    from es2.prompts import load_prompts
    from es2.runs import import_adapter, open_run
    from es2.showcase import build
    from es2.store import Store

    # No path of a machine: peft writes the model's into an adapter's README.md, which the digest of the weights covers.
    reproduce.absolute_source = str
    models.find_snapshot = lambda hub_id: Path("hub", f"models--{hub_id.replace('/', '--')}", "snapshots", REVISION)
    reproduced = reproduce.reproduce(reproduce.read_protocol("protocol.toml"), MODEL)
    done = open_run(reproduced["run"])
    done.rename("done")
    blocks = {"method": "full", "layers": [2], "first_block": 2, "learning_rate": 1e-3}
    full = run("finetune", settings(steps=2, watch_every=1, **blocks), "full")
    stopped = run("finetune", settings(kl_budget=1e-9, steps=2, watch_every=1), "stopped")
    run("finetune", settings(prompts="gone.csv"), "failed")
    cancelled = lay_down("finetune", settings(seed=2))
    (cancelled.path / "cancel").touch()
    run_job(cancelled.path, tasks.JOBS)
    cancelled.rename("cancelled")
    imported = import_adapter(done.path / "adapter", MODEL, "prompts.csv", (1, 2), name="imported", device="cpu")
    run_job(imported.path, tasks.JOBS)
    subprocess.run([sys.executable, __file__, "--interrupt"], check=False)

    run("prepare", {"model": MODEL, "prompts": "prompts.csv", "position": "last_instruction"})
    run("project", {"model": MODEL, "prompts": "prompts.csv", "position": "last", "run": done.id})
    alone = EvaluateConfig(model=MODEL, prompts="harmful.csv", suite="refusal", limit=2, new_tokens=3, device="cpu")
    run("evaluate", alone.to_dict(), "alone")
    asked = lay_down("read", {"model": MODEL, "run": done.id}, heavy=False)
    question = reader.ask(asked, "Pick this lock.")
    reader.IDLE_SECONDS = 0.5
    run_job(asked.path, tasks.JOBS)

    prompts = load_prompts("prompts.csv")
    measured = prompts.measured()
    both = tasks.prepare(MODEL, prompts, run=done)
    base = tasks.prepare(MODEL, prompts)
    tasks.write_views(measured, both.activations, both.tuned, both.analysis)
    tasks.write_views(measured, base.activations, None, base.analysis)
    tasks.project(MODEL, prompts)
    given = ("--model", MODEL, "--prompts", "prompts.csv")
    analyses = {
        "base": es2("analyze", *given),
        "run": es2("analyze", *given, "--run", done.id),
        "full": es2("analyze", *given, "--run", full.id),
        "others": es2("analyze", *given, "--run", done.id, "--test-prompts", "others.csv"),
    }
    half = es2("capture", "--model", MODEL, "--prompts", "harmful.csv", "--dtype", "bfloat16", "--position", "last")
    showcase = build(
        run=done, model=MODEL, prompts="prompts.csv", settings=FinetuneConfig.from_dict(settings(layers=[])),
        path=Path("cached_activations/showcase").absolute(), limit=150_000,
    )  # fmt: skip

    views = LayerViews.load(tasks.find_views_folder(both.activations, measured, "last", both.tuned))
    umap = tasks.find_umap(both.activations, measured, "last", both.tuned)
    reading = reader.answer(asked, question)
    return {
        "runs": {row["name"]: row for row in es2("runs")["runs"]},
        "jobs": {job.id: [job.kind, job.status()] for job in list_jobs()},
        "analyses": analyses,
        "embeddings": {
            one.key: {p: [float(np.linalg.norm(one.layer(l, p))) for l in range(one.n_layers)] for p in one.positions}
            for one in Store().list()
        },
        "texts": {one.key: [one.texts[0], len(one.texts)] for one in Store().list()},
        "half": half["key"],
        "views": {kind: views.view(kind, 2).tuned[0].tolist() for kind in ("separation", "pca")},
        "umap": umap.view(2).tuned[0].tolist(),
        "reading": {
            "job": asked.id, "question": question, "n_tokens": reading.n_tokens,
            "tuned": float(np.linalg.norm(reading.tuned["last"])),
        },
        "reproduced": reproduced,
        "stopped": {"reason": stopped.result()["reason"], "best_step": stopped.result()["best_step"]},
        "showcase": {"verdict": showcase.result["verdict"], "n_prompts": len(showcase.prompts)},
    }  # fmt: skip


def compact(value: Any) -> Any:
    """Intervals as lists and no curves over C, so that the file stays small."""
    if isinstance(value, dict):
        if value.keys() == {"value", "low", "high"}:
            return [value["value"], value["low"], value["high"]]
        return {
            name: compact(entry) for name, entry in value.items() if name not in ("by_cost", "path", "seconds_left")
        }
    return [compact(entry) for entry in value] if isinstance(value, list) else value


def neutral(home: Path) -> None:
    """Take this machine's path out of every JSON file and seal it again as the old code does."""
    from es2.files import read_json, sealed, write_json

    here = f"{home.absolute()}/"
    for path in home.rglob("*.json"):
        if here in path.read_text(encoding="utf-8"):
            document = json.loads(path.read_text(encoding="utf-8").replace(here, ""))
            write_json(path, sealed(document) if "digest" in (read_json(path) or {}) else document)


def main(out: Path) -> None:
    from es2 import job_folder, jobs, versions

    assert versions.__file__.startswith(os.environ["PYTHONPATH"]), "PYTHONPATH must name the checkout of b0b27d8"
    job_folder.HOST = jobs.HOST = HOST
    if "--interrupt" in sys.argv:
        return interrupt()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_sources(out)
    os.chdir(out)
    expected = make()
    # The same as the killed run, whole, in a home that is thrown away.
    os.environ["ES2_HOME"] = os.environ["ES2_SCRATCH"]
    whole = run("finetune", settings(seed=1)).result()
    expected["killed"] = {name: whole[name] for name in ("watched", "best_step", "kl_harmless_test", "after")}
    neutral(out)
    lines = (f"{json.dumps(name)}: {json.dumps(compact(entry))}" for name, entry in expected.items())
    (out / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    shutil.rmtree(out / "runs" / expected["runs"]["full"]["run"] / "checkpoint")  # large, and of an ended run
    for stale in (*out.rglob(".locks"), *out.rglob(".turn-*")):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


if __name__ == "__main__":
    main(Path(os.environ["ES2_HOME"]))
