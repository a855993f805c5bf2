"""The models known by name; names, Hub ids, folders and `.gguf` files resolved without network or torch."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from es2.core.errors import InputError
from es2.core.files import expanded
from es2.models.costs import BATCH_BYTES, DTYPES, WORKING_SHARE, runtime_bytes

DEFAULT_MODEL = "smollm2-135m-instruct"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class CatalogueEntry:
    """A model that the workbench knows by name.

    Attributes:
        name: what to type for `--model`.
        hub_id: where its weights are. (The default model's come from the package index, rounded to four bits; where
            the Hub is not reached, others may too, see `es2.models.mirror`.)
        parameters: number of weights.
        vocabulary: number of rows of its embedding.
        gated: whether the Hub asks to accept the licence and log in first.
        paper: whether the ES2 paper (arXiv 2603.20206) evaluates on it.
        tied: whether its embedding is its LM head, too.
    """

    name: str
    hub_id: str
    parameters: int
    n_layers: int
    d_model: int
    vocabulary: int
    licence: str
    gated: bool = False
    paper: bool = False
    tied: bool = True

    def memory_gb(self, dtype: str = "float32") -> float:
        """Memory in GB (10⁹ bytes) that loading it and capturing with it takes, about."""
        return (self.parameters * DTYPES[dtype] * WORKING_SHARE + runtime_bytes("cpu") + BATCH_BYTES) / 1e9

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


CATALOGUE = (
    CatalogueEntry(DEFAULT_MODEL, "HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, 30, 576, 49_152, "Apache-2.0"),
    CatalogueEntry(
        "smollm2-360m-instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, 32, 960, 49_152, "Apache-2.0"
    ),
    CatalogueEntry(
        "smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, 24, 2048, 49_152, "Apache-2.0"
    ),
    CatalogueEntry("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, 24, 896, 151_936, "Apache-2.0"),
    CatalogueEntry(
        "qwen2.5-coder-0.5b-instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct", 494_032_768, 24, 896, 151_936, "Apache-2.0"
    ),
    CatalogueEntry(
        "qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, 28, 1536, 151_936, "Apache-2.0"
    ),
    CatalogueEntry(
        "llama-3.2-1b-instruct",
        "meta-llama/Llama-3.2-1B-Instruct",
        1_235_814_400,
        16,
        2048,
        128_256,
        "Llama 3.2",
        gated=True,
    ),
    CatalogueEntry("gemma-3-270m-it", "google/gemma-3-270m-it", 268_098_176, 18, 640, 262_144, "Gemma", gated=True),
    CatalogueEntry("gemma-3-1b-it", "google/gemma-3-1b-it", 999_885_952, 26, 1152, 262_144, "Gemma", gated=True),
    CatalogueEntry("gemma-2-2b-it", "google/gemma-2-2b-it", 2_614_341_888, 26, 2304, 256_000, "Gemma", gated=True),
    CatalogueEntry(
        "llama-2-7b-chat",
        "meta-llama/Llama-2-7b-chat-hf",
        6_738_415_616,
        32,
        4096,
        32_000,
        "Llama 2",
        gated=True,
        paper=True,
        tied=False,
    ),
    CatalogueEntry(
        "llama-3-8b-instruct",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        8_030_261_248,
        32,
        4096,
        128_256,
        "Llama 3",
        gated=True,
        paper=True,
        tied=False,
    ),
    CatalogueEntry(
        "mistral-7b-instruct",
        "mistralai/Mistral-7B-Instruct-v0.3",
        7_248_023_552,
        32,
        4096,
        32_768,
        "Apache-2.0",
        paper=True,
        tied=False,
    ),
    CatalogueEntry(
        "qwen2.5-7b-instruct",
        "Qwen/Qwen2.5-7B-Instruct",
        7_615_616_512,
        28,
        3584,
        152_064,
        "Apache-2.0",
        paper=True,
        tied=False,
    ),
)
"""Small models first, as people try them first; then the paper's four."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model is meant, and where it is to be had.

    Attributes:
        name: a catalogue name, a Hub id, or an absolute path (two folders called `checkpoint` are two models).
        kind: what the user gave.
        location: the Hub id, or the absolute path of the folder or file.
    """

    name: str
    kind: Literal["catalogue", "hub", "folder", "gguf"]
    location: str


def known_depth(spec: ModelSpec) -> int | None:
    """The number of layers of a catalogue model, which need not be here; None of any other."""
    return next((entry.n_layers for entry in CATALOGUE if entry.name == spec.name), None)


def resolve(model: str) -> ModelSpec:
    """What `model` names: a catalogue entry, a folder, a `.gguf` file or a Hub id. Fetches nothing.

    Raises:
        InputError: when it names nothing, with the nearest catalogue names.
    """
    shown = repr(model[:200])
    entries = {entry.name: entry for entry in CATALOGUE}
    if model.lower() in entries:
        entry = entries[model.lower()]
        return ModelSpec(entry.name, "catalogue", entry.hub_id)
    path = expanded(model)
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            if os.path.isfile(os.path.join(path, "adapter_config.json")):
                raise InputError(f"The folder {shown} holds an adapter, no model; give the model it was trained on.")
            raise InputError(f"The folder {shown} is no model: it has no config.json; give the folder that holds one.")
        folder = Path(path).resolve()
        return ModelSpec(str(folder), "folder", str(folder))
    if model.lower().endswith(".gguf"):
        if not os.path.isfile(path):
            raise InputError(f"There is no file {shown}; check the path of the .gguf file.")
        file = Path(path).resolve()
        return ModelSpec(str(file), "gguf", str(file))
    if os.path.isfile(path):
        raise InputError(f"{shown} is a file, no model; give a model folder, a .gguf file, a Hub id or a name.")
    if HUB_ID.fullmatch(model) and ".." not in model:
        for entry in CATALOGUE:
            # The default's Hub weights are not those of its name: they were not rounded to four bits.
            if entry.hub_id.lower() == model.lower() and entry.name != DEFAULT_MODEL:
                return ModelSpec(entry.name, "catalogue", entry.hub_id)
        return ModelSpec(model, "hub", model)
    if model.startswith((".", "/", "~")):
        raise InputError(f"There is no model folder {shown}; check the path.")
    near = difflib.get_close_matches(model[:80].lower(), entries, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise InputError(
        f"There is no model {shown}; {hint}`es2 models` lists the known ones, "
        "and a Hub id (owner/name), a folder or a .gguf file will do too."
    )
