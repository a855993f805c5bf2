"""A soft prompt does to a tiny model what it is fitted for, and leaves nothing behind but its effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from es2.analysis.layers import analyze
from es2.analysis.results import AnalysisConfig
from es2.capture.residuals import capture_residuals
from es2.core.errors import InputError
from es2.core.progress import Cancelled
from es2.evaluation import soft_attack, soft_prompt
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.results import read_evaluation
from es2.evaluation.robustness import make_attacker
from es2.evaluation.soft_prompt import (
    SoftPrompt,
    fit_soft_prompt,
    own_refusals,
    random_directions,
    soft_sweep,
    spliced,
)
from es2.models import replies
from es2.models.chat_template import render, template_prefix
from es2.models.loading import load_bridge, load_model, load_tokenizer
from es2.models.soft_tokens import SoftTokens, embeddings_of, mean_embedding_norm
from es2.models.thinking import ReplyThinking, answer_reader
from es2.prompts.prompt_set import HARMFUL
from es2.store.sources import ArrayLayers
from es2.store.store import Store
from es2.workflow.evaluate import evaluate
from tests.builders import save_tiny_model, tiny_prompts
from tests.evaluation.test_robustness import with_splits
from tests.old_artifacts import check

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = (0, 1)


class Attacked:
    """A tiny model, what its attacker knows of it, and harmful prompts."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.folder = save_tiny_model(folder, architecture)
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, device="cpu").requires_grad_(False)
        prompts = with_splits(tiny_prompts(16), ("probe", "probe", "test"))
        rendered = render(self.tokenizer, prompts.texts)
        source = ArrayLayers(capture_residuals(load_bridge(folder, device="cpu"), rendered, ("last",))["last"])
        config = AnalysisConfig(n_bootstrap=20, n_shuffles=1, Cs=(1.0,))
        self.attacker = make_attacker(prompts, source, analyze(prompts, source, config=config).base_probes, LAYERS)
        self.harmful = rendered.select(np.flatnonzero(prompts.labels == HARMFUL)[:6].tolist())
        self.prefix = template_prefix(self.tokenizer, rendered.token_ids)
        self.replies = []  # the model's own, since only what is likely can become unlikely
        for tokens in self.harmful.token_ids:
            whole = list(tokens)
            for _ in range(3):
                whole.append(int(self.model(torch.tensor([whole])).logits[0, -1].argmax()))
            self.replies.append(tuple(whole[-3:]))

    def fit(self, refusals: list[tuple[int, ...]], budgets: tuple[float, ...] = (2.0,), **more: Any) -> list[Any]:
        return fit_soft_prompt(
            self.model, self.attacker, self.harmful.token_ids, self.harmful.first_instruction, refusals, 3, budgets,
            prefix=self.prefix, **{"seed": 0, **more},
        )  # fmt: skip

    def effect(self, vectors: torch.Tensor | None) -> tuple[float, float]:
        """The probes' mean log-odds of harmful at `last` and the mean log-probability of `replies`, by whole passes."""
        odds, logs = [], []
        given = torch.empty(0, 1) if vectors is None else vectors
        with torch.no_grad(), SoftTokens(self.model, given) as soft:
            for tokens, start, reply in zip(
                self.harmful.token_ids, self.harmful.first_instruction, self.replies, strict=True
            ):
                prompt = spliced(tokens, start, range(soft.first, soft.first + len(given)))
                output = self.model(torch.tensor([[*prompt, *reply[:-1]]]), output_hidden_states=True)
                last = len(prompt) - 1
                for plane, layer in zip(self.attacker.planes, LAYERS, strict=True):
                    odds.append(plane.logits(output.hidden_states[layer + 1][0, last : last + 1].numpy())[0])
                logs.append(output.logits[0, last : last + 3].log_softmax(-1)[range(3), reply].mean())
        return float(np.mean(odds)), float(np.mean(logs))


@pytest.fixture(scope="module", params=["llama", "gemma"])
def attacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    return Attacked(tmp_path_factory.mktemp("models") / request.param, request.param)


