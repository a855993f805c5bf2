"""What the user has chosen, kept in one place and mirrored in the address bar.

Streamlit forgets the value of a widget that is not shown, and plotly a selection when its figure changes. So the choice
and the selection have keys of their own: widgets are set from them and write back in callbacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import streamlit as st

from es2.analysis.projection import FitOn
from es2.analysis.series import MAX_MEMBERS
from es2.core.errors import InputError
from es2.core.files import is_key, parse_json
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.models.catalogue import DEFAULT_MODEL
from es2.prompts.benchmarks import absolute_source
from es2.store.sources import POSITIONS, check_position

VIEWS = ("separation", "pca", "umap")
ARRANGEMENTS = ("side", "overlay", "morph")
"""Base beside tuned, both in one plot with an arrow a prompt, or one plot that moves from base to tuned."""
FITS: tuple[FitOn, ...] = ("base", "both")
MAX_NAME = 1000
MAX_SOURCE = 8000
"""Characters of a prompt source that an address holds, each of which may take three there: servers read 65,536."""
_RUNS = ("run", "against", "sweep")
_OPTIONAL = ("layer", "trial", "splits", "arrange", "fit", "lengths", "series", *_RUNS, *Rendering.model_fields)
_MAX_RENDERING = 8000  # characters of an address
_RUN_ID = re.compile(r"[a-z0-9-]{1,80}")

_CHOICE, _LINK, _NOTES = "choice", "choice_link", "choice_notes"
_SELECTION, _HABITS, _ACTED = "choice_selection", "choice_habits", "choice_acted"
_PAGE, _PAGES = "choice_page", "choice_pages"
_TARGETS = "launch_targets"


@dataclass(frozen=True)
class Choice:
    """What the pages show.

    Attributes:
        model: a catalogue name, Hub id, or the absolute path of a folder or `.gguf` file.
        prompts: `builtin`, `hf:…`, or the absolute path of a file or two (`es2.prompts.sources`).
        position: as `es2.store.sources.check_position` takes it.
        layer: the chosen layer; None until there is an analysis to recommend one.
        view: one of `VIEWS`.
        others: whether prompts of other splits than `test` are shown too.
        run: the id of the run that is compared; None for the newest that can be.
        against: the id of the run that takes the place of base; None for base itself.
        sweep: the id of the sweep that is shown; None for the newest.
        trial: the number of the sweep's trial that is shown; None for its best.
        arrangement: of base and tuned, one of `ARRANGEMENTS`.
        fit_on: what the axes are fitted on, one of `FITS`.
        raw: whether lengths are the models' own rather than divided by each model's scale.
        series: keys of the activation sets beside base on the page Series; empty for some of those there are.
        rendering: how the model is given the prompts; what it leaves open is as in the run, or as the prompts say.
    """

    model: str = DEFAULT_MODEL
    prompts: str = "builtin"
    position: str = "last"
    layer: int | None = None
    view: str = "separation"
    others: bool = False
    run: str | None = None
    against: str | None = None
    sweep: str | None = None
    trial: int | None = None
    arrangement: str = "side"
    fit_on: FitOn = "base"
    raw: bool = False
    series: tuple[str, ...] = ()
    rendering: Rendering = AS_THE_TEMPLATE

    def to_link(self) -> dict[str, str]:
        """The query parameters that reopen this choice."""
        link = {"model": self.model, "prompts": self.prompts, "position": self.position, "view": self.view}
        for name in ("layer", "trial"):
            if (number := getattr(self, name)) is not None:
                link[name] = str(number)
        if self.others:
            link["splits"] = "all"
        if self.arrangement != "side":
            link["arrange"] = self.arrangement
        if self.fit_on != "base":
            link["fit"] = self.fit_on
        if self.raw:
            link["lengths"] = "raw"
        if self.series:
            link["series"] = ",".join(self.series)
        for name, value in self.rendering.to_dict().items():
            link[name] = value if isinstance(value, str) else json.dumps(value)
        for name in _RUNS:
            if (id := getattr(self, name)) is not None:
                link[name] = id
        return link


def read_link(link: Mapping[str, str]) -> tuple[Choice, list[str]]:
    """The choice that query parameters describe, and a note for each that could not be understood."""
    notes: list[str] = []

    def word(name: str, allowed: Sequence[str]) -> str:
        value = link.get(name, allowed[0])
        if value in allowed:
            return value
        notes.append(f"The link asks for the {name} {value[:40]!r}, which does not exist; {allowed[0]} is shown.")
        return allowed[0]

    def name(key: str, usual: str, longest: int = MAX_NAME) -> str:
        value = link.get(key, usual).strip()
        if value and len(value) <= longest and value.isprintable():
            return value
        notes.append(f"The link's {key} is not a name; {usual} is shown.")
        return usual

    def run(key: str) -> str | None:
        id = link.get(key)
        if id is None or _RUN_ID.fullmatch(id):
            return id
        notes.append(f"The link's {key} {id[:40]!r} is no {'sweep' if key == 'sweep' else 'run'}'s id.")
        return None

    def series() -> tuple[str, ...]:
        keys = tuple(dict.fromkeys(filter(None, link.get("series", "").split(","))))
        if len(keys) < MAX_MEMBERS and all(map(is_key, keys)):
            return keys
        notes.append(f"The link's series is no list of at most {MAX_MEMBERS - 1} keys of activation sets.")
        return ()

    def position() -> str:
        asked = link.get("position", POSITIONS[0])
        try:
            return check_position(asked)
        except InputError:
            return word("position", POSITIONS)

    def rendering() -> Rendering:
        values: dict[str, Any] = {name: link[name] for name in Rendering.model_fields if name in link}
        try:
            if sum(map(len, values.values())) > _MAX_RENDERING:
                raise ValueError
            if "template_arg" in values:
                values["template_arg"] = tuple(parse_json(values["template_arg"]))
            return Rendering(**values)
        except (InputError, TypeError, ValueError):
            notes.append("The link's system prompt, thinking or template_arg cannot be; the template has its way.")
            return AS_THE_TEMPLATE

    def number(key: str) -> int | None:
        value = link.get(key)
        if value is None or re.fullmatch(r"[0-9]{1,5}", value):
            return None if value is None else int(value)
        notes.append(f"The link asks for {key} {value[:40]!r}, which is no number.")
        return None

    choice = Choice(
        model=name("model", Choice.model),
        prompts=absolute_source(name("prompts", Choice.prompts, MAX_SOURCE)),
        position=position(),
        layer=number("layer"),
        view=word("view", VIEWS),
        others=word("splits", ("test", "all")) == "all",
        run=run("run"),
        against=run("against"),
        sweep=run("sweep"),
        trial=number("trial"),
        arrangement=word("arrange", ARRANGEMENTS),
        fit_on="both" if word("fit", FITS) == "both" else "base",
        raw=word("lengths", ("scaled", "raw")) == "raw",
        series=series(),
        rendering=rendering(),
    )
    return choice, notes


def open_link(check: Callable[[Choice], tuple[Choice, list[str]]], page: str = "") -> None:
    """Read the choice from the address, when the session begins or the browser went back or forward.

    Going to another page empties the address; the choice stays. A run that a widget caused never reads it: of two quick
    clicks the second arrives with the address from before the first, and would undo it.

    Args:
        check: returns what exists of a choice, and a note for each thing that does not.
        page: the page's path; empty for the first.
    """
    link = st.query_params.to_dict()
    acted = st.session_state.pop(_ACTED, False)
    turned = st.session_state.get(_PAGE, page) != page and not link
    st.session_state[_PAGE] = page
    if _CHOICE in st.session_state and (acted or turned or link == st.session_state[_LINK]):
        return
    asked, damaged = read_link(link)
    choice, missing = check(asked)
    st.session_state[_CHOICE], st.session_state[_NOTES], st.session_state[_LINK] = choice, damaged + missing, link


def current() -> Choice:
    """The choice of this session, after `open_link`."""
    choice: Choice = st.session_state[_CHOICE]
    return choice


def update(**changes: Any) -> None:
    """Callback: change some of the choice. With that, the notes about the link have been read."""
    _acted()
    settle(**changes)
    st.session_state[_NOTES] = []


def _acted() -> None:
    """Note, in every callback, that a widget caused this run."""
    st.session_state[_ACTED] = True


def owes_the_page() -> bool:
    """Whether a callback was called that the page has not been run for since; asked by a part that can run alone."""
    return _ACTED in st.session_state


def settle(**changes: Any) -> Choice:
    """Fill in what the choice left open, or replace what turned out not to exist; returns the choice."""
    choice: Choice = replace(st.session_state[_CHOICE], **changes)
    st.session_state[_CHOICE] = choice
    return choice


def mirror() -> None:
    """Write the choice to the address bar, where the two differ."""
    link = st.session_state[_CHOICE].to_link()
    own = {field: value for field, value in st.query_params.to_dict().items() if field in (*link, *_OPTIONAL)}
    if own != link:
        for gone in own.keys() - link.keys():
            del st.query_params[gone]
        st.query_params.update(link)
    st.session_state[_LINK] = st.query_params.to_dict()


def choose_prompts(source: str) -> None:
    """Take other prompts, of any run's. Raises as `lasting_source` does."""
    update(prompts=lasting_source(source), run=None, against=None, series=())


