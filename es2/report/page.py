"""The page of a report: a comparison as the text of one HTML file.

Prompts and names come from users and data sets: each is escaped where it is put, prompts are shortened, and labels of
figures pass through `es2.report.labels`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.io import to_json

from es2.analysis.comparison import Comparison
from es2.analysis.film import FilmView
from es2.analysis.projection import pca_view, separation_view
from es2.analysis.results import Change, LayerNumbers
from es2.analysis.verdict import behaviour_rule, rule
from es2.core.settings import option_words
from es2.core.versions import installed_versions
from es2.prompts.prompt_set import HARMFUL, LABEL_NAMES, stable_hash
from es2.report import figures as report_figures
from es2.report.attacks import attack_sections, direction_sections
from es2.report.film import film_caption, film_figure, losses
from es2.report.findings import accuracy_sentence
from es2.report.glossary import BY_NAME, COMPARED, TERMS, UNITS, Term
from es2.report.labels import shortened
from es2.store.sources import OWN_HOOKS
from es2.training.config import FinetuneConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int


PROMPT_CHARACTERS = 300
MAX_POINTS = 1500  # more make a file that is slow to open
N_LISTED = 10

_STRIPS = (
    ("probe_accuracy", "how well each layer's probe tells the labels apart", "balanced accuracy"),
    ("margin_mean", "mean distance to the probe's boundary", UNITS),
    ("mean_difference_margin", "how far the two clouds stand apart", UNITS),
)
_ALL_LAYERS = ("probe_accuracy", "margin_mean", "mean_difference_margin", "fisher_ratio", "relative_distance")


@dataclass(frozen=True)
class Compared(Comparison):
    """A comparison with the title of its run, the known progress events of its training, the film of it, an evaluation
    that attacked both models, one that removed and added directions, and its multiple choice, if there is one.
    """

    title: str = ""
    events: Sequence[Mapping[str, Any]] = ()
    film: FilmView | None = None
    attacked: Mapping[str, Any] | None = None
    directed: Mapping[str, Any] | None = None
    ability: Mapping[str, Any] | None = None


def report_html(compared: Compared) -> str:
    """The report as the text of an HTML file. Raises as reading embeddings does."""
    figures: dict[str, str] = {}
    body = "\n".join(_sections(compared, figures))
    return _page(f"ES2 report: {compared.title}", body, figures)


def figure_html(figure: go.Figure | Mapping[str, Any], title: str, caption: str = "") -> str:
    """One figure, or what `go.Figure` takes, as the text of an HTML file of its own, which needs nothing else."""
    drawn = f'<div id="figure-1" class="plot"></div><figcaption>{escape(caption)}</figcaption>'
    body = f"<h1>{escape(title)}</h1><figure>{drawn}</figure>"
    return _page(title, body, {"figure-1": to_json(figure, validate=False)})


def _page(title: str, body: str, figures: Mapping[str, str]) -> str:
    """An HTML file with plotly.js inside; `figures` are plotly's JSON by the id of their element."""
    from plotly.offline import get_plotlyjs

    drawings = ",\n".join(f"{json.dumps(name)}: {figure}" for name, figure in figures.items())
    return _PAGE.format(
        title=escape(title), style=_STYLE, plotly=get_plotlyjs(), body=body, figures=drawings, script=_SCRIPT
    )


