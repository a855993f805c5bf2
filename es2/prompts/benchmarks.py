"""The standard benchmarks by name, read from the files that their authors publish.

Columns, labels, licence and citation of each are data, so that all users read the same rows in the same way. No file is
shipped, and columns of answers, targets or attack strings are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from es2.core.errors import InputError
from es2.core.files import expanded
from es2.prompts.prompt_set import PromptSet
from es2.prompts.readers import read_bounded, read_hub_rows, read_table
from es2.prompts.rows import Row, from_rows


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        prompt: columns that may hold the prompt; the first one found counts. A list's first entry is taken.
        label: `harmful` or `harmless` for all rows; or `file`, by words in the file's name or the Hub's folder; or
            `xstest`, by the column `label` and, where it is missing, by a type that begins with `contrast_`.
        source: address and name of the published file.
        category: columns that may hold the category.
        context: a column whose text goes before the prompt, where it is not empty.
        pair: a column of ids of pairs whose members may be in two files.
        harmless_files, harmful_files: words in a file's name that decide its rows' label (label `file`).
        hub: the data set on the Hugging Face Hub, or None.
        hub_folders: the configurations or splits of it that are read (`configuration/split`); empty for the split
            `train` of every configuration.
        gated: whether the Hub asks for a log-in and consent first.
    """

    name: str
    title: str
    prompt: tuple[str, ...]
    label: str
    licence: str
    citation: str
    source: str
    category: tuple[str, ...] = ("category",)
    context: str | None = None
    pair: str | None = None
    harmless_files: tuple[str, ...] = ()
    harmful_files: tuple[str, ...] = ()
    hub: str | None = None
    hub_folders: tuple[str, ...] = ()
    gated: bool = False


BENCHMARKS = (
    Benchmark(
        "advbench",
        "AdvBench harmful behaviors",
        ("goal", "prompt"),
        "harmful",
        "MIT",
        "Zou et al., Universal and Transferable Adversarial Attacks on Aligned Language Models, arXiv 2307.15043",
        "github.com/llm-attacks/llm-attacks: data/advbench/harmful_behaviors.csv",
        hub="walledai/AdvBench",
        gated=True,
    ),
    Benchmark(
        "harmbench",
        "HarmBench text behaviors",
        ("behavior", "prompt"),
        "harmful",
        "MIT",
        "Mazeika et al., HarmBench, arXiv 2402.04249",
        "github.com/centerforaisafety/HarmBench: data/behavior_datasets/harmbench_behaviors_text_all.csv",
        category=("semanticcategory", "category"),
        context="contextstring",
        hub="walledai/HarmBench",
        hub_folders=("standard/train",),
        gated=True,
    ),
    Benchmark(
        "jailbreakbench",
        "JailbreakBench JBB-Behaviors",
        ("goal",),
        "file",
        "MIT",
        "Chao et al., JailbreakBench, arXiv 2404.01318",
        "huggingface.co/datasets/JailbreakBench/JBB-Behaviors: data/harmful-behaviors.csv, data/benign-behaviors.csv",
        pair="index",
        harmless_files=("benign",),
        harmful_files=("harmful",),
        hub="JailbreakBench/JBB-Behaviors",
        hub_folders=("behaviors/harmful", "behaviors/benign"),
    ),
    Benchmark(
        "strongreject",
        "StrongREJECT",
        ("forbidden_prompt", "prompt"),
        "harmful",
        "MIT",
        "Souly et al., A StrongREJECT for Empty Jailbreaks, arXiv 2402.10260",
        "github.com/alexandrasouly/strongreject: strongreject_dataset/strongreject_dataset.csv",
        hub="walledai/StrongREJECT",
        gated=True,
    ),
    Benchmark(
        "xstest",
        "XSTest",
        ("prompt",),
        "xstest",
        "CC BY 4.0",
        "Röttger et al., XSTest, NAACL 2024, arXiv 2308.01263",
        "github.com/paul-rottger/exaggerated-safety: xstest_prompts.csv (earlier: xstest_v2_prompts.csv)",
        category=("type",),
        hub="walledai/XSTest",
        gated=True,
    ),
    Benchmark(
        "do-not-answer",
        "Do-Not-Answer",
        ("question", "prompt"),
        "harmful",
        "CC BY-NC-SA 4.0",
        "Wang et al., Do-Not-Answer, arXiv 2308.13387",
        "github.com/Libr-AI/do-not-answer: datasets/Instruction/do_not_answer_en.csv",
        category=("risk_area",),
        hub="LibrAI/do-not-answer",
    ),
    Benchmark(
        "or-bench",
        "OR-Bench (hard 1k and toxic)",
        ("prompt",),
        "file",
        "CC BY 4.0",
        "Cui et al., OR-Bench, arXiv 2405.20947",
        "huggingface.co/datasets/bench-llm/or-bench: or-bench-hard-1k.csv, or-bench-toxic.csv, or-bench-80k.csv",
        harmless_files=("hard", "80k"),
        harmful_files=("toxic",),
        hub="bench-llm/or-bench",
        hub_folders=("or-bench-hard-1k/train", "or-bench-toxic/train"),
    ),
    Benchmark(
        "alpaca",
        "Alpaca instructions",
        ("instruction",),
        "harmless",
        "CC BY-NC 4.0",
        "Taori et al., Stanford Alpaca, 2023",
        "github.com/tatsu-lab/stanford_alpaca: alpaca_data.json",
        hub="tatsu-lab/alpaca",
    ),
    Benchmark(
        "mt-bench",
        "MT-Bench, first turns",
        ("turns", "prompt"),
        "harmless",
        "Apache-2.0",
        "Zheng et al., Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena, arXiv 2306.05685",
        "github.com/lm-sys/FastChat: fastchat/llm_judge/data/mt_bench/question.jsonl",
        hub="HuggingFaceH4/mt_bench_prompts",
    ),
)
"""Licences are as the publishers state them; the files decide."""