def lasting_source(source: str) -> str:
    """A source of prompts with absolute paths.

    Raises:
        InputError: for a source that no address can hold, whose choice would be lost with the page.
    """
    source = absolute_source(source)
    if len(source) > MAX_SOURCE or not source.isprintable():
        raise InputError(
            f"These prompts are named by {len(source):,} characters, and the page's address holds {MAX_SOURCE:,} "
            "printable ones; give files, columns and values shorter names."
        )
    return source


def note(sentence: str) -> None:
    """Add a note about the link, for the page to show."""
    if sentence not in st.session_state[_NOTES]:
        st.session_state[_NOTES].append(sentence)


def notes() -> list[str]:
    """The notes about the link that the page was opened with."""
    return list(st.session_state[_NOTES])


def picked(key: str, kind: str) -> int | None:
    """The number of the point that was clicked in a plot, if it is of this kind; points carry `[kind, number]`."""
    data = st.session_state[key].get("picked")
    return int(data[1]) if data and data[0] == kind else None


def pick_layer(key: str) -> None:
    """Callback of a layer strip: go to the clicked layer."""
    _acted()
    if (layer := picked(key, "layer")) is not None:
        update(layer=layer)


def pick_cell(key: str, positions: Sequence[str], **changes: Any) -> None:
    """Callback of a map of layers and positions: go to both, with `changes` where the position is another."""
    pick_layer(key)
    if (layer := picked(key, "cell")) is not None:
        update(layer=layer, position=positions[st.session_state[key]["picked"][2]], **changes)


