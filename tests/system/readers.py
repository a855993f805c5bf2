"""The readers that are fuzzed: for each, valid input made by the program's own writers, and how it is read and used.

To read is not enough: what a reader lets through is also used here as the app and the commands use it, so that
something of the wrong kind shows as an escape and not as a result.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from es2.core.files import content_key, file_digest, with_checksum, write_json
from tests.system.mutations import (
    change_json,
    dump,
    mutate_bytes,
    mutate_json,
    mutate_lines,
    mutate_safetensors,
    mutate_text,
)
from tests.system.prompt_files import prompt_files

Attempt = Callable[[], object]
Draw = Callable[[Random], Attempt]


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        prepare: given an empty folder, makes valid input there and returns what draws cases.
        weight: its share of the cases; slow readers have a smaller one.
    """

    prepare: Callable[[Path], Draw]
    weight: float


ROWS = [
    {"prompt": f"How do I {verb} lock {n}?", "label": label, "category": "locks", "pair": f"p{n}"}
    for n in range(4)
    for verb, label in (("force", "harmful"), ("oil", "harmless"))
]


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _fresh(original: Path, copy: Path) -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    for aside in copy.parent.glob(f"{copy.name}.damaged-*"):
        shutil.rmtree(aside)
    shutil.copytree(original, copy)
    return copy


def _spoilt(document: dict[str, Any], rng: Random) -> bytes:
    """A changed document: as it is, without a digest, or with one that somebody made anew for what it says now."""
    rest = {name: entry for name, entry in document.items() if name != "digest"}
    kind = rng.randrange(3)
    if kind < 2:
        return mutate_json(with_checksum(rest) if kind else rest, rng)
    changed = change_json(rest, rng)
    with suppress(ValueError, TypeError, RecursionError, AttributeError):  # what no writer could seal has no digest
        changed = with_checksum(changed)
    return dump(changed, rng)


def _artifacts(folder: Path) -> Any:
    """Base and tuned embeddings with their analysis and a run, from synthetic clouds."""
    from tests.builders_artifacts import write_comparison

    return write_comparison(folder / "home", 24)


# ------------------------------------------------------------------------------------------------------------- prompts


def _prompts(name: str, write: Callable[[Random], bytes]) -> Callable[[Path], Draw]:
    def prepare(folder: Path) -> Draw:
        from es2.prompts.readers import parse_prompts
        from es2.prompts.sources import Source

        def draw(rng: Random) -> Attempt:
            data = write(rng)

            def read() -> object:
                prompts = parse_prompts(data, name, Source("", skip_bad_rows=rng.random() < 0.3))
                return prompts.digest, prompts.measured().texts_digest, prompts.leak

            return read

        return draw

    return prepare


def _csv_prompts(rng: Random) -> bytes:
    rows = [dict(row) for row in ROWS]
    for _ in range(rng.randrange(3)):
        row = rng.choice(rows)
        row[rng.choice(list(row))] = mutate_text(rng.choice(list(row.values())), rng)
    data = _csv(rows) if rng.random() < 0.5 else _csv(ROWS)
    return mutate_bytes(data, rng) if rng.random() < 0.8 else data


def _jsonl_prompts(rng: Random) -> bytes:
    return mutate_lines(ROWS, rng)


