"""The form that starts a fine-tune: target layers by click, a handful of settings, what it will take, one button.

What is wrong is said by `FinetuneConfig.check`, the same function that would refuse the run later, so the page and the
command line cannot disagree; the button stays closed until it is content. Settings live in `app.state` rather than in
the widgets, since this form stands on two pages and is not drawn while a run is watched. The estimate comes from
`es2.workflow.plan`, which loads nothing heavy; only token counts are remembered here, by the digest of the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st

from app import artifacts, jobs_panel, state, text
from app.charts import canvas
from app.components.plots import plot
from app.run_rows import METHOD_NAMES
from app.state import Choice
from es2.analysis.results import LayerNumbers
from es2.core.errors import Es2Error, InputError
from es2.models.catalogue import resolve
from es2.models.shape import Shape, local_folder
from es2.prompts.benchmarks import absolute_source
from es2.prompts.prompt_set import PromptSet
from es2.report import palette
from es2.report.glossary import BY_NAME
from es2.training.config import MANY_LAYERS, METHODS, FinetuneConfig
from es2.training.terms import OBJECTIVES
from es2.workflow.plan import Plan, guessed_layers, plan, token_counts

USUAL = FinetuneConfig(layers=())
"""Where the shipped defaults are written."""
OPEN = "launch_open"
"""The session's key for whether the page of runs shows the form."""
STRIP_HEIGHT = 170
STAGE_NAMES = {
    "start": "loading",
    "base capture": "capturing the base",
    "replies": "the base's replies",
    "steps": "steps",
    "watching": "looks at held-out prompts",
    "tuned capture": "capturing the tuned model",
    "analysis": "analysis",
}


@dataclass(frozen=True)
class Setting:
    """A number of `FinetuneConfig` that the form asks for.

    Attributes:
        name: the field.
        label: what the form calls it.
        help: what it does, for a tooltip.
        step: of the field's arrows.
        format: of a number with decimals.
    """

    name: str
    label: str
    help: str
    step: float = 1
    format: str | None = None


MAIN = (
    Setting("steps", "Steps", "Optimizer steps. Time grows with them; so does what is moved.", 5),
    Setting(
        "kl_weight",
        "λ, weight of the KL",
        "How strongly harmless behaviour is held, in separation per nat. Higher keeps more and separates less.",
        0.5,
        "%.2f",
    ),
    Setting(
        "learning_rate",
        "Learning rate",
        "Its peak, after the warm-up; from there it follows a cosine down to a tenth.",
        1e-4,
        "%.1e",
    ),
    Setting("seed", "Seed", "Of the adapter's first weights and of the batches. The same seed repeats the same run."),
)
ADVANCED = (
    Setting("pairs_per_step", "Pairs per step", "Harmful prompts, and as many harmless ones, in every step.", 4),
    Setting("kl_prompts", "KL prompts per step", "So many harmless prompts of a step have their logits held to base."),
    Setting("warmup_steps", "Warm-up steps", "Steps over which the learning rate rises."),
    Setting("clip", "Gradient norm", "A longer gradient is cut to this length.", 0.5, "%.2f"),
    Setting("rank", "LoRA rank", "Of the adapter's matrices.", 4),
    Setting("alpha", "LoRA alpha", "The adapter's update is scaled by alpha / rank.", 4),
    Setting(
        "kl_budget",
        "KL budget",
        "Nats per token that each KL may reach on held-out harmless prompts. Beyond it λ is doubled, then the run "
        "stops.",
        0.05,
        "%.2f",
    ),
    Setting("reply_tokens", "Reply tokens", "Tokens of the base's own reply that the second KL covers.", 8),
    Setting("margin_target", "Margin target", "Where the margin term stops pushing, in scale-free units.", 0.1, "%.2f"),
    Setting("watch_every", "Steps between looks", "How often held-out prompts are measured and a checkpoint is kept."),
    Setting("watch_prompts", "Held-out prompts", "At most so many of each label are looked at.", 8),
    Setting("accumulate", "Parts of a step", "More parts need less memory and more time."),
)