def pick_prompts(key: str, digest: str) -> None:
    """Callback of a projection: select the prompts that were clicked or encircled, in any of its plots."""
    _acted()
    rows = st.session_state[key].get("selected") or ()
    if rows:
        select([int(row) for row in rows], digest)


def select(rows: Iterable[int], digest: str) -> None:
    """Callback: select rows of the prompt set with this digest of its texts."""
    _acted()
    st.session_state[_SELECTION] = (digest, tuple(rows))


def selection(digest: str) -> tuple[int, ...]:
    """The selected rows; none when they were selected in another prompt set."""
    of, rows = st.session_state.get(_SELECTION, ("", ()))
    return rows if of == digest else ()


def tool() -> str:
    """How prompts are selected in a projection; a habit, so no part of a link."""
    return str(habit("tool", "click"))


def habit(name: str, usual: Any) -> Any:
    """What was chosen last; a habit, so no part of a link."""
    return st.session_state.get(_HABITS, {}).get(name, usual)


def take_habit(name: str, value: Any) -> None:
    """Callback: keep a choice that is a habit."""
    update()
    st.session_state[_HABITS] = {**st.session_state.get(_HABITS, {}), name: value}


def targets(model: str, usual: Sequence[int]) -> tuple[int, ...]:
    """The target layers picked for a fine-tune of this model, ascending; `usual` until some were picked."""
    picked_for: dict[str, tuple[int, ...]] = st.session_state.get(_TARGETS, {})
    return picked_for.get(model, tuple(usual))


def take_targets(model: str, layers: Iterable[int]) -> None:
    """Callback: keep the target layers of this model."""
    _acted()
    known = st.session_state.get(_TARGETS, {})
    st.session_state[_TARGETS] = known | {model: tuple(sorted(set(layers)))}


def toggle_target(key: str, model: str, usual: Sequence[int]) -> None:
    """Callback of the strip of target layers: take the clicked layer in, or out."""
    _acted()
    if (layer := picked(key, "target")) is not None:
        take_targets(model, set(targets(model, usual)) ^ {layer})


def settings(form: str) -> Mapping[str, Any]:
    """What was set in a form, by name; a habit, so no part of a link."""
    found: Mapping[str, Any] = st.session_state.get(f"{form}_settings", {})
    return found


def take_setting(form: str, name: str, value: Any) -> None:
    """Callback: one setting of a form changed."""
    _acted()
    take_settings(form, {name: value})


def take_settings(form: str, values: Mapping[str, Any]) -> None:
    """Set several settings of a form at once."""
    st.session_state[f"{form}_settings"] = {**settings(form), **values}


def know_pages(pages: Mapping[str, Any]) -> None:
    """Remember the pages by name, for `go`."""
    st.session_state[_PAGES] = pages


def go(name: str) -> None:
    """Turn to a page, with the choice as it is; on that page already, run it again."""
    page = st.session_state.get(_PAGES, {}).get(name)
    if page is None or page.url_path == st.session_state.get(_PAGE):
        st.rerun()
    st.switch_page(page, query_params=current().to_link())