def _parquet_prompts(rng: Random) -> bytes:
    """Half of them valid Parquet of columns that nobody expects, the others damaged bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {name: pa.array([row[name] for row in ROWS]) for name in ROWS[0]}
    if rng.random() < 0.6:
        kinds: tuple[Callable[[], Any], ...] = (
            lambda: pa.array(list(range(8))),
            lambda: pa.array([None] * 8),
            lambda: pa.array([[1, 2]] * 8),
            lambda: pa.array([{"a": 1}] * 8),
            lambda: pa.array([b"\xff\x00"] * 8, pa.binary()),
            lambda: pa.array([rng.choice((1e300, math.nan, -1.0))] * 8),
            lambda: pa.array([rng.randrange(-(2**63), 2**63)] * 8, pa.int64()).view(pa.timestamp("ns")),
            lambda: pa.array([2**31 - 1] * 8, pa.int32()).view(pa.date32()),
            lambda: pa.array(["a" * rng.choice((1, 30_000))] * 8).dictionary_encode(),
            lambda: pa.array(["\ufeff", "\u202e", "", " ", "harmful", "HARMFUL", "x\0", "é"]),
        )
        columns[rng.choice([*columns, "split", "Prompt "])] = rng.choice(kinds)()
    if rng.random() < 0.1:
        del columns[rng.choice(list(columns))]
    file = io.BytesIO()
    options = {"compression": rng.choice(("snappy", "none", "gzip", "zstd")), "use_dictionary": rng.random() < 0.5}
    pq.write_table(pa.table(columns), file, **options)
    return mutate_bytes(file.getvalue(), rng) if rng.random() < 0.6 else file.getvalue()


def _benchmarks(folder: Path) -> Draw:
    from es2.prompts.benchmarks import BENCHMARKS, load_benchmark

    def draw(rng: Random) -> Attempt:
        benchmark = rng.choice(BENCHMARKS)
        rows = []
        for number in range(4):
            row: dict[str, Any] = {benchmark.prompt[0]: f"How do I oil lock {number}?", benchmark.category[0]: "locks"}
            row |= {name: f"{number}" for name in (benchmark.pair, benchmark.context) if name}
            rows.append(row | {"label": "safe"})
        kind = rng.choice(("csv", "json", "jsonl"))
        if kind == "csv":
            data = mutate_bytes(_csv(rows), rng)
        else:
            data = mutate_json(rows, rng) if kind == "json" else mutate_lines(rows, rng)
        path = folder / f"{rng.choice((*benchmark.harmful_files, 'harmful', 'x'))}.{kind}"
        path.write_bytes(data)
        return lambda: load_benchmark(f"{benchmark.name}:{path}").digest

    return draw


def _sources(folder: Path) -> Draw:
    """What a person types, or an address holds, where prompts are asked for."""
    from es2.prompts.benchmarks import BENCHMARKS, absolute_source
    from es2.prompts.loading import load_prompts

    (folder / "mine.csv").write_bytes(_csv(ROWS))
    (folder / "folder.csv").mkdir()
    known = ["builtin", "hf:owner/name:split", str(folder / "mine.csv"), str(folder / "folder.csv"), "~/x.csv"]
    known += [
        "/dev/zero",
        "/dev/stdin",
        "xstest:/dev/zero",
        "xstest:",
        "a" * 5000,
        "~nobody/x.csv",
        "",
    ]
    os.mkfifo(folder / "pipe.csv")
    known += [str(folder / "pipe.csv"), f"xstest:{folder / 'pipe.csv'}"]
    known += [f"{benchmark.name}:{folder}" for benchmark in BENCHMARKS]

    def draw(rng: Random) -> Attempt:
        source = rng.choice(known)
        source = mutate_text(source, rng) if rng.random() < 0.8 and source != "builtin" else source
        return lambda: load_prompts(absolute_source(source))

    return draw


# ----------------------------------------------------------------------------------------------------------- artifacts


def _sets(folder: Path) -> Draw:
    """An activation set's three files, damaged; half of the time with digests that say that all is well."""
    from es2.store.store import Store

    made = _artifacts(folder)
    original, root = made.tuned.path, folder / "sets"
    meta = json.loads((original / "meta.json").read_bytes())
    del meta["digest"]  # which would give every change away
    derived = next((original / "derived").iterdir()).name

    def draw(rng: Random) -> Attempt:
        path = _fresh(original, root / original.name)
        kind = rng.randrange(4)
        if kind == 0:
            name = rng.choice(("activations.safetensors", "texts.parquet"))
            data = (path / name).read_bytes()
            change = mutate_safetensors if name.endswith("safetensors") else mutate_bytes
            (path / name).write_bytes(change(data, rng))
            if rng.random() < 0.7:
                files = meta["files"] | {name: file_digest(path / name)}
                (path / "meta.json").write_text(json.dumps(with_checksum(meta | {"files": files})))
        elif kind == 1:
            name = rng.choice(("digests.json", "analysis.json", "probes.safetensors"))
            file = path / "derived" / derived / name
            file.write_bytes(mutate_bytes(file.read_bytes(), rng))
        else:
            (path / "meta.json").write_bytes(_spoilt(meta, rng))

        def read() -> object:
            store = Store(root)
            known = [(found.models, found.run, found.created, found.positions) for found in store.list()]
            store.find(model=meta["model"], texts_digest=meta["texts_digest"], position="last", run=meta["run"])
            found = store.open(original.name)
            for position in found.positions:
                found.layer(found.n_layers - 1, position)
            return known, found.texts, found.derived(derived)

        return read

    return draw