def _sections(compared: Compared, figures: dict[str, str]) -> Iterable[str]:
    """The page's parts; adds each figure's JSON to `figures` under the id of its element."""

    def plot(figure: Any, caption: str) -> str:
        name = f"figure-{len(figures) + 1}"
        figures[name] = to_json(figure, validate=False)  # plotly escapes <, > and / in it
        return f'<figure><div id="{name}" class="plot"></div><figcaption>{escape(caption)}</figcaption></figure>'

    result, targets = compared.result, compared.targets
    yield _head(compared)
    yield "<h2>Numbers</h2>"
    yield _targets_table(compared)
    yield _all_layers_table(compared)
    yield "<h2>All layers</h2>"
    n_test = sum(compared.analysis.n_prompts["test"].values())
    for name, meaning, unit in _STRIPS:
        figure = report_figures.strip(compared.analysis, name, names=compared.names, targets=targets, y_title=unit)
        where = f"on {n_test} test prompts, with 95 % intervals. Triangles: target layers."
        yield plot(figure, f"{BY_NAME[name].title}: {meaning}, {where}")

    rows, shown = _shown(compared)
    for layer in targets:
        yield f"<h2>Layer {layer}</h2>"
        base, tuned = (one.layer(layer, compared.position) for one in (compared.base, compared.tuned))
        own, theirs = compared.analysis.base_probes, compared.analysis.tuned_probes
        assert theirs is not None  # a comparison has both
        margins = own.margin(base, layer), theirs.margin(tuned, layer)
        for kind, view_of in (("Separation", separation_view), ("PCA", pca_view)):
            test = compared.prompts.in_split("test")
            view = view_of(base, own, layer, tuned=tuned, tuned_probes=theirs, fit=test)
            figure = report_figures.pair(view, compared.prompts, rows, margins=margins, names=compared.names)
            yield plot(figure, f"{kind}: {shown}; both models on the same axes.")
        yield _movers(compared, layer, margins)
    if compared.attacked is not None:
        yield from attack_sections(compared.attacked, compared.names, plot)
    if compared.directed is not None:
        yield from direction_sections(compared.directed, compared.names)
    if (figure := report_figures.training(compared.events, compared.kl_budget)) is not None:
        yield "<h2>Training</h2>"
        kept = f"The weights of step {result['best_step']} of {result['steps']} were kept."
        yield plot(figure, f"What each step logged, and what was measured on prompts held out for that. {kept}")
    if (film := compared.film) is not None:
        yield "<h2>Film</h2>"
        yield plot(
            film_figure(film, losses(compared.events), compared.kl_budget), film_caption(film, result["best_step"])
        )
    yield _how(compared)


def _head(compared: Compared) -> str:
    result = compared.result
    left, right = compared.names
    verdict, budget = compared.run_verdict, compared.kl_budget
    kls = ", ".join(f"{name} {value:.3f}" for name, value in (compared.kl or {}).items())
    facts = [
        ("Model", compared.config.get("model", compared.base.model)),
        ("Prompts", compared.config.get("prompts", compared.prompts.name)),
        ("Prompts given as", compared.base.given_as),
        *_rendering(compared.base.rendering),
        ("Hooks", "the model's own blocks" if compared.base.hooks == OWN_HOOKS else "TransformerLens"),
        ("Compared", f"{left} and {right}"),
        ("Target layers", ", ".join(map(str, compared.targets))),
        ("Objective", compared.config.get("objective", "")),
        ("KL on harmless test prompts", f"{kls} (budget {budget:g}) nats per token" if kls else "not measured"),
        ("Ability", "not measured" if compared.ability is None else accuracy_sentence(compared.ability)),
        ("Run", f"{compared.run}, {result['status']}"),
    ]
    behaviour = "".join(f'<p class="doubt" role="alert">{escape(one)}</p>' for one in compared.warnings)
    if not compared.is_of_two_runs and compared.behaviours[-1].warning is None:
        behaviour = f"<p>{escape(compared.behaviours[-1].reason)}</p>"
    others = "".join(
        f"<li>{escape(one.name.capitalize())}. {escape(one.reason)}</li>"
        for one in map(compared.verdict, compared.targets)
        if one != verdict
    )
    stopped = f"<p>{escape(result['reason'])}</p>" if result.get("reason") else ""
    doubts = "".join(f'<p class="doubt">{escape(str(one))}</p>' for one in result.get("warnings") or ())
    return f"""<header><p class="kind">ES2 report</p><h1>{escape(compared.title)}</h1>
<p class="verdict"><b>{escape(compared.outcome.capitalize())}</b>{escape(verdict.reason)}</p>
{behaviour}{stopped}{doubts}<ul>{others}</ul>
<details><summary>The rule behind the verdict</summary><p>Per layer the first line that holds, on paired 95 % intervals
over test prompts; a run has the gravest verdict of its target layers.</p>{_rows(rule(budget).items())}
<p>On what became of behaviour, on the newest evaluation of the run, base against tuned:</p>
{_rows(behaviour_rule().items())}</details>
<dl>{"".join(f"<dt>{escape(name)}</dt><dd>{escape(shortened(str(value), 200))}</dd>" for name, value in facts)}</dl>
</header>"""


