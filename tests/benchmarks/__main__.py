"""How fast it is, beside what it is to reach; `docs/performance.md` holds what this prints.

    python -m tests.benchmarks [NAME …] [--prompts 200] [--repeats 3] [--out FILE] [--busy]

A table on stderr as soon as a benchmark is done, one JSON document on stdout. Nothing here fails for being slow.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from contextlib import nullcontext
from pathlib import Path

NAMES = ("capture", "step", "analysis", "replies", "app", "growth", "callback")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="benchmark", help=f"some of {', '.join(NAMES)}; by default all")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompt-set", default="builtin")
    parser.add_argument("--prompts", type=int, default=200, help="prompts of the capture benchmark")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON document there")
    parser.add_argument("--busy", action="store_true", help="one thread, by the time that the processor gave it")
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.names} - {*NAMES}):
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")

    from rich.console import Console
    from threadpoolctl import threadpool_limits

    from es2.models.catalogue import resolve
    from es2.models.folders import model_folder
    from es2.prompts.loading import load_prompts
    from tests.benchmarks.contest import Settings, table

    settings = Settings(
        model_folder(resolve(arguments.model)),
        load_prompts(arguments.prompt_set),
        arguments.prompts,
        arguments.repeats,
        arguments.busy,
    )
    reports = []
    for name in arguments.names or NAMES:
        benchmark = importlib.import_module(f"tests.benchmarks.{name}")
        if arguments.busy:
            import torch

            torch.set_num_threads(1)
        with threadpool_limits(1) if arguments.busy else nullcontext():
            reports.append(benchmark.measure(settings))
        Console(stderr=True).print(table(reports[-1:]))
    document = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "busy": arguments.busy,
        },
        "model": arguments.model,
        "repeats": arguments.repeats,
        **{report.name: report.to_dict() for report in reports},
    }
    text = json.dumps(document, indent=1)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