class TestFitting:
    def test_probes_read_less_harmful_and_refusals_become_unlikely(self, attacked: Attacked) -> None:
        odds, logs = attacked.effect(None)
        (vectors,) = attacked.fit(attacked.replies)
        unit = mean_embedding_norm(attacked.model)
        torch.testing.assert_close(vectors.norm(dim=1), torch.full((3,), 2.0 * unit))
        random = torch.tensor(2 * unit * random_directions("a", 3, vectors.shape[1], 0), dtype=torch.float32)
        fitted_odds, fitted_logs = attacked.effect(vectors)
        random_odds, random_logs = attacked.effect(random)
        assert fitted_odds < min(odds, random_odds) - 0.5
        assert fitted_logs < min(logs, random_logs)

    def test_without_a_refusal_no_block_above_the_attacked_ones_is_run(self, attacked: Attacked) -> None:
        above = list(attacked.model.base_model.children())[1][2]
        runs: list[int] = []
        handle = above.register_forward_hook(lambda *_: runs.append(1))
        (vectors,) = attacked.fit([()] * 6)
        handle.remove()
        assert len(runs) <= 3, "the prefix, and the check of the head"
        assert attacked.effect(vectors)[0] < attacked.effect(None)[0] - 0.5

    def test_the_same_seed_fits_the_same_vectors_and_budgets_grow_from_one_another(self, attacked: Attacked) -> None:
        small, large = attacked.fit([()] * 6, (1.0, 2.0))
        (alone,) = attacked.fit([()] * 6, (1.0,))
        torch.testing.assert_close(alone, small)
        assert not torch.allclose(attacked.fit([()] * 6, (1.0,), seed=1)[0], small)
        assert not torch.allclose(2 * small, large), "fitted on"

    def test_steps_are_reported_and_may_stop(self, attacked: Attacked) -> None:
        calls: list[int] = []

        def step() -> None:
            calls.append(1)
            if len(calls) == 3:
                raise Cancelled

        with pytest.raises(Cancelled):
            attacked.fit([()] * 6, step=step)
        assert attacked.model.get_input_embeddings()._forward_hooks == {}


def test_a_refusal_counts_by_its_first_tokens(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    words = answer_reader(attacked.tokenizer, None)
    none = own_refusals(
        attacked.model, words, attacked.harmful.token_ids, attacked.prefix, lambda *_, **__: None, "reply"
    )
    assert none == [()] * 6, "a tiny model babbles"
    monkeypatch.setattr(soft_prompt, "judge_reply", lambda text: "refusal")
    first = own_refusals(
        attacked.model, words, attacked.harmful.token_ids, attacked.prefix, lambda *_, **__: None, "reply"
    )
    assert max(map(len, first)) <= 8
    assert [reply[:3] for reply in first] == attacked.replies
    thoughts = answer_reader(attacked.tokenizer, ReplyThinking(None, "</think>", opened=True))
    monkeypatch.setattr(soft_prompt, "judge_reply", lambda text: "refusal" if text else "empty")
    settings = (attacked.harmful.token_ids, attacked.prefix, lambda *_, **__: None, "reply")
    assert own_refusals(attacked.model, thoughts, *settings) == [()] * 6, "a thought that never ends refuses nothing"


def test_the_sweep() -> None:
    sweep = soft_sweep((2, 1), (4.0, 1.0))
    assert sweep[0] == SoftPrompt()
    assert len(sweep) == 1 + 2 * 2 * 2
    assert [one.budget for one in sweep[1:3]] == [1.0, 4.0], "each is fitted on from the smaller one"
    for wrong in ({"soft_lengths": (0,)}, {"soft_budgets": (0.0,)}, {"suite": "soft_prompt", "soft_budgets": ()}):
        with pytest.raises(InputError, match=r"A soft prompt"):
            EvaluateConfig(**wrong)
    assert EvaluateConfig(suite="perturbation").suites == ("perturbation", "soft_prompt")
    assert EvaluateConfig(suite="perturbation", soft_budgets=()).suites == ("perturbation",)


# ------------------------------------------------------------------------------------------------------- the evaluation

SMALL: dict[str, Any] = {
    "suite": "soft_prompt",
    "new_tokens": 5,
    "steering_limit": 3,
    "soft_lengths": (2,),
    "soft_budgets": (1.0, 3.0),
    "device": "cpu",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("home") / "cached_activations")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))


def run_it(model: Path, store: Store, folder: Path, report: Callable[..., None] | None = None, **more: Any) -> Any:
    config = EvaluateConfig(model=str(model), **SMALL | more)
    own = {"report": report} if report else {}
    return evaluate(config, tiny_prompts(60), folder, store=store, **own)


def test_the_suite_alone(model: Path, store: Store, tmp_path: Path) -> None:
    document = run_it(model, store, tmp_path / "job")
    part = document["suite"]["soft_prompt"]
    assert [(point["direction"], point["length"], point["budget"]) for point in part["curve"]] == [
        ("none", 0, 0.0),
        ("soft_prompt", 2, 1.0),
        ("soft_prompt", 2, 3.0),
        ("soft_random", 2, 1.0),
        ("soft_random", 2, 3.0),
    ]
    assert part["n_refused"] == {"base": 0}
    assert part["n_prompts"] == 3
    none, *_, fitted = part["curve"][:3]
    assert fitted["base"]["probability"]["value"] < none["base"]["probability"]["value"]
    json.dumps(document, allow_nan=False)
    rows = read_evaluation(Path(document["path"]))["rows"]["soft_prompt"]
    assert len(rows) == 5 * 3
    assert all(set(row["base"]) == {"verdict", "read"} for row in rows), "no reply is kept"