def _targets_table(compared: Compared) -> str:
    """The numbers of the target layers: base, tuned and change of each."""
    layers = [(compared.analysis.base_layers[layer], compared.analysis.layers[layer]) for layer in compared.targets]
    left, right = map(escape, compared.names)
    groups = "".join(f'<th colspan="3">layer {after.layer}</th>' for _, after in layers)
    rows = []
    for term in (*TERMS, *COMPARED):
        if not all(term.name in after.numbers for _, after in layers):
            continue
        cells = ""
        for before, after in layers:
            first = "<td></td>" if term in COMPARED else _cell(term, before)  # base against itself is always 1
            cells += f"{first}{_cell(term, after)}<td>{'' if term in COMPARED else _change(term, after)}</td>"
        rows.append(f"<tr><th>{escape(term.title)}</th>{cells}</tr>")
    heads = f"<th>{left}</th><th>{right}</th><th>change</th>" * len(layers)
    return (
        '<div class="wide"><table class="numbers"><caption>Target layers, on test prompts; 95 % intervals in brackets.'
        f"</caption><thead><tr><th></th>{groups}</tr><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
        f"</table></div><details><summary>What the numbers mean</summary>"
        f"{_rows((term.title, term.definition) for term in (*TERMS, *COMPARED))}</details>"
    )


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f'<table class="rule">{lines}</table>'


def _cell(term: Term, layer: LayerNumbers) -> str:
    interval = layer.numbers[term.name]
    return f"<td>{term.value(interval)}<small>({term.range(interval)})</small></td>"


def _change(term: Term, after: LayerNumbers) -> str:
    change: Change | None = (after.change or {}).get(term.name)
    if change is None:
        return ""
    if (ratio := change.ratio) is not None:
        return f"×{ratio.value:,.2f}<small>(×{ratio.low:,.2f} to ×{ratio.high:,.2f})</small>"
    sign = "+" if change.difference.value > 0 else ""
    return f"{sign}{term.value(change.difference)}<small>({term.range(change.difference)})</small>"


def _all_layers_table(compared: Compared) -> str:
    terms = [BY_NAME[name] for name in _ALL_LAYERS]
    head = "".join(f"<th>{escape(term.title)}</th>" for term in (*terms, *COMPARED))
    rows = []
    for before, after in zip(compared.analysis.base_layers, compared.analysis.layers, strict=True):
        cells = "".join(
            f"<td>{term.value(before.numbers[term.name])} → {term.value(after.numbers[term.name])}</td>"
            for term in terms
        )
        ratios = "".join(f"<td>{term.value(after.numbers[term.name])}</td>" for term in COMPARED)
        verdict = compared.verdict(after.layer).name
        mark = ' class="target"' if after.layer in compared.targets else ""
        rows.append(f"<tr{mark}><th>{after.layer}</th><td>{verdict}</td>{cells}{ratios}</tr>")
    return (
        "<details><summary>The numbers of every layer</summary>"
        '<div class="wide"><table class="numbers dense">'
        f"<thead><tr><th>layer</th><th>verdict</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _movers(
    compared: Compared, layer: int, margins: tuple[Float[np.ndarray, "prompt"], Float[np.ndarray, "prompt"]]
) -> str:
    """The test prompts that moved most, and those on the wrong side after, by distance to each model's own boundary."""
    prompts = compared.prompts
    side = np.where(prompts.labels == HARMFUL, 1.0, -1.0)
    before, after = (side * one for one in margins)
    test, kept = _test(compared)
    moved = test[np.argsort(-np.abs(after - before)[test], kind="stable")][:N_LISTED]
    wrong = test[after[test] < 0]
    worst = wrong[np.argsort(after[wrong], kind="stable")][:N_LISTED]
    left, right = map(escape, compared.names)

    def table(rows: Int[np.ndarray, "row"], caption: str) -> str:
        lines = "".join(
            f'<tr><td class="prompt" dir="auto">{escape(shortened(prompts.texts[row], PROMPT_CHARACTERS))}</td>'
            f"<td>{LABEL_NAMES[int(prompts.labels[row])]}</td><td>{_signed(before[row])}</td>"
            f"<td>{_signed(after[row])}</td><td>{_signed(after[row] - before[row])}</td></tr>"
            for row in rows
        )
        return (
            f'<details><summary>{escape(caption)}</summary><div class="wide"><table class="numbers prompts">'
            f"<thead><tr><th>prompt</th><th>label</th><th>{left}</th><th>{right}</th><th>change</th></tr></thead>"
            f"<tbody>{lines}</tbody></table></div></details>"
        )

    note = "distance to the probe's boundary, + on the correct side, scale-free"
    parts = [table(moved, f"Layer {layer}: the {len(moved)} test prompts that moved most ({note})")]
    if len(wrong):
        parts.append(table(worst, f"Layer {layer}: {len(wrong)} of {kept} on the wrong side after"))
    return "".join(parts)