def _two_files(original: Path, copy: Path, document: str, tensors: str, read: Callable[[Path], object]) -> Draw:
    """A JSON document and the tensors beside it, one of them changed."""
    parsed = json.loads((original / document).read_bytes())
    data = (original / tensors).read_bytes()

    def draw(rng: Random) -> Attempt:
        copy.mkdir(exist_ok=True)
        spoil = rng.random() < 0.7
        (copy / document).write_bytes(mutate_json(parsed, rng) if spoil else (original / document).read_bytes())
        (copy / tensors).write_bytes(data if spoil else mutate_safetensors(data, rng))
        return lambda: read(copy)

    return draw


def _analyses(folder: Path) -> Draw:
    from es2.analysis.results import Analysis
    from es2.analysis.verdict import run_verdict

    made = _artifacts(folder)
    analysis = folder / "analysis"
    analysis.mkdir()
    made.analysis.save(analysis)
    embeddings = made.tuned.layer(2)

    def read(path: Path) -> object:
        found = Analysis.load(path)
        found.base_probes.margin(embeddings[:, : found.base_probes.weights.shape[1]], 0)
        verdict = run_verdict(found, found.recommended, None) if found.tuned_layers else None
        return json.dumps(found.to_dict(), allow_nan=False), verdict

    return _two_files(analysis, folder / "copy", "analysis.json", "probes.safetensors", read)


def _maps(folder: Path) -> Draw:
    from es2.analysis.projection import UmapCoordinates

    original = folder / "umap"
    original.mkdir()
    points = np.random.default_rng(0).normal(size=(3, 2, 20, 2)).astype(np.float32)
    UmapCoordinates(points, "umap", "both").save(original)

    def read(path: Path) -> object:
        found = UmapCoordinates.load(path)
        return [found.view(layer) for layer in range(len(found.points))]

    return _two_files(original, folder / "copy", "umap.json", "umap.safetensors", read)


def _views(folder: Path) -> Draw:
    from es2.analysis.layer_views import RENDERS, LayerViews

    original = folder / "views"
    original.mkdir()
    rng = np.random.default_rng(0)
    points = {kind: rng.normal(size=(3, 2, 20, 2)).astype(np.float32) for kind in RENDERS}
    LayerViews(points, {kind: rng.random((3, 2)) for kind in RENDERS}).save(original)

    def read(path: Path) -> object:
        found = LayerViews.load(path)
        layers = range(len(found.points["pca"]))
        return [(found.margins(layer), [found.view(kind, layer) for kind in RENDERS]) for layer in layers]

    return _two_files(original, folder / "copy", "views.json", "views.safetensors", read)


