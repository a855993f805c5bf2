"""Files that are uploaded: what is understood is shown, can be corrected, and only then is what every page shows."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

import es2.prompts
from app import prompt_files, state
from app.text import in_app
from es2.core.errors import InputError
from es2.prompts.loading import load_prompts
from es2.prompts.readers import parse_prompts
from es2.prompts.sources import Source, read_source, source_title, write_source
from tests.builders import tiny_prompts, write_prompts

HARMFUL = "goal,target\n" + "".join(f"Break lock {i},Sure\n" for i in range(40))
HARMLESS = "".join(f"Oil gate {i}\n" for i in range(40))
UNCLEAR = "Frage,text,art\n" + "".join(f"Break lock {i},x {i},S{i % 2 + 1}\nOil gate {i},y {i},S3\n" for i in range(40))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    return tmp_path


def script() -> None:
    from app import artifacts, prompt_files, state
    from app.text import sentences

    state.open_link(artifacts.existing, "own")
    with sentences():
        prompt_files.section(state.current())


def open_page(**link: str) -> AppTest:
    at = AppTest.from_function(script, default_timeout=60)
    for name, value in link.items():
        at.query_params[name] = value
    at.run()
    assert not at.exception
    return at


def upload(at: AppTest, box: str, name: str, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    at.file_uploader(key=f"own_{box}").upload(name, data)
    run(at)


def run(at: AppTest) -> AppTest:
    at.run()
    assert not at.exception
    return at


def shown(at: AppTest) -> str:
    """All that the page says, without its marks of Markdown."""
    said = [element.value for kind in ("markdown", "caption", "error", "info", "warning") for element in at.get(kind)]
    return " ".join(said).replace("\\", "")


def taken(at: AppTest) -> Source:
    """The source that is chosen once the button is pressed."""
    at.button(key="own_use").click()
    run(at)
    source = at.session_state["choice"].prompts
    assert not at.error
    return read_source(source)


def test_two_files_become_one_source(place: Path) -> None:
    at = open_page()
    upload(at, "harmful", "Goals.csv", HARMFUL)
    assert "is kept as harmful prompts; give a file of harmless ones too" in shown(at)
    assert not at.get("selectbox")
    upload(at, "harmless", "../text.txt.gz", gzip.compress(HARMLESS.encode()))
    assert "prompts from goal" in shown(at)
    assert "40 harmful, 40 harmless." in shown(at)
    assert at.dataframe[0].value["prompt"].tolist()[:3] == ["Break lock 0", "Oil gate 0", "Break lock 1"]
    assert list(at.dataframe[0].value) == ["prompt", "label", "split"], "no category and no pair was given"
    source = taken(at)
    assert [Path(one).parents[1] for one in source.places] == [place / "uploads"] * 2
    assert [Path(one).name for one in source.places] == ["Goals.csv", "text.txt.gz"]
    assert load_prompts(write_source(source)).labels.sum() == 40


def test_a_reading_is_corrected_and_part_of_the_source() -> None:
    at = open_page()
    upload(at, "file", "mine.csv", UNCLEAR)
    assert "no column that tells harmful from harmless" in shown(at)
    assert "--" not in shown(at)
    assert "under “Label column”, or give two files as “Harmful prompts” and “Harmless prompts”." in shown(at)
    at.selectbox(key="own_prompt_column").select("frage")
    run(at)
    at.selectbox(key="own_label_column").select("art")
    run(at)
    assert "its values say neither harmful nor harmless: 's3' (40), 's1' (20), 's2' (20)" in shown(at)
    at.multiselect(key="own_harmful_values").select("s1")
    run(at)
    at.multiselect(key="own_harmful_values").select("s2")
    run(at)
    assert "labels from column art (s1 = harmful (20), s3 = harmless (40), s2 = harmful (20))" in shown(at)
    table = at.dataframe[0].value
    assert table["prompt"].tolist()[:2] == ["Break lock 0", "Oil gate 0"]
    assert table["label"].tolist()[:2] == ["harmful", "harmless"]
    source = taken(at)
    assert (source.prompt_column, source.label_column, source.harmful_values) == ("frage", "art", ("s1", "s2"))

    again = open_page(prompts=at.session_state["choice"].prompts)
    assert "These are the prompts that every page shows." in shown(again)
    assert again.selectbox(key="own_prompt_column").value == "frage"
    assert again.multiselect(key="own_harmful_values").value == ["s1", "s2"]
    again.selectbox(key="own_prompt_column").select("text")
    assert "prompts from text" in shown(run(again))
    again.button(key="own_discard").click()
    assert "prompts from frage" in shown(run(again))


def test_wrong_rows_are_listed_and_left_out() -> None:
    rows = "prompt,label\n" + "".join(f"Break lock {i},harmful\nOil gate {i},harmless\n" for i in range(40))
    at = open_page()
    upload(at, "file", "mine.csv", rows + "Break lock 0,harmful\n,harmless\nOil it,perhaps\n")
    assert "2 rows cannot be read." in shown(at)
    assert "left out." not in shown(at)
    assert at.button(key="own_use").disabled
    wrong = at.dataframe[0].value["what is wrong"].tolist()
    assert ["row 83" in wrong[0], "'perhaps' is unknown" in wrong[1]] == [True, True]
    assert "--" not in wrong[1]
    at.button(key="own_leave_out").click()
    run(at)
    assert "2 rows left out" in shown(at)
    assert "1 duplicate(s) merged, 2 wrong row(s) left out." in shown(at)
    at.toggle(key="own_skip_bad_rows").set_value(False)
    assert at.button(key="own_use").disabled is False
    run(at)
    assert at.button(key="own_use").disabled
    at.button(key="own_leave_out").click()
    run(at)
    assert taken(at).skip_bad_rows


def test_a_draft_outlasts_what_the_boxes_forget() -> None:
    at = open_page()
    upload(at, "file", "mine.csv", UNCLEAR)
    at.selectbox(key="own_prompt_column").select("frage")
    run(at)
    draft = at.session_state["files_draft"]
    other = AppTest.from_function(script, default_timeout=60)  # the page anew, with nothing in its boxes
    for name in ("files_draft", "files_kept"):
        other.session_state[name] = at.session_state[name]
    run(other)
    assert other.session_state["files_draft"] == draft
    assert other.selectbox(key="own_prompt_column").value == "frage"


def test_a_file_that_is_none_is_a_sentence() -> None:
    at = open_page()
    upload(at, "file", "mine.parquet", "not parquet")
    assert "is not a readable Parquet file" in at.error[0].value.replace("\\", "")
    assert not at.get("dataframe")
    at.file_uploader(key="own_file").clear()
    run(at)
    assert not at.error


@pytest.mark.parametrize("name", ["../../etc/passwd.csv", "a/b\\c.csv", "Ünï çødé 🔒.CSV", "x" * 300 + ".csv"])
def test_an_uploads_name_never_becomes_a_path(place: Path, name: str) -> None:
    data = b"prompt,label\na lock,harmful\nan oiled lock,harmless\n"
    path = prompt_files.keep(data, name)
    assert path.parents[1] == place / "uploads"
    assert len(path.name) < 64
    assert path.name.isascii()
    assert load_prompts(str(path)).texts == parse_prompts(data, "a.csv").texts
    assert prompt_files.keep(data, name) == path


def test_what_an_uploads_name_says_of_labels_is_kept(place: Path) -> None:
    for name, ending in (("MaliciousInstruct.txt", ".txt"), ("harmful_train.txt.gz", ".txt.gz")):
        data = b"Break it"
        path = prompt_files.keep(gzip.compress(data, mtime=0) if ending.endswith("gz") else data, name)
        assert path.name == name.replace("_", "-")
        assert load_prompts(str(path)).labels.tolist() == [1]


def test_a_long_source_is_refused_before_it_is_lost(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(place / "m.csv", tiny_prompts(40))
    source = Source(str(place / "m.csv"), label_column="label", harmful_values=("harmful", *(["ü" * 80] * 9)))
    at = open_page(prompts=write_source(source))
    assert at.session_state["choice"].prompts == write_source(source)
    assert len(write_source(source)) > state.MAX_NAME
    too_long = write_source(Source(str(place / "m.csv"), harmful_values=("ü" * 80,) * 20))
    with pytest.raises(InputError, match="the page's address holds 8,000"):
        state.choose_prompts(too_long)


def test_a_title_names_files_and_columns() -> None:
    assert source_title("/a/b/m.csv") == "m.csv"
    assert source_title("builtin") == "builtin"
    assert source_title("hf:a/b:test") == "hf:a/b:test"
    pair = write_source(Source("/a/b.csv", "/c/d.txt", "goal", skip_bad_rows=True))
    assert source_title(pair) == "b.csv and d.txt (goal, wrong rows left out)"


def test_sentences_about_options_are_about_controls() -> None:
    """Whatever `es2.prompts` says of an option of the command line has words of the app."""
    said: list[Any] = []
    for file in Path(es2.prompts.__path__[0]).glob("*.py"):
        code = re.sub(r'"\n\s*f?"', "", file.read_text())  # parts of one string
        said += re.findall(r'"([^"\n]*--[a-z][^"\n]*)"', code)
    assert len(said) >= 8
    assert [sentence for sentence in said if "--" in in_app(sentence)] == []
    assert [sentence for sentence in said if "FILE:" in in_app(sentence)] == []
    assert in_app("Name it with --prompt-column.") == "Name it under “Prompt column”, on the page Your own."
    assert in_app("There is no file 'x'.") == "There is no file 'x'."


def test_the_preview_has_the_pairs_and_categories_that_were_given() -> None:
    table = prompt_files.preview(tiny_prompts(2))
    assert table["pair"].tolist() == ["pair-0", "pair-0", "pair-1", "pair-1"]
    assert set(table["category"]) == {"locks"}