def form(choice: Choice) -> None:
    """Draw the form for the model and the prompts of the choice; starting leads to the page of runs."""
    with st.container(border=True, key="launch"):
        st.subheader("Fine-tune with ES2", anchor=False)
        prompts = artifacts.prompts(choice.prompts)
        shape = Shape.of_model(choice.model)
        model = artifacts.model_name(choice.model)
        st.caption(
            f"Moves the embeddings of harmful and harmless prompts apart at the target layers of "
            f"**{text.markdown(model)}**, trained on the {int(prompts.in_split('tune').sum()):,} prompts of the tune "
            f"split of {text.markdown(prompts.name)}, and holds the replies to harmless prompts where they are. "
            "Model and prompts are chosen at the left."
        )
        layers = target_layers(choice, model, prompts, shape.n_layers)
        config = _settings(choice, layers)
        problem = _problem(config, shape.n_layers, prompts)
        made = None if problem else estimate(config, prompts)
        with st.container(horizontal=True, vertical_alignment="center", gap="medium", key="launch_start"):
            if st.button(
                "Start the fine-tune",
                key="start_finetune",
                type="primary",
                icon=":material/play_arrow:",
                disabled=problem is not None,
            ):
                source = absolute_source(choice.prompts)
                jobs_panel.ensure("finetune", config.to_dict() | {"prompts": source})
                st.session_state[OPEN] = False
                state.go("runs")
            if problem is not None:
                st.markdown(f":red[{text.markdown(problem)}]", width="stretch")
            elif made is not None:
                _show_estimate(made)


def _problem(config: FinetuneConfig, n_layers: int, prompts: PromptSet) -> str | None:
    """What is wrong with the settings, in a sentence."""
    try:
        config.check(n_layers, prompts)
    except InputError as error:
        return str(error)
    return None


# ------------------------------------------------------------------------------------------------------ target layers


def target_layers(choice: Choice, model: str, prompts: PromptSet, n_layers: int) -> tuple[int, ...]:
    """Let target layers be picked, by a click in the strip or in the list; returns the choice."""
    opened = artifacts.find(model, prompts, choice.position)
    analysis = opened.analysis if opened is not None and len(opened.analysis.base_layers) == n_layers else None
    usual = analysis.recommended if analysis is not None else guessed_layers(n_layers)
    layers = tuple(layer for layer in state.targets(choice.model, usual) if layer < n_layers)
    plot(
        target_strip(n_layers, layers, usual, analysis.base_layers if analysis is not None else None),
        key="target_strip",
        on_pick=partial(state.toggle_target, "target_strip", choice.model, usual),
        alt="The model's layers; a click takes one in as a target layer, or out",
    )
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.session_state["targets"] = list(layers)
        st.multiselect(
            "Target layers",
            range(n_layers),
            key="targets",
            format_func=lambda layer: f"Layer {layer}",
            placeholder="Click layers above, or choose here",
            help="The layers whose embeddings are to move apart. Two is the ES2 paper's finding: one is not enough, "
            "three collapse the model. A click on a layer above takes it in, or out.",
            on_change=lambda: state.take_targets(choice.model, st.session_state["targets"]),
        )
        st.button(
            "Recommended" if analysis is not None else "Preset",
            key="usual_targets",
            help=f"Back to {' and '.join(map(str, usual))}",
            disabled=layers == tuple(usual),
            on_click=state.take_targets,
            args=(choice.model, usual),
        )
    if analysis is None:
        st.caption(
            "The base model is not analysed for these prompts yet, so the preset is a guess by depth. *Capture and "
            "analyse* on the page Layers first to see how well each layer tells the labels apart, and which two are "
            "recommended."
        )
    return layers


