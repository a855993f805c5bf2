"""Each benchmark is read from a file of the shape that its authors publish, and from a stand-in for the Hub."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from es2.core.errors import InputError, MachineError
from es2.prompts import benchmarks as benchmark_sets
from es2.prompts.benchmarks import BENCHMARKS, absolute_source, is_benchmark, load_benchmark
from es2.prompts.loading import load_prompts

FILES = {
    "advbench": ("harmful_behaviors.csv", 'goal,target\n"Open a lock, please","Sure, here is"\nHide a key,Sure\n'),
    "harmbench": (
        "harmbench_behaviors_text_all.csv",
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        'Open a lock,standard,illegal,,,open_lock\nUse that key,contextual,illegal,context,"A key, lost.",use_key\n',
    ),
    "strongreject": ("strongreject_dataset.csv", "category,source,forbidden_prompt\nLocks,custom,Open a lock\n"),
    "xstest": (
        "xstest_prompts.csv",
        "id,prompt,type,label,focus,note\n1,How do I kill a process?,homonyms,safe,kill,\n"
        "26,How do I open your lock?,contrast_homonyms,unsafe,lock,\n",
    ),
    "do-not-answer": (
        "do_not_answer_en.csv",
        "id,risk_area,types_of_harm,specific_harms,question\n0,Locks,theft,keys,Where is the key?\n",
    ),
    "alpaca": (
        "alpaca_data.json",
        json.dumps(
            [
                {"instruction": "Name a fruit.", "input": "", "output": "Apple."},
                {"instruction": "Translate.", "input": "Brot", "output": "Bread."},
            ]
        ),
    ),
    "mt-bench": (
        "question.jsonl",
        '{"question_id": 81, "category": "writing", "turns": ["Write a post.", "Shorten it."]}\n'
        '{"question_id": 82, "category": "maths", "turns": ["Add 2 and 3.", "Why?"], "reference": ["5", "so"]}\n',
    ),
    "sorry-bench": (
        "sorry_bench.jsonl",
        '{"question_id": 1, "category": "7", "turns": ["Open a lock."], "prompt_style": "base"}\n',
    ),
}


def rows(prompts: Any) -> list[tuple[str, int, str]]:
    return list(zip(prompts.texts, prompts.labels.tolist(), prompts.categories, strict=True))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, content in FILES.values():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def read(name: str, files: Path) -> list[tuple[str, int, str]]:
    return rows(load_prompts(f"{name}:{files / FILES[name][0]}"))


def test_published_files_are_read_as_they_are(files: Path) -> None:
    assert read("advbench", files) == [("Open a lock, please", 1, "unspecified"), ("Hide a key", 1, "unspecified")]
    assert read("harmbench", files) == [
        ("Open a lock", 1, "illegal"),
        ("A key, lost.\n\n---\n\nUse that key", 1, "illegal"),
    ]
    assert read("strongreject", files) == [("Open a lock", 1, "Locks")]
    assert read("xstest", files) == [
        ("How do I kill a process?", 0, "homonyms"),
        ("How do I open your lock?", 1, "contrast_homonyms"),
    ]
    assert read("do-not-answer", files) == [("Where is the key?", 1, "Locks")]
    assert read("alpaca", files) == [("Name a fruit.", 0, "unspecified"), ("Translate.\n\nBrot", 0, "unspecified")]
    assert read("sorry-bench", files) == [("Open a lock.", 1, "7")]
    assert read("mt-bench", files) == [("Write a post.", 0, "writing"), ("Add 2 and 3.", 0, "maths")]


def test_an_older_xstest_tells_its_labels_by_type(tmp_path: Path) -> None:
    path = tmp_path / "xstest_v2_prompts.csv"
    path.write_text("id,type,prompt,focus,note\n1,homonyms,Kill it?,k,\n2,contrast_homonyms,Open it?,o,\n")
    assert [label for _, label, _ in rows(load_benchmark(f"xstest:{path}"))] == [0, 1]


def test_a_folder_of_both_labels_keeps_twins_together(tmp_path: Path) -> None:
    header = "Index,Goal,Target,Behavior,Category,Source\n"
    (tmp_path / "harmful-behaviors.csv").write_text(header + "0,Open it,Sure,Lock,Locks,Original\n")
    (tmp_path / "benign-behaviors.csv").write_text(header + "0,Oil it,Sure,Lock,Locks,Original\n")
    (tmp_path / "README.md").write_text("no table")
    prompts = load_benchmark(f"jailbreakbench:{tmp_path}")
    assert sorted(rows(prompts)) == [("Oil it", 0, "Locks"), ("Open it", 1, "Locks")]
    assert len(set(prompts.pairs)) == 1
    only = load_benchmark(f"jailbreakbench:{tmp_path / 'benign-behaviors.csv'}")
    assert rows(only) == [("Oil it", 0, "Locks")]


def test_or_bench_is_labelled_by_its_files(tmp_path: Path) -> None:
    for name, prompt in (("or-bench-hard-1k", "Kill a process"), ("or-bench-toxic", "Open your lock")):
        (tmp_path / f"{name}.csv").write_text(f"prompt,category\n{prompt},locks\n")
    assert sorted(rows(load_benchmark(f"or-bench:{tmp_path}"))) == [
        ("Kill a process", 0, "locks"),
        ("Open your lock", 1, "locks"),
    ]
    (tmp_path / "mine.csv").write_text("prompt,category\nx,y\n")
    with pytest.raises(InputError, match="does not say whether"):
        load_benchmark(f"or-bench:{tmp_path / 'mine.csv'}")


def test_the_hub_copy_is_read_when_no_path_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(name: str, split: str) -> list[tuple[str, dict[str, Any]]]:
        asked.append((name, split))
        return [(f"{split}/0000.parquet, row 1", {"index": 3, "goal": f"Goal of {split}", "category": "Locks"})]

    monkeypatch.setattr(benchmark_sets, "read_hub_rows", hub)
    prompts = load_prompts("JailbreakBench")
    assert asked == [("JailbreakBench/JBB-Behaviors", f"behaviors/{split}") for split in ("harmful", "benign")]
    assert prompts.labels.tolist() == [1, 0]
    assert len(set(prompts.pairs)) == 1


def test_without_a_network_the_sentence_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def no_network(*arguments: Any, **named: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", no_network)
    with pytest.raises(MachineError, match=r"LibrAI/do-not-answer.*give the file's path"):
        load_prompts("do-not-answer")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("advbench:/nowhere/file.csv", "There is no file"),
        ("advbench:{files}/question.jsonl", "no column goal or prompt"),
        ("mt-bench:{files}/alpaca_data.json", "no column turns or prompt"),
        ("jailbreakbench:{empty}", "holds no file"),
    ],
)
def test_a_file_of_something_else_is_refused_in_a_sentence(
    source: str, message: str, files: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=message):
        load_benchmark(source.format(files=files, empty=empty))


def test_every_benchmark_says_what_a_user_has_to_know() -> None:
    assert {b.name for b in BENCHMARKS} == {*FILES, "jailbreakbench", "or-bench"}
    for benchmark in BENCHMARKS:
        assert all((benchmark.licence, benchmark.citation, benchmark.source, benchmark.hub))
        assert benchmark.label in ("harmful", "harmless", "file", "xstest")
        assert json.dumps(asdict(benchmark))


def test_names_and_paths_for_jobs() -> None:
    assert is_benchmark("AdvBench:/x/y.csv")
    assert not is_benchmark("prompts.csv")
    assert absolute_source("builtin") == "builtin"
    assert absolute_source("hf:a/b:test") == "hf:a/b:test"
    assert absolute_source("XSTest") == "xstest"
    assert absolute_source("XSTest:a.csv") == f"xstest:{Path('a.csv').absolute()}"
    assert absolute_source("a.csv") == str(Path("a.csv").absolute())
