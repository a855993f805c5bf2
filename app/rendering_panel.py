"""The panel of model, prompts and rendering: how the model is given the first prompt, token by token, and the choices.

What is chosen there counts once it is taken, so a rendering that cannot be leaves the pages as they are. The prompt is
rendered by a process of its own when the panel opens, and kept (`es2.models.preview`).
"""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path

import streamlit as st

from app import artifacts, state, text
from app.choice_boxes import lasting, model_box, prompts_box
from app.state import Choice
from es2.charts.position_chart import position_words
from es2.core.errors import Es2Error, InputError
from es2.core.files import stamp_of
from es2.core.rendering import DEFAULT, NONE, Rendering
from es2.models.model_files import PROCESSOR_FILES
from es2.models.preview import Choices, Preview, ask
from es2.models.shape import local_folder
from es2.store.sources import MEAN, PLAIN_TEXT_NOTE, POSITIONS, before_last, in_order
from es2.workflow.runs import open_run, rendering_of

AUTOMATIC, OWN_TEXT = "automatic", "text"
_SYSTEM = {AUTOMATIC: "Automatic", DEFAULT: "Template's own", OWN_TEXT: "Own text", NONE: "None"}
_THINKING = {AUTOMATIC: "Automatic", DEFAULT: "Template's own", "on": "On", "off": "Off"}
_SHORT = 300
"""Characters of a text that is shown unfolded."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", *PROCESSOR_FILES)


def button(choice: Choice) -> None:
    """What is decided of the rendering, in a line, and the button that opens the panel."""
    if decided := in_words(choice.rendering):
        st.caption(text.markdown(decided))
    if st.button("How the model reads them", key="rendering", type="tertiary", icon=":material/data_object:"):
        _begin(choice)
        _dialog()


def in_words(rendering: Rendering) -> str:
    """What is decided of a rendering, in a line; empty where everything is left to others."""
    parts = []
    if (system := rendering.system_prompt) is not None:
        one_line = " ".join(system.split())
        shown = one_line if len(one_line) <= 60 else f"{one_line[:60]}…"
        parts.append(f"system prompt: {_SYSTEM[system].lower() if system in _SYSTEM else f'“{shown}”'}")
    if rendering.thinking is not None:
        parts.append(f"thinking: {_THINKING[rendering.thinking].lower()}")
    parts += rendering.template_arg
    words = ", ".join(parts)
    return words[:1].upper() + words[1:]


def effective(choice: Choice) -> Rendering:
    """The rendering of what the pages show: as chosen, else as in the chosen run."""
    if choice.run is None:
        return choice.rendering
    try:
        return choice.rendering.over(rendering_of(open_run(choice.run)))
    except Es2Error:
        return choice.rendering  # the page shows what is wrong with the run


def _begin(choice: Choice) -> None:
    """Set the panel's widgets to what is chosen."""
    for name in ("model", "prompts"):
        st.session_state[f"rendering_{name}"] = getattr(choice, name)
    _begin_rendering(choice)


def _begin_rendering(choice: Choice) -> None:
    now = effective(choice)
    system = now.system_prompt
    is_text = system is not None and system not in (NONE, DEFAULT)
    st.session_state["rendering_system"] = OWN_TEXT if is_text else system or AUTOMATIC
    st.session_state["rendering_text"] = system if is_text else ""
    st.session_state["rendering_thinking"] = now.thinking or AUTOMATIC
    st.session_state["rendering_arguments"] = "\n".join(now.template_arg)
    st.session_state["rendering_position"] = choice.position


@st.dialog("How the model reads the prompts", width="large")
def _dialog() -> None:
    with text.sentences():
        _panel(state.current())


