"""Past one process and one device: the same sets and the same curves, and nothing half-written when one of them fails.

Two processes of `accelerate launch` talk over gloo on the CPU; `--cpu` would silently start one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

from es2.capture.capture import capture
from es2.capture.residuals import capture_residuals
from es2.core.errors import InputError, MachineError
from es2.core.files import read_json
from es2.models import placement
from es2.models.chat_template import render
from es2.models.loading import load_bridge, load_model, load_tokenizer
from es2.store.store import Store
from es2.training.config import FinetuneConfig
from es2.training.finetune import finetune
from tests.builders import TEXTS, save_tiny_adapter, save_tiny_model, tiny_prompts, write_prompts

Es2 = Callable[..., tuple[int, dict[str, Any]]]
PROMPTS = tiny_prompts(30)
LAUNCH = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", n_layers=4)


def in_two_processes(home: Path, *command: str | Path, how: str = "--multi_gpu") -> subprocess.CompletedProcess[str]:
    """Run a command under `accelerate launch` with its own home; `how` as its own help says."""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": root,
        "OMP_NUM_THREADS": "1",
        "ES2_HOME": str(home),
        "ES2_CACHE": str(home / "cache"),
    }
    launch = [sys.executable, "-m", "accelerate.commands.launch", *how.split(), *LAUNCH.split()]
    return subprocess.run(
        [*launch, *map(str, command)], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "locks.csv", PROMPTS)


@pytest.mark.long
class TestCapture:
    def test_two_processes_make_the_set_of_one(self, folder: Path, prompts: Path, tmp_path: Path) -> None:
        done = in_two_processes(tmp_path, "-m", "es2", "capture", "--model", folder, "--prompts", prompts, "--json")
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["computed"]
        alone = capture(str(folder), PROMPTS, device="cpu", store=Store(tmp_path / "alone")).activations
        together = Store(tmp_path / "cached_activations").open(document["key"])
        assert together.key == alone.key
        assert together.texts == alone.texts
        for position in alone.positions:
            for layer in range(alone.n_layers):
                expected = alone.layer(layer, position)
                error = np.abs(together.layer(layer, position) - expected).max()
                assert error <= 1e-5 * np.linalg.norm(expected, axis=1).mean()
        assert not list((tmp_path / "cached_activations").glob(".tmp-*"))
        again = in_two_processes(tmp_path, "-m", "es2", "capture", "--model", folder, "--prompts", prompts, "--json")
        assert json.loads(again.stdout)["computed"] is False

    def test_no_thread_of_the_group_outlives_it(self, folder: Path, prompts: Path, tmp_path: Path) -> None:
        # One that does may find the interpreter gone, and the process aborts at its end.
        script = tmp_path / "script.py"
        script.write_text(
            "import atexit, os\n"
            "from pathlib import Path\n"
            "from es2.cli.main import main\n"
            "@atexit.register\n"
            "def tell():\n"
            "    names = [path.read_text().strip() for path in Path('/proc/self/task').glob('*/comm')]\n"
            "    told = Path(os.environ['ES2_HOME'], 'threads-' + os.environ['RANK'])\n"
            "    told.write_text(str(names.count('pt_gloo_runloop')))\n"
            "main()\n"
        )
        done = in_two_processes(tmp_path, script, "capture", "--model", folder, "--prompts", prompts, "--json")
        assert done.returncode == 0, done.stderr
        # A file for each process, since what two write to one stream may be mixed.
        assert [path.read_text() for path in sorted(tmp_path.glob("threads-*"))] == ["0", "0"]

    @pytest.mark.parametrize(
        ("failing", "what", "sentence"),
        [(1, "raise MemoryError", "Process 1 of 2 failed: MemoryError"), (0, "os.kill(os.getpid(), 9)", "")],
    )
    def test_a_process_that_fails_takes_the_others_along(
        self, failing: int, what: str, sentence: str, folder: Path, prompts: Path, tmp_path: Path
    ) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            "import os, sys\n"
            "from es2.capture.capture import CaptureRequest\n"
            "from es2.cli.main import main\n"
            "def fail(self, report):\n"
            f"    {what}\n"
            f"if os.environ['RANK'] == '{failing}':\n"
            "    CaptureRequest.read = fail\n"
            "main()\n"
        )
        done = in_two_processes(tmp_path, script, "capture", "--model", folder, "--prompts", prompts, "--json")
        assert done.returncode != 0
        if sentence:
            assert sentence in json.loads(done.stdout)["error"]
        store = tmp_path / "cached_activations"
        assert not Store(store).list()
        # What a killed first process left is swept away by whoever writes next.
        capture(str(folder), PROMPTS, device="cpu", store=Store(store))
        assert not list(store.glob(".tmp-*"))


@pytest.mark.long
class TestShards:
    """Under FSDP every process holds a part of each block; the curve and the adapter are those of one process."""

    SETTINGS = (
        "--layers 1,2 --steps 4 --pairs-per-step 5 --validate-every 2 --rank 4 --objective fisher+margin --device cpu"
    )

    def test_two_processes_train_as_one(self, folder: Path, prompts: Path, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            "import os\n"
            "from pathlib import Path\n"
            "from torch.distributed.tensor import DTensor\n"
            "from es2.training import base\n"
            "from es2.cli.main import main\n"
            "load, models = base.load_sharded, []\n"
            "def load_and_keep(*arguments):\n"
            "    models.append(load(*arguments))\n"
            "    return models[-1]\n"
            "base.load_sharded = load_and_keep\n"
            "try:\n"
            "    main()\n"
            "finally:\n"
            "    shards = [w for w in models[0].model.layers.parameters() if isinstance(w, DTensor)]\n"
            "    sizes = sum(w.to_local().numel() for w in shards), sum(w.numel() for w in shards)\n"
            "    Path(os.environ['ES2_HOME'], 'shards-' + os.environ['RANK']).write_text(f'{sizes[0]} {sizes[1]}')\n"
        )
        command = ("finetune", "--model", folder, "--prompts", prompts, *self.SETTINGS.split(), "--accumulate", "3")
        done = in_two_processes(tmp_path, script, *command, "--json", how="--use_fsdp --fsdp_version 2")
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        run = Path(document["path"])
        assert any("shards" in sentence for sentence in document["warnings"]), "why there are no replies"
        assert document["behaviour"] is None
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        losses = [event["loss"] for event in events if "loss" in event]

        config = FinetuneConfig.from_dict(json.loads((run / "config.json").read_text()) | {"accumulate": 1})
        alone = finetune(config, PROMPTS, tmp_path / "alone")
        assert losses == pytest.approx(alone.losses, abs=1e-4)
        assert document["kl_harmless_test"] == pytest.approx(alone.kl_test, abs=1e-4)
        expected = safetensors.torch.load_file(alone.output / "adapter_model.safetensors")
        found = safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            assert (found[name] - weight).abs().max() <= 1e-3 * weight.abs().max()
        for rank in (0, 1):
            own, whole = map(int, (tmp_path / f"shards-{rank}").read_text().split())
            assert whole > 0
            assert own == pytest.approx(whole / 2, rel=0.01)

    @pytest.mark.parametrize(
        ("changes", "word"), [({"method": "full"}, "--method"), ({"quantize": "4bit"}, "quantize")]
    )
    def test_only_an_adapter(
        self, changes: dict[str, str], word: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(InputError, match=word):
            finetune(FinetuneConfig(layers=(1, 2), model=str(folder), **changes), PROMPTS, tmp_path)


class TestSpread:
    """A model that one device does not hold, laid over memory and disk by accelerate."""

    def test_what_does_not_fit_into_memory_is_read_from_disk(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ES2_CACHE", str(tmp_path))
        rendered = render(load_tokenizer(folder), TEXTS)
        expected = capture_residuals(load_bridge(folder, device="cpu"), rendered)
        size = (folder / "model.safetensors").stat().st_size
        monkeypatch.setattr(placement, "free_bytes", lambda device: size)
        bridge = load_bridge(folder, device="auto", may_spread=True)
        assert set(bridge.original_model.hf_device_map.values()) == {"cpu", "disk"}
        found = capture_residuals(bridge, rendered)
        for position, embeddings in expected.items():
            assert np.abs(found[position] - embeddings).max() <= 1e-5 * np.linalg.norm(embeddings, axis=-1).mean()

    def test_no_fine_tune_is_merged_on_the_disk(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ES2_CACHE", str(tmp_path))
        adapter = save_tiny_adapter(tmp_path / "adapter", folder)
        size = (folder / "model.safetensors").stat().st_size
        monkeypatch.setattr(placement, "free_bytes", lambda device: size)
        with pytest.raises(MachineError, match="--merged"):
            load_bridge(folder, adapter=adapter, device="auto", may_spread=True)

    def test_auto_has_the_key_of_one_device(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ES2_CACHE", str(tmp_path))
        one, spread = (
            capture(str(folder), PROMPTS, device=device, store=Store(tmp_path / device)) for device in ("cpu", "auto")
        )
        assert one.activations.key == spread.activations.key

    def test_several_gpus_that_are_too_small_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        monkeypatch.setattr(placement, "free_bytes", lambda device: 10**9)
        assert placement.map_to_devices(1.7e9, "big") == {
            "device_map": "auto",
            "max_memory": {0: 9 * 10**8, 1: 9 * 10**8},
        }
        with pytest.raises(MachineError, match="2 GPU"):
            placement.map_to_devices(1.9e9, "big")

    def test_only_capture_takes_a_model_in_parts(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="for capture"):
            load_model(folder, device="auto")
        with pytest.raises(InputError, match="for capture"):
            finetune(FinetuneConfig(layers=(1, 2), model=str(folder), device="auto"), PROMPTS, tmp_path)


class TestFourBits:
    def test_needs_cuda(self, folder: Path, tmp_path: Path) -> None:
        config = FinetuneConfig(layers=(1, 2), model=str(folder), device="cpu", quantize="4bit")
        with pytest.raises(InputError, match="need a CUDA device"):
            finetune(config, PROMPTS, tmp_path)

    def test_needs_bitsandbytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"es2\[quantize\]"):
            placement.quantized("cuda", "bfloat16")

    def test_trains_no_blocks_and_knows_one_width(self) -> None:
        with pytest.raises(InputError, match="--method lora"):
            FinetuneConfig(layers=(1, 2), method="full", quantize="4bit").check(4, PROMPTS)
        with pytest.raises(InputError, match="Unknown quantisation"):
            FinetuneConfig(layers=(1, 2), quantize="2bit").check(4, PROMPTS)


@pytest.mark.long
def test_a_job_of_another_host_is_seen_followed_and_cancelled(
    es2: Es2, folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The app at home, the job elsewhere, and between them a folder; locks and pids of elsewhere mean nothing here."""
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
    elsewhere = "import es2.jobs.job; es2.jobs.job.HOST = 'gpu-node'; from es2.cli.main import main; main()"
    command = ("finetune", "--model", folder, "--prompts", prompts, "--layers", "1,2", "--steps", "2000", "--json")
    settings = ("--pairs-per-step", "2", "--validate-every", "2000", "--device", "cpu", "--learning-rate", "1e-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", elsewhere, *map(str, (*command, *settings))], env=environment, stdout=subprocess.PIPE
    )
    try:

        def run() -> dict[str, Any]:
            return next(iter(es2("runs")[1]["runs"]), {})

        wait_until(lambda: ((run().get("progress") or {}).get("stage")) == "finetune", process)
        seen = run()
        assert seen["status"] == "running"
        assert read_json(Path(seen["path"]) / "heartbeat.json")["host"] == "gpu-node"
        wait_until(lambda: run()["progress"]["done"] > seen["progress"]["done"], process)
        assert "loss" in run()["progress"]
        code, refused = es2("runs", "delete", seen["run"])
        assert code == 2
        assert "running" in refused["error"]

        monkeypatch.setattr("os.kill", lambda pid, number: pytest.fail("a process of this host was signalled"))
        monkeypatch.setattr("os.killpg", lambda pid, number: pytest.fail("a process of this host was signalled"))
        es2("runs", "cancel", seen["run"])
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "resume" in json.loads(out)["error"]
        assert run()["status"] == "cancelled"
    finally:
        process.terminate()
        process.wait()


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for what another process does, for as long as it lives."""
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
