"""The way to the hyperplane, directions with known answers, and steerings that are read back in the forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es2.analysis.layers import analyze
from es2.analysis.probes import Probes
from es2.analysis.results import AnalysisConfig
from es2.capture.residuals import capture_residuals
from es2.core.errors import InputError
from es2.evaluation.robustness import (
    DIRECTIONS,
    Attacker,
    hyperplane,
    logit,
    make_attacker,
    needed_by_layer,
    needed_perturbation,
    reading_vector,
)
from es2.evaluation.steering import ReadBack, Steered, Steering, steering_sweep
from es2.models.batching import end_tokens
from es2.models.chat_template import render, template_prefix
from es2.models.loading import load_bridge, load_model, load_tokenizer
from es2.models.replies import greedy_replies
from es2.models.row_cache import Rows
from es2.prompts.prompt_set import HARMFUL, PromptSet
from es2.store.sources import ArrayLayers
from tests.builders import save_tiny_model, tiny_prompts
from tests.clouds import probability

D = 12


pytestmark = pytest.mark.usefixtures("one_thread")


def some_probes(n_layers: int = 2, seed: int = 0) -> Probes:
    """Probes in frames far from the origin, as real ones are."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(n_layers, D))
    return Probes(
        weights=rng.normal(size=(n_layers, D)),
        bias=rng.normal(size=n_layers),
        centre=40 * rng.normal(size=(n_layers, D)),
        scale=np.full(n_layers, 130.0),
        C=np.ones(n_layers),
        direction=direction / np.linalg.norm(direction, axis=1, keepdims=True),
    )


def with_splits(prompts: PromptSet, splits: tuple[str, ...]) -> PromptSet:
    chosen = tuple(splits[int(pair.split("-")[1]) % len(splits)] for pair in prompts.pairs)
    return PromptSet(prompts.name, prompts.texts, prompts.labels, prompts.categories, prompts.pairs, chosen)


class TestAnalytic:
    @pytest.mark.parametrize("p0", [0.5, 0.01, 0.9])
    def test_after_the_shift_the_probe_says_p0(self, p0: float) -> None:
        probes = some_probes()
        embeddings = probes.centre[1] + 130 * np.random.default_rng(1).normal(size=(20, D))
        plane = hyperplane(probes, 1)
        shift = plane.signed_shift(embeddings, p0)
        moved = embeddings + shift[:, None] * plane.normal
        np.testing.assert_allclose(probability(probes, moved, 1), p0, atol=1e-9)
        length, relative = needed_perturbation(embeddings, probes, 1, p0)
        needs = probability(probes, embeddings, 1) > p0
        assert 0 < needs.sum() < 20
        np.testing.assert_allclose(length, np.where(needs, -shift, 0), atol=1e-9)
        np.testing.assert_allclose(relative, length / np.linalg.norm(embeddings, axis=1))

    def test_the_way_to_the_hyperplane_is_the_probes_own_margin(self) -> None:
        probes = some_probes()
        embeddings = probes.centre[0] + 130 * np.random.default_rng(2).normal(size=(20, D))
        length, _ = needed_perturbation(embeddings, probes, 0)
        np.testing.assert_allclose(length, np.maximum(probes.margin(embeddings, 0), 0) * 130)

    def test_logits_are_the_probes(self) -> None:
        probes = some_probes()
        embeddings = 100 * np.random.default_rng(3).normal(size=(5, D))
        found = hyperplane(probes, 0).logits(embeddings)
        np.testing.assert_allclose(1 / (1 + np.exp(-found)), probability(probes, embeddings, 0))

    def test_a_probe_that_reads_nothing_and_impossible_probabilities_are_refused(self) -> None:
        blank = some_probes()
        blank.weights[0] = 0
        with pytest.raises(InputError, match="reads nothing"):
            needed_perturbation(np.ones((2, D)), blank, 0)
        for p0 in (0, 1, -2, float("nan")):
            with pytest.raises(InputError, match="between 0 and 1"):
                logit(p0)

    def test_clouds_that_moved_apart_need_more_and_inflation_does_not_count(self) -> None:
        prompts = with_splits(tiny_prompts(60), ("probe", "test"))
        rng = np.random.default_rng(0)
        noise = rng.normal(size=(1, len(prompts), D))
        signs = np.where(prompts.labels == HARMFUL, 1.0, -1.0)
        base, apart = noise + 5, noise + 5
        base[0, :, 0] += 1.5 * signs
        apart[0, :, 0] += 4.5 * signs
        sources = [ArrayLayers(array) for array in (base, apart, 7 * base)]
        config = AnalysisConfig(n_bootstrap=50, n_shuffles=1, Cs=(0.1, 1.0))

        def needed(tuned: ArrayLayers) -> dict[float, Any]:
            analysis = analyze(prompts, sources[0], tuned, config=config)
            assert analysis.tuned_probes is not None
            records = needed_by_layer(
                prompts, sources[0], analysis.base_probes, tuned, analysis.tuned_probes, n_bootstrap=200
            )
            return {record.p0: record for record in records}

        moved, inflated = needed(sources[1])[0.5], needed(sources[2])[0.5]
        assert moved.change["relative_ratio"].low > 1.3
        assert moved.change["relative"].low > 0
        assert moved.tuned["already"].value <= moved.base["already"].value
        assert inflated.change["relative_ratio"].value == pytest.approx(1, abs=1e-6)
        assert inflated.tuned["absolute"].value == pytest.approx(7 * inflated.base["absolute"].value)
        assert len(moved.values["tuned"]) == len(moved.texts) == 30
        assert moved.base["relative"].value == pytest.approx(moved.values["base"].mean())