def _panel(choice: Choice) -> None:
    if "rendering_system" not in st.session_state:  # Streamlit forgets widgets that the last model did not have
        _begin_rendering(choice)
    wanted = _model_and_prompts(choice)
    prompts = artifacts.prompts(wanted.prompts)
    folder = local_folder(wanted.model)
    if folder is None:
        st.info(
            "The model is not on this machine yet, so its chat template is not known. “Capture and analyse” and “Check "
            "this model” fetch it.",
            icon=":material/info:",
        )
        _take(choice, wanted, effective(wanted))
        return
    about = (str(folder), tuple(stamp_of(folder / name) for name in _FILES), prompts.texts[0])
    draft, of_file = None, None
    try:
        draft = _draft()
        asked = prompts.rendered_as(draft)
        of_file = asked.system_prompt if draft.system_prompt is None else None
        can, shown = _ask(*about, json.dumps(asked.to_dict()))
    except InputError as error:  # of the draft, of chats with several system prompts, or of a template of no use at all
        can, shown = _ask(*about, "{}")[0], error
    _controls(can, shown if isinstance(shown, Preview) else _ask(*about, "{}")[1], of_file)
    if isinstance(shown, Preview):
        _show(shown, st.session_state["rendering_position"])
    else:
        st.error(text.markdown(text.in_app(str(shown))), icon=":material/error:")
    _take(choice, wanted, draft if isinstance(shown, Preview) else None)


def _model_and_prompts(choice: Choice) -> Choice:
    """The boxes of both; returns the choice with what they are set to, without the run where that is another model."""
    left, right = st.columns(2, gap="medium")
    with left:
        model_box("rendering_model")
    with right:
        prompts_box("rendering_prompts")
    model, source = (st.session_state[f"rendering_{name}"] or getattr(choice, name) for name in ("model", "prompts"))
    if (model, source) == (choice.model, choice.prompts):
        return choice
    return replace(choice, model=lasting(model), prompts=state.lasting_source(source), run=None, against=None)


@st.cache_resource(max_entries=64, show_spinner="Rendering the first prompt")
def _ask(folder: str, stamp: object, prompt: str, rendering: str) -> tuple[Choices, Preview | InputError]:
    return ask(Path(folder), prompt, Rendering.from_dict(json.loads(rendering)))


def _draft() -> Rendering:
    """What the widgets say; raises `InputError` for what can be no rendering."""
    system = st.session_state["rendering_system"]
    thinking = st.session_state.get("rendering_thinking", AUTOMATIC)
    own = st.session_state.get("rendering_text", "")
    arguments = [line.strip() for line in st.session_state.get("rendering_arguments", "").splitlines() if line.strip()]
    return Rendering(
        system_prompt=own if system == OWN_TEXT else None if system == AUTOMATIC else system,
        thinking=None if thinking == AUTOMATIC else thinking,
        template_arg=tuple(arguments),
    )


def _controls(can: Choices, shown: Preview | InputError, of_file: str | None) -> None:
    """The choices that the template allows, and those that were made; `of_file` is the prompts' own system prompt."""
    if not can.templated:
        st.caption(f":material/info: {PLAIN_TEXT_NOTE}")
    system, thinking = st.session_state["rendering_system"], st.session_state.get("rendering_thinking", AUTOMATIC)
    allowed = {AUTOMATIC: True, DEFAULT: can.templated, OWN_TEXT: can.system_prompt, NONE: can.none}
    arguments = st.session_state.get("rendering_arguments", "")
    st.segmented_control(
        "System prompt",
        [name for name in _SYSTEM if allowed[name] or name == system],
        key="rendering_system",
        format_func=_SYSTEM.__getitem__,
        required=True,
        help="Automatic: as the chosen run was tuned, else as the prompts' file says, else the template's own.",
    )
    if system == OWN_TEXT:
        st.text_area("Own system prompt", key="rendering_text", height=90, placeholder="You are a careful assistant.")
    elif of_file is not None:
        _fold("The system prompt of the prompts' own chats", of_file)
    elif can.default_system_prompt is None:
        st.caption("The template puts in no system prompt by itself." if can.templated else "")
    elif system != NONE:
        _fold("The template's own system prompt", can.default_system_prompt)
    left, right = st.columns(2, gap="medium")
    with left:
        if can.thinking or thinking != AUTOMATIC:
            st.segmented_control(
                "Thinking",
                list(_THINKING),
                key="rendering_thinking",
                format_func=_THINKING.__getitem__,
                required=True,
                help="Whether the model thinks before it answers, by its template's own switch.",
            )
        elif can.templated:
            st.caption("The template has no switch of thinking that is known here.")
    with right:
        positions = _positions(shown, st.session_state["rendering_position"])
        st.selectbox("Position", positions, key="rendering_position", format_func=position_words)
    if can.arguments != "none" or arguments:
        with st.expander("Template arguments", expanded=bool(arguments)):
            st.text_area(
                "Template arguments",
                key="rendering_arguments",
                height=70,
                label_visibility="collapsed",
                placeholder="KEY=VALUE, one a line",
            )
            st.caption(f"The template knows {text.markdown(can.arguments)}.")