def _showcases(folder: Path) -> Draw:
    """The shipped run's documents, their digests made anew where the change is to be seen; and all other files."""
    from es2.analysis.projection import UmapCoordinates
    from es2.workflow.compared import find_compared
    from es2.workflow.derived import find_umap
    from es2.workflow.showcase import write

    made = _artifacts(folder)
    prompts = made.artifacts.prompts
    original = folder / "original"
    original.mkdir()
    umap = UmapCoordinates(
        np.zeros((len(made.analysis.base_layers), 2, len(prompts), 2), dtype=np.float32), "umap", "both"
    )
    models = (made.artifacts.activations, made.tuned)
    write(original, made.run, made.run.config, prompts, models, made.analysis, umap)
    files = sorted(file.relative_to(original) for file in original.rglob("*") if file.is_file())
    documents = [file for file in files if file.name in ("config.json", "result.json", "meta.json")]

    def draw(rng: Random) -> Attempt:
        path = _fresh(original, folder / "copy")
        if rng.random() < 0.6:
            file = path / rng.choice(documents)
            file.write_bytes(_spoilt(json.loads(file.read_bytes()), rng))
        else:
            file = path / rng.choice(files)
            file.write_bytes(mutate_bytes(file.read_bytes(), rng))

        def read() -> object:
            os.environ["ES2_SHOWCASE"] = str(path)
            found = find_compared("showcase")
            find_umap(found.base, found.prompts, found.position, found.tuned)
            return found.prompts.digest

        return read

    return draw


def _evaluations(folder: Path) -> Draw:
    """A kept evaluation, and one from before there were digests."""
    from es2.evaluation.results import EVALUATION_FORMAT, read_evaluation
    from es2.report.findings import attack_sentence, needed_sentence, refusal_sentence, side_effects

    def number(value: float = 0.5) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    names = ("dsr", "over_refusal", "harmful_degenerate", "harmless_degenerate")
    refusal = {model: {name: number() for name in names} for model in ("base", "tuned", "change")}
    change = {"dsr": number(), "degenerate": number(), "relative_ratio": number(1.5)}
    attack = {
        "layers": [2],
        "needed": [{"layer": 2, "p0": 0.5, "change": change}],
        "curve": [{"direction": "scav", "change": change}],
    }
    document = {
        "format": EVALUATION_FORMAT, "created": 1.7e9, "model": "toy", "run": None, "prompts": "locks", "note": None,
        "suite": {"refusal": refusal, "perturbation": attack}, "settings": {"limit": 4}, "path": "x",
        "rows": {"refusal": [{"prompt": "p", "label": "harmful", "base": {"verdict": "refusal", "text": "No."}}]},
    }  # fmt: skip
    path = folder / "evaluation.json"

    def draw(rng: Random) -> Attempt:
        path.write_bytes(mutate_json(with_checksum(document) if rng.random() < 0.7 else document, rng))

        def read() -> object:
            from datetime import datetime

            found = read_evaluation(path)
            datetime.fromtimestamp(found["created"])
            if "digest" not in found:
                return found["settings"]["limit"]  # nothing vouches for what is deeper
            suite = found["suite"]
            said = [refusal_sentence(suite["refusal"], True), *side_effects(suite["refusal"])]
            return [*said, needed_sentence(suite["perturbation"]), attack_sentence(suite["perturbation"])]

        return read

    return draw


# ---------------------------------------------------------------------------------------------------------------- jobs


def _finetune_settings() -> dict[str, Any]:
    from es2.training.config import FinetuneConfig

    return FinetuneConfig(layers=(1, 2)).to_dict()


def _job_configs(folder: Path) -> Draw:
    from es2.jobs.job import read_job
    from es2.jobs.queue import list_jobs
    from es2.workflow.runs import config_of
    from tests.builders import tiny_prompts

    path = folder / "runs" / "20260101-120000-000000-finetune-0123ab"
    path.mkdir(parents=True)
    config = {"format": 1, "kind": "finetune", "created": "2026-01-01T12:00:00+00:00", "heavy": True}
    config |= _finetune_settings() | {"prompts": "builtin"}
    prompts = tiny_prompts(60)

    def draw(rng: Random) -> Attempt:
        (path / "config.json").write_bytes(_spoilt(config, rng))

        def read() -> object:
            list_jobs(path.parent)
            job = read_job(path)
            state = (job.status(), job.error(), job.name, job.kind, job.created, job.is_ahead_of(job))
            settings = config_of(job)
            settings.check(6, prompts)
            return state, settings.targets, settings.blocks, settings.learning_rate_at(1, 1.0)

        return read

    return draw


