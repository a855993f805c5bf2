"""Files of prompts that a user brings: uploaded, shown as they are understood, corrected, and then chosen.

What is uploaded is kept at once in a folder named by its content, and what is being looked at is one source string,
as on the command line (`es2.prompts.sources`). So it outlasts a turn to another page, and prompts that were chosen in
another way, by path or from an earlier run, are shown and corrected here too.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st

from app import artifacts, state, text
from app.prompt_list import HEAD_HEIGHT, ROW_HEIGHT
from app.state import Choice
from es2.analysis.setup import check_prompts
from es2.core.errors import Es2Error, InputError
from es2.core.files import home, stamp_of, writing
from es2.prompts.benchmarks import is_benchmark, source_files
from es2.prompts.columns import named_label_columns
from es2.prompts.loading import table_columns
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, SPLITS, PromptSet, own_pair
from es2.prompts.sources import Source, read_source, source_title, write_source
from es2.prompts.tables import MAX_FILE_BYTES, SUFFIXES

if TYPE_CHECKING:
    import pandas as pd

UPLOAD_TYPES = (*SUFFIXES, ".gz")
N_PREVIEW = 50
N_LEFT_OUT = 200
_BOXES = {"file": "One file with labels", "harmful": "Harmful prompts", "harmless": "Harmless prompts"}
_KEPT, _CHANGED, _DRAFT = "files_kept", "files_changed", "files_draft"


def section(choice: Choice) -> None:
    """Bring files of prompts, see how they are understood, correct that, and choose them."""
    st.subheader("Files of prompts", anchor=False)
    st.caption(
        "One file with a column of prompts and one of labels, or a file of harmful and a file of harmless prompts: "
        "CSV, TSV, JSON, JSON lines, plain text or Parquet, each also gzipped. They stay on this machine."
    )
    for column, (box, title) in zip(st.columns(len(_BOXES)), _BOXES.items(), strict=True):
        column.file_uploader(
            title,
            type=UPLOAD_TYPES,
            key=f"own_{box}",
            max_upload_size=MAX_FILE_BYTES >> 20,
            on_change=_note,
            args=(box,),
        )
    if (box := st.session_state.pop(_CHANGED, None)) is not None:
        _take(box)
    kept: Mapping[str, str] = st.session_state.get(_KEPT, {})
    for one, other in (("harmful", "harmless"), ("harmless", "harmful")):
        if one in kept and other not in kept:
            name = text.markdown(Path(kept[one]).name)
            st.info(f"{name} is kept as {one} prompts; give a file of {other} ones too.", icon=":material/info:")
    chosen = choice.prompts if choice.prompts != "builtin" else None
    source = st.session_state.get(_DRAFT, chosen)
    if source is not None:
        with st.container(border=True, key="own_reading_of_files"):
            _reading(source, choice)


def _note(box: str) -> None:
    """Callback of a box: its file is looked at in the page, where errors are shown."""
    state.update()
    st.session_state[_CHANGED] = box


def _take(box: str) -> None:
    """Keep what a box holds now, and look at the one file or at the two; without a file, at what was chosen before."""
    kept = dict(st.session_state.get(_KEPT, {}))
    kept.pop(box, None)
    st.session_state.pop(_DRAFT, None)
    if (uploaded := st.session_state[f"own_{box}"]) is not None:
        kept[box] = str(keep(uploaded.getvalue(), uploaded.name))
    st.session_state[_KEPT] = kept
    if uploaded is not None and box == "file":
        st.session_state[_DRAFT] = write_source(Source(kept["file"]))
    elif uploaded is not None and {"harmful", "harmless"} <= kept.keys():
        st.session_state[_DRAFT] = write_source(Source(kept["harmful"], kept["harmless"]))


def keep(data: bytes, name: str) -> Path:
    """Write an uploaded file below the home folder, in a folder named by its content; returns its path.

    Raises:
        MachineError: when the disk refuses.
    """
    name, packed = (name[:-3], ".gz") if name.lower().endswith(".gz") else (name, "")
    stem, _, ending = Path(name).name.rpartition(".")
    stem = re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-")[:40] or "prompts"
    suffix = f".{re.sub('[^a-z0-9]', '', ending.lower())[:10]}{packed}"
    path = home() / "uploads" / hashlib.blake2b(data, digest_size=8).hexdigest() / f"{stem}{suffix}"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
        temporary.write_bytes(data)
        temporary.replace(path)
    return path


# ------------------------------------------------------------------------------------------------------- what is read


def _reading(source: str, choice: Choice) -> None:
    """The prompts under the reading chosen, the controls that correct it, and what is left out and why."""
    how = read_source(source)
    st.markdown(f"**{text.markdown(source_title(write_source(Source(how.place, how.harmless))))}**")
    try:
        prompts = artifacts.prompts(write_source(replace(how, skip_bad_rows=True)))
        problem = None
    except Es2Error as error:
        prompts, problem = None, error
    _controls(how, prompts)
    if problem is not None or prompts is None:
        st.error(text.markdown(text.in_app(str(problem), "")), icon=":material/error:")
        return
    wrong: tuple[str, ...] = ()
    if (reading := prompts.reading) is not None:
        wrong = reading.skipped
        st.markdown(text.markdown((reading if how.skip_bad_rows else replace(reading, skipped=())).sentence))
    if wrong:
        _wrong_rows(wrong, how)
    text.warn(prompts.leak)
    st.dataframe(preview(prompts), hide_index=True, height=260, key="own_preview")
    st.caption(f"The first of each label, of {len(prompts):,} prompts. {_counts(prompts)}")
    try:
        check_prompts(prompts)
    except InputError as error:
        st.error(text.markdown(str(error)), icon=":material/error:")
        return
    if source == choice.prompts:
        st.caption("These are the prompts that every page shows.")
        return
    with st.container(horizontal=True, gap="small"):
        if st.button(
            "Use these prompts",
            key="own_use",
            type="primary",
            icon=":material/check:",
            disabled=bool(wrong) and not how.skip_bad_rows,
        ):
            state.choose_prompts(source)
            st.session_state.pop(_DRAFT, None)
            state.go("layers")
        st.button("Discard", key="own_discard", on_click=_discard)


def _discard() -> None:
    """Callback: look at the chosen prompts again."""
    state.update()
    for key in (_DRAFT, _KEPT):
        st.session_state.pop(key, None)


def _controls(how: Source, prompts: PromptSet | None) -> None:
    """The columns, the harmful values and whether wrong rows are left out; each as it was found until it is chosen."""
    tables = prompts.reading.tables if prompts is not None and prompts.reading is not None else ()
    understood = [dict(table) for table in tables] + [{}] * (len(how.places) - len(tables))
    changeable = [place for place in how.places if place != "builtin" and not is_benchmark(place)]
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        names = ("prompt_column", "harmless_column")
        for name, place, table in zip(names, how.places, understood, strict=False):
            if place in changeable:
                title = "Prompt column" if how.harmless is None else f"Prompt column of {Path(place).name}"
                _column(how, name, title, list(_columns(place)), table.get("prompt_column"))
        if how.harmless is None and changeable:
            columns = _columns(how.place)
            table = understood[0]
            found = table.get("label_column") or table.get("label_from")
            others = [column for column, values in columns.items() if values and column != table.get("prompt_column")]
            _column(how, "label_column", "Label column", others, found)
            label = how.label_column or table.get("label_column") or next(iter(named_label_columns(list(columns))), "")
            _harmful_values(how, columns.get(label, {}), table)
    if how.skip_bad_rows:
        st.toggle(
            "Leave wrong rows out", True, key="own_skip_bad_rows", on_change=_correct, args=(how, "skip_bad_rows")
        )


def _column(how: Source, name: str, title: str, columns: list[str], found: str | None) -> None:
    chosen = getattr(how, name)
    columns = columns if chosen is None or chosen in columns else [chosen, *columns]
    st.session_state[f"own_{name}"] = chosen
    st.selectbox(
        title,
        columns,
        index=None,
        key=f"own_{name}",
        placeholder=f"as found: {found}" if found else "Choose a column",
        on_change=_correct,
        args=(how, name),
        width=240,
    )


def _harmful_values(how: Source, values: Mapping[str, int], table: Mapping[str, Any]) -> None:
    """Which values of the label's column are harmful, all others being harmless."""
    if not values:
        return
    found = [value for value, own in table.get("values", {}).items() if own["label"] == "harmful"]
    harmful = list(how.harmful_values or found)
    st.session_state["own_harmful_values"] = harmful
    st.multiselect(
        "Harmful values",
        list(dict.fromkeys([*values, *harmful])),
        key="own_harmful_values",
        format_func=lambda value: f"{value} ({values.get(value, 0):,})",
        placeholder="Choose the harmful ones",
        help="The values of the label's column that are harmful; all others are harmless.",
        on_change=_correct,
        args=(how, "harmful_values"),
        width=300,
    )


