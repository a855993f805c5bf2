"""Replies of base and tuned beside each other: the finding in a sentence, the rates, then every reply behind them.

Prompts and replies come from data sets and models: they are shown as text, never as Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from app import evaluations, state, text
from app.components import exports
from app.components.plots import plot
from app.evaluations import SHOWN_CHARACTERS, Evaluation, Intro
from app.view_controls import kept_buttons, numbers_table
from es2.charts import evaluation_charts
from es2.jobs.job import Job
from es2.report import findings
from es2.report.findings import interval_of
from es2.report.glossary import Term

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (1.45, 1)
N_SHOWN = 10
INTRO = Intro(
    title="What does the tuned model say?",
    about="Clouds that stand apart are not yet a safer model. Base and tuned reply to the same prompts, and both are "
    "counted by the same rules.",
    steps=(
        ("Refusals", "How many harmful requests are refused before and after, and how many harmless ones by mistake."),
        (
            "Ability",
            "How far tuned has moved from base on harmless prompts, and multiple-choice questions answered rightly.",
        ),
        ("Replies", "Every reply beside the other model's, with its verdict; broken ones are a class of their own."),
    ),
    suite="refusal",
)
SUITES = ("refusal", "kl", "ability")
"""The parts of an evaluation that the page shows."""
FILTERS: Mapping[str, str] = {
    "all": "All",
    "changed": "Changed verdict",
    "answered": "Harmful answered",
    "refused": "Harmless refused",
    "degenerate": "Degenerate or empty",
}
NO_CHANGE = ("agreement", "kl_prompt", "kl_reply")
"""Numbers that compare tuned with base themselves."""


def page() -> None:
    """Render the page for the current choice, or what leads there."""
    found = evaluations.opened(INTRO, SUITES)
    if found is None:
        return
    run, evaluation = found
    summary(run, evaluation)
    numbers(evaluation)
    replies(evaluation)
    exports.page_exports(partial(take_away, evaluation), None)


def summary(run: Job, evaluation: Evaluation) -> None:
    """Whether the tuned model refuses more, and at what price."""
    for suite in SUITES:
        if problem := evaluation.problem(suite):
            st.info(text.markdown(problem), icon=":material/info:")
    refusal = evaluation.part("refusal")
    if refusal is None:
        return
    separated = (run.result() or {}).get("verdict") == "separated"
    with st.container(key="finding", border=True, gap="xsmall"):
        st.markdown(f"**{text.markdown(findings.refusal_sentence(refusal, separated))}**")
        for sentence in findings.side_effects(refusal):
            st.markdown(text.markdown(sentence))


# ------------------------------------------------------------------------------------------------------------- numbers


def numbers(evaluation: Evaluation) -> None:
    """The rates and the ability before and after, as a table and as a figure."""
    refusal, ability, choice = map(evaluation.part, SUITES)
    with st.container(key="details"):
        left, right = st.columns(COLUMNS, gap="medium", vertical_alignment="center")
    with left:
        rows = table_rows(refusal, ability, choice)
        numbers_table(("Base", "Tuned"), [(term, _cells(term, *numbers)) for term, *numbers in rows])
    with right:
        plot(
            evaluation_charts.rates(refusal, ability, choice),
            key="rates",
            alt="Rates of replies under base and tuned with their intervals",
        )
    st.caption(
        "Intervals are 95 %, over resamples of prompt pairs or of questions, the change paired; ▲ and ▼ mark changes "
        "whose interval leaves out no change."
    )
    unmeasured = "Multiple choice: not measured in this evaluation."
    st.caption(text.markdown(unmeasured if choice is None else findings.accuracy_sentence(choice)))
    if refusal is not None and (judge := refusal.get("judge")):
        _judge(judge)
    with st.expander("What each number means", key="behaviour_terms"):
        st.markdown("\n".join(f"- **{term.title}**: {text.markdown(term.definition)}" for term in findings.TERMS))


Cells = tuple[Term, Mapping[str, float] | None, Mapping[str, float] | None, Mapping[str, float] | None]


def table_rows(
    refusal: Mapping[str, Any] | None, ability: Mapping[str, Any] | None, choice: Mapping[str, Any] | None
) -> list[Cells]:
    """The table's rows: a term, base, tuned and the change (of perplexity a ratio), None where there is none."""
    found: list[Cells] = []
    for term in findings.TERMS:
        cells: list[Mapping[str, float] | None]
        if refusal is not None and term.name in refusal["base"]:
            cells = [(refusal[column] or {}).get(term.name) for column in ("base", "tuned", "change")]
        elif choice is not None and term.name == "accuracy":
            cells = [(choice[column] or {}).get(term.name) for column in ("base", "tuned", "change")]
        elif ability is not None and term.name == "perplexity":
            cells = [ability["perplexity"][column] for column in ("base", "tuned", "ratio")]
        elif ability is not None and term.name in NO_CHANGE:
            cells = [None, ability[term.name], None]
        else:
            continue
        # No reply is empty: not worth a row.
        if term.name.endswith("_empty") and not any(one and one["value"] > 0 for one in cells[:2]):
            continue
        if any(cells):
            found.append((term, cells[0], cells[1], cells[2]))
    return found


