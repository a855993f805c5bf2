"""The form that starts a fine-tune: target layers by click, settings, an estimate, one button.

`FinetuneConfig.check` refuses settings here as it would refuse the run, so the page and the command line cannot
disagree. The estimate of `es2.workflow.plan` loads nothing heavy; token counts are cached by the digest of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st

from app import artifacts, jobs_panel, state, text
from app.components.plots import plot
from app.run_rows import METHOD_NAMES
from app.settings_form import SettingsForm, start_button
from app.state import Choice
from es2.analysis.results import LayerNumbers
from es2.charts import canvas
from es2.core.errors import Es2Error, InputError
from es2.models.catalogue import resolve
from es2.models.checked import refuse_untunable
from es2.models.shape import Shape, local_folder
from es2.prompts.benchmarks import absolute_source
from es2.prompts.prompt_set import PromptSet
from es2.report import palette
from es2.report.glossary import BY_NAME
from es2.training.config import MANY_LAYERS, FinetuneConfig
from es2.workflow.plan import CostEstimate, guessed_layers, plan, token_counts

OPEN = "launch_open"
"""The session's key for whether the page of runs shows the form."""
STRIP_HEIGHT = 170
STAGE_NAMES = {
    "start": "loading",
    "base capture": "capturing the base",
    "replies": "the base's replies",
    "steps": "steps",
    "validation": "validation",
    "tuned capture": "capturing the tuned model",
    "analysis": "analysis",
    "behaviour": "replies of both models",
}


def form(choice: Choice) -> None:
    """Render the form for the model and the prompts of the choice; starting leads to the page of runs."""
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
        config, problem = _config(choice, layers, shape.n_layers, prompts)
        made = None if config is None else estimate(config, prompts)
        with st.container(horizontal=True, vertical_alignment="center", gap="medium", key="launch_start"):
            pressed = start_button("Start the fine-tune", "start_finetune", disabled=config is None)
            if config is None:
                st.markdown(f":red[{text.markdown(problem)}]", width="stretch")
            elif pressed:
                source = absolute_source(choice.prompts)
                jobs_panel.ensure("finetune", config.to_dict() | {"prompts": source})
                st.session_state[OPEN] = False
                state.go("runs")
            elif made is not None:
                _show_estimate(made)


def _config(
    choice: Choice, layers: tuple[int, ...], n_layers: int, prompts: PromptSet
) -> tuple[FinetuneConfig | None, str]:
    """Render the settings; returns the config, or None and what is wrong, in a sentence."""
    widgets = SettingsForm(FinetuneConfig, "launch", {"method": METHOD_NAMES})
    spec = resolve(choice.model)
    model = spec.location if spec.kind in ("folder", "gguf") else spec.name
    values: dict[str, Any] = {"layers": layers, "model": model} | dict(choice.rendering)
    if len(layers) >= MANY_LAYERS:
        st.warning(
            f"{len(layers)} target layers: the ES2 paper saw models collapse from three on. Two are its finding.",
            icon=":material/warning:",
        )
        values["allow_many_layers"] = widgets.one("allow_many_layers")
    values |= widgets.group("main", per_row=3)
    with st.expander("Advanced", key="launch_advanced"):
        values |= widgets.group("advanced")
    try:
        config = FinetuneConfig.from_text(values | {"objective": values["objective"] or ""})  # a box may be emptied
        config.check(n_layers, prompts)
        if (folder := local_folder(config.model)) is not None:
            refuse_untunable(folder, config.method)
    except InputError as error:
        return None, str(error)
    return config, ""


# ------------------------------------------------------------------------------------------------------ target layers


def target_layers(choice: Choice, model: str, prompts: PromptSet, n_layers: int) -> tuple[int, ...]:
    """Let target layers be picked, by a click in the strip or in the list; returns the choice."""
    opened = artifacts.find(model, prompts, choice.position, choice.rendering)
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
            "analyse* on the page Layers first to see how well each layer separates the labels, and which two are "
            "recommended."
        )
    return layers


def target_strip(
    n_layers: int, targets: Sequence[int], recommended: Sequence[int], layers: Sequence[LayerNumbers] | None
) -> canvas.Figure:
    """The layers to pick from: base's probe accuracy where it is known (`layers`), and the picked ones marked."""
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
    return canvas.figure(
        traces,
        STRIP_HEIGHT if layers else STRIP_HEIGHT - 40,
        revision="target strip",
        x=canvas.layer_axis(n_layers, "layer (click to take it in, or out)"),
        y={
            "range": [low, high],
            "title": canvas.title("balanced accuracy" if layers else None),
            "nticks": 5,
            "visible": layers is not None,
        },
        shapes=[canvas.column(layer, palette.TUNED, 0.16, 0.42) for layer in sorted(picked)],
        hovermode="x",
        hoverdistance=-1,
    )


# ----------------------------------------------------------------------------------------------------------- estimate


def estimate(config: FinetuneConfig, prompts: PromptSet) -> CostEstimate | None:
    """What the fine-tune will take; None, with a note, where there is no estimate."""
    try:
        folder = local_folder(config.model)
        return plan(config, prompts, folder, lengths=lengths_of(folder, prompts))
    except Es2Error as error:
        st.caption(f"No estimate: {text.markdown(str(error))}")
        return None


def lengths_of(folder: Path | None, prompts: PromptSet) -> list[int]:
    """Number of tokens of every prompt, counted once."""
    return _token_counts(folder, prompts.texts_digest, prompts)


@st.cache_data(max_entries=16, show_spinner="Counting tokens")
def _token_counts(folder: Path | None, digest: str, _prompts: PromptSet) -> list[int]:
    return token_counts(folder, _prompts)


def _show_estimate(made: CostEstimate) -> None:
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