def _correct(how: Source, name: str) -> None:
    """Callback of a control: read the files with what it says. A new column has values of its own."""
    value = st.session_state[f"own_{name}"]
    changes: dict[str, Any] = {name: tuple(value) if name == "harmful_values" else value}
    if name == "label_column":
        changes["harmful_values"] = ()
    state.update()
    st.session_state[_DRAFT] = write_source(replace(how, **changes))


@st.cache_resource(max_entries=8, show_spinner="Reading the columns")
def _read_columns(place: str, stamp: object) -> dict[str, dict[str, int]]:
    return table_columns(place)


def _columns(place: str) -> dict[str, dict[str, int]]:
    """The columns of a place to choose from; none where it cannot be read, which the page says."""
    try:
        return _read_columns(place, tuple(map(stamp_of, source_files(place))))
    except Es2Error:
        return {}


def _wrong_rows(wrong: tuple[str, ...], how: Source) -> None:
    """The rows that cannot be read, each with why, and the way to go on without them."""
    rows = "1 row" if len(wrong) == 1 else f"{len(wrong):,} rows"
    if how.skip_bad_rows:
        st.warning(f"{rows} left out, for these reasons.", icon=":material/warning:")
    else:
        st.error(f"{rows} cannot be read. Mend the file, or leave them out.", icon=":material/error:")
        st.button(
            "Leave wrong rows out",
            key="own_leave_out",
            icon=":material/playlist_remove:",
            on_click=partial(_leave_out, how),
        )
    shown = [text.in_app(sentence, "") for sentence in wrong[:N_LEFT_OUT]]
    st.dataframe(
        {"what is wrong": shown},
        hide_index=True,
        key="own_problems",
        row_height=ROW_HEIGHT,
        height=min(HEAD_HEIGHT + ROW_HEIGHT * len(shown), 4 * ROW_HEIGHT),
    )


