"""Prompts: what is read, what is refused and how it is said, and that splits are what they claim to be."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from es2.core.errors import Es2Error, InputError, MachineError
from es2.prompts.loading import load_builtin, load_prompts
from es2.prompts.prompt_set import HARMFUL, HARMLESS, SPLITS, normalised, split_of, stable_hash
from es2.prompts.readers import parse_prompts
from es2.prompts.sources import Source


def csv(text: str, name: str = "mine.csv"):
    return parse_prompts(text.encode(), name)


class TestSplits:
    def test_shares_are_those_of_the_design(self) -> None:
        counts = Counter(split_of(f"pair-{number}") for number in range(20_000))
        shares = [counts[split] / 20_000 for split in SPLITS]
        np.testing.assert_allclose(shares, [0.5, 0.1, 0.2, 0.2], atol=0.015)

    def test_the_hash_is_pinned(self) -> None:
        """Splits must never move between versions: published numbers depend on them."""
        assert stable_hash("split:violence-001") == 11404751855027095244
        assert [split_of(f"violence-{number:03d}") for number in range(1, 7)] == [
            "probe",
            "tune",
            "probe",
            "probe",
            "tune",
            "validation",
        ]

    def test_both_members_of_a_pair_fall_together(self) -> None:
        prompts = load_builtin()
        splits: dict[str, set[str]] = {}
        for pair, split in zip(prompts.pairs, prompts.splits, strict=True):
            splits.setdefault(pair, set()).add(split)
        assert all(len(found) == 1 for found in splits.values())

    def test_adding_prompts_moves_no_other(self) -> None:
        few = csv("prompt,label\nHow do I bake bread?,harmless\nHow do I rob a bank?,harmful\n")
        more = csv(
            "prompt,label\nWhat is rain?,harmless\nHow do I rob a bank?,harmful\nHow do I bake bread?,harmless\n"
        )
        of = dict(zip(more.texts, more.splits, strict=True))
        assert [of[text] for text in few.texts] == list(few.splits)

    def test_a_prompt_without_pair_hashes_its_normalised_text(self) -> None:
        one = csv("prompt,label\nHow do I bake  Bread?,harmless\n")
        other = csv("prompt,label\nhow do i bake bread?,harmless\n")
        assert one.pairs == other.pairs

    def test_a_split_column_overrides(self) -> None:
        prompts = csv("prompt,label,split\na b,harmful,watch\nc d,harmless,Test\n")
        assert prompts.splits == ("validation", "test")


class TestReaders:
    def test_all_three_formats_give_the_same_set(self, tmp_path: Path) -> None:
        import pandas as pd

        table = pd.DataFrame(
            {
                "prompt": ['Say "hi", please', "Line one\nline two", "Grüße 👋 مرحبا"],
                "label": ["harmless", "harmful", "harmless"],
                "category": ["greeting", None, "greeting"],
                "pair": ["p1", "p1", None],
            }
        )
        table.to_csv(tmp_path / "set.csv", index=False)
        table.to_parquet(tmp_path / "set.parquet")
        lines = [json.dumps({k: v for k, v in row.items() if isinstance(v, str)}) for row in table.to_dict("records")]
        (tmp_path / "set.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        sets = [load_prompts(str(tmp_path / f"set.{ending}")) for ending in ("csv", "parquet", "jsonl")]
        assert sets[0].texts == ('Say "hi", please', "Line one\nline two", "Grüße 👋 مرحبا")
        assert sets[0].labels.tolist() == [HARMLESS, HARMFUL, HARMLESS]
        assert sets[0].categories == ("greeting", "unspecified", "greeting")
        assert {prompts.digest for prompts in sets} == {sets[0].digest}

    def test_exact_duplicates_merge_with_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        prompts = csv("prompt,label\nsame,harmful\nother,harmless\n same ,harmful\n")
        assert prompts.texts == ("same", "other")
        assert "1 exact duplicate(s) merged" in caplog.text

    def test_a_byte_order_mark_and_odd_headers_are_read(self) -> None:
        assert parse_prompts("\ufeff Prompt ,LABEL\nx,Harmful\n".encode(), "m.csv").texts == ("x",)

    def test_digests(self) -> None:
        one = csv("prompt,label\na,harmful\nb,harmless\n")
        turned = csv("prompt,label\nb,harmless\na,harmful\n")
        corrected = csv("prompt,label\na,harmless\nb,harmless\n")
        assert one.digest == turned.digest
        assert one.texts_digest != turned.texts_digest
        assert one.digest != corrected.digest
        assert one.texts_digest == corrected.texts_digest


BAD = {
    "empty file": (b"", "m.csv", "is empty"),
    "white space only": (b" \n\n", "m.jsonl", "is empty"),
    "header only": (b"prompt,label\n", "m.csv", "holds no prompt"),
    "no label column": (b"prompt,category\na,b\n", "m.csv", "no column that tells harmful from harmless"),
    "column twice": (b"prompt,label,label\na,harmful,harmful\n", "m.csv", "exactly one column 'label'"),
    "unknown label": (b"prompt,label\na,harmful\nb,evil\n", "m.csv", "row 3, column label: 'evil' is unknown"),
    "no label": (b"prompt,label\na,\n", "m.csv", "row 2, column label: empty"),
    "no prompt": (b"prompt,label\n  ,harmful\n", "m.csv", "row 2, column prompt: empty"),
    "both labels": (b"prompt,label\nSame,harmful\nsame ,harmless\n", "m.csv", "row 3: this text stands under both"),
    "too long": (b"prompt,label\n" + b"x" * 100_000 + b",harmful\n", "m.csv", "row 2, column prompt: 100,000 char"),
    "NUL": (b"prompt,label\na\x00b,harmful\n", "m.csv", "row 2"),
    "not UTF-8": (b"prompt,label\nok,harmful\n\xff\xfe,harmful\n", "m.csv", "not UTF-8 text (line 3)"),
    "too many cells": (b"prompt,label\nhello, world,harmful\n", "m.csv", "row 2: more cells"),
    "open quote": (b'prompt,label\n"hello,harmful\n', "m.csv", "not valid CSV"),
    "bad JSON": (b'{"prompt": "a", "label": "harmful"}\n{oops\n', "m.jsonl", "row 2: not valid JSON"),
    "JSON list": (b"[1, 2]\n", "m.jsonl", "row 1: expected an object"),
    "number as prompt": (b'{"prompt": 7, "label": "harmful"}\n', "m.jsonl", "column prompt: expected text, found int"),
    "surrogate": (b'{"prompt": "\\ud800", "label": "harmful"}\n', "m.jsonl", "surrogate"),
    "bad parquet": (b"PAR1 this is none", "m.parquet", "not a readable Parquet file"),
    "other ending": (b"prompt,label\na,harmful\n", "m.xlsx", "its name must end in .csv, .tsv, .json, .jsonl"),
    "unknown split": (b"prompt,label,split\na,harmful,train\n", "m.csv", "column split: 'train' is unknown"),
    "pair over two splits": (
        b"prompt,label,pair,split\na,harmful,p,test\nb,harmless,p,tune\n",
        "m.csv",
        "the pair 'p' stands in tune here and in test at row 2",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("case", BAD)
    def test_bad_content_is_one_sentence_with_its_place(self, case: str) -> None:
        data, name, words = BAD[case]
        with pytest.raises(InputError) as caught:
            parse_prompts(data, name)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("source", ["nowhere.csv", "", "a\0b.csv", "x" * 5000 + ".csv"])
    def test_bad_paths(self, source: str) -> None:
        with pytest.raises(InputError):
            load_prompts(source)

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is a folder"):
            load_prompts(str(tmp_path))

    @given(st.binary(max_size=400), st.sampled_from(["m.csv", "m.jsonl", "m.parquet"]))
    def test_any_bytes_end_in_a_result_or_a_sentence(self, data: bytes, name: str) -> None:
        try:
            prompts = parse_prompts(data, name)
        except Es2Error as error:
            sentence = str(error)
        else:
            sentence = ""
            assert len(prompts) > 0
        assert "\n" not in sentence

    @given(st.lists(st.tuples(st.text(max_size=30), st.sampled_from(["harmful", "harmless", "x"])), max_size=8))
    def test_any_rows_end_in_a_result_or_a_sentence(self, rows: list[tuple[str, str]]) -> None:
        data = "\n".join(json.dumps({"prompt": text, "label": label}) for text, label in rows).encode()
        try:
            prompts = parse_prompts(data, "m.jsonl")
        except InputError:
            return
        assert len(prompts) == len({text.strip() for text, _ in rows})


class TestHub:
    @pytest.mark.parametrize("library", [True, False])
    def test_no_network_is_a_sentence(self, monkeypatch: pytest.MonkeyPatch, library: bool) -> None:
        import huggingface_hub
        from huggingface_hub.errors import HTTPError

        def offline(*_args: object, **_options: object) -> None:
            raise HTTPError("no route") if library else ConnectionError("no route")

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
        with pytest.raises(MachineError, match="cannot be reached for the data set 'some/set'"):
            load_prompts("hf:some/set")

    def test_a_split_is_read_from_the_parquet_branch(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import huggingface_hub
        import pandas as pd

        pd.DataFrame({"prompt": ["a", "b"], "label": ["harmful", "harmless"]}).to_parquet(tmp_path / "0.parquet")
        files = ["default/train/0.parquet", "default/test/0.parquet"]
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_a, **_k: files)
        asked: list[str] = []

        def download(_name: str, file: str, **_options: object) -> str:
            asked.append(file)
            return str(tmp_path / "0.parquet")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        assert load_prompts("hf:some/set:test").texts == ("a", "b")
        assert asked == ["default/test/0.parquet"]
        with pytest.raises(InputError, match="no split 'validation'; it has: test, train"):
            load_prompts("hf:some/set:validation")


class TestBuiltin:
    """The built-in set is what its docs claim: no shallow reading of words, characters or length tells the labels."""

    @pytest.fixture(scope="class")
    def prompts(self):
        return load_builtin()

    def test_size_and_variety(self, prompts) -> None:
        assert len(prompts) >= 1200
        assert set(Counter(prompts.pairs).values()) == {2}
        assert len(set(prompts.categories)) >= 14
        assert prompts.labels.sum() * 2 == len(prompts)

    def test_forms(self) -> None:
        import csv as csv_reader
        from importlib import resources

        table = resources.files("es2") / "data" / "contrast_pairs.csv"
        forms = Counter(row["form"] for row in csv_reader.DictReader(table.read_text(encoding="utf-8").splitlines()))
        assert len(forms) >= 60

    def test_no_two_prompts_of_different_pairs_are_alike(self, prompts) -> None:
        from sklearn.feature_extraction.text import CountVectorizer

        words = CountVectorizer(token_pattern=r"[A-Za-z0-9']+", binary=True).fit_transform(prompts.texts)
        shared = (words @ words.T).toarray().astype(float)
        sizes = shared.diagonal()
        jaccard = shared / (sizes[:, None] + sizes[None, :] - shared)
        pairs = np.array(prompts.pairs)
        jaccard[pairs[:, None] == pairs[None, :]] = 0
        first, second = np.unravel_index(jaccard.argmax(), jaccard.shape)
        assert jaccard.max() <= 0.6, (prompts.texts[first], prompts.texts[second])

    @pytest.mark.parametrize(("features", "limit"), [("words", 0.70), ("characters", 0.70), ("length", 0.55)])
    def test_shallow_features_do_not_tell_the_labels(self, prompts, features: str, limit: float) -> None:
        from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import balanced_accuracy_score
        from sklearn.model_selection import GroupKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import FunctionTransformer, StandardScaler

        lengths = FunctionTransformer(lambda texts: np.array([[len(text), len(text.split())] for text in texts], float))
        model = {
            "words": make_pipeline(CountVectorizer(binary=True), LogisticRegression(max_iter=2000)),
            "characters": make_pipeline(
                TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5)), LogisticRegression(C=10, max_iter=2000)
            ),
            "length": make_pipeline(lengths, StandardScaler(), LogisticRegression()),
        }[features]
        predicted = cross_val_predict(
            model,
            list(prompts.texts),
            prompts.labels,
            groups=prompts.pairs,
            cv=GroupKFold(5, shuffle=True, random_state=0),
        )
        assert balanced_accuracy_score(prompts.labels, predicted) < limit

    def test_prompts_are_short_requests(self, prompts) -> None:
        assert max(len(text) for text in prompts.texts) <= 450
        assert not any(re.search(r"\bstep 1\b|\n", text, flags=re.IGNORECASE) for text in prompts.texts)

    def test_no_near_duplicates_across_splits(self, prompts) -> None:
        seen: dict[str, str] = {}
        for text, split in zip(prompts.texts, prompts.splits, strict=True):
            assert seen.setdefault(normalised(text), split) == split


def test_every_wrong_row_is_found() -> None:
    lines = ["prompt,label", "a lock,harmful", "oil,maybe", ",harmless", "a lock,harmless", "water,harmless"]
    reading = parse_prompts("\n".join(lines).encode(), "mine.csv", Source("", skip_bad_rows=True)).reading
    assert reading is not None
    assert [problem.split(",")[1].split(":")[0].strip() for problem in reading.skipped] == ["row 3", "row 4", "row 5"]
    assert "'maybe' is unknown" in reading.skipped[0]
    assert not any("--skip-bad-rows" in problem for problem in reading.skipped)
    with pytest.raises(InputError, match=r"No row of 'mine\.jsonl' can be read"):
        parse_prompts(b'{"prompt": 1, "label": "harmful"}\n{', "mine.jsonl", Source("", skip_bad_rows=True))