def _how(compared: Compared) -> str:
    names = (*FinetuneConfig.model_fields, "prompts")
    settings = {name: compared.config[name] for name in names if name in compared.config}
    config = _rows((name, shortened(json.dumps(value, ensure_ascii=False), 200)) for name, value in settings.items())
    captured = compared.tuned.meta.get("versions") or {}
    versions = installed_versions()
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(captured.get(name, '')))}</td>"
        f"<td>{escape(versions.get(name, ''))}</td></tr>"
        for name in dict.fromkeys((*versions, *captured))
    )
    counts = compared.analysis.n_prompts
    n_prompts = "; ".join(
        f"{split}: {', '.join(f'{n} {name}' for name, n in labels.items())}" for split, labels in counts.items()
    )
    return f"""<h2>How it was made</h2>
<p>Again, on another machine:</p><pre>{escape(reproduce(compared.config))}</pre>
<p>Probes were fitted on the <code>probe</code> split and measured on <code>test</code>, neither of which the fine-tune
saw ({escape(n_prompts)}). Keys: base {escape(compared.base.key)}, tuned {escape(compared.tuned.key)}.</p>
<details><summary>Settings</summary>{config}</details>
<details><summary>Versions</summary><table class="rule"><tr><th></th><td>captured with</td><td>reported with</td></tr>
{lines}</table></details>
<footer>ES2 Workbench, {datetime.now(UTC).strftime("%Y-%m-%d %H:%M")} UTC</footer>"""


def reproduce(config: Mapping[str, Any]) -> str:
    """The command that makes a run of these settings, with every option spelled out."""
    ordered = dict.fromkeys(["model", "prompts", *FinetuneConfig.model_fields])
    return shlex.join(["es2", "finetune", *option_words(FinetuneConfig, {name: config.get(name) for name in ordered})])


