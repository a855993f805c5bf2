"""What must not change a number, what must not be read at all, and numbers that are known before they are measured.

The analysis is held against transformations of its input that mean nothing (lengths, a rotation of the space, the order
of prompts), the fine-tune against itself, and the whole way from a prompt file to the table against a transformer whose
weights were written by hand so that every number has a closed form.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from es2.analysis.layers import analyze
from es2.analysis.projection import pca_view, separation_view
from es2.analysis.resampling import canonical, fold_of, resample_pairs, shuffled_labels
from es2.analysis.results import Analysis, AnalysisConfig
from es2.analysis.verdict import run_verdict
from es2.evaluation.suites import held_out
from es2.prompts.loading import load_builtin, load_prompts
from es2.prompts.near_duplicates import near_duplicates
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet
from es2.prompts.readers import parse_prompts
from es2.store.sources import ArrayLayers, TestSet
from es2.training.config import FinetuneConfig
from es2.training.finetune import finetune
from es2.training.sampling import make_schedule
from es2.training.validation import validation_numbers
from es2.workflow.prepare import prepare, without_shared
from tests.builders import save_tiny_model, tiny_prompts
from tests.clouds import clouds, paired_prompts, permuted, rotation, single_prompts

CONFIG = AnalysisConfig(n_bootstrap=100, n_shuffles=3, Cs=(1e-4, 1e-2, 1.0, 1e2))
LENGTH = ("centroid_distance", "pairwise_distance", "mean_norm", "norm_ratio", "scale")
"""What measures lengths in the models' own units, or compares them."""
BEFORE, AFTER = (0.0, 1.5, 4.0), (0.0, 4.0, 5.0)
PROMPTS = paired_prompts(60)
ELSEWHERE = single_prompts([HARMFUL] * 25 + [HARMLESS] * 30, name="elsewhere")


def embedded(change: Callable[[np.ndarray, str], np.ndarray], order: np.ndarray | None = None) -> Analysis:
    """Base, tuned and prompts of another origin, analysed after `change(embeddings, model)`."""
    rows = slice(None) if order is None else order
    prompts = PROMPTS if order is None else permuted(PROMPTS, order.tolist())
    own, other = {}, {}
    for model, distances, seed in (("base", BEFORE, 0), ("tuned", AFTER, 1)):
        own[model] = ArrayLayers(change(clouds(PROMPTS, distances, topic=0.5, seed=seed), model)[:, rows])
        other[model] = ArrayLayers(change(clouds(ELSEWHERE, distances, seed=seed + 2), model))
    test = TestSet(ELSEWHERE, other["base"], other["tuned"])
    return analyze(prompts, own["base"], own["tuned"], test=test, config=CONFIG)


@pytest.fixture(scope="module")
def plain() -> Analysis:
    return embedded(lambda embeddings, model: embeddings)


