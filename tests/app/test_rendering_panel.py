"""The panel of the rendering: what it offers, shows and takes, and where what was taken goes."""

from __future__ import annotations

import io
import json
import re
import subprocess
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from app import jobs_panel, rendering_panel
from app.artifacts import job_config
from app.rendering_panel import in_words
from app.state import Choice
from app.text import in_app
from es2.core.errors import InputError
from es2.core.rendering import NONE, Rendering
from es2.jobs.queue import create_job
from es2.models import preview
from es2.models.chat_template import prompt_frame
from es2.store.sources import PLAIN_TEXT_NOTE
from tests.builders import tiny_prompts, tiny_tokenizer, write_prompts
from tests.models.test_preview import SWITCHED

REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No.') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    tiny_tokenizer(chat_template=SWITCHED).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    write_prompts(tmp_path / "prompts.csv", tiny_prompts(4))
    return tmp_path


@pytest.fixture(autouse=True)
def answered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The panel's questions are answered in this process; the one that answers the app is `test_preview.py`'s."""

    def run_here(command: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
            patch.setattr("sys.stdin", io.StringIO(input))
            preview.answer()
        return subprocess.CompletedProcess(command, 0, output.getvalue())

    here = SimpleNamespace(run=run_here, SubprocessError=subprocess.SubprocessError)
    monkeypatch.setattr(preview, "subprocess", here)


def script() -> None:
    import streamlit as st

    from app import artifacts, rendering_panel, state

    state.open_link(artifacts.existing, "own")
    choice = state.current()
    if "begun" not in st.session_state:
        st.session_state["begun"] = True
        rendering_panel._begin(choice)
    with rendering_panel.text.sentences():
        rendering_panel._panel(choice)
    state.mirror()


def open_panel(home: Path, **link: str) -> AppTest:
    at = AppTest.from_function(script, default_timeout=120)
    for name, value in {"model": str(home / "model"), "prompts": str(home / "prompts.csv"), **link}.items():
        at.query_params[name] = value
    return run(at)


def run(at: AppTest) -> AppTest:
    at.run()
    assert not at.exception
    return at


def tokens(at: AppTest) -> str:
    return next(element.proto.body for element in at.get("html") if "prompt-tokens" in element.proto.body)


def control(at: AppTest, key: str):  # type: ignore[no-untyped-def]
    return next(one for one in at.button_group if one.key == key)


def test_a_rendering_is_shown_taken_and_in_the_address(home: Path) -> None:
    at = open_panel(home)
    assert at.button(key="rendering_take").disabled
    assert tokens(at).count('class="read"') == 1
    control(at, "rendering_system").set_value("text")
    run(at)
    assert "blank" in at.error[0].value  # the empty text; nothing is taken
    assert at.button(key="rendering_take").disabled
    at.text_area(key="rendering_text").set_value("Speak in <b>verse</b>.")
    control(at, "rendering_thinking").set_value("off")
    at.selectbox(key="rendering_position").set_value("last-2")
    run(at)
    assert not at.error
    folded = " ".join(element.proto.body for element in at.get("html"))
    assert "Speak in &lt;b&gt;verse&lt;/b&gt;." in folded
    assert "<b>" not in folded
    assert at.session_state["choice"].rendering == Rendering()
    at.button(key="rendering_take").click()
    run(at)
    choice = at.session_state["choice"]
    assert choice.rendering == Rendering(system_prompt="Speak in <b>verse</b>.", thinking="off")
    assert choice.position == "last-2"
    assert at.query_params["thinking"] in ("off", ["off"])
    assert job_config(choice)["rendering"] == choice.rendering.to_dict()


def test_what_cannot_be_is_one_sentence_about_controls(home: Path) -> None:
    at = open_panel(home, template_arg='["enable_thinking=true"]', thinking="on")
    assert "choose “Automatic” under “Thinking”" in at.error[0].value
    assert "--" not in at.error[0].value.replace("\\", "")
    assert at.button(key="rendering_take").disabled


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        (None, {"thinking": "on"}),
        (REFUSING, {"system_prompt": "Be brief."}),
        (REFUSING, {"thinking": "on"}),
        (SWITCHED, {"template_arg": ("enable_thinkng=true",)}),
        (SWITCHED, {"template_arg": ("messages=1",)}),
        (SWITCHED, {"template_arg": ("enable_thinking=true",), "thinking": "on"}),
    ],
)
def test_sentences_speak_of_controls(template: str | None, settings: dict[str, object]) -> None:
    with pytest.raises(InputError) as refused:
        prompt_frame(tiny_tokenizer(chat_template=template), Rendering(**settings))
    assert "--" in str(refused.value)
    assert "--" not in in_app(str(refused.value))


def test_a_rendering_in_words() -> None:
    assert in_words(Rendering()) == ""
    assert in_words(Rendering(system_prompt=NONE, thinking="off")) == "System prompt: none, thinking: off"
    assert len(in_words(Rendering(system_prompt="x " * 900))) < 100


def test_a_job_under_another_rendering_is_another(home: Path) -> None:
    under = job_config(Choice(model="m", prompts="p", rendering=Rendering(thinking="off")))
    create_job("prepare", under)
    assert jobs_panel.latest("prepare", under) is not None
    assert jobs_panel.latest("prepare", job_config(Choice(model="m", prompts="p"))) is None


def test_mean_marks_the_request() -> None:
    shown = rendering_panel.Preview("", ("a", "b", "c", "d"), 2, (1, 3), "", None, None)
    assert list(rendering_panel._marked(shown, "mean")) == [1, 2, 3]
    assert list(rendering_panel._marked(shown, "last_instruction")) == [3]
    assert list(rendering_panel._marked(shown, "last-1")) == [4]


def test_the_prompts_own_system_turn_is_shown_and_a_long_one_is_folded(home: Path) -> None:
    own = "Mind the gap. " * 100
    rows = [
        {"messages": [{"role": "system", "content": own}, {"role": "user", "content": f"{words} {i}"}], "label": label}
        for i in range(8)
        for words, label in (("Break lock", "harmful"), ("Oil gate", "harmless"))
    ]
    (home / "chats.json").write_text(json.dumps(rows), encoding="utf-8")
    at = open_panel(home, prompts=str(home / "chats.json"))
    assert not at.error
    folds = [element.proto.body for element in at.get("html") if "prompt-text" in element.proto.body]
    assert [("own chats" in fold, '<details class="prompt-text">' in fold) for fold in folds] == [
        (True, True),
        (False, True),
    ]
    control(at, "rendering_system").set_value("default")
    run(at)
    assert "Mind the gap" not in " ".join(element.proto.body for element in at.get("html"))


def test_a_model_without_a_template_is_given_the_plain_text(home: Path) -> None:
    tiny_tokenizer(chat_template=None).save_pretrained(home / "plain")
    (home / "plain" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    at = open_panel(home, model=str(home / "plain"))
    assert not at.error
    assert any(PLAIN_TEXT_NOTE in caption.value for caption in at.caption)
    assert at.selectbox(key="rendering_position").options == [
        "Last token",
        "Last token of the request",
        "Mean over the request",
    ]
    assert not [one for one in at.button_group if one.key == "rendering_thinking"]


def test_model_and_prompts_are_chosen_in_the_same_panel(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Options, since the test's boxes take no others.
    monkeypatch.setattr("app.artifacts.models", lambda: (["owner/not-here", str(home / "plain")], set()))
    for name in ("nowhere.csv", "others.csv"):
        create_job("prepare", {"prompts": str(home / name)})
    tiny_tokenizer(chat_template=None).save_pretrained(home / "plain")
    (home / "plain" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    write_prompts(home / "others.csv", replace(tiny_prompts(4), texts=tuple(f"Mend lock {i}" for i in range(8))))
    at = open_panel(home, run="of-another-model")
    at.selectbox(key="rendering_prompts").set_value(str(home / "nowhere.csv"))
    run(at)
    assert "nowhere.csv" in at.error[0].value.replace("\\", "")
    assert not [one for one in at.button if one.key == "rendering_take"]
    at.selectbox(key="rendering_prompts").set_value(str(home / "others.csv"))
    at.selectbox(key="rendering_model").set_value("owner/not-here")
    run(at)
    assert "not on this machine yet" in at.info[0].value
    at.selectbox(key="rendering_model").set_value(str(home / "plain"))
    run(at)
    assert not at.error
    assert "".join(re.findall(r">([^<]*)</span>", tokens(at))) == "Mend␣lock␣0"
    assert any(PLAIN_TEXT_NOTE in caption.value for caption in at.caption)
    before = at.session_state["choice"]
    assert (before.model, before.prompts) == (str(home / "model"), str(home / "prompts.csv"))
    at.button(key="rendering_take").click()
    run(at)
    choice = at.session_state["choice"]
    assert (choice.model, choice.prompts, choice.run) == (str(home / "plain"), str(home / "others.csv"), None)
    assert at.button(key="rendering_take").disabled