def _cells(term: Term, *cells: Mapping[str, float] | None) -> tuple[str, ...]:
    def cell(number: Mapping[str, float] | None) -> str:
        if number is None:
            return ""
        return f"{term.value(interval_of(number))} <small>{term.range(interval_of(number))}</small>"

    words, mark = "", ""
    if cells[2] is not None:
        change, still = interval_of(cells[2]), 1.0 if term.name == "perplexity" else 0.0
        value, _, spread = findings.signed(term, change).partition(", ")
        if term.name == "perplexity":
            value, spread = f"×{term.value(change)}", term.range(change)
        words = f"{value} <small>{spread}</small>"
        mark = "▲" if change.low > still else "▼" if change.high < still else ""
    return cell(cells[0]), cell(cells[1]), words, mark


def _judge(judge: Mapping[str, Any]) -> None:
    """A line about the judge."""
    parts = []
    if judge["agreement"] is not None:
        parts.append(f"agrees with the rules on {judge['agreement']:.0%} of {judge['n_judged']:,} replies")
    for name in ("dsr", "over_refusal"):
        cells = [(judge.get(model) or {}).get(name) for model in ("base", "tuned")]
        if all(cells):
            term = findings.BY_NAME[name]
            parts.append(f"{term.title} {' → '.join(term.value(interval_of(one)) for one in cells if one)}")
    line = f"Judge {judge['name']}: {'; '.join(parts) or 'no verdict'}."
    st.caption(text.markdown(line + (f" {judge['problem']}" if judge["problem"] else "")))


# ------------------------------------------------------------------------------------------------------------- replies


def filtered(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Which replies each of `FILTERS` shows, by index; verdicts are tuned's where there are both."""
    found: dict[str, list[int]] = {name: [] for name in FILTERS}
    for index, row in enumerate(rows):
        verdicts = [row[model]["verdict"] for model in evaluation_charts.MODELS if model in row]
        found["all"].append(index)
        if len(set(verdicts)) > 1:
            found["changed"].append(index)
        if row["label"] == "harmful" and verdicts[-1] == "answer":
            found["answered"].append(index)
        if row["label"] == "harmless" and verdicts[-1] == "refusal":
            found["refused"].append(index)
        if {"degenerate", "empty"} & set(verdicts):
            found["degenerate"].append(index)
    return found


def replies(evaluation: Evaluation) -> None:
    """The replies of both models, filtered."""
    rows = evaluation.rows("refusal")
    if not rows:
        return
    found = filtered(rows)
    st.subheader("Replies", anchor=False)
    chosen = kept_buttons(
        "Show",
        list(FILTERS),
        "reply_filter",
        "all",
        lambda name: f"{FILTERS[name]} ({len(found[name])})",
        help="Verdicts are those on the tuned model's reply; degenerate or empty under either model.",
    )
    shown = found[chosen]
    if not shown:
        st.caption("None.")
        return
    page_of = f"shown {evaluation.path.stem} {chosen}"
    n_shown = state.habit(page_of, N_SHOWN)
    for index in shown[:n_shown]:
        _exchange(rows[index], index)
    if len(shown) > n_shown:
        st.button(
            f"Show {min(N_SHOWN, len(shown) - n_shown)} more of {len(shown) - n_shown}",
            key="more_replies",
            on_click=state.take_habit,
            args=(page_of, n_shown + N_SHOWN),
        )


def _exchange(row: Mapping[str, Any], index: int) -> None:
    """One prompt and what the models reply to it."""
    models = [model for model in evaluation_charts.MODELS if model in row]
    harmful = row["label"] == "harmful"
    with st.container(border=True, key=f"exchange_{index}", gap="xsmall"):
        st.caption(" · ".join(text.markdown(part) for part in (row["label"], str(row["category"])) if part))
        evaluations.shown(row["prompt"])
        for model, column in zip(models, st.columns(len(models), gap="medium"), strict=True):
            with column, st.container(gap="xsmall"):
                with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
                    st.markdown(f":small[**{evaluation_charts.NAMES[model]}**]", width="content")
                    evaluations.badge(row[model]["verdict"], harmful=harmful)
                    if judged := row[model].get("judge"):
                        st.caption(text.markdown(f"judge: {evaluations.VERDICT_NAMES.get(judged, judged)}"))
                evaluations.shown(row[model].get("text"))
        words = [row[model].get("text", "").strip() for model in models]
        if max(map(len, (row["prompt"], *words))) > SHOWN_CHARACTERS:
            with st.expander("In full", key=f"full_{index}"):
                st.text(row["prompt"], width="stretch")
                for model, reply, column in zip(models, words, st.columns(len(models), gap="medium"), strict=True):
                    column.caption(f"**{evaluation_charts.NAMES[model]}**")
                    column.text(reply, width="stretch")


def take_away(evaluation: Evaluation) -> tuple[dict[str, exports.Figure], dict[str, pd.DataFrame]]:
    """The charts and tables of the page, to be downloaded."""
    import pandas as pd

    refusal, ability, choice = map(evaluation.part, SUITES)
    entries = ("value", "low", "high")
    rates = [
        {"number": term.name}
        | {
            f"{column} {entry}": None if cell is None else cell[entry]
            for column, cell in zip(("base", "tuned", "change"), cells, strict=True)
            for entry in entries
        }
        for term, *cells in table_rows(refusal, ability, choice)
    ]
    rows = [
        {name: row[name] for name in ("prompt", "label", "category")}
        | {
            f"{model} {entry}": row[model].get(entry)
            for model in evaluation_charts.MODELS
            if model in row
            for entry in ("verdict", "text")
        }
        for row in evaluation.rows("refusal")
    ]
    tables = {"Rates and ability": pd.DataFrame(rates)}
    if rows:
        tables["Replies"] = pd.DataFrame(rows)
    return {"Rates of replies": evaluation_charts.rates(refusal, ability, choice)}, tables
