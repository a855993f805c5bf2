"""What runs, evaluations, sweeps and checks become in Python: tables (`to_frame`) and the app's figures (`plot`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.api.tables import as_figure, ends_of
from es2.charts import evaluation_charts, sweep_charts
from es2.core.errors import InputError
from es2.report.findings import direction_rows, main_p0

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from es2.jobs.job import Job
    from es2.workflow.check import ModelCheck

__all__ = ["Checked", "Evaluation", "Run", "Sweep"]

_MODELS = ("base", "tuned", "change")
_REPLIED = ("refusal", "kl", "ability")


@dataclass(frozen=True)
class Run:
    """A fine-tuning run as its folder shows it; every property reads the folder anew.

    Attributes:
        job: the folder, and how to stop it.
    """

    job: Job

    @property
    def id(self) -> str:
        """What other functions take."""
        return self.job.id

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.job.path

    @property
    def status(self) -> str:
        """`queued`, `running`, `done`, `cancelled`, `interrupted`, `failed`, or `stopped` by the KL budget."""
        return self.job.status()

    @property
    def settings(self) -> Mapping[str, Any]:
        """Every setting that it was made with."""
        return self.job.config

    @property
    def result(self) -> Mapping[str, Any] | None:
        """What `es2 finetune --json` prints of it; None before its end."""
        return self.job.result()

    @property
    def outcome(self) -> str | None:
        """The verdict with that on behaviour by its newest evaluation; None before its end."""
        from es2.evaluation.results import run_behaviour

        verdict = (self.result or {}).get("verdict")
        return run_behaviour(self.job).to_dict(verdict)["outcome"]

    def to_frame(self) -> pd.DataFrame:
        """A row for each number of each target layer: `before`, `after`, and their difference, with intervals."""
        import pandas as pd

        result = self._result()
        rows = []
        for layer in map(str, result["target_layers"]):
            after = result["after"].get(layer, {})
            for name, number in after.items():
                if isinstance(number, Mapping) and "value" in number:
                    change = (after["change"] or {}).get(name, {})
                    row = {"layer": int(layer), "number": name} | ends_of("before", result["before"][layer].get(name))
                    rows.append(row | ends_of("after", number) | ends_of("difference", change.get("difference")))
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Loss, separation and KL against its budget over the steps. Raises `InputError` where nothing was trained."""
        from es2.report.figures import training

        figure = training(self.job.events()[0], float(self.settings.get("kl_budget", 0.0)))
        if figure is None:
            raise InputError(f"Run {self.id} has trained no step, so it has no curve.")
        figure.layout.template = None  # the notebook's own
        return figure

    def _result(self) -> Mapping[str, Any]:
        if (result := self.result) is None:
            raise InputError(f"Run {self.id} is {self.status} and has no result; es2.finetune(resume=...) goes on.")
        return result


@dataclass(frozen=True)
class Evaluation:
    """What both models reply and withstand.

    Attributes:
        result: what `es2 evaluate --json` prints: `suite` by name, the settings, and where the replies are kept.
    """

    result: Mapping[str, Any] = field(repr=False)

    @property
    def outcome(self) -> str | None:
        """The verdict on the run with that on its behaviour; None without a run."""
        return self.result.get("outcome")

    def to_frame(self) -> pd.DataFrame:
        """A row for each number: its suite, where it was steered, `base`, `tuned` and `change`, with their intervals.

        Replies are not in it.
        """
        import pandas as pd

        return pd.DataFrame([row for suite, part in self.result["suite"].items() for row in _rows(suite, part)])

    def plot(self, what: str = "rates") -> go.Figure:
        """A figure of the pages *Behaviour* and *Robustness*.

        Args:
            what: `rates` (refusals and broken replies), `attack` (DSR while embeddings are steered), `soft_prompt` (DSR
                after a soft prompt), `needed` (the perturbation that reaches the boundary) or `direction`.

        Raises:
            InputError: for a figure whose suite was not evaluated.
        """
        suite = self.result["suite"]
        kinds = {
            "rates": ("refusal", lambda _: evaluation_charts.rates(*(_part(suite, name) for name in _REPLIED))),
            "attack": ("perturbation", lambda part: evaluation_charts.curve(part, "dsr", "DSR")),
            "soft_prompt": ("soft_prompt", lambda part: evaluation_charts.curve(part, "dsr", "DSR")),
            "needed": ("perturbation", lambda part: evaluation_charts.needed_strip(part, main_p0(part))),
            "direction": ("direction", evaluation_charts.direction_rates),
        }
        if what not in kinds:
            raise InputError(f"Unknown figure {what[:40]!r}; one of {', '.join(kinds)}.")
        name, draw = kinds[what]
        part = _part(suite, name)
        if part is None and not (what == "rates" and any(_part(suite, other) for other in _REPLIED)):
            problem = suite.get(name, {}).get("problem", f"evaluate with suite={name!r}")
            raise InputError(f"There is no {name} to draw: {problem}.")
        return as_figure(draw(part))