def _job_states(folder: Path) -> Draw:
    """Everything in a job's folder but its config."""
    from es2.charts.run_charts import History
    from es2.jobs.job import HOST, read_job
    from es2.jobs.queue import list_jobs

    path = folder / "runs" / "20260101-120000-000000-finetune-0123ab"
    path.mkdir(parents=True)
    config = {"format": 1, "kind": "finetune", "created": "2026-01-01T12:00:00+00:00", "heavy": True}
    write_json(path / "config.json", config)
    (path / "lock").touch()
    result = {"status": "done", "target_layers": [1, 2], "activations": {"base": "a", "tuned": "b"}, "verdict": "worse"}
    ends = [
        {"format": 1, "finished": 1.7e9, "status": "done", "result": result, "error": None},
        {"format": 1, "finished": 1.7e9, "status": "failed", "result": None, "error": "Why."},
    ]
    events = [{"time": 1.7e9, "event": "status", "status": "running"}]
    for step in range(6):
        numbers = {"loss": 1.0 - step / 10, "kl_prompt": 0.01, "validation_kl_prompt": None}
        step_done = {"event": "progress", "stage": "finetune", "done": step, "total": 6}
        events.append({"time": 1.7e9 + step} | step_done | numbers)
    beat = {"host": HOST, "pid": 2**22 + 1, "state": "running"}
    documents: dict[str, Any] = {
        "heartbeat.json": beat,
        "launched.json": {"host": HOST, "pid": 2**22 + 1, "time": 1.7e9},
        "name.json": {"name": "Mine"},
    }

    def draw(rng: Random) -> Attempt:
        for old in ("result.json", "heartbeat.json", "launched.json", "name.json", "events.jsonl", "log.txt"):
            (path / old).unlink(missing_ok=True)
        (path / "events.jsonl").write_bytes(mutate_lines(events, rng))
        for name, document in documents.items():
            if rng.random() < 0.5:
                (path / name).write_bytes(mutate_json(document, rng))
        if rng.random() < 0.6:
            end = rng.choice(ends)
            (path / "result.json").write_bytes(_spoilt(end, rng))
        (path / "log.txt").write_bytes(rng.randbytes(200))
        offset = rng.choice((0, 0, 5, 10**9))

        def read() -> object:
            job = read_job(path)
            found, _ = job.events(offset)
            training = [event for event in found if event.get("stage") == "finetune" and event.get("loss") is not None]
            curves = [(int(event["done"]), event["loss"] + 0.0) for event in training]
            History().add(found)
            state = (job.status(), job.error(), job.result(), job.name, job.log_tail(), job._pid(), curves)
            list_jobs(path.parent)
            return state, job.progress(), job.is_ahead_of(job)

        return read

    return draw


def _finetune_configs(folder: Path) -> Draw:
    from es2.training.config import FinetuneConfig
    from es2.training.terms import parse_objective
    from tests.builders import tiny_prompts

    prompts = tiny_prompts(60)
    valid = _finetune_settings()

    def draw(rng: Random) -> Attempt:
        settings = change_json(valid, rng)
        if rng.random() < 0.3:
            settings = dict(valid) | {"objective": mutate_text("1.0*margin+0.5*fisher", rng)}

        def read() -> object:
            if not isinstance(settings, dict):
                return None
            config = FinetuneConfig.read(settings, "The config")
            config.check(6, prompts)
            return parse_objective(config.objective), json.dumps(config.to_dict())

        return read

    return draw


def _evaluate_configs(folder: Path) -> Draw:
    from es2.evaluation.config import EvaluateConfig

    valid = EvaluateConfig(layers=(1, 2)).to_dict()

    def draw(rng: Random) -> Attempt:
        settings = change_json(valid, rng)

        def read() -> object:
            if not isinstance(settings, dict):
                return None
            config = EvaluateConfig.read(settings, "The config")
            return config.suites, json.dumps(config.to_dict())

        return read

    return draw