class TestDirections:
    def test_the_reading_vector_finds_the_axis_of_the_labels(self) -> None:
        prompts = tiny_prompts(20)
        rng = np.random.default_rng(0)
        axis = np.eye(D)[4]
        embeddings = rng.normal(size=(40, D)) * 0.3 + 10
        embeddings += np.where(prompts.labels == HARMFUL, 1.0, -1.0)[:, None] * axis
        found = reading_vector(embeddings, prompts)
        assert found @ axis > 0.95
        assert np.linalg.norm(found) == pytest.approx(1)
        # Twins that all differ by the same vector: what centring in the usual PCA would erase.
        exact = np.where(prompts.labels == HARMFUL, 1.0, 0.0)[:, None] * axis
        assert reading_vector(exact, prompts) @ axis == pytest.approx(1)

    def test_prompts_without_twins_are_put_together(self) -> None:
        twins = tiny_prompts(20)
        pairs = tuple(f"own-{row}" for row in range(40))
        alone = PromptSet("alone", twins.texts, twins.labels, twins.categories, pairs, twins.splits)
        embeddings = np.random.default_rng(0).normal(size=(40, D)) * 0.3
        embeddings[:, 2] += np.where(alone.labels == HARMFUL, 1.0, -1.0)
        assert reading_vector(embeddings, alone)[2] > 0.9

    def test_random_directions_are_unit_and_depend_on_text_and_seed_alone(self) -> None:
        probes = some_probes()
        attacker = Attacker((0, 1), tuple(hyperplane(probes, layer) for layer in (0, 1)), {})
        both = attacker.vectors("random", ("a", "b"), 0)
        np.testing.assert_allclose(np.linalg.norm(both, axis=2), 1)
        np.testing.assert_array_equal(attacker.vectors("random", ("b",), 0)[:, 0], both[:, 1])
        assert np.abs(attacker.vectors("random", ("b",), 1)[:, 0] - both[:, 1]).max() > 0.1

    def test_the_sweep_has_every_direction_at_every_budget_and_scav_to_every_p0(self) -> None:
        sweep = steering_sweep(DIRECTIONS, (0.1, 0.2), (0.5,))
        assert len(sweep) == 1 + 4 * 2 + 1
        assert len(set(sweep)) == len(sweep)
        with pytest.raises(InputError, match="Unknown direction"):
            Steering("sideways", 0.1)
        with pytest.raises(InputError, match="Only the scav direction"):
            Steering("repe", p0=0.5)


class Attacked:
    """A tiny model behind hooks, its embeddings, and an attacker who knows them."""

    def __init__(self, folder: Path, architecture: str) -> None:
        save_tiny_model(folder, architecture)
        tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, device="cpu")
        self.prompts = with_splits(tiny_prompts(16), ("probe", "probe", "test"))
        rendered = render(tokenizer, self.prompts.texts)
        self.tokens = list(rendered.token_ids)
        self.head = template_prefix(tokenizer, self.tokens)
        self.source = ArrayLayers(capture_residuals(load_bridge(folder, device="cpu"), rendered, ("last",))["last"])
        config = AnalysisConfig(n_bootstrap=20, n_shuffles=1, Cs=(1.0, 100.0))
        self.probes = analyze(self.prompts, self.source, config=config).base_probes
        self.attacker = make_attacker(self.prompts, self.source, self.probes, (2, 0))

    def reply(self, cases: list[tuple[int, Steering]], n_tokens: int = 5) -> tuple[list[tuple[int, ...]], ReadBack]:
        """Replies to (row, steering), in one batch."""
        texts = [self.prompts.texts[row] for row, _ in cases]
        steered = Steered(self.model, self.attacker, [steering for _, steering in cases], texts)
        with steered:
            tokens = [self.tokens[row] for row, _ in cases]
            ends = end_tokens(self.model)
            found = list(greedy_replies(self.model, tokens, n_tokens, ends, prefix=self.head, steering=steered))
        replies = dict(pair for batch in found for pair in zip(batch.rows, batch.replies, strict=True))
        return [replies[row] for row in range(len(cases))], steered.read


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def attacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    return Attacked(tmp_path_factory.mktemp("models") / request.param, request.param)