@dataclass(frozen=True)
class Sweep:
    """Many short fine-tunes of one model.

    Attributes:
        result: what `es2 sweep --json` prints: the space, the trials, the front and the best.
    """

    result: Mapping[str, Any] = field(repr=False)

    @property
    def id(self) -> str:
        """What `es2.sweep(resume=...)` takes."""
        return str(self.result["sweep"])

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The settings of the best trial within the KL budget (docs/sweep.md); None where none kept a step."""
        return None if self.result["best"] is None else self.result["best"]["settings"]

    def to_frame(self) -> pd.DataFrame:
        """A row for each trial: its settings, its numbers on `validation`, whether it is on the front, and its run."""
        import pandas as pd

        front = set(self.result["front"])
        return pd.DataFrame(
            [
                {"trial": trial["number"], "status": trial["status"], "front": trial["number"] in front}
                | trial["settings"]
                | _flat(trial["numbers"] or {})
                | {"run": trial["run"]}
                for trial in self.result["trials"]
            ]
        )

    def plot(self, what: str = "front") -> go.Figure:
        """A figure of the page *Sweep*: `front` (separation against KL), `settings` (of trials) or `pairs` (of layers).

        Raises:
            InputError: for pairs of layers where none were searched.
        """
        kinds = {"front": sweep_charts.front, "settings": sweep_charts.parallel, "pairs": sweep_charts.pairs}
        if what not in kinds:
            raise InputError(f"Unknown figure {what[:40]!r}; one of {', '.join(kinds)}.")
        if (drawn := kinds[what](self.result, None)) is None:
            raise InputError("This sweep searched no pairs of layers, so there are none to draw.")
        return as_figure(drawn)


@dataclass(frozen=True)
class Checked:
    """Whether what is read of a model is what it computes.

    Attributes:
        found: every check, with what was found.
    """

    found: ModelCheck = field(repr=False)

    @property
    def passed(self) -> bool:
        """Whether nothing failed and nothing was left untried."""
        return self.found.passed

    def to_frame(self) -> pd.DataFrame:
        """A row for each check: `check`, `passed` (None where it could not be tried) and `found`."""
        import pandas as pd

        return pd.DataFrame(
            [{"check": one.name, "passed": one.passed, "found": one.sentence} for one in self.found.checks]
        )


def _flat(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a trial, those of its defence beside the others."""
    own = dict(numbers)
    defence = own.pop("defence", None) or {}
    return own | {f"defence_{name}": value for name, value in defence.items() if name != "layers"}


def _part(suite: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """A suite that was evaluated without a problem."""
    part = suite.get(name)
    return None if part is None or "problem" in part else part


def _rows(suite: str, part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The numbers of one suite, a row each."""

    def row(number: str, models: Mapping[str, Any], **where: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"suite": suite, "number": number, **where}
        for model in _MODELS:
            found |= ends_of(model, models.get(model))
        return found

    if "problem" in part:
        return
    base = part.get("base") or {}
    for name, number in base.items():
        if isinstance(number, Mapping) and "value" in number:
            yield row(name, {model: (part.get(model) or {}).get(name) for model in _MODELS})
    for name in ("kl_prompt", "kl_reply", "agreement"):
        if part.get(name) is not None:
            yield row(name, {"tuned": part[name]})
    if part.get("perplexity") is not None:
        yield row("perplexity", part["perplexity"])
    for point in part.get("curve", ()):
        where = {name: point.get(name) for name in ("direction", "budget", "p0", "length")}
        for name in ("dsr", "degenerate"):
            yield row(name, {model: (point.get(model) or {}).get(name) for model in _MODELS}, **where)
    for record in part.get("needed", ()):
        models = {model: (record.get(model) or {}).get("relative") for model in ("base", "tuned")}
        yield row("needed perturbation / ‖e‖", models, layer=record["layer"], p0=record["p0"])
    if suite == "direction":
        refused: dict[tuple[int, str, str], dict[str, Any]] = {}
        for layer, model, kind, numbers in direction_rows(part):
            for name in ("before", "direction", "control", "over_control"):
                refused.setdefault((layer, kind, name), {})[model] = numbers[name]
        for (layer, kind, name), models in refused.items():
            yield row(f"refused, {name}", models, direction=kind, layer=layer)