def _protocols(folder: Path) -> Draw:
    """The TOML of `es2 reproduce`, and what a person types where it is asked for."""
    from importlib import resources

    from es2.workflow.reproduce import SHIPPED, read_protocol

    shipped = [(resources.files("es2") / "data" / f"reproduce-{name}.toml").read_bytes() for name in SHIPPED]
    path = folder / "mine.toml"
    os.mkfifo(folder / "pipe.toml")
    lines = [b"[finetune]", b"[evaluate]", b"[[finetune]]", b"steps = ", b"limit = ", b"models = ", b"budgets = "]
    values = [b"1", b"-1", b"nan", b"inf", b"1e400", b"true", b'"x"', b"[1, 2]", b"[]", b"{}", b"1979-05-27", b"9" * 30]
    sources = (str(path), "/dev/zero", str(folder / "pipe.toml"), "~nobody/x", "paper")

    def draw(rng: Random) -> Attempt:
        data = rng.choice(shipped)
        for _ in range(rng.randrange(3)):
            line = rng.choice(lines)
            data += b"\n" + line + (rng.choice(values) if line.endswith(b"= ") else b"")
        path.write_bytes(mutate_bytes(data, rng) if rng.random() < 0.7 else data)
        source = str(path)
        if rng.random() < 0.15:
            source = mutate_text(rng.choice(sources), rng)
        return lambda: read_protocol(source)

    return draw


def _reply_logs(folder: Path) -> Draw:
    from es2.evaluation.reply_log import ReplyLog

    path = folder / "replies.jsonl"
    records: list[dict[str, Any]] = [
        {"key": f"r{n}", "model": "base", "run": None, "prompt": "p", "tokens": [1, 2], "text": "No."} for n in range(3)
    ]
    records.append({"key": "p", "verdict": "refusal", "text": "No.", "read": {"probability": 0.5, "relative": 0.1}})

    def draw(rng: Random) -> Attempt:
        lines = [with_checksum(record) if rng.random() < 0.5 else record for record in records]
        path.write_bytes(mutate_lines(lines, rng))

        def read() -> object:
            log = ReplyLog(path)
            said = []
            for record in records:
                if (key := record["key"]) in log:
                    found = log[key]
                    said.append(found.get("text", "") + found.get("verdict", "") + str(sum(found.get("tokens", []))))
                    said.append(str(sum(found.get("read", {}).values())))
            log.add([{"key": "new", "text": "é"}])
            return said, ReplyLog(path)["new"]["text"]

        return read

    return draw


def _answers(folder: Path) -> Draw:
    """What the process that reads single prompts answers."""
    from safetensors.numpy import save_file

    from es2.jobs.job import Job
    from es2.workflow.reader import answer

    path = folder / "answers"
    path.mkdir()
    names = [f"{model}.{position}" for model in ("base", "tuned") for position in ("last", "last_instruction")]
    arrays = {name: np.zeros((3, 4), np.float32) for name in names}
    save_file(arrays, folder / "whole.safetensors")
    document = {"text": "How?", "n_tokens": 4, "error": None}
    job = Job(folder, {"kind": "read", "created": ""})

    def draw(rng: Random) -> Attempt:
        whole = (folder / "whole.safetensors").read_bytes()
        spoil = rng.random() < 0.6
        (path / "id.json").write_bytes(mutate_json(document, rng) if spoil else json.dumps(document).encode())
        (path / "id.safetensors").write_bytes(whole if spoil else mutate_safetensors(whole, rng))
        return lambda: answer(job, "id")

    return draw


# -------------------------------------------------------------------------------------------------- models and adapters