_BY_NAME: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in BENCHMARKS}


def is_benchmark(source: str) -> bool:
    """Whether a prompt source names a benchmark: `advbench`, or `advbench:` and a path."""
    return source.partition(":")[0].lower() in _BY_NAME


def absolute_source(source: str) -> str:
    """A prompt source with its path made absolute, so that it means the same wherever a job runs."""
    name, _, path = source.partition(":")
    if source == "builtin" or source.startswith("hf:"):
        return source
    if is_benchmark(source):
        return f"{name.lower()}:{Path(expanded(path)).absolute()}" if path else name.lower()
    return str(Path(expanded(source)).absolute())


def load_benchmark(source: str) -> PromptSet:
    """The prompts of a benchmark, under its name.

    Args:
        source: `name:path` for a published file on this machine (CSV, JSON, JSONL or Parquet), or for a folder that
            holds several (JailbreakBench, OR-Bench); the name alone for its copy on the Hub.

    Raises:
        InputError: for an unknown name, a file that is not the benchmark's, and as `load_prompts` does.
        MachineError: when the Hub cannot be reached.
    """
    name, _, path = source.partition(":")
    if name.lower() not in _BY_NAME:
        raise InputError(f"There is no benchmark {name[:40]!r}; there are: {', '.join(_BY_NAME)}.")
    benchmark = _BY_NAME[name.lower()]
    if path:
        rows = list(_path_rows(benchmark, Path(expanded(path))))
        return from_rows(benchmark.name, rows, where=f"{benchmark.title} ({Path(path).name!r})")
    if benchmark.hub is None:
        raise InputError(f"{benchmark.title} is not on the Hub; get {benchmark.source} and give {name}:PATH.")
    rows = [
        _row(benchmark, place, row, place)
        for folder in benchmark.hub_folders or ("train",)
        for place, row in read_hub_rows(benchmark.hub, folder)
    ]
    return from_rows(benchmark.name, rows, where=f"{benchmark.title} (hf:{benchmark.hub})")


def _path_rows(benchmark: Benchmark, path: Path) -> Iterator[Row]:
    shown = repr(str(path)[:300])
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if _stated_label(benchmark, file.name))
            if not files:
                raise InputError(f"The folder {shown} holds no file of {benchmark.title}: {benchmark.source}.")
        elif path.is_file():
            files = [path]
        else:
            raise InputError(f"There is no file {shown}; get {benchmark.source} and give its path.")
        for file in files:
            for place, row in read_table(read_bounded(file), file.name):
                place = f"{file.name}, {place}" if len(files) > 1 else place
                yield _row(benchmark, place, row, file.name)
    except OSError as error:
        raise InputError(f"{shown} cannot be read ({error.strerror or error}); check its permissions.") from error


def _row(benchmark: Benchmark, place: str, row: Mapping[str, Any], file: str) -> Row:
    """One published row as a row of a prompt set."""
    found = next((column for column in benchmark.prompt if column in row), None)
    if found is None:
        raise InputError(
            f"{place} has no column {' or '.join(benchmark.prompt)}, so this is no file of {benchmark.title} "
            f"({benchmark.source})."
        )
    prompt = row[found]
    if isinstance(prompt, (list, tuple)):
        prompt = prompt[0] if prompt else ""
    if benchmark.name == "alpaca" and isinstance(prompt, str) and (more := row.get("input")):
        prompt = f"{prompt}\n\n{more}"
    if benchmark.context and isinstance(prompt, str) and (context := row.get(benchmark.context)):
        prompt = f"{context}\n\n---\n\n{prompt}"  # as HarmBench's own code puts them together
    cells: dict[str, Any] = {"prompt": prompt, "label": _label(benchmark, row, file)}
    category = next((row[column] for column in benchmark.category if isinstance(row.get(column), str)), None)
    if category:
        cells["category"] = category
    if benchmark.pair and row.get(benchmark.pair) not in (None, ""):
        cells["pair"] = f"{benchmark.name}:{row[benchmark.pair]}"
    return place, cells


def _label(benchmark: Benchmark, row: Mapping[str, Any], file: str) -> str:
    if benchmark.label == "xstest":
        stated = str(row.get("label") or "").strip().casefold()
        if stated in ("safe", "unsafe"):
            return "harmless" if stated == "safe" else "harmful"
        return "harmful" if str(row.get("type") or "").startswith("contrast_") else "harmless"
    if benchmark.label == "file":
        if (label := _stated_label(benchmark, file)) is not None:
            return label
        words = ", ".join((*benchmark.harmful_files, *benchmark.harmless_files))
        raise InputError(
            f"The name of {file!r} does not say whether its rows are harmful; {benchmark.title} has them in files "
            f"whose names hold one of {words}."
        )
    return benchmark.label


def _stated_label(benchmark: Benchmark, file: str) -> str | None:
    """The label in a file's name; for benchmarks of one label, `any` for every table."""
    if benchmark.label != "file":
        return "any" if Path(file).suffix.lower() in (".csv", ".json", ".jsonl", ".parquet") else None
    name = file.casefold()
    if any(word in name for word in benchmark.harmless_files):
        return "harmless"
    return "harmful" if any(word in name for word in benchmark.harmful_files) else None