def _rendering(rendering: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the model was given the prompts, as far as the embeddings say it."""
    if not rendering:
        return []
    prompt, arguments = rendering.get("system_prompt"), rendering.get("template_arguments") or {}
    of = " (the template's own)" if rendering.get("system_prompt_from") == "template" else ""
    facts = [("System prompt", f"{shortened(prompt, 300)}{of}" if prompt else "none")]
    if arguments:
        facts.append(("Template arguments", ", ".join(f"{name} = {value}" for name, value in arguments.items())))
    return [*facts, ("Position last lies", str(rendering.get("last", "")))]


def _shown(compared: Compared) -> tuple[Int[np.ndarray, "row"], str]:
    """The rows of the test prompts that pictures show, chosen by hash of their pair, and their number in words."""
    test, kept = _test(compared)
    if len(test) <= MAX_POINTS:
        return test, kept
    ranked = test[np.argsort([stable_hash(compared.prompts.pairs[row]) for row in test], kind="stable")]
    return np.sort(ranked[:MAX_POINTS]), f"{MAX_POINTS} of {kept}, chosen by hash"


def _test(compared: Compared) -> tuple[Int[np.ndarray, "row"], str]:
    """The rows of the test prompts, which may be a part of those that gave the numbers, and their number in words."""
    test = np.flatnonzero(compared.prompts.in_split("test"))
    measured = sum(compared.analysis.n_prompts["test"].values())
    part = f" (a part of the {measured} that gave the numbers)" if len(test) < measured else ""
    return test, f"{len(test)} test prompts{part}"


def _signed(number: float) -> str:
    return f"{number:+.4f}".replace("-", "−")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head><body><main>
{body}
</main>
<script>
const FIGURES = {{
{figures}
}};
{script}
</script></body></html>
"""

_STYLE = """
:root { --text: #1d2127; --soft: #5c6470; --line: #d9dde3; --back: #ffffff; --panel: #f5f6f8; --link: #0f6b62;
  --doubt: #a15c00; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --soft: #a0a7b1; --line: #363c45; --back: #14171c; --panel: #1d2229; --link: #5cc9bd;
    --doubt: #e0a040; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 38px 0 8px; padding-top: 14px; border-top: 1px solid var(--line); }
.kind { margin: 0; color: var(--soft); font-size: 13px; letter-spacing: .04em; text-transform: uppercase; }
.verdict { font-size: 17px; background: var(--panel); border-left: 4px solid var(--link); padding: 10px 14px;
  margin: 0; }
.verdict b { margin-right: .7em; }
.doubt { background: var(--panel); border-left: 4px solid var(--doubt); padding: 10px 14px; margin: 8px 0 0;
  overflow-wrap: anywhere; }
header ul { color: var(--soft); padding-left: 20px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 18px 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 14px 0; } figcaption { color: var(--soft); font-size: 13px; }
.plot { width: 100%; }
.updatemenu-item-rect { fill: var(--panel) !important; } /* plotly's colour under the mouse is for light pages */
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 10px 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: 13px; padding-bottom: 4px; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.numbers { width: 100%; }
.numbers td, .numbers thead th { text-align: right; white-space: nowrap; }
.numbers th:first-child, .numbers td.prompt { text-align: left; }
.dense { font-size: 13px; }
.dense th, .dense td { padding: 3px 10px 3px 0; }
.numbers thead th { color: var(--soft); font-weight: 600; white-space: normal; }
.numbers td.prompt { white-space: normal; overflow-wrap: anywhere; width: 60%; unicode-bidi: plaintext; }
tbody th { font-weight: 500; }
.target th, .target td { background: var(--panel); font-weight: 600; }
small { display: block; color: var(--soft); font-weight: 400; font-size: 12px; }
.numbers th[colspan] { text-align: center; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--link); }
pre { background: var(--panel); padding: 12px 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
footer { color: var(--soft); margin-top: 40px; font-size: 13px; }
@media print { details { break-inside: avoid; } }
"""

_SCRIPT = """
const CONFIG = {
  responsive: true, displaylogo: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"], toImageButtonOptions: { format: "svg" },
};
const theme = window.matchMedia("(prefers-color-scheme: dark)");

function dressed(layout) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const { template, ...own } = layout;
  const dress = { ...own, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
  dress.font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--text") };
  dress.hoverlabel = { ...layout.hoverlabel, bgcolor: colour("--back"), bordercolor: colour("--line"),
    font: { color: colour("--text") } };
  for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key)))
    dress[name] = { ...layout[name], gridcolor: colour("--line"), linecolor: colour("--line"), automargin: true,
      title: { ...layout[name].title, font: { size: 12.5 } } };
  dress.modebar = { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--text") };
  const control = { bgcolor: colour("--panel"), bordercolor: colour("--line") };
  dress.updatemenus = layout.updatemenus?.map((menu) => ({ ...menu, ...control }));
  dress.sliders = layout.sliders?.map((slider) => ({ ...slider, ...control, bordercolor: colour("--soft"),
    activebgcolor: colour("--link"), tickcolor: colour("--soft") }));
  return dress;
}

function draw() {
  for (const [id, figure] of Object.entries(FIGURES))
    Plotly.react(id, { ...figure, layout: dressed(figure.layout), config: CONFIG });
}

// Plotly rejects an animation that another one interrupts, and its own buttons let that pass as an error.
window.addEventListener("unhandledrejection", (event) => event.reason === undefined && event.preventDefault());
draw();
theme.addEventListener("change", draw);
"""