def test_nothing_but_the_effect_is_written(
    model: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[torch.Tensor] = []
    own, texts = fit_soft_prompt, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        fitted.extend(found := own(*args, **kwargs))
        return found

    def judged(text: str) -> str:
        texts.append(text)
        return "answer"

    monkeypatch.setattr(soft_attack, "fit_soft_prompt", noted)
    monkeypatch.setattr("es2.evaluation.suites.judge_reply", judged)
    run_it(model, store, tmp_path / "job")
    assert len(fitted) == 2
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) >= 2
    values = [vectors.flatten()[:4].double().numpy() for vectors in fitted]
    for file in written:
        data = file.read_bytes()
        for vector in values:
            for form in (vector.astype(np.float64), vector.astype(np.float32), vector.astype(np.float16)):
                assert form[:3].tobytes() not in data, file
            assert not any(f"{value:.4f}".lstrip("-").encode() in data for value in vector.tolist()), file
        for text in filter(lambda one: len(one) > 3, texts):
            assert json.dumps(text, ensure_ascii=False)[1:-1].encode() not in data, file


def test_killed_it_fits_again_and_ends_alike(
    model: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_it(model, store, tmp_path / "whole")
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "another home"))  # the first keeps what the base replied
    monkeypatch.setattr(replies, "rows_that_fit", lambda device, bytes_per_row: 3)
    left = [9]

    def report(stage: str, *_: Any, **__: Any) -> None:
        left[0] -= stage.startswith("soft")
        if not left[0]:
            raise Cancelled

    with pytest.raises(Cancelled):
        run_it(model, store, tmp_path / "job", report)
    stages: list[str] = []
    resumed = run_it(model, store, tmp_path / "job", lambda stage, *_, **__: stages.append(stage))
    assert "fit base" in stages
    check(resumed["suite"], whole["suite"], 1e-4)
    stages.clear()
    Path(resumed["path"]).unlink()
    again = run_it(model, store, tmp_path / "job", lambda stage, *_, **__: stages.append(stage))
    assert again["suite"] == resumed["suite"]
    assert "fit base" not in stages, "every reply is in the log"


def test_a_model_that_cannot_take_one_is_refused_before_anything_is_fitted(
    model: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> None:
        raise InputError("Not this one.")

    monkeypatch.setattr("es2.models.soft_tokens.refuse_other_readers", refuse)
    monkeypatch.setattr(soft_attack, "fit_soft_prompt", lambda *_, **__: pytest.fail("fitted"))
    monkeypatch.setattr(soft_attack, "own_refusals", lambda *_, **__: pytest.fail("replied"))
    with pytest.raises(InputError, match="Not this one"):
        run_it(model, store, tmp_path / "job")
    both = run_it(model, store, tmp_path / "job", suite="perturbation", budgets=(0.5,), directions=("scav",))
    assert both["suite"]["soft_prompt"] == {"problem": "Not this one."}
    assert both["suite"]["perturbation"]["curve"], "the other attacks go on"


def test_a_head_that_logits_cannot_be_made_with_is_refused_likewise(
    model: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> None:
        raise InputError("A strange head.")

    monkeypatch.setattr("es2.models.kl.read_lm_head", refuse)
    monkeypatch.setattr(soft_attack, "own_refusals", lambda *_, **__: pytest.fail("replied"))
    with pytest.raises(InputError, match=r"No soft prompt can be fitted to this model: A strange head\."):
        run_it(model, store, tmp_path / "job")


def test_half_precision(attacked: Attacked) -> None:
    model = load_model(attacked.folder, device="cpu", dtype="bfloat16").requires_grad_(False)
    (vectors,) = fit_soft_prompt(
        model, attacked.attacker, attacked.harmful.token_ids, attacked.harmful.first_instruction, attacked.replies,
        3, (2.0,), prefix=attacked.prefix, seed=0,
    )  # fmt: skip
    assert vectors.dtype == torch.float32
    odds, logs = attacked.effect(None)
    fitted_odds, fitted_logs = attacked.effect(vectors)
    assert fitted_odds < odds - 0.5
    assert fitted_logs < logs


def test_a_context_that_vectors_do_not_fit_into_is_refused(
    model: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any) -> None:
        raise Cancelled

    monkeypatch.setattr(soft_attack, "load", loaded)
    prompts = tiny_prompts(60)
    attacked = prompts.select((prompts.labels == HARMFUL) & prompts.in_split("probe"))
    longest = max(map(len, render(load_tokenizer(model), attacked.texts).token_ids))
    with pytest.raises(Cancelled):
        run_it(model, store, tmp_path / "job", new_tokens=256 - longest - 2)
    with pytest.raises(InputError, match="reads at most 256"):
        run_it(model, store, tmp_path / "job", new_tokens=256 - longest - 1)


def test_vectors_are_as_long_as_the_budget_says_and_random_ones_depend_on_text_and_seed(attacked: Attacked) -> None:
    one, other = (random_directions(text, 3, 8, 0) for text in ("a", "b"))
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1)
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_array_equal(one, random_directions("a", 3, 8, 0))
    assert np.abs(one - random_directions("a", 3, 8, 1)).max() > 0.1
    assert embeddings_of(attacked.model, [0]).shape[-1] == 32
