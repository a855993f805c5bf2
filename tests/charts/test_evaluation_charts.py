"""The figures of an evaluation, and the sentences about it: functions of numbers that are known here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from es2.charts import evaluation_charts
from es2.evaluation.config import EvaluateConfig
from es2.models.machine import Machine
from es2.models.shape import Shape
from es2.report import findings, palette
from es2.workflow.evaluation_plan import Sample, evaluation_seconds
from tests.builders_evaluation import directions_by_hand
from tests.figures import Checked, traces

evaluation_charts = Checked(evaluation_charts)


def number(value: float, low: float | None = None, high: float | None = None) -> dict[str, float]:
    return {
        "value": value,
        "low": value - 0.05 if low is None else low,
        "high": value + 0.05 if high is None else high,
    }


def refusal(base: float, tuned: float, change: tuple[float, float], **rates: Any) -> dict[str, Any]:
    """The part `refusal` with these DSRs; `rates` are (base, tuned, low, high) of others."""
    rest = {"over_refusal": (0.1, 0.1, -0.05, 0.05), "harmful_degenerate": (0.0, 0.0, -0.05, 0.05)}
    rest |= {"harmless_degenerate": (0.0, 0.0, -0.05, 0.05)} | rates
    document: dict[str, Any] = {
        "base": {"dsr": number(base)},
        "tuned": {"dsr": number(tuned)},
        "change": {"dsr": number(tuned - base, *change)},
    }
    for name, (before, after, low, high) in rest.items():
        document["base"][name], document["tuned"][name] = number(before), number(after)
        document["change"][name] = number(after - before, low, high)
    return document


def point(direction: str, budget: float | None, base: float, tuned: float, p0: float | None = None) -> dict[str, Any]:
    def rates(dsr: float) -> dict[str, Any]:
        return {
            "dsr": number(dsr),
            "degenerate": number(0.2),
            "answered": number(0.5),
            "probability": number(0.5),
            "relative_length": number(0.3),
            "largest_error": 1e-5,
        }

    change = {"dsr": number(tuned - base), "degenerate": number(0.0), "answered": number(0.0)}
    return {"direction": direction, "budget": budget, "p0": p0, "base": rates(base), "tuned": rates(tuned)} | {
        "change": change
    }


def attack(ratio: tuple[float, float] = (1.1, 1.5)) -> dict[str, Any]:
    """Two attacked layers of four; base and tuned under two directions and two budgets."""
    needed = [
        {
            "layer": layer,
            "p0": p0,
            "base": {"relative": number(0.2), "relative_q1": number(0.1), "already": number(0.0)},
            "tuned": {"relative": number(0.26), "relative_q1": number(0.15), "already": number(0.0)},
            "change": {"relative_ratio": number(1.3, *ratio) if layer == 1 else number(1.0, 0.9, 1.2)},
        }
        for layer in range(4)
        for p0 in (0.5, 0.01)
    ]
    return {
        "layers": [1, 2],
        "n_prompts": 4,
        "n_needed": 4,
        "needed": needed,
        "needed_values": [
            {"layer": layer, "p0": p0, "base": [0.0, 0.1, 0.3, 0.2], "tuned": [0.2, 0.4, 0.1, 0.5]}
            for layer in (1, 2)
            for p0 in (0.5, 0.01)
        ],
        "curve": [
            point("none", 0.0, 0.5, 0.75),
            point("scav", 0.1, 0.25, 0.75),
            point("scav", 0.8, 0.0, 0.5),
            point("random", 0.1, 0.5, 0.5),
            point("random", 0.8, 0.25, 0.25),
            point("scav", None, 0.0, 0.5, p0=0.01),
        ],
    }


def soft() -> dict[str, Any]:
    """Soft prompts of two lengths, the longer one at one budget and without its control."""
    sweep = (
        ("none", 0, 0.0, 0.5, 0.75),
        ("soft_prompt", 4, 1.0, 0.25, 0.5),
        ("soft_prompt", 4, 2.0, 0.0, 0.25),
        ("soft_random", 4, 1.0, 0.5, 0.75),
        ("soft_random", 4, 2.0, 0.5, 0.75),
        ("soft_prompt", 8, 1.0, 0.25, 0.25),
    )
    curve = [point(kind, budget, *dsr) | {"length": length} for kind, length, budget, *dsr in sweep]
    return {"layers": [1, 2], "n_prompts": 4, "n_fitted": 16, "n_refused": {"base": 8, "tuned": 12}, "curve": curve}


def directed(**tuned: Any) -> dict[str, Any]:
    """A direction that steers the base, which refuses all harmful requests; `tuned` are replies of a tuned model."""
    before = ["refusal"] * 6 + ["answer"] * 6
    base = {"before": before, "remove": ["answer"] * 5 + ["refusal"], "add": ["refusal"] * 4 + ["answer"] * 2}
    models = {"base": base} | ({"tuned": {"before": before} | tuned} if tuned else {})
    return directions_by_hand([str(number) for number in range(12)], models)[0]


class TestFigures:
    def test_a_direction_has_a_panel_for_removal_and_one_for_addition(self) -> None:
        figure = evaluation_charts.direction_rates(directed())
        assert list(figure.layout.yaxis.ticktext) == ["not steered", "layer 1, direction", "layer 1, random"]
        removed, added = (one for one in figure.data if one.name == "Base")
        assert list(removed.x) == pytest.approx([1, 1 / 6, 1])
        assert list(added.x) == pytest.approx([0, 4 / 6, 0])
        assert (removed.xaxis, added.xaxis) == ("x", "x2")
        assert removed.error_x.array[1] > 0
        assert [round(y) for y in removed.y] == [0, -1, -2]
        assert "layer 1, direction, base: 0.17 (" in removed.hovertext[1]

    def test_rates_stand_in_rows_with_their_intervals(self) -> None:
        figure = evaluation_charts.rates(refusal(0.2, 0.6, (0.3, 0.5)), {"agreement": number(0.9)})
        found = traces(figure)
        assert figure.layout.yaxis.ticktext[0] == "DSR"
        assert figure.layout.yaxis.ticktext[-1] == "Agreement"
        assert found["Base"].x[0] == 0.2
        assert found["Tuned"].x[0] == 0.6
        assert found["Tuned"].error_x.array[0] == pytest.approx(0.05)
        assert len(found["Tuned"].x) == len(found["Base"].x) + 1  # base agrees with itself: not drawn
        assert found["Base"].y[0] > found["Tuned"].y[0]
        assert found["Base"].marker.color == palette.BASE
        assert found["Base"].marker.symbol != found["Tuned"].marker.symbol

    def test_rates_without_harmful_prompts(self) -> None:
        part = refusal(0.2, 0.6, (0.3, 0.5))
        for model in ("base", "tuned", "change"):
            part[model]["dsr"] = part[model]["harmful_degenerate"] = None
        figure = evaluation_charts.rates(part, None)
        assert list(figure.layout.yaxis.ticktext) == ["Over-refusal", "Degenerate, harmless"]

    def test_every_direction_has_a_panel_that_begins_without_a_push(self) -> None:
        figure = evaluation_charts.curve(attack(), "dsr", "DSR")
        scav, random = [[trace for trace in figure.data if trace.xaxis == axis] for axis in ("x", "x2")]
        assert [trace.name for trace in scav] == ["Base", "Tuned"]
        assert list(scav[0].y) == [0.5, 0.25, 0.0]
        assert list(scav[1].y) == [0.75, 0.75, 0.5]
        assert list(random[1].y) == [0.75, 0.5, 0.25]
        assert list(figure.layout.xaxis.ticktext) == ["0", "0.1", "0.8"]
        assert [round(x) for x in scav[0].x] == [0, 1, 2]  # equal steps
        assert figure.layout.xaxis.range == figure.layout.xaxis2.range
        assert figure.layout.xaxis.domain[1] < figure.layout.xaxis2.domain[0]
        assert sum(trace.showlegend for trace in figure.data) == 2

    def test_soft_prompts_have_a_panel_for_each_kind_and_number_of_vectors(self) -> None:
        figure = evaluation_charts.curve(soft(), "dsr", "DSR")
        panels = [[trace for trace in figure.data if trace.xaxis == axis] for axis in ("x", "x2", "x3")]
        assert [list(tuned.y) for _, tuned in panels] == [[0.75, 0.5, 0.25], [0.75, 0.75, 0.75], [0.75, 0.25]]
        assert [one.text for one in figure.layout.annotations][:3] == [
            "<b>Soft prompt, 4 vectors</b>",
            "<b>Random vectors (control), 4 vectors</b>",
            "<b>Soft prompt, 8 vectors</b>",
        ]
        assert "token" in figure.layout.annotations[3].text, "another unit than that of steerings"
        assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2"]

    def test_reach_counts_prompts(self) -> None:
        figure = evaluation_charts.reach(attack())
        assert len(figure.data) == 8
        base = figure.data[0]
        steps = dict(zip(base.x, base.y, strict=True))
        assert steps[0.1] == 0.5  # two of four need at most 0.1, one of them nothing
        assert steps[0.3] == 1.0
        assert "25% need at most 0.000" in base.hovertext[0]
        assert len({figure.layout[f"xaxis{n}"].range for n in ("", "3")}) == 1
        assert figure.layout.yaxis.domain[0] > figure.layout.yaxis3.domain[1]  # the first layer above

    def test_needed_over_layers_marks_the_attacked_ones(self) -> None:
        figure = evaluation_charts.needed_strip(attack(), 0.5)
        found = traces(figure)
        assert list(found["Base, mean"].x) == [0, 1, 2, 3]
        assert list(found["Tuned, mean"].y) == [0.26] * 4
        assert list(found["Tuned, easier quarter"].y) == [0.15] * 4
        assert [shape.x0 for shape in figure.layout.shapes] == [0.5, 1.5]
        assert "×1.30 (1.10 to 1.50)" in found["Tuned, mean"].hovertext[1]

    def test_boundary_marks_the_chosen_push_and_joins_those_that_grow(self) -> None:
        read = {"base": [0.9, None, 0.5], "tuned": [0.8, 0.3, 0.5]}
        figure = evaluation_charts.boundary(["no steering", "<b>", "to"], read, 1, 2)
        found = traces(figure)
        assert list(found["Tuned"].y) == [0.8, 0.3]
        assert list(found["Tuned, to p₀"].x) == [2]
        assert found["Tuned, to p₀"].mode == "markers"
        assert figure.layout.shapes[0].x0 == 1
        assert list(figure.layout.xaxis.ticktext) == ["no steering", "&lt;b&gt;", "to"]


class TestSentences:
    @pytest.mark.parametrize(
        ("change", "separated", "said"),
        [
            ((0.1, 0.4), True, "Tuned refuses more harmful requests than base"),
            ((-0.1, 0.4), True, "The embeddings are separated, but the tuned model refuses no more than before"),
            ((-0.1, 0.4), False, "The tuned model refuses no more than before"),
            ((-0.4, -0.1), True, "The embeddings are separated, but the tuned model refuses fewer"),
        ],
    )
    def test_refusals(self, change: tuple[float, float], separated: bool, said: str) -> None:
        value = sum(change) / 2
        sentence = findings.refusal_sentence(refusal(0.5, 0.5 + value, change), separated)
        assert sentence.startswith(said)
        assert f"DSR 0.50 → {0.5 + value:.2f}" in sentence

    def test_no_harmful_prompts(self) -> None:
        part = refusal(0.5, 0.5, (0.0, 0.0))
        part["base"]["dsr"] = part["tuned"]["dsr"] = part["change"]["dsr"] = None
        assert "no harmful request" in findings.refusal_sentence(part, True)

    def test_side_effects(self) -> None:
        assert findings.side_effects(refusal(0.5, 0.5, (-0.1, 0.1))) == []
        worse = refusal(0.5, 0.5, (0, 0), over_refusal=(0.1, 0.4, 0.1, 0.5), harmless_degenerate=(0.0, 0.3, 0.1, 0.5))
        over, broken = findings.side_effects(worse)
        assert "harmless requests" in over
        assert "Degenerate, harmless 0.00 → 0.30" in broken
        collapsed = refusal(0.5, 0.5, (0, 0), harmful_degenerate=(0.0, 0.9, 0.8, 1.0))
        assert "collapsed" in findings.side_effects(collapsed)[0]
        babbled = refusal(0.5, 0.5, (0, 0), harmful_degenerate=(0.9, 0.9, -0.1, 0.1))
        assert findings.side_effects(babbled) == [
            "Most replies are degenerate under both models, so the other rates say little."
        ]

    def test_needed_push(self) -> None:
        assert findings.needed_sentence(attack() | {"needed": []}) == ""
        both = findings.needed_sentence(attack())
        assert "grew from base to tuned at layer 1: ×1.30, 1.10 to 1.50; it did not at layer 2: ×1.00" in both
        assert "did not grow" in findings.needed_sentence(attack((0.9, 1.5)))
        only = attack()
        only["layers"] = [1]
        assert findings.needed_sentence(only).endswith("grew from base to tuned (layer 1: ×1.30, 1.10 to 1.50).")
        assert "layer 0" not in both  # not attacked

    def test_attacks_count_learnt_directions_alone(self) -> None:
        assert findings.attack_sentence(attack()).startswith(
            "Under 3 steerings along learnt directions tuned refuses more than base, beyond chance, in 3, less in 0"
        )

    def test_soft_prompts(self) -> None:
        assert findings.soft_sentence(soft()) == (
            "After 3 soft prompts, each fitted to the model that it attacks, tuned refuses more than base, beyond "
            "chance, in 2, less in 0; where tuned refuses least (budget 1, 8 vectors), DSR is 0.25 → 0.25."
        )


class TestEstimate:
    SHAPE = Shape(30, 576, 1536, 3_540_000, 28_000_000, 134_500_000)
    MACHINE = Machine("cpu", 1e11, 8.0)
    SAMPLE = Sample(48, 48, 12, 200, 80.0)

    def seconds(self, **settings: Any) -> dict[str, float]:
        config = EvaluateConfig(run="r", **settings)
        return dict(evaluation_seconds(config, self.SAMPLE, self.SHAPE, self.MACHINE))

    def test_the_shipped_defaults_come_near_what_was_measured(self) -> None:
        found = self.seconds()
        assert 45 < found["replies"] < 120
        assert 100 < self.seconds(soft_budgets=())["attacks"] < 300
        soft = self.seconds(suite="soft_prompt")
        assert 60 < soft["attacks"] < found["attacks"], "of which 2 · 12 · 7 replies, and 30 steps for each model"
        assert soft["loading"] < found["loading"]
        longer = self.seconds(suite="soft_prompt", soft_lengths=(4, 8))
        assert longer["attacks"] > 1.5 * soft["attacks"]
        assert set(self.seconds(suite="kl")) == {"loading", "ability"}

    def test_questions_are_counted_by_their_characters(self) -> None:
        config = EvaluateConfig(run="r", suite="ability")
        sample = Sample(0, 0, 0, 0, 0.0, questions=200, question_characters=400.0)
        found = evaluation_seconds(config, sample, self.SHAPE, None, tokens_per_second=500.0)
        assert set(found) == {"loading", "questions"}
        assert found["questions"] == pytest.approx(2 * 200 * 100 / 500)

    def test_base_alone_takes_half_the_replies_and_a_known_speed_decides(self) -> None:
        both = self.seconds(suite="refusal")["replies"]
        alone = EvaluateConfig(suite="refusal")
        assert evaluation_seconds(alone, self.SAMPLE, self.SHAPE, self.MACHINE)["replies"] == pytest.approx(both / 2)
        known = evaluation_seconds(alone, self.SAMPLE, self.SHAPE, None, tokens_per_second=96 * (28 + 64) / 10)
        assert known["replies"] == pytest.approx(10)

    def test_what_the_base_replied_already_takes_no_time(self) -> None:
        config = EvaluateConfig(run="r")
        new = self.seconds()
        every = dict.fromkeys(("refusal", "kl", "perturbation", "soft_prompt"), 1.0)
        found = evaluation_seconds(config, replace(self.SAMPLE, known=every), self.SHAPE, self.MACHINE)
        assert found["replies"] == pytest.approx(new["replies"] / 2)
        assert 0.5 < found["attacks"] / new["attacks"] < 0.6, "both are captured"
        some = replace(self.SAMPLE, known={"refusal": 0.5})
        found = evaluation_seconds(config, some, self.SHAPE, self.MACHINE)
        assert found["replies"] == pytest.approx(new["replies"] * 3 / 4)
        assert found["attacks"] == new["attacks"]


class TestDirections:
    def test_fewer_refusals_that_are_broken_replies_are_no_steering(self) -> None:
        broken = {"remove": ["degenerate"] * 6, "add": ["answer"] * 6}
        base, tuned = map(". ".join, findings.direction_findings(directed(**broken)))
        assert base.startswith("Base, layer 1: steers. Removed, it steers: DSR 1.00 → 0.17, random 1.00")
        assert tuned.startswith("Tuned, layer 1: not measured enough. Removed, it breaks replies: DSR 1.00 → 0.00")
        assert "broken replies 0.00 → 1.00" in tuned
        assert "Added, it is undecided" in tuned, "six prompts do not rule out an effect"

    def test_what_is_never_refused_cannot_be_refused_less(self) -> None:
        answers = {"before": ["answer"] * 12, "remove": ["answer"] * 6, "add": ["refusal"] * 6}
        (sentence,) = map(". ".join, findings.direction_findings(directions_by_hand(["p"] * 12, {"base": answers})[0]))
        assert "Removed, it is undecided: 0 of 6 harmful requests are refused before, too few to tell." in sentence
        assert sentence.startswith("Base, layer 1: steers."), "by what is added"

    def test_its_time_grows_with_layers_and_random_directions(self) -> None:
        sample = Sample(48, 48, 12, 0, 60.0, directed=96)
        shape = Shape(30, 576, 1536, 3_540_000, 28_000_000, 134_500_000)

        def seconds(**changes: Any) -> float:
            config = EvaluateConfig(suite="direction", **changes)
            return evaluation_seconds(config, sample, shape, None, tokens_per_second=400.0)["directions"]

        assert seconds(layers=(3,)) < seconds() < seconds(controls=5)
        assert seconds() == seconds(layers=(3, 5))
