"""The committed before and after: made from a real short fine-tune of a tiny model, read back, damaged, replaced."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from es2.analysis.layers import analyze
from es2.analysis.projection import UmapCoordinates
from es2.analysis.results import AnalysisConfig
from es2.core.errors import InputError, MachineError
from es2.core.files import home as own_home
from es2.core.files import shipped, with_checksum
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.results import find_evaluations, read_evaluation
from es2.jobs.job import Job
from es2.jobs.queue import list_jobs, reopen
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.report.page import Compared
from es2.store.store import Store
from es2.training.config import FinetuneConfig
from es2.workflow import showcase
from es2.workflow.compared import find_compared, find_comparison
from es2.workflow.derived import find_umap
from es2.workflow.evaluate import evaluate
from es2.workflow.runs import export, list_runs, open_run
from es2.workflow.showcase import LIMIT_BYTES, build, choose_pairs
from tests.app.test_app import MAIN
from tests.builders import D_MODEL, N_LAYERS, save_tiny_model, tiny_prompts, write_prompts

SETTINGS = FinetuneConfig(
    layers=(), steps=2, pairs_per_step=4, validate_every=2, validation_prompts=4, reply_tokens=4, replies=False
)


class World:
    """A home with a tiny model, its prompts, one default fine-tune and the showcase made of it, in full."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.model = str(save_tiny_model(home / "models" / "tiny-llama"))
        self.prompts = str(write_prompts(home / "locks.csv", tiny_prompts(40)))
        self.made = self.build(home / "showcase")

    def build(self, path: Path, **changes: Any) -> Compared:
        """The showcase, made at `path`, which is where it is looked for from then on."""
        os.environ["ES2_SHOWCASE"] = str(path)  # the tests' fixture puts it back
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
def copy(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A showcase that may be spoilt."""
    path = shutil.copytree(world.home / "showcase", tmp_path / "showcase")
    monkeypatch.setenv("ES2_SHOWCASE", str(path))
    return path


def edit(path: Path, file: str, *, signed: bool = True, **changes: Any) -> None:
    (place,) = path.glob(f"runs/*/{file}")
    document = json.loads(place.read_text()) | changes
    place.write_text(json.dumps(with_checksum(document) if signed else document))


def umap_of(found: Compared) -> UmapCoordinates:
    umap = find_umap(found.base, found.prompts, found.position, found.tuned)
    assert umap is not None
    return umap


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


class TestBuild:
    def test_holds_the_run_and_everything_a_comparison_needs(self, world: World) -> None:
        made, result = world.made, world.run.result()
        assert result is not None
        keys = {"base": made.base.key, "tuned": made.tuned.key}
        assert made.result == {name: own for name, own in result.items() if name != "path"} | {"activations": keys}
        assert made.targets == made.analysis.recommended == tuple(result["target_layers"])
        assert made.prompts.digest == world.measured.digest, "everything fits"
        for kept, name in ((made.base, "base"), (made.tuned, "tuned")):
            original = Store().open(result["activations"][name])
            assert kept.positions == ("last",)
            assert kept.meta["dtype"] == "float16"
            assert kept.whole == original.key
            for layer in range(N_LAYERS):
                np.testing.assert_allclose(kept.layer(layer), original.layer(layer), rtol=2**-10, atol=1e-6)
        assert umap_of(made).points.shape == (N_LAYERS, 2, len(made.prompts), 2)
        assert [event["done"] for event in made.events] == [1, 2]
        assert made.config["versions"]["numpy"] == np.__version__

    def test_says_nothing_about_the_machine_that_made_it(self, world: World) -> None:
        (run,) = (world.home / "showcase" / "runs").iterdir()
        assert str(world.home) not in (run / "result.json").read_text()
        assert not {"host", "pid"} & json.loads((run / "config.json").read_text()).keys()
        assert not list((world.home / "showcase").rglob(".locks"))
        assert not list((world.home / "showcase").rglob("adapter*"))

    def test_takes_an_existing_run_and_only_the_pairs_that_fit(self, world: World) -> None:
        n_runs = len(list_runs())
        whole = size(world.home / "showcase")
        limit = whole + 2**16 - 8000  # building reserves 2**16 for headers, and all embeddings take 12 kB
        path = world.home / "small" / "showcase"
        umap = umap_of(world.made)
        small = world.build(path, run=world.run, limit=limit)
        assert len(list_runs()) == n_runs
        assert size(path) <= limit
        assert 0 < len(small.prompts) < len(world.made.prompts)
        rows = [world.measured.texts.index(text) for text in small.prompts.texts]
        assert rows == sorted(rows)
        np.testing.assert_array_equal(umap_of(small).points, umap.points[:, :, rows])
        np.testing.assert_array_equal(small.base.layer(1), world.made.base.layer(1)[rows])
        assert small.analysis.to_dict() == world.made.analysis.to_dict(), "the numbers are of all measured prompts"

    def test_takes_the_evaluations_on_its_prompts_without_the_replies(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shown = {"model": world.model, "run": world.run.id, "limit": 2, "steering_limit": 1, "new_tokens": 4}
        shown |= {"directions": ("random",), "budgets": (0.1,), "p0s": (), "soft_budgets": ()}
        others = str(write_prompts(tmp_path / "others.csv", tiny_prompts(44)))
        for prompts in (world.prompts, others):
            for suite in ("refusal", "perturbation", "ability"):
                config = EvaluateConfig(**shown, prompts=prompts, suite=suite, question_limit=1)
                evaluate(config, load_prompts(prompts), world.home, run=world.run)
        assert len(find_evaluations(world.run)) == 6
        world.build(world.home / "evaluated" / "showcase", run=world.run)

        shipped = open_run("showcase")
        kept = {own["settings"]["suite"]: own for own in map(read_evaluation, find_evaluations(shipped))}
        assert kept.keys() == {"refusal", "perturbation", "ability"}
        for path in find_evaluations(world.run):
            whole = read_evaluation(path)
            if whole["settings"]["prompts"] == world.prompts:
                assert kept[whole["settings"]["suite"]]["suite"] == whole["suite"]
        for suite in ("refusal", "perturbation"):
            for row in kept[suite]["rows"][suite]:
                for model in ("base", "tuned"):
                    assert row[model]["verdict"]
                    assert "text" not in row[model]
        assert list((own_home() / "base_replies").iterdir())
        lines = {file.name for file in (world.home / "evaluated" / "showcase").rglob("*.jsonl")}
        assert lines == {"events.jsonl"}, "no reply is shipped"

        monkeypatch.setenv("ES2_HOME", str(tmp_path / "nothing made yet"))
        at = AppTest.from_file(MAIN, default_timeout=60)
        for page in ("behaviour", "robustness"):
            at._page_hash = calc_hash(page)
            at.run()
            assert not at.exception
            assert "without replies" in "\n".join(caption.value for caption in at.caption)
            assert not [button for button in at.button if button.key == "new_evaluation"]
            assert [one.value for one in at.subheader]

    def test_a_limit_that_holds_nothing(self, world: World) -> None:
        with pytest.raises(InputError, match="allow it more bytes"):
            world.build(world.home / "nothing" / "showcase", run=world.run, limit=1000)
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
            world.build(world.home / "refused" / "showcase", run=world.run, **changes)

    def test_replaces_the_old_one_only_when_the_new_one_is_whole(
        self, world: World, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        edit(copy, "config.json", created="long ago")

        def full(*arguments: object) -> str:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(showcase, "_write_part", full)
            with pytest.raises(MachineError, match="No space"):
                world.build(copy, run=world.run)
        assert find_compared("showcase").config["created"] == "long ago"

        assert world.build(copy, run=world.run).config["created"] == world.run.created
        assert [entry.name for entry in copy.parent.iterdir() if entry.name != ".locks"] == ["showcase"]


class TestLoad:
    def test_a_builder_that_was_killed_while_it_replaced_the_old_one(self, copy: Path) -> None:
        copy.rename(copy.with_name(".former-showcase-00112233"))
        assert find_compared("showcase").prompts

    def test_absent(self) -> None:
        with pytest.raises(InputError, match=r"no showcase .* `es2 showcase` makes it"):
            find_compared("showcase")

    @pytest.mark.parametrize(
        "file",
        ["*/activations.safetensors", "*/derived/*/analysis.json", "*/derived/*/umap.safetensors", "*/texts.parquet"],
    )
    def test_a_damaged_file_is_named_with_the_way_out_and_stays(self, copy: Path, file: str) -> None:
        (damaged, *_) = sorted(copy.glob(f"cached_activations/{file}"))
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
        before = sorted(copy.rglob("*"))
        with pytest.raises(InputError, match=rf"{damaged.name} is not what was written\); `es2 showcase` rebuilds it"):
            umap_of(find_compared("showcase"))
        assert sorted(copy.rglob("*")) == before

    def test_a_missing_file(self, copy: Path) -> None:
        next(copy.rglob("umap.json")).unlink()
        with pytest.raises(InputError, match=r"umap.json is missing\); `es2 showcase` rebuilds it"):
            umap_of(find_compared("showcase"))

    @pytest.mark.parametrize("part", ["analysis.json", "meta.json"])
    def test_a_missing_folder(self, copy: Path, part: str) -> None:
        shutil.rmtree(next(copy.rglob(part)).parent)
        with pytest.raises(InputError, match=r"not here.*; `es2 showcase` rebuilds it"):
            find_compared("showcase")

    @pytest.mark.parametrize("file", ["config.json", "result.json"])
    def test_an_edited_document(self, copy: Path, file: str) -> None:
        edit(copy, file, signed=False, model="another")
        with pytest.raises(InputError, match="`es2 showcase` rebuilds it"):
            find_compared("showcase")
        next(copy.rglob(file)).write_text("{")
        with pytest.raises(InputError, match="`es2 showcase` rebuilds it"):
            find_compared("showcase")

    @pytest.mark.parametrize(("version", "fix"), [(99, "update"), (0, "es2 showcase"), ("1", "es2 showcase")])
    def test_another_format(self, copy: Path, version: object, fix: str) -> None:
        edit(copy, "config.json", format=version)
        with pytest.raises(InputError, match=fix):
            find_compared("showcase")

    def test_prompts_that_have_changed_since(self, copy: Path, world: World, tmp_path: Path) -> None:
        edit(copy, "config.json", prompts=str(write_prompts(tmp_path / "others.csv", tiny_prompts(44))))
        with pytest.raises(InputError, match="its prompts as they are now is not here; `es2 showcase` rebuilds it"):
            find_compared("showcase")
        text = Path(world.prompts).read_text()
        (tmp_path / "reworded.csv").write_text(text.replace("Oil lock", "Paint lock"))
        edit(copy, "config.json", prompts=str(tmp_path / "reworded.csv"))
        with pytest.raises(InputError, match=r"have changed since .*; `es2 showcase` rebuilds it"):
            find_compared("showcase")

    def test_needs_no_torch(self, world: World) -> None:
        code = (
            "import sys; from es2.workflow.compared import find_compared; assert find_compared('showcase').targets; "
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


class TestReadOnly:
    """Of two roots the own one comes first, and nothing changes the other."""

    @pytest.fixture
    def elsewhere(self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
        """The shipped run, with a home in which there is nothing."""
        monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))
        return open_run("showcase")

    @pytest.mark.parametrize(
        "change",
        [
            lambda run: run.cancel(),
            lambda run: run.rename("mine"),
            lambda run: run.delete(),
            reopen,
            lambda run: export(run, own_home() / "out"),
            lambda run: export(run, own_home() / "out", merged=True),
        ],
    )
    def test_it_cannot_be_changed_or_taken_away(self, elsewhere: Job, change: Callable[[Job], object]) -> None:
        before = {path: path.stat().st_mtime_ns for path in shipped().rglob("*")}
        with pytest.raises(InputError, match=r"comes with the program.*`es2 finetune` makes a run of your own\.$"):
            change(elsewhere)
        assert {path: path.stat().st_mtime_ns for path in shipped().rglob("*")} == before
        assert not own_home().exists()

    @pytest.mark.parametrize("action", ["cancel", "resume", "rename", "delete"])
    def test_the_command_says_so(self, elsewhere: Job, es2: Any, action: str) -> None:
        code, document = es2("runs", action, elsewhere.id, *(["mine"] if action == "rename" else []))
        assert (code, "comes with the program" in document["error"]) == (2, True)

    def test_it_is_opened_by_its_id_and_shown_but_not_listed(self, elsewhere: Job, es2: Any) -> None:
        assert open_run(elsewhere.id).path == elsewhere.path
        assert es2("runs", "show", elsewhere.id)[1]["result"]["verdict"] == elsewhere.result()["verdict"]
        assert list_runs() == list_jobs() == Store().list() == []
        assert find_compared(elsewhere.id).base.path.is_relative_to(shipped())

    def test_what_is_in_the_own_home_comes_first(self, world: World, copy: Path) -> None:
        run = open_run("showcase")
        assert run.is_shipped
        assert not open_run(run.id).is_shipped
        assert len(find_compared(run.id).prompts) == len(world.measured)

    def test_it_does_not_stand_beside_another_run(self, world: World, copy: Path) -> None:
        own, shown = world.run, open_run("showcase")
        for pair in ((own, shown), (shown, own)):
            with pytest.raises(InputError, match="comes with the program"):
                find_comparison(pair[0], world.measured, against=pair[1])

    def test_other_positions_are_not_there(self, elsewhere: Job) -> None:
        measured = load_prompts(elsewhere.config["prompts"]).measured()
        with pytest.raises(InputError, match="at position last only; choose that one"):
            find_comparison(elsewhere, measured, "last_instruction")


def test_the_checkout_has_it_whatever_the_home_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ES2_SHOWCASE")
    assert shipped() == Path(__file__).resolve().parents[2] / "cached_activations" / "showcase"


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

        choice = Choice(model=shown.model, prompts=shown.prompts, run=run)
        found = artifacts.find_comparison(choice)
        assert found is not None
        assert (found.run, found.names, found.targets) == (shown.made.run, ("Base", "Tuned"), shown.made.targets)
        assert found.prompts.digest == shown.made.prompts.digest
        for margins in artifacts.margins(found, 1):
            assert margins.shape == (len(found.prompts),)
        for kind in ("separation", "pca", "umap"):
            view = artifacts.view(found, 1, kind)
            assert view is not None
            assert view.tuned is not None
            assert len(view.base) == len(view.tuned) == len(found.prompts)
        np.testing.assert_array_equal(view.base, umap_of(shown.made).points[1, 0])
        again = artifacts.find_comparison(choice)
        assert again is not None
        assert (again.base, again.tuned, again.analysis) == (found.base, found.tuned, found.analysis)
        assert again.base is found.base, "read once"
        assert again.analysis is found.analysis, "read once"

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

        found = artifacts.find_comparison(Choice(run="showcase"))
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
        monkeypatch.setattr(showcase, "build", lambda **given: find_compared("showcase"))
        code, document = es2("showcase")
        assert code == 0
        assert document["path"] == str(copy)
        assert document["verdict"] == world.made.result["verdict"]
        assert document["n_prompts"] == dict.fromkeys(("measured", "part"), len(world.measured))
        assert document["bytes"] > 1000


# ------------------------------------------------------------------------------------------------------ the real one


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> Compared:
    monkeypatch.delenv("ES2_SHOWCASE")
    return find_compared("showcase")


def test_the_committed_one_is_of_the_shipped_settings(committed: Compared) -> None:
    assert committed.config["model"] == committed.base.model == showcase.MODEL
    assert committed.config["prompts"] == "builtin"
    shipped_ones = FinetuneConfig(layers=committed.analysis.recommended, model=showcase.MODEL)
    assert FinetuneConfig.from_dict(dict(committed.config)) == shipped_ones
    assert committed.analysis.config == AnalysisConfig()
    assert committed.base.d_model > D_MODEL
    assert umap_of(committed).points.shape[2] == len(committed.prompts)
    assert size(shipped()) <= LIMIT_BYTES < 20_000_000


def test_the_committed_one_says_what_became_of_behaviour_under_attack_too(committed: Compared) -> None:
    assert committed.behaviours[-1].name == "defends better"
    assert committed.attacked is not None
    assert {"perturbation", "soft_prompt", "kl", "ability", "refusal"} <= committed.attacked["suite"].keys()
    assert committed.ability is not None
    for rows in committed.attacked["rows"].values():
        assert not any("text" in row[model] for row in rows for model in ("base", "tuned") if model in row)


@pytest.mark.real
def test_the_committed_one_is_what_its_embeddings_say(committed: Compared) -> None:
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
