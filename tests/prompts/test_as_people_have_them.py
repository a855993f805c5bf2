"""Files as people have them: whatever format, columns and labels, they are the same prompts, and it is told."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from es2.core.errors import InputError
from es2.core.rendering import Rendering
from es2.prompts.benchmarks import absolute_source, is_remote, source_files
from es2.prompts.loading import load_prompts, table_columns, two_files
from es2.prompts.prompt_set import PromptSet
from es2.prompts.readers import parse_prompts
from es2.prompts.sources import Source, read_source, write_source

ROWS = [(f"Break lock {i}, please\nnow.", 1) for i in range(5)] + [(f'Oil "gate" {i}; then; go.', 0) for i in range(7)]
WORDS = [(text, "harmful" if label else "harmless") for text, label in ROWS]


def delimited(header: Sequence[str], rows: Sequence[Sequence[Any]], separator: str = ",", end: str = "\r\n") -> str:
    import csv

    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator=end).writerows([header, *rows])
    return text.getvalue()


def parquet(columns: dict[str, Any], classes: dict[str, list[str]] | None = None) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns)
    if classes:
        features = {name: {"names": names, "_type": "ClassLabel"} for name, names in classes.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def objects(make: Callable[[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    return [make(text, label) for text, label in ROWS]


def lines(make: Callable[[str, int], dict[str, Any]]) -> bytes:
    return "\n".join(map(json.dumps, objects(make))).encode()


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be nice."}, {"role": "user", "content": text}]


PLAIN = delimited(["prompt", "label"], WORDS)
TEXTS, NUMBERS = [text for text, _ in ROWS], [label for _, label in ROWS]
LAYOUTS: dict[str, tuple[str, bytes]] = {
    "line feeds": ("m.csv", PLAIN.replace("\r\n", "\n").encode()),
    "a mark": ("m.csv", PLAIN.encode("utf-8-sig")),
    "UTF-16": ("m.csv", PLAIN.encode("utf-16")),
    "UTF-16 without a mark": ("m.csv", PLAIN.encode("utf-16-le")),
    "UTF-32": ("m.csv", PLAIN.encode("utf-32")),
    "semicolons": ("m.csv", delimited(["Prompt", "Label"], WORDS, ";").encode()),
    "tabs": ("m.csv", delimited(["prompt", "label"], WORDS, "\t").encode()),
    "TSV": ("m.TSV", delimited(["prompt", "label"], WORDS, "\t").encode()),
    "gzip": ("m.csv.gz", gzip.compress(PLAIN.encode())),
    "gzip of two members": ("m.csv.gz", gzip.compress(PLAIN.encode()[:50]) + gzip.compress(PLAIN.encode()[50:])),
    "JSON": ("m.json", json.dumps(objects(lambda text, label: {"text": text, "harmful": bool(label)})).encode()),
    "JSON by column": ("m.json", json.dumps({"prompt": TEXTS, "label": NUMBERS}).encode()),
    "JSON of pandas": (
        "m.json",
        json.dumps({"prompt": dict(enumerate(TEXTS)), "label": dict(enumerate(NUMBERS))}).encode(),
    ),
    "JSON by label": (
        "m.json",
        json.dumps({"harmful": [t for t, own in ROWS if own], "harmless": [t for t, own in ROWS if not own]}).encode(),
    ),
    "JSON below one key": (
        "m.json",
        json.dumps({"version": 1, "data": objects(lambda text, label: {"query": text, "unsafe": label})}).encode(),
    ),
    "JSON lines called JSON": ("m.json", lines(lambda text, label: {"Question": text, "Toxicity": label})),
    "an array called JSON lines": (
        "m.jsonl",
        json.dumps(objects(lambda text, label: {"request": text, "is safe": not label})).encode(),
    ),
    "gzipped lines": ("m.jsonl.gz", gzip.compress(lines(lambda text, label: {"prompt": text, "label": float(label)}))),
    "messages": ("m.jsonl", lines(lambda text, label: {"messages": chat(text), "is_safe": not label})),
    "conversations": (
        "m.jsonl",
        lines(lambda text, label: {"conversations": [{"from": "human", "value": text}], "label": str(bool(label))}),
    ),
    "turns": ("m.jsonl", lines(lambda text, label: {"turns": [text, "And then?"], "toxic": label})),
    "parts": (
        "m.jsonl",
        lines(
            lambda text, label: {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": text}]}],
                "label": label,
            }
        ),
    ),
    "chats written into CSV": (
        "m.csv",
        delimited(["messages", "label"], [[str(chat(text)), label] for text, label in ROWS]).encode(),
    ),
    "Parquet": ("m.parquet", parquet({"instruction": TEXTS, "label": NUMBERS})),
    "gzipped Parquet": ("m.parquet.gz", gzip.compress(parquet({"goal": TEXTS, "is_safe": [not n for n in NUMBERS]}))),
    "Parquet of chats": ("m.parquet", parquet({"messages": [chat(text) for text in TEXTS], "label": NUMBERS})),
    "Parquet with a struct of arrays": (
        "m.parquet",
        parquet({"conversations": [{"role": ["user"], "content": [text]} for text in TEXTS], "label": NUMBERS}),
    ),
    "class labels that begin at harmful": (
        "m.parquet",
        parquet({"text": TEXTS, "label": [1 - number for number in NUMBERS]}, {"label": ["harmful", "benign"]}),
    ),
    "WildGuard": (
        "m.csv",
        delimited(
            ["prompt", "adversarial", "response", "prompt_harm_label", "response_harm_label"],
            [[text, "False", "No.", "harmful" if label else "unharmful", "unharmful"] for text, label in ROWS],
        ).encode(),
    ),
    "jailbreak-classification": (
        "m.csv",
        delimited(["prompt", "type"], [[text, "jailbreak" if own else "benign"] for text, own in ROWS]).encode(),
    ),
    "BeaverTails": (
        "m.jsonl",
        lines(
            lambda text, label: {
                "prompt": text,
                "response": "No.",
                "category": {"theft": bool(label)},
                "is_safe": not label,
            }
        ),
    ),
    "ToxicChat": (
        "m.csv",
        delimited(
            ["conv_id", "user_input", "model_output", "human_annotation", "toxicity", "jailbreaking"],
            [["a", text, "No.", "True", label, 0] for text, label in ROWS],
        ).encode(),
    ),
    "Aegis": (
        "m.jsonl",
        lines(
            lambda text, label: {
                "prompt": text,
                "response": None,
                "prompt_label": "unsafe" if label else "safe",
                "response_label": None,
            }
        ),
    ),
    "splits of another kind": (
        "m.csv",
        delimited(["text", "label", "split"], [[text, label, "train"] for text, label in ROWS]).encode(),
    ),
}


def told(prompts: PromptSet) -> list[tuple[Any, ...]]:
    return sorted(zip(prompts.texts, prompts.labels.tolist(), prompts.pairs, prompts.splits, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_prompts(layout: str, tmp_path: Path) -> None:
    name, data = LAYOUTS[layout]
    (tmp_path / name).write_bytes(data)
    prompts = load_prompts(str(tmp_path / name))
    plain = parse_prompts(PLAIN.encode(), "plain.csv")
    assert told(prompts) == told(plain)
    assert prompts.digest == plain.digest
    assert prompts.reading is not None
    assert prompts.reading.counts == {"harmful": 5, "harmless": 7}


class TestSystemTurns:
    """A system turn that all chats share is the system prompt; others are a sentence, unless one is given."""

    def read(self, tmp_path: Path, rows: list[Any], **more: Any) -> PromptSet:
        file = tmp_path / "m.jsonl"
        file.write_text("\n".join(json.dumps({"messages": row, "label": n % 2} | more) for n, row in enumerate(rows)))
        return load_prompts(str(file))

    def turns(self, system: str | None, text: str, role: str = "system") -> list[dict[str, str]]:
        before = [] if system is None else [{"role": role, "content": system}]
        return [*before, {"role": "user", "content": text}]

    @pytest.mark.parametrize("role", ["system", "System", "developer"])
    def test_one_that_all_share_is_the_system_prompt(self, role: str, tmp_path: Path) -> None:
        prompts = self.read(tmp_path, [self.turns("Be nice.", text, role) for text in ("a", "b", "c")])
        assert prompts.rendered_as(Rendering()) == Rendering(system_prompt="Be nice.")
        assert prompts.measured().rendered_as().system_prompt == "Be nice."
        assert prompts.rendered_as(Rendering(system_prompt="none")).system_prompt == "none"
        assert prompts.rendered_as(Rendering(thinking="on"), Rendering(system_prompt="As the run")) == Rendering(
            system_prompt="As the run", thinking="on"
        )
        assert prompts.reading is not None
        assert "the system prompt of its chats, 'Be nice.'" in prompts.reading.sentence

    def test_one_beside_the_chat(self, tmp_path: Path) -> None:
        prompts = self.read(tmp_path, [self.turns(None, text) for text in ("a", "b")], system="Be nice.")
        assert prompts.rendered_as().system_prompt == "Be nice."

    @pytest.mark.parametrize("systems", [["Be nice.", "Be terse."], ["Be nice.", None], [None, "Be nice."]])
    def test_rows_that_disagree_are_a_sentence(self, systems: list[str | None], tmp_path: Path) -> None:
        prompts = self.read(tmp_path, [self.turns(system, text) for system, text in zip(systems, "ab", strict=True)])
        with pytest.raises(InputError, match=r"different system prompts \(.*'Be nice.'.*--system-prompt"):
            prompts.rendered_as()
        assert prompts.rendered_as(Rendering(system_prompt="default")).settled == Rendering()

    def test_no_system_turn_is_nothing(self, tmp_path: Path) -> None:
        prompts = self.read(tmp_path, [self.turns(None, text) for text in ("a", "b")])
        assert prompts.rendered_as() == Rendering()

    def test_two_files_have_to_agree(self, tmp_path: Path) -> None:
        for name, system in (("harmful", "Be nice."), ("harmless", None)):
            row = {"messages": self.turns(system, f"A {name} one")}
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        prompts = load_prompts(f"pair:{tmp_path / 'harmful.jsonl'}|{tmp_path / 'harmless.jsonl'}")
        with pytest.raises(InputError, match="different system prompts"):
            prompts.rendered_as()


class TestTwoFiles:
    @pytest.fixture
    def files(self, tmp_path: Path) -> Path:
        header = "goal,target\n"
        (tmp_path / "bad.csv").write_text(header + "".join(f"Break lock {i},Sure\n" for i in range(3)))
        (tmp_path / "good|100%.txt").write_text("".join(f"Oil gate {i}\n\n" for i in range(4)))
        return tmp_path

    def test_they_are_one_source(self, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(files)
        source = absolute_source(write_source(two_files("bad.csv:goal", "good|100%.txt")))
        monkeypatch.chdir("/")
        assert absolute_source(source) == source
        assert source_files(source) == (files / "bad.csv", files / "good|100%.txt")
        assert not is_remote(source)
        prompts = load_prompts(source)
        assert prompts.labels.tolist() == [1] * 3 + [0] * 4
        assert prompts.texts[0] == "Break lock 0"
        assert prompts.reading is not None
        assert [table["prompt_column"] for table in prompts.reading.tables] == ["goal", "prompt"]
        assert (
            prompts.digest
            == load_prompts(
                write_source(two_files("advbench:" + str(files / "bad.csv"), str(files / "good|100%.txt")))
            ).digest
        )

    def test_twins_of_one_benchmark_stay_together(self, tmp_path: Path) -> None:
        header = "Index,Goal,Target,Behavior,Category,Source\n"
        (tmp_path / "a.csv").write_text(header + "0,Open it,Sure,Lock,Locks,Original\n")
        (tmp_path / "b.csv").write_text(header + "0,Oil it,Sure,Lock,Locks,Original\n")
        prompts = load_prompts(write_source(two_files(str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))))
        assert len(set(prompts.pairs)) == 1

    def test_a_file_that_says_otherwise_is_refused_unless_its_column_is_named(self, files: Path) -> None:
        mixed = files / "mixed.csv"
        mixed.write_text("text,label\na b,1\nc d,0\n")
        with pytest.raises(InputError, match=r"given as harmful, but by its column label 1 row"):
            load_prompts(f"pair:{mixed}|{files / 'bad.csv'}")
        assert load_prompts(write_source(two_files(f"{mixed}:text", str(files / "bad.csv")))).labels.sum() == 2

    @pytest.mark.parametrize("place", ["builtin", "nowhere.csv", "hf:"])
    def test_what_is_no_file_of_one_label(self, files: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(Exception, match=r"both labels|no prompt file|data set"):
            load_prompts(f"pair:{files / 'bad.csv'}|{place}")


class TestOverruling:
    DATA = delimited(["Frage", "class", "text", "query"], [["Break it", "S1", "x", "y"], ["Oil it", "S2", "x", "y"]])

    def test_columns_and_values_may_be_named(self) -> None:
        how = Source("", prompt_column="frage", label_column="Class", harmful_values=("s1",))
        prompts = parse_prompts(self.DATA.encode(), "m.csv", how)
        assert prompts.texts == ("Break it", "Oil it")
        assert prompts.labels.tolist() == [1, 0]
        assert prompts.reading is not None
        assert prompts.reading.tables[0]["values"] == {
            "s1": {"label": "harmful", "rows": 1},
            "s2": {"label": "harmless", "rows": 1},
        }
        assert "prompts from frage" in prompts.reading.sentence
        broken = parse_prompts(
            b'goal,class\na b,"S\n1"\nc d,S2\n', "m.csv", Source("", label_column="class", harmful_values=("s2",))
        )
        assert broken.reading is not None
        assert "(s 1 = harmless (1), s2 = harmful (1))" in broken.reading.sentence

    @pytest.mark.parametrize(
        ("data", "how", "words"),
        [
            (DATA, Source(""), "several columns that may hold the prompt: text, query"),
            (DATA, Source("", prompt_column="Frage"), "no column that tells harmful from harmless"),
            (DATA, Source("", prompt_column="nothing"), "no column 'nothing'; it has: frage, class, text, query"),
            (DATA, Source("", prompt_column="text", label_column="class"), "column class: its values say neither"),
            (DATA, Source("", prompt_column="text", label_column="class"), "'s1' (1), 's2' (1)"),
            ('"a\nA",b\nx,1\n', Source(""), "no column of prompts under a usual name (columns: a a, b)"),
            ("a,b\nx,1\n", Source(""), "(columns: a, b); name it with --prompt-column (of two files: FILE:COLUMN)"),
            ("text,label,toxicity\nx,1,0\ny,0,1\n", Source(""), "disagree: label, toxicity"),
            ("prompt,type,class\nx,safe,unsafe\n", Source(""), "several columns that may hold the label: type, class"),
            ("goal,is_safe\nx y,1\nz,maybe\n", Source(""), "row 3, column is_safe: 'maybe' is unknown ('maybe' (1))"),
            ("goal,is_safe\nx y,1\n,0\n", Source(""), "row 3, column goal: empty"),
        ],
    )
    def test_what_fits_no_reading_is_listed(self, data: str, how: Source, words: str) -> None:
        with pytest.raises(InputError) as caught:
            parse_prompts(data.encode(), "m.csv", how)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_wrong_rows_are_left_out_and_counted(self, caplog: pytest.LogCaptureFixture) -> None:
        data = b'{"prompt": "a b", "label": 1}\n{oops\n[1]\n{"prompt": "", "label": 0}\n{"prompt": "c d", "label": 0}\n'
        with pytest.raises(InputError, match=r"row 2: not valid JSON .*--skip-bad-rows"):
            parse_prompts(data, "m.jsonl")
        prompts = parse_prompts(data, "m.jsonl", Source("", skip_bad_rows=True))
        assert prompts.texts == ("a b", "c d")
        assert prompts.reading is not None
        assert prompts.reading.to_dict()["n_skipped"] == 3
        assert ["row 2" in sentence for sentence in prompts.reading.skipped] == [True, False, False]
        assert "3 wrong row(s) left out; the first: 'm.jsonl', row 2" in caplog.text


def test_labels_that_somebody_added_to_a_benchmark_count() -> None:
    rows = [
        ["1", "Kill a process?", "homonyms", "harmful", "kill", ""],
        ["2", "Rob it?", "contrast_x", "harmless", "", ""],
    ]
    data = delimited(["id", "prompt", "type", "label", "focus", "note"], rows)
    assert parse_prompts(data.encode(), "xstest.csv").labels.tolist() == [1, 0]


def test_sets_like_a_benchmark_are_not_taken_for_it() -> None:
    """A set may have MT-Bench's columns and more, and one in Alpaca's form may hold anything."""
    row = {"question_id": 1, "category": "7", "turns": ["Break it"], "style": "base"}
    for name, data in (
        ("question.jsonl", json.dumps(row)),
        ("mine.json", json.dumps([{"instruction": "Break", "input": "it", "output": ""}])),
    ):
        with pytest.raises(InputError, match="no column that tells harmful from harmless"):
            parse_prompts(data.encode(), name)
    prompts = parse_prompts(json.dumps([{"instruction": "Break", "input": "it"}]).encode(), "harmful_train.json")
    assert (prompts.texts, prompts.labels.tolist()) == (("Break\n\nit",), [1])


def test_a_small_file_that_unpacks_to_much_is_refused() -> None:
    import zlib

    packer = zlib.compressobj(9, wbits=31)
    block = b"a" * 2**20
    data = b"".join(packer.compress(block) for _ in range(300)) + packer.flush()
    assert len(data) < 2**20
    with pytest.raises(InputError, match=r"larger than 200 MB once unpacked"):
        parse_prompts(data, "bomb.txt.gz")
    with pytest.raises(InputError, match="its end is missing"):
        parse_prompts(gzip.compress(b"x")[:-9], "c.csv.gz")


@pytest.mark.parametrize(
    "source",
    [
        Source("a.csv"),
        Source("a?b|c%7C.csv", "d&e=.csv", "my column", "other?=&", None, (), True),
        Source("hf:a/b:test", None, None, None, "label", ("a,b", "c|d&e", "ü")),
    ],
)
def test_a_source_is_written_and_read(source: Source) -> None:
    assert read_source(write_source(source)) == source


CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["harmful", "safe", "1", "Break it", "\ud800", "\0", '[{"role": "user"}]', "[" * 300]),
    st.text(max_size=12),
)
NESTED = st.recursive(
    CELLS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "messages", "turns", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
COLUMNS = st.sampled_from(
    [
        "prompt",
        "label",
        "Text",
        "goal",
        "is_safe",
        "type",
        "messages",
        "turns",
        "category",
        "pair",
        "split",
        "harmful",
        "x",
    ]
)
HOW = st.builds(
    Source,
    st.just(""),
    prompt_column=st.none() | COLUMNS,
    label_column=st.none() | COLUMNS,
    harmful_values=st.lists(st.sampled_from(["1", "safe", "x"]), max_size=2).map(tuple),
    skip_bad_rows=st.booleans(),
)


def a_result_or_a_sentence(data: bytes, name: str, how: Source) -> None:
    try:
        prompts = parse_prompts(data, name, how)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017 (few files are prompts)
        return
    assert len(prompts) > 0
    assert prompts.reading is not None
    assert json.dumps(prompts.reading.to_dict(), allow_nan=False)


@given(st.data())
def test_any_rows_are_a_result_or_a_sentence(drawn: st.DataObject) -> None:
    rows = drawn.draw(st.lists(st.dictionaries(COLUMNS, NESTED, max_size=5) | CELLS, max_size=6))
    kind = drawn.draw(st.sampled_from(["json", "jsonl", "columns"]))
    if kind == "jsonl":
        data = "\n".join(map(json.dumps, rows)).encode()
    else:
        named = {name: [row.get(name) for row in rows if isinstance(row, dict)] for name in ("prompt", "label", "goal")}
        data = json.dumps(rows if kind == "json" else named).encode()
    a_result_or_a_sentence(data, "m.jsonl" if kind == "jsonl" else "m.json", drawn.draw(HOW))


@given(st.sampled_from(list(LAYOUTS)), st.data())
def test_any_damaged_file_is_a_result_or_a_sentence(layout: str, drawn: st.DataObject) -> None:
    name, data = LAYOUTS[layout]
    damaged = bytearray(data)
    for _ in range(drawn.draw(st.integers(1, 4))):
        place = drawn.draw(st.integers(0, max(len(damaged) - 1, 0)))
        damaged[place : place + drawn.draw(st.integers(0, 9))] = drawn.draw(st.binary(max_size=6))
    other = drawn.draw(st.sampled_from([name, "m.csv", "m.json", "m.txt", "harmful.txt", "m.parquet", "m.tsv.gz"]))
    a_result_or_a_sentence(bytes(damaged), other, drawn.draw(HOW))


@given(
    st.text(max_size=60),
    st.sampled_from(["", "pair:", "?prompt-column=", "?skip-bad-rows=yes", "|"]),
    st.text(max_size=20),
)
def test_any_source_means_the_same_wherever_it_is_read(start: str, middle: str, end: str) -> None:
    source = absolute_source(start + middle + end)
    assert absolute_source(source) == source
    source_files(source)


def test_columns_and_values_to_choose_from(tmp_path: Path) -> None:
    rows = [[f"Ask {i}", i % 2, ["Safe", " safe", "", "S1"][i % 4], "x" * 90] for i in range(60)]
    (tmp_path / "m.csv").write_text(delimited(["Frage", "Label", "art", "note"], rows))
    assert table_columns(str(tmp_path / "m.csv")) == {
        "frage": {},
        "label": {"0": 30, "1": 30},
        "art": {"safe": 30, "s1": 15},
        "note": {},
    }
    (tmp_path / "m.jsonl").write_bytes(lines(lambda text, label: {"messages": chat(text), "is_safe": not label}))
    assert table_columns(str(tmp_path / "m.jsonl")) == {"messages": {}, "is_safe": {"true": 7, "false": 5}}
    assert table_columns("xstest:nowhere.csv") == {}
    with pytest.raises(InputError, match="no prompt file"):
        table_columns("nowhere.csv")