def _positions(shown: Preview | InputError, chosen: str) -> list[str]:
    """The positions that there are, from the end of the prompt on, and the chosen one."""
    n_after = shown.n_after if isinstance(shown, Preview) else 1
    return in_order(["last", *(f"last-{distance}" for distance in range(1, n_after)), *POSITIONS, MEAN, chosen])


def _marked(shown: Preview, position: str) -> range:
    """The tokens that a position reads, counted from the prompt's first."""
    first, last = shown.request
    if position == MEAN:
        return range(first, last + 1)
    distance = before_last(position)
    at = last if distance is None else shown.n_before + len(shown.pieces) - 1 - distance
    return range(at, at + 1)


def _visible(piece: str) -> str:
    """A token's text with its line breaks and spaces at the edges made visible."""
    shown = piece.replace("\n", "↵").replace("\t", "⇥")
    body = shown.strip(" ")
    if not body:
        return "␣" * len(shown) or "·"
    n_left = len(shown) - len(shown.lstrip(" "))
    return f"{'␣' * n_left}{body}{'␣' * (len(shown) - len(body) - n_left)}"


def _show(shown: Preview, position: str) -> None:
    """The first prompt, what stands before it folded where it is long, each token in a box, the read ones marked."""
    marked = _marked(shown, position)
    first, last = shown.request
    boxes = []
    for number, piece in enumerate(shown.pieces, shown.n_before):
        kind = " ".join(["read"] * (number in marked) + ["own"] * (first <= number <= last))
        title = f"token {number + 1}{', read here' if number in marked else ''}"
        boxes.append(f'<span class="{kind}" title="{title}">{html.escape(_visible(piece))}</span>')
        if piece.endswith("\n"):
            boxes.append("<br>")
    before = shown.before
    if position == MEAN and first < shown.n_before:
        title = f"The {shown.n_before:,} tokens before these, of which the last {shown.n_before - first:,} are read too"
    else:
        title = f"The {shown.n_before:,} tokens before these"
    st.markdown("**The first prompt, as the model gets it**")
    if before:
        _fold(title, before)
    st.html(f'<div class="prompt-tokens">{"".join(boxes)}</div>')
    what = "mean over the marked tokens is" if len(marked) > 1 else "embedding of the marked token is"
    st.caption(f"The {what} read. The last token lies {text.markdown(shown.last)}.")


def _fold(title: str, words: str) -> None:
    """A text as it is, folded where it is long."""
    n_more = f" · {len(words):,} characters" if len(words) > _SHORT else ""
    opened = "" if n_more else " open"
    st.html(
        f'<details class="prompt-text"{opened}><summary>{html.escape(title)}{n_more}</summary>'
        f"<pre>{html.escape(words)}</pre></details>"
    )


def _take(choice: Choice, wanted: Choice, draft: Rendering | None) -> None:
    """The button that makes every page show what is wanted, rendered as in the draft; None where none can be."""
    if draft is not None and (wanted != choice or draft != effective(choice)):
        wanted = replace(wanted, rendering=draft, run=None, against=None)
    wanted = replace(wanted, position=st.session_state["rendering_position"])
    is_new = draft is not None and wanted != choice
    with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
        if st.button("Read prompts this way", key="rendering_take", type="primary", disabled=not is_new):
            state.update(**vars(wanted))
            st.rerun()
        if is_new:
            st.caption("Embeddings read in another way are another set, which is captured by itself.")
