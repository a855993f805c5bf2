"""The committed before and after: made from a real short fine-tune of a tiny model, read back, damaged, replaced."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es2.analysis.layers import analyze
from es2.analysis.results import AnalysisConfig
from es2.core.errors import InputError, MachineError
from es2.core.files import content_key
from es2.jobs.job import Job
from es2.models.catalogue import DEFAULT_MODEL
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.store.store import Store
from es2.training.config import FinetuneConfig
from es2.workflow import showcase
from es2.workflow.runs import list_runs
from es2.workflow.showcase import LIMIT_BYTES, Showcase, build, choose_pairs, load
from tests.builders import D_MODEL, N_LAYERS, save_tiny_model, tiny_prompts, write_prompts

SETTINGS = FinetuneConfig(layers=(), steps=2, pairs_per_step=4, watch_every=2, watch_prompts=4, reply_tokens=4)


class World:
    """A home with a tiny model, its prompts, one default fine-tune and the showcase made of it, in full."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.model = str(save_tiny_model(home / "models" / "tiny-llama"))
        self.prompts = str(write_prompts(home / "locks.csv", tiny_prompts(40)))
        self.made = self.build(path=home / "showcase")

    def build(self, **changes: Any) -> Showcase:
        return build(**{"model": self.model, "prompts": self.prompts, "settings": SETTINGS} | changes)

    @property
    def run(self) -> Job:
        return list_runs()[-1]

    @property
    def measured(self) -> PromptSet:
        return load_prompts(self.prompts).measured()


@pytest.fixture(scope="module")
def world(home: Path) -> World:
    with pytest.MonkeyPatch.context() as patch:
        _set_places(home, patch)
        return World(home)