def numbers(document: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a JSON document by its path."""
    if isinstance(document, dict):
        return {k: v for name, entry in document.items() for k, v in numbers(entry, f"{path}/{name}").items()}
    if isinstance(document, list):
        return {k: v for place, entry in enumerate(document) for k, v in numbers(entry, f"{path}/{place}").items()}
    return {path: document}


def assert_equal(found: Analysis, expected: Analysis, within: float, *, but: Sequence[str] = ()) -> None:
    left, right = numbers(found.to_dict()), numbers(expected.to_dict())
    assert left.keys() == right.keys()
    for path, value in right.items():
        if set(path.split("/")) & set(but):
            continue
        if isinstance(value, float):
            assert left[path] == pytest.approx(value, rel=within, abs=within), path
        else:
            assert left[path] == value, path


FACTORS = {"base": 3.7, "tuned": 0.0081}


class TestLengths:
    def test_each_model_may_have_its_own_and_no_scale_free_number_moves(self, plain: Analysis) -> None:
        scaled = embedded(lambda embeddings, model: FACTORS[model] * embeddings)
        assert_equal(scaled, plain, 1e-9, but=LENGTH)
        for before, after in ((plain.base_layers, scaled.base_layers), (plain.tuned_layers, scaled.tuned_layers)):
            factor = FACTORS["base" if after is scaled.base_layers else "tuned"]
            for was, now in zip(before or (), after or (), strict=True):
                assert now.scale == pytest.approx(factor * was.scale, rel=1e-12)
                distance = now.numbers["centroid_distance"].value
                assert distance == pytest.approx(factor * was.numbers["centroid_distance"].value, rel=1e-9)

    def test_the_verdict_stays(self, plain: Analysis) -> None:
        scaled = embedded(lambda embeddings, model: FACTORS[model] * embeddings)
        assert run_verdict(scaled, (1, 2), None).name == run_verdict(plain, (1, 2), None).name == "separated"

    def test_pictures_stay(self, plain: Analysis) -> None:
        scaled = embedded(lambda embeddings, model: FACTORS[model] * embeddings)
        base = clouds(PROMPTS, BEFORE, topic=0.5)[2]
        for view in (separation_view, pca_view):
            was = view(base, plain.base_probes, 2).base
            assert view(3.7 * base, scaled.base_probes, 2).base == pytest.approx(was, abs=1e-9)

    def test_what_the_fine_tune_watches_stays(self) -> None:
        validations = PROMPTS.select(PROMPTS.in_split("test"))
        base, tuned = (clouds(validations, (distance,))[0] for distance in (1.0, 3.0))
        was, now = (
            validation_numbers(validations, base, tuned),
            validation_numbers(validations, 5.0 * base, 5.0 * tuned),
        )
        assert {name: now[name] for name in was if name != "centroid_distance"} == pytest.approx(
            {name: value for name, value in was.items() if name != "centroid_distance"}, rel=1e-9
        )


class TestRotation:
    def test_one_of_both_models_changes_nothing(self, plain: Analysis) -> None:
        turn = rotation(12, seed=7)
        assert_equal(embedded(lambda embeddings, model: embeddings @ turn), plain, 1e-9)

    def test_of_tuned_alone_is_seen_by_what_compares_directions_and_by_nothing_else(self, plain: Analysis) -> None:
        turn = rotation(12, seed=7)
        turned = embedded(lambda embeddings, model: embeddings @ turn if model == "tuned" else embeddings)
        assert_equal(turned, plain, 1e-9, but=("direction_cosine",))
        assert plain.tuned_layers is not None
        assert turned.tuned_layers is not None
        assert plain.tuned_layers[2].numbers["direction_cosine"].value > 0.9
        assert abs(turned.tuned_layers[2].numbers["direction_cosine"].value) < 0.9


class TestOrder:
    ORDER = np.random.default_rng(3).permutation(len(PROMPTS))

    def test_of_prompts_changes_no_number(self, plain: Analysis) -> None:
        assert_equal(embedded(lambda embeddings, model: embeddings, self.ORDER), plain, 1e-9)

    def test_folds_bootstraps_and_shuffles_are_keyed_by_pair(self) -> None:
        """What a prompt gets depends on itself and its pair, not on where it stands nor, but for draws, on others."""

        def dealt(prompts: PromptSet, *, drawn: bool = True) -> dict[str, tuple[Any, ...]]:
            _, ordered = canonical(prompts)
            columns = [fold_of(ordered, 5), *shuffled_labels(ordered, 4, 0)]
            columns += list(resample_pairs(ordered, 50, 0)) if drawn else []
            return {text: tuple(column[row] for column in columns) for row, text in enumerate(ordered.texts)}

        whole = dealt(PROMPTS)
        assert whole == dealt(permuted(PROMPTS, self.ORDER.tolist()))
        part = PROMPTS.select(np.array([int(pair[-4:]) % 3 > 0 for pair in PROMPTS.pairs]))
        few = dealt(part, drawn=False)
        assert few == {text: whole[text][:5] for text in part.texts}
        twins = zip(PROMPTS.texts[::2], PROMPTS.texts[1::2], strict=True)
        assert all(whole[one][0] == whole[other][0] and whole[one][5:] == whole[other][5:] for one, other in twins)

    def test_the_fine_tune_draws_the_same_prompts(self) -> None:
        prompts = tiny_prompts(80)
        order = np.random.default_rng(1).permutation(len(prompts))

        def drawn(prompts: PromptSet) -> list[list[str]]:
            plan = make_schedule(prompts, 5, 12, 0, 6, 2)
            rows = [[*batch.harmful, *batch.harmless] for batch in plan.batches]
            rows += [list(plan.validation_rows), list(plan.validation_kl), list(plan.tested)]
            return [[prompts.texts[row] for row in own] for own in rows]

        assert drawn(prompts) == drawn(permuted(prompts, order.tolist()))


class TestLeaks:
    FIRST = "Explain how a worker opens the old lock of a door without its key."
    ALIKE = (
        "explain how a worker opens the old lock of a door - without its key!",
        "Explain how a worker opens the old lock of a gate without its key.",
        "Explain how a worker opens the old lock of a door without its own key.",
    )

    def read(self, *rows: tuple[str, str, str]) -> PromptSet:
        lines = [json.dumps({"prompt": text, "label": label, "split": split}) for text, label, split in rows]
        return parse_prompts("\n".join(lines).encode(), "mine.jsonl")

    @pytest.mark.parametrize("other", ALIKE)
    def test_near_duplicates_in_two_splits_are_warned_of(self, other: str, caplog: pytest.LogCaptureFixture) -> None:
        unlike = ("Tell me how bread is baked in a village of the mountains today.", "harmless", "probe")
        prompts = self.read((self.FIRST, "harmful", "tune"), unlike, (other, "harmful", "test"))
        assert prompts.leak is not None
        assert "1 prompt(s) of 'mine' say nearly the same as one in another split" in caplog.text
        assert "in tune" in prompts.leak
        assert "in test" in prompts.leak

    def test_in_one_split_or_in_other_words_they_are_not(self, caplog: pytest.LogCaptureFixture) -> None:
        other_words = "Explain how a worker paints the old frame of a door without its key."
        rows = [(text, "harmful", "tune") for text in (self.FIRST, *self.ALIKE)]
        assert self.read(*rows, (other_words, "harmful", "test")).leak is None
        short = self.read(("How do I pick a lock?", "harmful", "tune"), ("How do I pick a fruit?", "harmless", "test"))
        assert short.leak is None
        assert "nearly the same" not in caplog.text

    def test_the_built_in_prompts_have_none(self) -> None:
        assert load_builtin().leak is None

    def test_likeness_equals_comparing_all_with_all(self) -> None:
        """Alike are two that become equal when each may lose one word; worked out the long way."""
        generator = np.random.default_rng(0)
        texts = [" ".join(generator.choice(list("abc"), size=generator.integers(8, 10))) for _ in range(60)]
        groups = [("tune", "test")[row % 2] for row in range(len(texts))]

        def shortened(text: str) -> set[str]:
            words = text.split()
            return {text, *(" ".join(words[:place] + words[place + 1 :]) for place in range(len(words)))}

        def is_near(row: int, other: int) -> bool:
            return groups[row] != groups[other] and bool(shortened(texts[row]) & shortened(texts[other]))

        expected = [row for row in range(len(texts)) if any(is_near(row, other) for other in range(row))]
        assert len(expected) > 3
        assert [row for row, _ in near_duplicates(texts, groups)] == expected

    def test_test_prompts_of_another_origin_and_evaluations_warn_too(self, caplog: pytest.LogCaptureFixture) -> None:
        own = self.read((self.FIRST, "harmful", "tune"), ("Bake bread.", "harmless", "probe"))
        elsewhere = replace(self.read((self.ALIKE[1], "harmful", "test"), ("Hi.", "harmless", "test")), name="other")
        with caplog.at_level(logging.WARNING):
            without_shared(elsewhere, own)
            held_out(elsewhere, own)
        assert caplog.text.count("1 prompt(s) of 'other' say nearly the same as one of 'mine'") == 2


class TestShuffledLabels:
    def test_probes_fitted_on_them_stay_at_chance(self) -> None:
        """Also where the true labels are read perfectly, and where there are more dimensions than prompts."""
        config = CONFIG.replace(n_shuffles=40)
        for d_model, topic in ((12, 0.0), (300, 2.0)):
            prompts = paired_prompts(80)
            found = analyze(prompts, ArrayLayers(clouds(prompts, (8.0,), d_model, topic=topic)), config=config)
            layer = found.base_layers[0].numbers
            assert layer["probe_accuracy"].value > 0.95
            assert layer["probe_accuracy_control"].value == pytest.approx(0.5, abs=0.04)
            assert layer["probe_auroc_control"].value == pytest.approx(0.5, abs=0.05)

    def test_so_does_a_whole_analysis_of_labels_that_mean_nothing(self) -> None:
        prompts = paired_prompts(80)
        shuffled = shuffled_labels(prompts, 30, seed=5)
        embeddings = ArrayLayers(clouds(prompts, (6.0,), 200, topic=1.0))
        config = CONFIG.replace(n_shuffles=1, n_bootstrap=20)
        reached = []
        for labels in shuffled:
            found = analyze(replace(prompts, labels=labels.astype(np.int8)), embeddings, config=config)
            layer = found.base_layers[0]
            reached.append(
                [layer.numbers["probe_accuracy"].value, layer.numbers["probe_auroc"].value, layer.cv_accuracy]
            )
        assert np.mean(reached, axis=0) == pytest.approx([0.5] * 3, abs=0.05)


@pytest.mark.usefixtures("one_thread", "places")
class TestSameSeed:
    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_gives_the_same_run_on_the_cpu_to_the_last_bit(self, method: str, home: Path, tmp_path: Path) -> None:
        model = home / "models" / "llama"
        if not model.exists():
            save_tiny_model(model, initializer_range=0.1)
        turns = ("tune", "validation", "tune", "test")
        prompts = tiny_prompts(24)
        prompts = replace(prompts, splits=tuple(turns[row // 2 % 4] for row in range(len(prompts))))
        config = FinetuneConfig(
            layers=(0, 1), model=str(model), method=method, steps=4, pairs_per_step=4, validate_every=2, rank=4,
            reply_tokens=3, learning_rate=3e-3, kl_budget=5.0, device="cpu",
        )  # fmt: skip

        def run(name: str, seed: int) -> tuple[tuple[float, ...], Any, dict[str, bytes]]:
            result = finetune(config.replace(seed=seed), prompts, tmp_path / name)
            kept = result.output / "adapter_model.safetensors" if method == "lora" else result.output
            # Not the file's bytes: its header is written in no particular order.
            weights = {weight: array.tobytes() for weight, array in load_file(kept).items()}
            return result.losses, result.validations, weights

        first, second, other = run("first", 0), run("second", 0), run("other", 1)
        assert len(first[0]) == 4
        assert first == second
        assert first[2] != other[2]


# ------------------------------------------------------------------------------- a transformer that was written by hand

N_PAIRS = 20  # in each of `probe` and `test`
WORDS = [f"word{number}" for number in range(2 * N_PAIRS)]
MARKS = {HARMFUL: "harm", HARMLESS: "safe"}
SPECIAL = ("<unk>", "<user>", "<reply>")
WIDTH = 64
RADIUS, DELTA = 3.0, 0.6
"""The length of every token's embedding, and how far the two marks stand off the plane between them."""


def write_tokenizer(folder: Path) -> None:
    """One token a word; the template puts one before the user's text and one after."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *MARKS.values(), *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    wrapped.chat_template = (
        "{{ '<user> ' }}{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<reply>' }}{% endif %}"
    )
    wrapped.save_pretrained(folder)


def write_model(folder: Path) -> Path:
    """A Llama of two blocks, all of whose tokens are known vectors of one length.

    Every word, and every part of the template, has an axis of its own. The marks are ±DELTA along the first axis and
    otherwise alike. Block 0 adds nothing. Block 1 attends to all tokens up to its own alike, since its queries and keys
    are zero, and adds the mean of what its norm makes of them: each token's direction times sqrt(WIDTH). Neither has a
    feed-forward part.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = [*SPECIAL, *MARKS.values(), *WORDS]
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=32, rms_norm_eps=1e-12, bos_token_id=None, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    table = torch.zeros(len(words), WIDTH)
    for number, word in enumerate(words):
        table[number, 2 + number] = RADIUS
        for label, mark in MARKS.items():
            if word == mark:
                table[number] = 0
                table[number, 0] = DELTA if label == HARMFUL else -DELTA
                table[number, 1] = math.sqrt(RADIUS**2 - DELTA**2)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(table)
        for number, block in enumerate(model.model.layers):
            attention = block.self_attn
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, block.mlp.down_proj):
                part.weight.zero_()
            if number == 1:
                attention.v_proj.weight.copy_(torch.eye(WIDTH))
                attention.o_proj.weight.copy_(torch.eye(WIDTH))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.usefixtures("one_thread", "places")