class TestPushed:
    @pytest.mark.parametrize("p0", [0.5, 0.01])
    def test_scav_reaches_p0_at_the_hook_at_every_layer_and_step(self, attacked: Attacked, p0: float) -> None:
        rows = np.flatnonzero(attacked.prompts.labels == HARMFUL)[:6].tolist()
        replies, seen = attacked.reply([(row, Steering("scav", p0=p0)) for row in rows])
        assert max(map(len, replies)) > 1
        assert seen.worst.max() < 1e-4
        assert seen.highest.max() <= p0 + 1e-4
        assert seen.relative.max() > 0

    def test_where_no_push_is_asked_for_the_probe_reads_what_was_captured(self, attacked: Attacked) -> None:
        rows = list(range(6))
        replies, seen = attacked.reply([(row, Steering("none", 0.0)) for row in rows])
        expected = [probability(attacked.probes, attacked.source.layer(layer)[:6], layer) for layer in (0, 2)]
        np.testing.assert_allclose(seen.probability, np.mean(expected, axis=0), atol=1e-4)
        plain = dict(self_replies(attacked, rows))
        assert replies == [plain[row] for row in rows]
        assert seen.relative.max() == 0

    def test_a_budget_is_a_length_relative_to_the_embedding_and_pushes_towards_harmless(
        self, attacked: Attacked
    ) -> None:
        rows = np.flatnonzero(attacked.prompts.labels == HARMFUL)[:4].tolist()
        _, still = attacked.reply([(row, Steering("none", 0.0)) for row in rows], 1)
        for direction in DIRECTIONS:
            _, seen = attacked.reply([(row, Steering(direction, 0.25)) for row in rows], 1)
            np.testing.assert_allclose(seen.relative, 0.25, rtol=1e-5)
            if direction != "random":
                assert (seen.probability < still.probability + 1e-9).all(), direction

    def test_rows_of_a_batch_are_pushed_each_its_own_way(self, attacked: Attacked) -> None:
        cases = [
            (0, Steering("none", 0.0)),
            (0, Steering("random", 2.0)),
            (2, Steering("scav", p0=0.01)),
            (4, Steering("mean_difference", 0.5)),
        ]
        together, seen = attacked.reply(cases)
        for index, case in enumerate(cases):
            alone, own = attacked.reply([case])
            assert alone[0] == together[index]
            assert own.relative[0] == pytest.approx(seen.relative[index], rel=1e-4)
        assert together[0] != together[1]  # as long a steering as that changes what is said

    def test_memory_that_runs_out_in_a_pass_changes_no_reading(
        self, attacked: Attacked, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cases = [(row, Steering("scav", p0=0.01)) for row in range(4)] + [(0, Steering("random", 0.5))]
        replies, seen = attacked.reply(cases)
        step, calls = Rows.step, [0]

        def short(self: Rows) -> Any:
            logits = step(self)
            calls[0] += 1
            if calls[0] == 2:
                raise MemoryError
            return logits

        monkeypatch.setattr(Rows, "step", short)
        again, read = attacked.reply(cases)
        assert again == replies
        for row in range(len(cases)):
            assert read.of(row) == pytest.approx(seen.of(row), rel=1e-6, abs=1e-8)

    def test_hooks_are_gone_afterwards(self, attacked: Attacked) -> None:
        before = dict(self_replies(attacked, [0, 2]))
        attacked.reply([(0, Steering("random", 3.0)), (2, Steering("random", 3.0))])
        assert dict(self_replies(attacked, [0, 2])) == before


def self_replies(attacked: Attacked, rows: list[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Replies without any hook."""
    model = attacked.model
    tokens = [attacked.tokens[row] for row in rows]
    found = []
    for batch in greedy_replies(model, tokens, 5, end_tokens(model), prefix=attacked.head):
        found += [(rows[i], reply) for i, reply in zip(batch.rows, batch.replies, strict=True)]
    return found


def test_a_layer_that_is_not_there_is_refused() -> None:
    prompts = with_splits(tiny_prompts(6), ("probe", "test"))
    source = ArrayLayers(np.random.default_rng(0).normal(size=(2, 12, D)))
    with pytest.raises(InputError, match="among 0 to 1"):
        make_attacker(prompts, source, some_probes(), (1, 2))