@pytest.fixture(autouse=True)
def _places(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _set_places(home, monkeypatch)


def _set_places(home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("ES2_HOME", str(home))
    patch.setenv("ES2_CACHE", str(home / "cache"))
    patch.setenv("ES2_SHOWCASE", str(home / "none"))
    patch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def copy(world: World, tmp_path: Path) -> Path:
    """A showcase that may be spoilt."""
    return shutil.copytree(world.home / "showcase", tmp_path / "showcase")


def edit(path: Path, *, signed: bool = True, **changes: Any) -> None:
    document = json.loads((path / "showcase.json").read_text()) | changes
    if signed:
        document.pop("digest")
        document["digest"] = content_key(document)
    (path / "showcase.json").write_text(json.dumps(document))


class TestBuild:
    def test_holds_the_run_and_everything_a_comparison_needs(self, world: World) -> None:
        made, result = world.made, world.run.result()
        assert result is not None
        assert made.result == {name: value for name, value in result.items() if name != "path"}
        assert made.comparison.targets == made.analysis.recommended == tuple(result["target_layers"])
        assert made.prompts.digest == world.measured.digest, "everything fits"
        for kept, name in ((made.base, "base"), (made.tuned, "tuned")):
            original = Store().open(result["activations"][name])
            assert kept.positions == ("last",)
            assert kept.meta["dtype"] == "float16"
            for layer in range(N_LAYERS):
                np.testing.assert_allclose(kept.layer(layer), original.layer(layer), rtol=2**-10, atol=1e-6)
        assert made.umap.points.shape == (N_LAYERS, 2, len(made.prompts), 2)
        assert [event["done"] for event in made.events] == [1, 2]
        assert made.about["versions"]["numpy"] == np.__version__

    def test_says_nothing_about_the_machine_that_made_it(self, world: World) -> None:
        result = json.loads((world.home / "showcase" / "showcase.json").read_text())["result"]
        assert str(world.home) not in json.dumps(result)
        assert not list((world.home / "showcase").rglob(".locks"))
        assert not list((world.home / "showcase").rglob("adapter*"))

    def test_takes_an_existing_run_and_only_the_pairs_that_fit(self, world: World) -> None:
        n_runs = len(list_runs())
        whole = sum(file.stat().st_size for file in (world.home / "showcase").rglob("*") if file.is_file())
        limit = whole + 2**16 - 8000  # building reserves 2**16 for headers, and all embeddings take 12 kB
        path = world.home / "small" / "showcase"
        small = world.build(run=world.run, path=path, limit=limit)
        assert len(list_runs()) == n_runs
        assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) <= limit
        assert 0 < len(small.prompts) < len(world.made.prompts)
        assert small.about["n_prompts"] == {"measured": len(world.measured), "part": len(small.prompts)}
        rows = [world.measured.texts.index(text) for text in small.prompts.texts]
        assert rows == sorted(rows)
        np.testing.assert_array_equal(small.umap.points, world.made.umap.points[:, :, rows])
        np.testing.assert_array_equal(small.base.layer(1), world.made.base.layer(1)[rows])
        assert small.analysis.to_dict() == world.made.analysis.to_dict(), "the numbers are of all measured prompts"

    def test_a_limit_that_holds_nothing(self, world: World) -> None:
        with pytest.raises(InputError, match="allow it more bytes"):
            world.build(run=world.run, path=world.home / "nothing" / "showcase", limit=1000)
        assert not (world.home / "nothing" / "showcase").exists()

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"settings": SETTINGS.replace(steps=3)}, "its steps is 2, the default is 3"),
            ({"prompts": "builtin"}, "prompt set"),
        ],
    )
    def test_refuses_a_run_that_is_not_the_default_one(self, world: World, changes: dict[str, Any], what: str) -> None:
        with pytest.raises(InputError, match=what):
            world.build(run=world.run, path=world.home / "refused" / "showcase", **changes)

    def test_replaces_the_old_one_only_when_the_new_one_is_whole(
        self, world: World, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        edit(copy, created="long ago")

        def full(*arguments: object) -> str:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(showcase, "_write_part", full)
            with pytest.raises(MachineError, match="No space"):
                world.build(run=world.run, path=copy)
        old = load(copy)
        assert old is not None
        assert old.about["created"] == "long ago"

        assert world.build(run=world.run, path=copy).about["created"] != "long ago"
        assert [entry.name for entry in copy.parent.iterdir() if entry.name != ".locks"] == ["showcase"]


class TestLoad:
    def test_a_builder_that_was_killed_while_it_replaced_the_old_one(self, copy: Path) -> None:
        copy.rename(copy.with_name(".former-showcase-00112233"))
        assert load(copy) is not None

    def test_absent(self, tmp_path: Path) -> None:
        assert load(tmp_path / "showcase") is None
        assert load() is None

    @pytest.mark.parametrize(
        "file", ["*/activations.safetensors", "analysis/analysis.json", "umap/umap.safetensors", "*/texts.parquet"]
    )
    def test_a_damaged_file_is_named_with_the_way_out_and_stays(self, copy: Path, file: str) -> None:
        (damaged, *_) = sorted(copy.glob(file))
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
        before = sorted(copy.rglob("*"))
        with pytest.raises(InputError, match=rf"{damaged.name} is not what was written\); `es2 showcase` rebuilds it"):
            load(copy)
        assert sorted(copy.rglob("*")) == before

    def test_a_missing_file(self, copy: Path) -> None:
        (copy / "umap" / "umap.json").unlink()
        with pytest.raises(InputError, match=r"umap/umap.json is missing\); `es2 showcase` rebuilds it"):
            load(copy)

    def test_an_edited_document(self, copy: Path) -> None:
        edit(copy, signed=False, model="another")
        with pytest.raises(InputError, match=r"showcase\.json is not what was written"):
            load(copy)
        (copy / "showcase.json").write_text("{")
        with pytest.raises(InputError, match="no JSON object"):
            load(copy)

    @pytest.mark.parametrize(("version", "fix"), [(99, "update"), (0, "es2 showcase"), ("1", "es2 showcase")])
    def test_another_format(self, copy: Path, version: object, fix: str) -> None:
        edit(copy, format=version)
        with pytest.raises(InputError, match=fix):
            load(copy)

    def test_prompts_that_have_changed_since(self, copy: Path, tmp_path: Path) -> None:
        edit(copy, prompts=str(write_prompts(tmp_path / "others.csv", tiny_prompts(44))))
        with pytest.raises(InputError, match=r"other prompts than .* `es2 showcase` rebuilds it"):
            load(copy)

    def test_needs_no_torch(self, world: World) -> None:
        code = (
            "import sys; from es2.workflow.showcase import load; assert load().comparison.targets; "
            "assert 'torch' not in sys.modules"
        )
        environment = {"ES2_SHOWCASE": str(world.home / "showcase"), "ES2_CACHE": str(world.home / "cache")}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[2])

    def test_is_no_activation_set(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        kept = world.home / "cached_activations"
        shutil.copytree(world.home / "showcase", kept / "showcase")
        try:
            assert {found.path.parent for found in Store().list()} == {kept}
            assert "showcase" not in caplog.text
        finally:
            shutil.rmtree(kept / "showcase")


def test_the_checkout_has_it_whatever_the_home_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ES2_SHOWCASE")
    assert showcase.folder() == Path(__file__).resolve().parents[2] / "cached_activations" / "showcase"


class TestApp:
    @pytest.fixture
    def shown(self, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
        """The app's view: another home, in which there is no run, and the showcase."""
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        monkeypatch.setenv("ES2_SHOWCASE", str(world.home / "showcase"))
        return world

    @pytest.mark.parametrize("run", [None, "showcase"])
    def test_is_the_comparison_where_there_is_no_run(self, shown: World, run: str | None) -> None:
        from app import artifacts
        from app.state import Choice

        found = artifacts.find_comparison(Choice(run=run))
        assert found is not None
        assert (found.run, found.names, found.targets) == ("showcase", ("Base", "Tuned"), shown.made.comparison.targets)
        assert found.prompts.digest == shown.made.prompts.digest
        for margins in artifacts.pair_margins(found, 1):
            assert margins.shape == (len(found.prompts),)
        for kind in ("separation", "pca", "umap"):
            view = artifacts.pair_view(found, 1, kind)
            assert view is not None
            assert view.tuned is not None
            assert len(view.base) == len(view.tuned) == len(found.prompts)
        np.testing.assert_array_equal(view.base, shown.made.umap.points[1, 0])
        assert artifacts.find_comparison(Choice(run=run)) is found, "read once"

    def test_a_run_comes_before_it(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        from app import artifacts
        from app.state import Choice

        monkeypatch.setenv("ES2_SHOWCASE", str(world.home / "showcase"))
        found = artifacts.find_comparison(Choice(model=world.model, prompts=world.prompts))
        assert found is not None
        assert found.run == list_runs()[0].id
        other = artifacts.find_comparison(Choice(model=world.model, prompts="elsewhere.csv"))
        assert other is None, "a run of other prompts is no answer"

    def test_asked_for_and_not_there(self) -> None:
        from app import artifacts
        from app.state import Choice

        with pytest.raises(InputError, match=r"no showcase .* `es2 showcase` makes it"):
            artifacts.find_comparison(Choice(run="showcase"))

    def test_reports(self, shown: World) -> None:
        from app import artifacts
        from app.components.exports import report
        from app.state import Choice
        from es2.report.page import report_html
        from es2.workflow.compared import find_compared

        found = artifacts.find_comparison(Choice())
        assert found is not None
        page = report(found).decode()
        assert "<h1>Showcase</h1>" in page
        assert found.result["verdict_reason"].replace("'", "&#x27;") in page
        assert len(page) == len(report_html(find_compared("showcase")))


class TestChoosePairs:
    def test_whole_pairs_of_both_splits_in_proportion(self) -> None:
        prompts = tiny_prompts(300).measured()
        chosen = prompts.select(choose_pairs(prompts, 61))
        assert len(chosen) == 60
        assert all(chosen.pairs.count(pair) == 2 for pair in chosen.pairs)
        for split in ("test", "probe"):
            expected = 60 * prompts.in_split(split).mean()
            assert abs(chosen.in_split(split).sum() - expected) <= 2

    def test_a_smaller_part_lies_within_a_larger_one(self) -> None:
        prompts = tiny_prompts(200).measured()
        smaller, larger = (choose_pairs(prompts, n) for n in (20, 50))
        assert (larger | ~smaller).all()

    def test_order_of_the_prompts_does_not_matter(self) -> None:
        prompts = tiny_prompts(100).measured()
        rows = np.random.default_rng(0).permutation(len(prompts))
        shuffled = PromptSet(
            "shuffled",
            *(tuple(np.array(column)[rows].tolist()) for column in (prompts.texts,)),
            prompts.labels[rows],
            *(tuple(np.array(c)[rows].tolist()) for c in (prompts.categories, prompts.pairs, prompts.splits)),
        )
        one, other = (set(part.select(choose_pairs(part, 20)).pairs) for part in (prompts, shuffled))
        assert one == other


class TestCommand:
    def test_is_of_the_shipped_defaults_whatever_run_is_given(self, es2: Any, world: World) -> None:
        code, document = es2("showcase", "--run", world.run.id)
        assert code == 2
        assert "cannot be the showcase: its model is" in document["error"]

    def test_prints_what_was_made(self, es2: Any, world: World, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ES2_SHOWCASE", str(copy))
        monkeypatch.setattr(showcase, "build", lambda **given: load())
        code, document = es2("showcase")
        assert code == 0
        assert document["path"] == str(copy)
        assert document["verdict"] == world.made.result["verdict"]
        assert document["bytes"] > 1000


# ------------------------------------------------------------------------------------------------------ the real one


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> Showcase:
    monkeypatch.delenv("ES2_SHOWCASE")
    found = load()
    if found is None:
        pytest.skip("no showcase is committed yet; `es2 showcase` makes it")
    return found


def test_the_committed_one_is_of_todays_defaults(committed: Showcase) -> None:
    assert committed.about["model"] == DEFAULT_MODEL
    assert committed.config["prompts"] == "builtin"
    assert committed.about["prompts_digest"] == load_prompts("builtin").measured().digest
    shipped = FinetuneConfig(layers=committed.analysis.recommended).to_dict()
    assert FinetuneConfig.from_dict(committed.config).to_dict() == shipped  # it may be older than a setting
    assert committed.analysis.config == AnalysisConfig()
    assert committed.base.d_model > D_MODEL
    files = [file for file in showcase.folder().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LIMIT_BYTES < 20_000_000


@pytest.mark.real
def test_the_committed_one_is_what_its_embeddings_say(committed: Showcase) -> None:
    """The numbers of the part agree with those of all measured prompts, as far as a part can: it is a sample."""
    part = analyze(committed.prompts, committed.base, committed.tuned, config=AnalysisConfig(n_bootstrap=200))
    assert part.tuned_layers is not None
    assert committed.analysis.tuned_layers is not None
    for name in ("centroid_distance", "pairwise_distance", "mean_norm", "relative_distance", "fisher_ratio"):
        outside = 0
        for own, full in zip(
            (*part.base_layers, *part.tuned_layers),
            (*committed.analysis.base_layers, *committed.analysis.tuned_layers),
            strict=True,
        ):
            mine, theirs = own.numbers[name], full.numbers[name]
            outside += mine.low > theirs.high or mine.high < theirs.low
        assert outside <= 0.1 * 2 * len(part.base_layers), f"{name} differs at {outside} layers"