class TestKnownModel:
    """Prompts are `<user> word mark <reply>`; twins differ in their mark, pairs in their word.

    With g = sqrt(WIDTH)/RADIUS, block 1 makes of `last` (the fourth token) reply + g/4 · (user + word + mark + reply)
    and of `last_instruction` (the third) mark + g/3 · (user + word + mark). So the clouds stand 2aDELTA apart, where a
    is g/4, and 1 + g/3; within a class only the word differs, by bRADIUS with b = g/4, g/3 along axes of their own; and
    twins agree in everything else, so there is no bias to take off.
    """

    @pytest.fixture(scope="class")
    def analyses(self, home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Analysis]:
        folder = tmp_path_factory.mktemp("known")
        model = write_model(folder / "model")
        rows = [
            {
                "prompt": f"{word} {mark}",
                "label": LABEL_NAMES[label],
                "pair": word,
                "split": ("probe", "test")[number % 2],
            }
            for number, word in enumerate(WORDS)
            for label, mark in MARKS.items()
        ]
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        prompts = load_prompts(str(folder / "prompts.jsonl"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ES2_HOME", str(folder / "home"))
            patch.setenv("ES2_CACHE", str(folder / "cache"))
            return {
                position: prepare(
                    str(model), prompts, config=CONFIG.replace(position=position), device="cpu", dtype="float32"
                ).analysis
                for position in ("last", "last_instruction")
            }

    @pytest.mark.parametrize("position", ["last", "last_instruction"])
    def test_every_number_is_that_of_the_closed_form(self, analyses: dict[str, Analysis], position: str) -> None:
        g = math.sqrt(WIDTH) / RADIUS
        n_tokens = 4 if position == "last" else 3
        b = g / n_tokens
        a = b if position == "last" else 1 + b
        # The squared length of an embedding: the word, the mark (both its parts), and what the template's tokens add.
        mark_plane = a**2 * (RADIUS**2 - DELTA**2)
        template = b**2 * RADIUS**2 + ((1 + b) ** 2 * RADIUS**2 if position == "last" else 0)
        scale = math.sqrt((b * RADIUS) ** 2 + (a * DELTA) ** 2 + mark_plane + template)
        pairwise = (math.hypot(2 * a * DELTA, math.sqrt(2) * b * RADIUS) * (N_PAIRS - 1) + 2 * a * DELTA) / N_PAIRS
        expected = {
            "centroid_distance": 2 * a * DELTA,
            "pairwise_distance": pairwise,
            "mean_norm": scale,
            "relative_distance": 2 * a * DELTA / scale,
            "fisher_ratio": 2 * a * DELTA / (b * RADIUS),
            "orthogonal_std": b * RADIUS / scale,
            "effective_rank": N_PAIRS - 1,
            "probe_accuracy": 1.0,
            "probe_auroc": 1.0,
            # By symmetry the best hyperplane is the one between the marks, whatever the regularisation.
            "margin_mean": a * DELTA / scale,
            "margin_harmful_q1": a * DELTA / scale,
            "mean_difference_margin": a * DELTA / scale,
        }
        layer = analyses[position].base_layers[1]
        assert {name: layer.numbers[name].value for name in expected} == pytest.approx(expected, rel=2e-6)
        assert layer.scale == pytest.approx(scale, rel=1e-6)
        for point in layer.by_C:
            assert point.numbers["margin_mean"].value == pytest.approx(a * DELTA / scale, rel=1e-5)

    def test_where_nothing_can_be_read_nothing_is(self, analyses: dict[str, Analysis]) -> None:
        """After block 0 the last token of every prompt is the template's own, and nothing else."""
        layer = analyses["last"].base_layers[0].numbers
        for name in ("centroid_distance", "relative_distance", "fisher_ratio", "orthogonal_std", "margin_mean"):
            assert layer[name].value == pytest.approx(0, abs=1e-6), name
        assert layer["mean_norm"].value == pytest.approx(RADIUS, rel=1e-6)
        assert layer["probe_accuracy"].value == 0.5
        assert layer["probe_auroc"].value == 0.5

    def test_the_marks_alone_are_read_where_they_stand(self, analyses: dict[str, Analysis]) -> None:
        layer = analyses["last_instruction"].base_layers[0].numbers
        assert layer["relative_distance"].value == pytest.approx(2 * DELTA / RADIUS, rel=1e-6)
        assert layer["mean_difference_margin"].value == pytest.approx(DELTA / RADIUS, rel=1e-6)
        assert layer["orthogonal_std"].value == pytest.approx(0, abs=1e-6)
        assert layer["probe_accuracy"].value == 1.0
