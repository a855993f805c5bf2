"""The parts of a report that say what became of refusals under attack, and with directions removed and added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from es2.analysis.verdict import direction_rule
from es2.report import figures as report_figures
from es2.report.findings import (
    BY_NAME,
    STEERING_NAMES,
    Numbers,
    attack_sentence,
    controls,
    direction_findings,
    direction_rows,
    interval_of,
    needed_sentence,
    panels_of,
    signed,
    soft_sentence,
)

_TERM = BY_NAME["dsr"]  # how a share is written
_STEERING = "length of the steering vector / ‖e‖"
_SOFT = "length of each vector / mean length of a token's embedding"


def attack_sections(
    evaluation: Mapping[str, Any], names: tuple[str, str], plot: Callable[[Any, str], str]
) -> Iterable[str]:
    """The parts of the page.

    Args:
        evaluation: what is kept of it.
        names: of the two models.
        plot: makes an element of a figure and its caption.
    """
    yield "<h2>Under attack</h2>"
    yield f"<p>Measured on harmful test prompts of {escape(str(evaluation['prompts']))}.</p>"
    suite = {name: part for name, part in evaluation["suite"].items() if "problem" not in part}
    if (attack := suite.get("perturbation")) is not None:
        yield f"<p>{escape(needed_sentence(attack))} {escape(attack_sentence(attack))}</p>"
        yield from _curves(attack, names, plot, "Embeddings steered while replies are generated", _STEERING)
    if (soft := suite.get("soft_prompt")) is not None:
        yield f"<p>{escape(soft_sentence(soft))}</p>"
        about = "Vectors before the user's text, fitted to each model, and random ones"
        yield from _curves(soft, names, plot, about, _SOFT)
    else:
        yield "<p>Soft prompts were not measured.</p>"


def direction_sections(evaluation: Mapping[str, Any], names: tuple[str, str]) -> Iterable[str]:
    """The part of the page on the causal check of directions; arguments as `attack_sections`."""
    part = evaluation["suite"]["direction"]
    counts = " and ".join(f"{part['n_prompts'][label]} {label}" for label in ("harmful", "harmless"))
    yield "<h2>Does the direction steer?</h2>"
    yield (
        f"<p>The difference of means of a layer was removed from every block's output while {counts} test prompts of "
        f"{escape(str(evaluation['prompts']))} were replied to (the harmful ones), or added at its layer (the harmless "
        f"ones); the control: {controls(part)}.</p>"
    )
    found = (f"<li><b>{escape(which)}.</b> {escape(reason)}</li>" for which, reason in direction_findings(part))
    yield f"<ul>{''.join(found)}</ul>"
    called = dict(zip(("base", "tuned"), names, strict=True))
    lines = []
    for layer, model, kind, refused in direction_rows(part):
        numbers = [interval_of(refused[name]) for name in ("before", "direction", "control")]
        cells = "".join(f"<td>{_TERM.value(one)}<small>({_TERM.range(one)})</small></td>" for one in numbers)
        beyond = signed(_TERM, interval_of(refused["over_control"]))
        head = f"layer {layer}, {STEERING_NAMES[kind]}"
        lines.append(f"<tr><th>{head}</th><td>{escape(called[model])}</td>{cells}<td>{beyond}</td></tr>")
    rule = "".join(f"<tr><th>{name}</th><td>{escape(when)}</td></tr>" for name, when in direction_rule().items())
    yield (
        '<div class="wide"><table class="numbers dense"><caption>Share refused: of harmful requests where removed, '
        "of harmless ones where it is added; 95 % intervals over prompts.</caption><thead><tr><th></th><th>model</th>"
        "<th>before</th><th>direction</th><th>random</th><th>direction − random</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    yield f'<details><summary>The rule behind these words</summary><table class="rule">{rule}</table></details>'


def _curves(
    attack: Numbers, names: tuple[str, str], plot: Callable[[Any, str], str], about: str, budget: str
) -> Iterable[str]:
    """The figure and the table of one part."""
    if not panels_of(attack):
        return
    figure = report_figures.attack_curves(attack, names)
    yield plot(figure, f"{about}: DSR over the budget ({budget}), {attack['n_prompts']} prompts, 95 % intervals.")
    lines = []
    for name, points in panels_of(attack).items():
        for point in points:
            cells = ""
            for rate, of in (("dsr", "dsr"), ("degenerate", "harmful_degenerate")):
                for model in ("base", "tuned"):
                    number = interval_of(point[model][rate])
                    cells += f"<td>{BY_NAME[of].value(number)}<small>({BY_NAME[of].range(number)})</small></td>"
            lines.append(f"<tr><th>{escape(name)}</th><td>{point['budget']:g}</td>{cells}</tr>")
    left, right = map(escape, names)
    yield (
        f'<details><summary>{escape(about)}: all numbers</summary><div class="wide"><table class="numbers dense">'
        f"<thead><tr><th></th><th>budget</th><th>DSR, {left}</th><th>DSR, {right}</th><th>degenerate, {left}</th>"
        f"<th>degenerate, {right}</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )
