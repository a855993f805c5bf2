"""From a name to a model that runs: catalogue, fingerprint, load.

Whatever a user names (a catalogue entry, a Hub id, a folder, a `.gguf` file) becomes one thing first: a local folder
of safetensors, configuration and tokenizer. Everything after that knows only folders, so there is one way to
fingerprint and one way to load, and a machine without network is no special case. Code that a model folder brings
along is never run, and transformers' habit of replacing missing weights by random ones is an error here. Nothing
imports torch before a model is actually loaded: resolving and fingerprinting must be cheap enough for every command.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from es2.adapters import ADAPTER_CONFIG, merge_adapter
from es2.errors import InputError, MachineError
from es2.files import expanded, file_digest
from es2.jobs import Reporter, silent
from es2.model_files import (
    convert_gguf,
    count_gguf_parameters,
    default_folder,
    fetch_snapshot,
    find_snapshot,
    first_line,
    gguf_folder,
    make_default,
    make_folder,
    read_config,
    weight_files,
)
from es2.placement import AUTO, all_or_none, free_bytes, quantized, shard, spread

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "smollm2-135m-instruct"

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The number formats a model may run in, and the bytes of one weight in each."""

_RUNTIME_BYTES = 10**9  # interpreter, torch, TransformerLens and one batch: 0.9 GB on the default model
_FOUR_BIT_BYTES = 0.6  # of one weight, with the scales and the parts that stay as they are
_WORKING_SHARE = 1.2  # the weights once more for a moment, shard by shard, while they are read and cast


@dataclass(frozen=True)
class CatalogueEntry:
    """A model that the workbench knows by name.

    Attributes:
        name: what to type for `--model`.
        hub_id: where its weights are. (The default model's come from the package index instead: the same
            network, its weights rounded to four bits by the file they are kept in.)
        parameters: number of weights.
        n_layers: number of blocks.
        d_model: width of the residual stream.
        licence: the licence of the weights.
        gated: whether the Hub asks to accept the licence and log in first.
        paper: whether the ES2 paper (arXiv 2603.20206) evaluates on it.
    """

    name: str
    hub_id: str
    parameters: int
    n_layers: int
    d_model: int
    licence: str
    gated: bool = False
    paper: bool = False

    def weights_gb(self, dtype: str = "float32") -> float:
        """Size of the weights in GB (10⁹ bytes) in one of `DTYPES`."""
        return self.parameters * DTYPES[dtype] / 1e9

    def memory_gb(self, dtype: str = "float32") -> float:
        """Memory in GB (10⁹ bytes) that loading it and capturing with it takes, about."""
        return (self.parameters * DTYPES[dtype] * _WORKING_SHARE + _RUNTIME_BYTES) / 1e9

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


CATALOGUE = (
    CatalogueEntry(DEFAULT_MODEL, "HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, 30, 576, "Apache-2.0"),
    CatalogueEntry("smollm2-360m-instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, 32, 960, "Apache-2.0"),
    CatalogueEntry(
        "smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, 24, 2048, "Apache-2.0"
    ),
    CatalogueEntry("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, 24, 896, "Apache-2.0"),
    CatalogueEntry("qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, 28, 1536, "Apache-2.0"),
    CatalogueEntry(
        "llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, 16, 2048, "Llama 3.2", gated=True
    ),
    CatalogueEntry("gemma-3-270m-it", "google/gemma-3-270m-it", 268_098_176, 18, 640, "Gemma", gated=True),
    CatalogueEntry("gemma-3-1b-it", "google/gemma-3-1b-it", 999_885_952, 26, 1152, "Gemma", gated=True),
    CatalogueEntry("gemma-2-2b-it", "google/gemma-2-2b-it", 2_614_341_888, 26, 2304, "Gemma", gated=True),
    CatalogueEntry(
        "llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", 6_738_415_616, 32, 4096, "Llama 2", gated=True, paper=True
    ),
    CatalogueEntry(
        "llama-3-8b-instruct",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        8_030_261_248,
        32,
        4096,
        "Llama 3",
        gated=True,
        paper=True,
    ),
    CatalogueEntry(
        "mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552, 32, 4096, "Apache-2.0", paper=True
    ),
    CatalogueEntry(
        "qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, 28, 3584, "Apache-2.0", paper=True
    ),
)
"""Small models first, as people try them first; then the paper's four."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model is meant, and where it is to be had.

    Attributes:
        name: what identifies it to a user: a catalogue name, a Hub id, or the absolute path of a folder or file (two
            folders called `checkpoint` are two models).
        kind: what the user gave.
        location: the Hub id, or the absolute path of the folder or file.
    """

    name: str
    kind: Literal["catalogue", "hub", "folder", "gguf"]
    location: str


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a model: digests that change when its numbers or its prompts' tokens would.

    Attributes:
        weights: of the weight files and of the configuration that says how to run them (quantisation included).
        adapter: of the adapter, `None` without one.
        tokenizer: of the tokenizer's files.
        chat_template: of the chat template, `None` for a model without one.
    """

    weights: str
    adapter: str | None
    tokenizer: str
    chat_template: str | None

    def to_dict(self) -> dict[str, str | None]:
        return asdict(self)


# ---------------------------------------------------------------------------------------------------- which model


def resolve(model: str) -> ModelSpec:
    """Tell what `model` names: a catalogue entry, a folder, a `.gguf` file or a Hub id. Fetches nothing.

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
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) and ".." not in model:
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


def is_cached(spec: ModelSpec) -> bool:
    """Whether the model's folder is complete on this machine, so that `model_folder` needs no network."""
    if spec.kind == "folder":
        return True
    if spec.kind == "gguf":
        return gguf_folder(Path(spec.location)).is_dir()
    if spec.name == DEFAULT_MODEL:
        return default_folder().is_dir()
    return find_snapshot(spec.location) is not None


def model_folder(spec: ModelSpec, report: Reporter = silent) -> Path:
    """The local folder of the model (safetensors, configuration, tokenizer), fetched or converted when needed.

    Raises:
        InputError: when the source holds no such model, or not in a form that is read here.
        MachineError: when network, disk or memory refuse.
    """
    if spec.kind == "folder":
        return Path(spec.location)
    if spec.kind == "gguf":
        gguf = Path(spec.location)
        return make_folder(gguf_folder(gguf), lambda folder: _convert(gguf, folder, report))
    if spec.name == DEFAULT_MODEL:
        return make_folder(default_folder(), lambda folder: make_default(folder, report))
    return find_snapshot(spec.location) or fetch_snapshot(spec.location, report)


def _convert(gguf: Path, folder: Path, report: Reporter) -> None:
    _require_memory(count_gguf_parameters(gguf) * DTYPES["float32"] * _WORKING_SHARE, "float32", "cpu", gguf.name)
    convert_gguf(gguf, folder, report)


# ----------------------------------------------------------------------------------------------------- what a folder is


def context_length(folder: Path) -> int | None:
    """The longest prompt in tokens that the model's configuration allows, `None` where it names no limit."""
    config = read_config(folder / "config.json")
    config = config.get("text_config") or config
    limits = [config.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return next((limit for limit in limits if isinstance(limit, int)), None)


def fingerprint(folder: Path, adapter: Path | None = None) -> Fingerprint:
    """Identify a model folder by content; a file is read once and then remembered by path, size and time.

    Raises:
        InputError: when the folder is no model, or `adapter` no adapter.
    """
    config = read_config(folder / "config.json")
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"):
        config.pop(volatile, None)  # who wrote the folder, and defaults that a load overrides: they decide no number
    tokenizer = [
        path
        for path in sorted(folder.iterdir())
        if re.fullmatch(r"(tokenizer.*|special_tokens_map|added_tokens|vocab|merges)\.(json|model|txt)", path.name)
    ]
    try:
        return Fingerprint(
            weights=_digest([config, *map(file_digest, weight_files(folder))]),
            adapter=None if adapter is None else _digest([*map(file_digest, _adapter_files(adapter))]),
            tokenizer=_digest([(path.name, file_digest(path)) for path in tokenizer]),
            chat_template=_chat_template_digest(folder),
        )
    except OSError as error:
        raise InputError(
            f"The model folder {str(folder)!r} cannot be read ({first_line(error)}); check its permissions."
        ) from error


def _chat_template_digest(folder: Path) -> str | None:
    own = folder / "chat_template.jinja"
    if own.is_file():
        return file_digest(own)
    settings = folder / "tokenizer_config.json"
    template = read_config(settings).get("chat_template") if settings.is_file() else None
    return None if template is None else _digest(template)


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _adapter_files(adapter: Path) -> list[Path]:
    """The files that decide an adapter: peft's two, or the one file of the blocks that a full fine-tune changed."""
    if adapter.is_file():
        return [adapter]
    files = [adapter / "adapter_config.json", adapter / "adapter_model.safetensors"]
    for file in files:
        if not file.is_file():
            raise InputError(f"The folder {str(adapter)!r} is no adapter: it has no {file.name}.")
    return files


# ---------------------------------------------------------------------------------------------------------------- load


def choose_device() -> str:
    """`cuda` where there is one, else `mps`, else `cpu`."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_dtype(device: str) -> str:
    """The number format that suits a device: `bfloat16` on CUDA, where it is fast, `float32` elsewhere."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a model folder's tokenizer, without running any code that the folder may bring.

    Raises:
        InputError: when the folder has none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"The model folder {str(folder)!r} has no tokenizer that can be read ({first_line(error)}); "
            "add its tokenizer.json and tokenizer_config.json."
        ) from error


def load_model(
    folder: Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    may_spread: bool = False,
    quantize: str | None = None,
) -> PreTrainedModel:
    """Load the plain transformers model of a folder, in evaluation mode.

    Args:
        folder: what `model_folder` returned.
        dtype: one of `DTYPES`; by default what suits the device.
        device: a torch device; by default the best there is.
        may_spread: whether it may lie on several devices: where the one GPU is too small, or with the device `auto`.
        quantize: `4bit` for weights of four bits (bitsandbytes, on CUDA only).

    Raises:
        InputError: when the folder is no causal language model, is damaged or incomplete, or needs code of its own.
        MachineError: when the device is missing or the memory too small.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    dtype = dtype or choose_dtype(choose_device() if device in (None, AUTO) else device)
    if dtype not in DTYPES:
        raise InputError(f"Unknown dtype {dtype[:40]!r}; one of {', '.join(DTYPES)}.")
    if (folder / ADAPTER_CONFIG).exists():  # transformers would load the model that the adapter names instead
        raise InputError(
            f"The model folder {str(folder)!r} also holds an adapter, so it is unclear which model is meant; move its "
            f"{ADAPTER_CONFIG} elsewhere, and import the adapter as a run if it is to be compared."
        )
    parameters = _count_parameters(folder)
    needed = parameters * (_FOUR_BIT_BYTES if quantize else DTYPES[dtype]) * _WORKING_SHARE
    placed: dict[str, Any] = {}
    if device == AUTO and not may_spread:
        raise InputError("The device auto is for capture; give cuda or cpu here.")
    one_gpu = device in (None, "cuda") and choose_device() == "cuda"
    if device == AUTO or (may_spread and one_gpu and needed > free_bytes("cuda") and torch.cuda.device_count() > 1):
        placed = spread(needed, folder.name)
    else:
        device = device or choose_device()
        _check_device(device)
        _require_memory(needed, dtype, device, folder.name)
    if quantize is not None:
        placed = quantized(str(device), dtype)
    offload = placed.pop("offload_folder", None)
    _quiet_transformers()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # all processes but one would get no weights
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **placed | ({} if offload is None else {"offload_folder": offload.name}),
        )
        model, loading = loaded
        model = model if placed else model.to(device)
        if offload is not None:
            model.offload_folder = offload  # which lives as long as the model
    except (
        MemoryError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        if is_out_of_memory(error):
            raise MachineError(f"{_too_large(folder.name)}.") from error
        raise InputError(
            f"The model folder {str(folder)!r} cannot be loaded as a causal language model ({first_line(error)}); "
            "fetch it again, or use another model."
        ) from error
    if loading["missing_keys"]:
        # transformers would go on with random numbers in their place.
        raise InputError(
            f"The model folder {str(folder)!r} lacks {len(loading['missing_keys'])} weights "
            f"(the first: {min(loading['missing_keys'])}); fetch it again."
        )
    return model.eval()


def load_sharded(folder: Path, dtype: str | None, device: str) -> PreTrainedModel:
    """Load a model whose blocks are split over the processes of an FSDP launch; each process calls it.

    The first process reads the weights into the machine's memory and hands them out block by block.

    Args:
        folder: what `model_folder` returned.
        dtype: one of `DTYPES`; by default what suits the device.
        device: this process's.

    Raises:
        InputError, MachineError: as `load_model`, in every process.
    """
    import torch
    from accelerate import PartialState, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from es2.passes import find_blocks

    dtype = dtype or choose_dtype(device)

    def load() -> Any:
        if PartialState().is_main_process:
            return load_model(folder, dtype=dtype, device="cpu")
        with init_empty_weights(include_buffers=False):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))

    model = all_or_none(load).requires_grad_(False)
    shard(model, find_blocks(model)[1], torch.device(device))
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_bridge(
    folder: Path,
    *,
    adapter: Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    may_spread: bool = False,
) -> TransformerBridge:
    """Load a model folder, its adapter merged into its weights, behind TransformerLens hooks.

    The bridge computes what transformers computes (no weight processing), with eager attention. With `may_spread` its
    blocks may lie on several devices, and so do what its hooks give.

    Raises:
        InputError, MachineError: as `load_model`; also when the adapter does not fit the model, and when
            TransformerLens does not know the architecture.
    """
    from transformer_lens.model_bridge import TransformerBridge

    # Merged before the bridge: once wrapped, a model takes no adapter any more.
    model = load_tuned(folder, adapter, dtype=dtype, device=device, may_spread=may_spread)
    try:
        bridge = TransformerBridge.boot_transformers(
            str(folder),
            hf_model=model,
            tokenizer=load_tokenizer(folder),
            dtype=model.dtype,
            device=str(model.device),
        )
    except (ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise InputError(
            f"TransformerLens cannot hook the {model.config.model_type!r} model in {str(folder)!r} "
            f"({first_line(error)}); use a decoder-only architecture that it supports."
        ) from error
    bridge.eval()
    return bridge


def load_tuned(
    folder: Path,
    adapter: Path | None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    may_spread: bool = False,
) -> PreTrainedModel:
    """Load a model folder with a fine-tune merged into its weights: a peft adapter, or the blocks that were changed.

    Raises:
        InputError, MachineError: as `load_model`; also when the adapter does not fit the model.
    """
    model = load_model(folder, dtype=dtype, device=device, may_spread=may_spread)
    if adapter is None:
        return model
    _adapter_files(adapter)
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise MachineError(
            f"The model {folder.name!r} lies partly on the disk, where no fine-tune can be merged into it; export it "
            "merged (`es2 export --merged`) where there is memory enough, and capture that folder."
        )
    if adapter.is_file():
        load_blocks(model, adapter)
        return model
    return merge_adapter(model, adapter)


def load_blocks(model: PreTrainedModel, weights: Path) -> None:
    """Put the blocks that a full fine-tune left in `weights.safetensors` into the model that it started from.

    Raises:
        InputError: when the file is damaged or of another model.
    """
    import torch

    from es2.checkpoint import load_tensors

    tensors, _ = load_tensors(weights)
    own = dict(model.named_parameters())
    unknown = [name for name, tensor in tensors.items() if name not in own or own[name].shape != tensor.shape]
    if unknown:
        raise InputError(f"The weights {str(weights)!r} do not fit this model (the first: {unknown[0]}).")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _count_parameters(folder: Path) -> int:
    """The number of weights in a folder, from the files' headers alone."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as tensors:
                total += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"The weights {str(file)!r} are damaged ({first_line(error)}); fetch them again."
            ) from error
    return total


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"The device {device[:40]!r} cannot be used ({first_line(error)}); use cpu.") from error


def _require_memory(needed: float, dtype: str, device: str, name: str) -> None:
    available = free_bytes(device)
    if needed > available:
        raise MachineError(
            f"{_too_large(name)} ({needed / 1e9:.1f} GB needed in {dtype} on {device}, {available / 1e9:.1f} GB free)."
        )


def _too_large(name: str) -> str:
    return f"The memory is too small for the model {name!r}: use a smaller model, bfloat16, or another device"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python means that memory ran out."""
    import torch

    words = ("can't allocate memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def _quiet_transformers() -> None:
    """Keep transformers' own progress bars out of the logs; ours tell more."""
    from transformers.utils import logging

    logging.disable_progress_bar()