def target_strip(
    n_layers: int, targets: Sequence[int], recommended: Sequence[int], layers: Sequence[LayerNumbers] | None
) -> canvas.Figure:
    """The layers to pick from: base's probe accuracy where it is known, and the picked ones marked.

    Args:
        n_layers: of the model.
        targets: the picked layers.
        recommended: the layers to mark by a triangle.
        layers: base's numbers; None before an analysis.
    """
    indices = list(range(n_layers))
    picked = set(targets)
    term = BY_NAME["probe_accuracy"]
    values = [layer.numbers[term.name].value for layer in layers] if layers else [0.5] * n_layers
    low = min(0.4, min(values) - 0.05) if layers else 0.0
    high = 1.02 if layers else 1.0
    hover = []
    for index in indices:
        known = f"<br>{term.title}: {term.value(layers[index].numbers[term.name])}" if layers else ""
        action = "click to take it out" if index in picked else "click to take it in"
        hover.append(f"<b>layer {index}</b>{known}<br>{action}")
    traces = [
        canvas.scatter(
            x=list(recommended),
            y=[low + 0.06 * (high - low)] * len(recommended),
            mode="markers",
            marker={"symbol": "triangle-up", "size": 10, "color": canvas.NEUTRAL},
            name="recommended" if layers else "preset",
            hoverinfo="skip",
        ),
        canvas.scatter(
            x=sorted(picked),
            y=[values[layer] for layer in sorted(picked)],
            mode="markers",
            marker={"size": 15, "color": palette.TUNED},
            name="target layers",
            hoverinfo="skip",
        ),
        canvas.scatter(
            x=indices,
            y=values,
            mode="lines+markers",
            line={"color": palette.BASE, "width": 2},
            marker={"size": 7, "color": palette.BASE},
            name="probe accuracy of the base" if layers else "layers",
            customdata=[["target", index] for index in indices],
            hoverinfo="text",
            hovertext=hover,
        ),
    ]
    bars = [
        {
            "type": "rect",
            "x0": layer - 0.42,
            "x1": layer + 0.42,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "fillcolor": canvas.translucent(palette.TUNED, 0.16),
            "line": {"width": 0},
            "layer": "below",
        }
        for layer in sorted(picked)
    ]
    return canvas.figure(
        traces,
        STRIP_HEIGHT if layers else STRIP_HEIGHT - 40,
        revision="target strip",
        x=canvas.layer_axis(n_layers, "layer (click to take it in, or out)"),
        y={
            "range": [low, high],
            "fixedrange": True,
            "title": canvas.title("balanced accuracy" if layers else None),
            "nticks": 5,
            "visible": layers is not None,
        },
        shapes=bars,
        hovermode="x",
        hoverdistance=-1,
        dragmode=False,
    )


# ----------------------------------------------------------------------------------------------------------- settings


def _settings(choice: Choice, layers: tuple[int, ...]) -> FinetuneConfig:
    """Draw the settings; returns what they make of the choice."""
    values: dict[str, Any] = {}
    if len(layers) >= MANY_LAYERS:
        st.warning(
            f"{len(layers)} target layers: the ES2 paper saw models collapse from three on. Two are its finding.",
            icon=":material/warning:",
        )
        values["allow_many_layers"] = _drawn("allow_many_layers", st.checkbox, "I want three or more target layers")
    objectives = list(dict.fromkeys([USUAL.objective, *OBJECTIVES, state.settings().get("objective") or "fisher"]))
    above, below = (st.columns(3, gap="small", vertical_alignment="bottom") for _ in range(2))
    with above[0]:
        values["objective"] = _drawn(
            "objective",
            st.selectbox,
            "Objective",
            options=objectives,
            accept_new_options=True,
            help="What is made larger. **distance** is the paper's form, which a longer residual stream also raises; "
            "**anchored** keeps the harmless cloud in place; **fisher** and **margin** are scale-free. Mixtures can be "
            "typed, such as 1.0\\*margin+0.5\\*fisher.",
        )
        values["objective"] = values["objective"] or ""  # a box that was emptied
    with above[1]:
        values["method"] = _drawn(
            "method",
            st.segmented_control,
            "Method",
            options=METHODS,
            format_func=METHOD_NAMES.__getitem__,
            required=True,
            width="stretch",
            help="**LoRA** trains a small adapter on the blocks up to the last target layer; **Full** trains those "
            "blocks themselves, which takes more memory.",
        )
    for column, setting in zip((above[2], *below), MAIN, strict=True):
        with column:
            values[setting.name] = _number(setting)
    with st.expander("Advanced", key="launch_advanced"):
        values |= _advanced()
    spec = resolve(choice.model)
    model = spec.location if spec.kind in ("folder", "gguf") else spec.name
    return FinetuneConfig(layers=layers, model=model, **values)