def _checkpoints(folder: Path) -> Draw:
    """A fine-tune's state: damaged, or changed by somebody who made its digest anew."""
    import torch

    from es2.models.tensors import _digest, load_tensors, save_tensors
    from es2.training.validation import ValidationPoint

    point = ValidationPoint(0, 0.0, 0.0, {1: {"effective_rank": 3.0, "mean_difference_margin": 0.1}})
    progress = {"step": 1, "losses": [1.0], "validations": [point.to_dict()]}
    state = {"identity": "a", "progress": progress}
    tensors = {"directions": torch.zeros(2, 4), "trained/x": torch.ones(3)}
    path, whole = folder / "state.safetensors", folder / "whole.safetensors"
    save_tensors(whole, tensors, state)

    def draw(rng: Random) -> Attempt:
        from safetensors.torch import save_file

        if rng.random() < 0.5:
            path.write_bytes(mutate_safetensors(whole.read_bytes(), rng))
        else:
            document = dump(change_json(state, rng), rng).decode("utf-8", "replace")
            version = rng.choice(("1", "1", "1", "2", "0", "", "x", "9" * 5000))
            header = {"format": version, "state": document, "digest": _digest(tensors, document)}
            save_file(tensors, path, metadata=header)
        return lambda: load_tensors(path)

    return draw


