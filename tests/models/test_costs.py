"""A cost is stated once, and every estimate goes by it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import es2
from es2.evaluation.config import EvaluateConfig
from es2.models import costs
from es2.models.machine import Machine
from es2.models.shape import Shape
from es2.training.config import FinetuneConfig
from es2.workflow.evaluation_plan import Sample, evaluation_seconds
from es2.workflow.memory import needs
from es2.workflow.plan import plan
from tests.builders import save_tiny_model, tiny_prompts

ROOT = Path(es2.__file__).parents[1]
SHAPE = Shape(30, 576, 1536, 3_540_000, 28_311_552, 134_515_008, 192)


def assigned(file: Path) -> set[str]:
    """The names that a module assigns outside of functions, without a leading underscore."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {name.id.lstrip("_") for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def test_no_cost_is_stated_a_second_time() -> None:
    known = {name for name in vars(costs) if name.isupper()}
    assert len(known) > 15
    for file in (*ROOT.glob("es2/**/*.py"), *ROOT.glob("app/**/*.py")):
        if file != Path(costs.__file__):
            assert not assigned(file) & known, file


def test_a_weight_of_four_bits_has_its_share_of_a_scale() -> None:
    machine = Machine("cuda", 1e14, 24.0)
    plain, packed = (
        needs(FinetuneConfig(layers=(16, 22), quantize=quantize), SHAPE, [30] * 20, 20, machine)
        for quantize in (None, "4bit")
    )
    saved = (2 - 4.5 / 8) * SHAPE.n_layers * SHAPE.block_parameters
    assert plain["steps"] - packed["steps"] == pytest.approx(saved)


def test_a_start_takes_as_long_in_both_plans(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny-llama")
    machine = Machine("cpu", 1e9, 8.0)
    config = FinetuneConfig(layers=(1, 2), model=str(folder), replies=False)
    found = plan(config, tiny_prompts(60), folder, machine=machine)
    shape = Shape.of_folder(folder)
    config = EvaluateConfig(model=str(folder), run="x", suite="all")
    loads = evaluation_seconds(config, Sample(4, 4, 4, 0, 80.0), shape, machine)["loading"]
    per_load = costs.LOAD_SECONDS + 4 * shape.parameters / costs.LOAD_BYTES_PER_SECOND
    assert found.seconds["start"] == pytest.approx(costs.START_SECONDS + 3 * per_load)
    assert loads == pytest.approx(costs.START_SECONDS + 7 * per_load)


def test_attention_heads_by_the_name_of_gpt2(tmp_path: Path) -> None:
    sizes = {"model_type": "gpt_bigcode", "n_layer": 2, "n_embd": 64, "n_head": 4, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"vocab_size": 100}), encoding="utf-8")
    assert Shape.of_folder(tmp_path).d_kv == 64 // 4
