"""A whole evaluation of the base, as `es2 evaluate` runs it, beside another checkout's in the same rounds.

    python -m tests.benchmarks.evaluation [--suite all] [--against FOLDER] [--model M] [--repeats 1]
    python -m tests.benchmarks.evaluation --fine-tunes [--suite refusal] [--limit 12]

The second form evaluates two random adapters of the base in one home, one after the other, and prints the seconds in
which each was evaluated and how many replies that took; what the base replied to the first is there for the second.
Each command runs in a process of its own, with this interpreter, in the home of its own checkout, where the model was
captured and analysed before. FOLDER is another checkout, such as one of commit b0b27d8 (`git worktree add`). Printed as
JSON: seconds of every round, the medians' ratio, and the peak memory of the processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from es2.evaluation.config import EvaluateConfig
from es2.jobs.queue import create_job
from es2.models.catalogue import resolve
from es2.models.folders import model_folder
from es2.prompts.loading import load_prompts
from es2.training.config import FinetuneConfig
from es2.workflow.evaluate import evaluate
from tests.builders import save_tiny_adapter

HERE = Path(__file__).parents[2]


def fine_tunes(home: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Seconds and number of replies of the evaluations of two fine-tunes of one base in a fresh home."""
    os.environ["ES2_HOME"] = str(home)
    found = []
    for seed in range(2):
        config = FinetuneConfig(layers=(0, 1), model=arguments.model)
        job = create_job("finetune", config.to_dict() | {"prompts": arguments.prompts})
        save_tiny_adapter(job.path / "adapter", model_folder(resolve(arguments.model)), seed=seed)
        settings = EvaluateConfig(
            model=arguments.model,
            prompts=arguments.prompts,
            run=job.id,
            suite=arguments.suite,
            limit=arguments.limit,
            steering_limit=min(12, arguments.limit),
        )
        document = evaluate(settings, load_prompts(arguments.prompts), job.path, run=job)
        found.append((document["seconds"], document["generated"]["replies"]))
    (first, n_first), (second, n_second) = found
    return {
        "seconds": {"first": first, "second": second},
        "replies": {"first": n_first, "second": n_second},
        "second_by_first": second / first,
    }


def run(tree: Path, home: Path, *arguments: str) -> tuple[float, float]:
    """Seconds and peak memory (MB) of a command of a checkout; `RuntimeError` when it fails."""
    environment = os.environ | {"ES2_HOME": str(home), "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "es2", *arguments, "--json"]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} in {tree} failed: {said.decode()[-2000:]}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="all")
    parser.add_argument("--against", type=Path, help="another checkout, whose evaluations take turns with these")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", default="builtin")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--fine-tunes", action="store_true", help="two fine-tunes of the base, one after the other")
    parser.add_argument("--limit", type=int, default=48, help="prompts of each label of --fine-tunes")
    arguments = parser.parse_args()
    if arguments.fine_tunes:
        with tempfile.TemporaryDirectory() as root:
            found = fine_tunes(Path(root), arguments)
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    trees = {"ours": HERE} | ({"against": arguments.against.resolve()} if arguments.against else {})
    about = ("--model", arguments.model, "--prompts", arguments.prompts)
    seconds: dict[str, list[float]] = {who: [] for who in trees}
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        for who, tree in trees.items():
            run(tree, Path(root) / who, "analyze", *about)
        for repeat in range(arguments.repeats):
            for who in list(trees)[:: 1 if repeat % 2 == 0 else -1]:
                home = Path(root) / who
                for kept in ("evaluation", "runs", "base_replies"):
                    shutil.rmtree(home / kept, ignore_errors=True)
                took, peak = run(trees[who], home, "evaluate", "--suite", arguments.suite, *about)
                seconds[who].append(took)
                memory[who] = max(peak, memory.get(who, 0.0))
    medians = {who: statistics.median(rounds) for who, rounds in seconds.items()}
    found = {"suite": arguments.suite, "seconds": seconds, "peak_mb": memory}
    if arguments.against:
        found["ours_by_against"] = medians["ours"] / medians["against"]
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