def _model_folders(folder: Path) -> Draw:
    """A model folder's own JSON files, before any weight is read."""
    from safetensors.numpy import save_file

    from es2.models.fingerprint import fingerprint
    from es2.models.shape import context_length, count_layers

    model = folder / "model"
    model.mkdir()
    documents: dict[str, Any] = {
        "config.json": {
            "model_type": "llama",
            "num_hidden_layers": 3,
            "max_position_embeddings": 64,
            "text_config": None,
        },
        "model.safetensors.index.json": {"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}},
        "tokenizer_config.json": {"chat_template": "{{ messages }}", "eos_token": "x"},
    }
    save_file({"a": np.zeros(3, np.float32)}, model / "model-1.safetensors")

    def draw(rng: Random) -> Attempt:
        spoilt = rng.choice(list(documents))
        for name, document in documents.items():
            (model / name).write_bytes(mutate_json(document, rng) if name == spoilt else json.dumps(document).encode())
        return lambda: (context_length(model), fingerprint(model), count_layers(model))

    return draw


def _adapters(folder: Path) -> Draw:
    """An adapter from elsewhere, up to where it is copied into a run."""
    from es2.workflow.runs import config_of, import_adapter
    from tests.builders import save_tiny_adapter, save_tiny_model

    model = save_tiny_model(folder / "model")
    whole = save_tiny_adapter(folder / "whole", model)
    config = json.loads((whole / "adapter_config.json").read_bytes())
    weights = (whole / "adapter_model.safetensors").read_bytes()
    copy = folder / "copy"
    copy.mkdir()

    def draw(rng: Random) -> Attempt:
        _write_adapter(copy, config, weights, rng)

        def read() -> object:
            run = import_adapter(copy, str(model), "builtin", (0, 1))
            try:
                return config_of(run)
            finally:
                shutil.rmtree(run.path)

        return read

    return draw


def _write_adapter(copy: Path, config: dict[str, Any], weights: bytes, rng: Random) -> None:
    spoil = rng.random() < 0.6
    (copy / "adapter_config.json").write_bytes(mutate_json(config, rng) if spoil else json.dumps(config).encode())
    (copy / "adapter_model.safetensors").write_bytes(weights if spoil else mutate_safetensors(weights, rng))


def _merged_adapters(folder: Path) -> Draw:
    """The same, merged into a tiny model by peft."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    from es2.models.adapters import apply_finetune
    from tests.builders import save_tiny_adapter, save_tiny_model

    model = save_tiny_model(folder / "model", n_layers=1)
    whole = save_tiny_adapter(folder / "whole", model)
    config = json.loads((whole / "adapter_config.json").read_bytes())
    weights = (whole / "adapter_model.safetensors").read_bytes()
    copy = folder / "copy"
    copy.mkdir()
    loaded = AutoModelForCausalLM.from_pretrained(model)

    def draw(rng: Random) -> Attempt:
        from copy import deepcopy

        _write_adapter(copy, config, weights, rng)
        own = deepcopy(loaded)
        return lambda: apply_finetune(own, copy, merge=True)

    return draw


# ----------------------------------------------------------------------------------------------------------------- app


def _links(folder: Path) -> Draw:
    """The address bar, and what the app looks up of it first."""
    from app.state import Choice, read_link
    from es2.models.catalogue import resolve
    from es2.prompts.loading import load_prompts

    whole = Choice(layer=3, others=True, run="20260101-120000-000000-finetune-0123ab", against="showcase", raw=True)
    link = whole.to_link() | {"arrange": "overlay", "fit": "both"}
    sources = ("builtin", str(folder / "x.csv"), "/dev/zero", "~nobody/x.csv", "xstest:x.csv", "hf:a/b", "~")

    def draw(rng: Random) -> Attempt:
        changed = dict(link) | {"prompts": rng.choice(sources)}
        for _ in range(rng.choice((1, 2, 4))):
            key = rng.choice([*changed, "unknown", ""])
            changed[key] = rng.choice((mutate_text(changed.get(key, "x"), rng), "9" * 400, "-1", "٣", "1e5", "²", " "))
        for key in [key for key in changed if rng.random() < 0.1]:
            del changed[key]

        def read() -> object:
            choice, notes = read_link(changed)
            again, _ = read_link(choice.to_link())
            if again != choice:
                raise AssertionError(f"{choice} reopens as {again}")
            if choice.prompts != "builtin":
                load_prompts(choice.prompts)
            return resolve(choice.model), notes

        return read

    return draw


def _model_names(folder: Path) -> Draw:
    """What a person types where a model is asked for."""
    from es2.models.catalogue import resolve
    from es2.models.folders import is_cached

    (folder / "m").mkdir()
    known = ["smollm2-135m-instruct", "owner/name", str(folder / "m"), str(folder / "x.gguf"), "/dev/zero", "~nobody/x"]

    def draw(rng: Random) -> Attempt:
        name = mutate_text(rng.choice(known), rng)
        return lambda: is_cached(resolve(name))

    return draw


def _stored_key(folder: Path) -> Draw:
    """Names of artifacts and jobs that come from outside."""
    from es2.jobs.queue import open_job
    from es2.store.store import Store

    good = content_key({"a": 1})
    job = "20260101-120000-000000-finetune-0123ab"

    def draw(rng: Random) -> Attempt:
        name = mutate_text(rng.choice((good, job, "../x", "/etc")), rng)

        def read() -> object:
            if rng.random() < 0.5:
                return Store(folder / "sets").open(name)
            return open_job(name, folder / "runs")

        return read

    return draw


READERS: dict[str, Reader] = {
    "prompts.csv": Reader(_prompts("p.csv", _csv_prompts), 12),
    "prompts.jsonl": Reader(_prompts("p.jsonl", _jsonl_prompts), 12),
    "prompts.parquet": Reader(_prompts("p.parquet", _parquet_prompts), 8),
    "prompts.source": Reader(_sources, 4),
    "prompts.files": Reader(prompt_files, 12),
    "benchmarks": Reader(_benchmarks, 8),
    "activation-set": Reader(_sets, 5),
    "analysis": Reader(_analyses, 3),
    "umap": Reader(_maps, 5),
    "views": Reader(_views, 5),
    "showcase": Reader(_showcases, 1.5),
    "evaluation": Reader(_evaluations, 6),
    "job-config": Reader(_job_configs, 6),
    "job-state": Reader(_job_states, 6),
    "finetune-config": Reader(_finetune_configs, 5),
    "evaluate-config": Reader(_evaluate_configs, 5),
    "protocol": Reader(_protocols, 4),
    "reply-log": Reader(_reply_logs, 6),
    "answer": Reader(_answers, 4),
    "checkpoint": Reader(_checkpoints, 4),
    "model-folder": Reader(_model_folders, 4),
    "adapter": Reader(_adapters, 3),
    "adapter-merged": Reader(_merged_adapters, 0.5),
    "link": Reader(_links, 8),
    "model-name": Reader(_model_names, 3),
    "key": Reader(_stored_key, 2),
}