def _advanced() -> dict[str, Any]:
    values: dict[str, Any] = {}
    for start in range(0, len(ADVANCED), 4):
        for column, setting in zip(st.columns(4, gap="small"), ADVANCED[start : start + 4], strict=False):
            with column:
                values[setting.name] = _number(setting)
    first, second, third = st.columns([1, 1, 2], gap="small", vertical_alignment="bottom")
    with first:
        values["first_block"] = _drawn(
            "first_block",
            st.number_input,
            "First trained block",
            step=1,
            value=None,
            placeholder="automatic",
            help="The last trained block is the last target layer. Automatic: block 4, or the first target layer "
            "where that is lower.",
        )
    with second:
        values["dtype"] = _drawn(
            "dtype",
            st.selectbox,
            "Number format",
            options=("float32", "bfloat16"),
            index=None,
            placeholder="automatic",
            help="Of the frozen weights. Automatic: bfloat16 on a CUDA device, else float32.",
        )
    with third:
        values["gradient_checkpointing"] = _drawn(
            "gradient_checkpointing",
            st.checkbox,
            "Gradient checkpointing",
            help="Recompute blocks in the backward pass: less memory, more time.",
        )
    return values


def _number(setting: Setting) -> Any:
    kind = float if setting.format else int  # the type of the value and of the step must agree
    return _drawn(
        setting.name,
        st.number_input,
        setting.label,
        kind=kind,
        step=kind(setting.step),
        format=setting.format,
        help=setting.help,
    )


def _drawn(
    name: str, widget: Callable[..., Any], label: str, *, kind: Callable[[Any], Any] | None = None, **arguments: Any
) -> Any:
    """Draw a widget that shows a setting, made a `kind` where one is given, and takes it over; returns the setting."""
    key = f"launch_{name}"
    value = state.settings().get(name, getattr(USUAL, name))
    st.session_state[key] = kind(value) if kind is not None else value
    widget(label, key=key, on_change=lambda: state.take_setting(name, st.session_state[key]), **arguments)
    return st.session_state[key]


# ----------------------------------------------------------------------------------------------------------- estimate


def estimate(config: FinetuneConfig, prompts: PromptSet) -> Plan | None:
    """What the fine-tune will take; None, with a note, where that cannot be told, which is no reason not to start."""
    try:
        folder = local_folder(config.model)
        return plan(config, prompts, folder, lengths=_token_counts(folder, prompts.texts_digest, prompts))
    except Es2Error as error:
        st.caption(f"No estimate: {text.markdown(str(error))}")
        return None


@st.cache_data(max_entries=16, show_spinner="Counting tokens")
def _token_counts(folder: Path | None, digest: str, _prompts: PromptSet) -> list[int]:
    return token_counts(folder, _prompts)


def _show_estimate(made: Plan) -> None:
    device = "an idle CPU" if made.machine.device == "cpu" else made.machine.device
    stages = [
        f"{STAGE_NAMES[stage]} {text.duration(seconds)}"
        for stage, seconds in made.seconds.items()
        if seconds >= 0.02 * made.total_seconds
    ]
    free = "" if made.machine.free_gb is None else f" ({made.machine.free_gb:.1f} GB are free)"
    fetch = f" The model is fetched first, about {made.fetch_gb:.1f} GB." if made.fetch_gb else ""
    with st.container(key="estimate", gap="xsmall"):
        st.markdown(f"About **{text.duration(made.total_seconds)}** and **{made.memory_gb:.1f} GB** of memory{free}")
        st.caption(f"On {device}: {', '.join(stages)}.{fetch}")
    if not made.fits:
        st.warning(
            f"It needs about {made.memory_gb:.1f} GB of memory and {made.machine.free_gb:.1f} GB are free: close other "
            "programs, work in more parts of a step, turn on gradient checkpointing, or choose a smaller model.",
            icon=":material/memory:",
        )