def _leave_out(how: Source) -> None:
    """Callback: read the files without their wrong rows."""
    state.update()
    st.session_state[_DRAFT] = write_source(replace(how, skip_bad_rows=True))


def preview(prompts: PromptSet) -> pd.DataFrame:
    """The first rows of each label in turn, as they were understood, with splits; no column that says nothing."""
    import pandas as pd

    of_label = [np.flatnonzero(prompts.labels == label)[: N_PREVIEW // 2].tolist() for label in (HARMFUL, HARMLESS)]
    first = prompts.take([row for rows in zip_longest(*of_label) for row in rows if row is not None])
    pairs = ["" if pair == own_pair(words) else pair for pair, words in zip(first.pairs, first.texts, strict=True)]
    columns: dict[str, Sequence[str]] = {
        "prompt": first.texts,
        "label": [LABEL_NAMES[int(label)] for label in first.labels],
        "category": first.categories if set(prompts.categories) != {"unspecified"} else (),
        "pair": pairs if any(pairs) else (),
        "split": first.splits,
    }
    return pd.DataFrame({name: values for name, values in columns.items() if values})


def _counts(prompts: PromptSet) -> str:
    def count(split: str, label: int) -> str:
        return f"{int((prompts.in_split(split) & (prompts.labels == label)).sum()):,} {LABEL_NAMES[label]}"

    return "; ".join(f"{split} {count(split, HARMFUL)} and {count(split, HARMLESS)}" for split in SPLITS) + "."
