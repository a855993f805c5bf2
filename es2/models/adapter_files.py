"""The files of peft adapters: where they are found, folders and the Hub alike, and which kinds can be read.

Only a configuration and safetensors are read, of kinds whose change of a model peft can merge into its weights exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from es2.core.errors import InputError
from es2.core.files import expanded, read_json
from es2.core.progress import Reporter, silent
from es2.models.catalogue import HUB_ID
from es2.models.model_files import first_line, hub_errors

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA")
"""What peft merges from these two files alone. Other kinds name models or tokenizers to be fetched."""

_OTHER_KINDS = {
    "PROMPT_TUNING": "vectors put before the prompt",
    "MULTITASK_PROMPT_TUNING": "vectors put before the prompt",
    "P_TUNING": "vectors put before the prompt",
    "PREFIX_TUNING": "keys and values put before those of the prompt",
    "CPT": "vectors put before the prompt",
    "CARTRIDGE": "keys and values put before those of the prompt",
    "ADAPTION_PROMPT": "attention to vectors of its own",
    "XLORA": "a mixture of other adapters, chosen for each token",
    "POLY": "a mixture of other adapters",
}
"""Kinds that change no weights, and what they do instead."""

_UNREAD = {
    "layer_replication": "repeats layers of its model, which is not read here",
    "megatron_config": "names a Python module to be imported, which is not done here",
    "alora_invocation_tokens": "works only after its alora_invocation_tokens, so that no weights equal it",
    "arrow_config": "chooses between other adapters for each token (arrow_config), so that no weights equal it",
}
"""Settings of an adapter that cannot be merged, or must not be followed."""

_LOST_STARTS = ("pissa_niter", "corda", "lora_ga", "loftq")
"""Starts (`init_lora_weights`) that changed the base's weights by what is not in the adapter: data, random numbers,
or four bits."""


def adapter_files(finetune: Path) -> list[Path]:
    """The files of a fine-tune: peft's two (`InputError` if one is missing), or the one of the changed blocks."""
    files = [finetune / ADAPTER_CONFIG, finetune / ADAPTER_WEIGHTS]
    try:
        if finetune.is_file():
            return [finetune]
        missing = [file.name for file in files if not file.is_file()]
    except OSError as error:  # a name that no file can have
        raise InputError(
            f"{str(finetune)[:200]!r} holds no peft adapter ({error.strerror}); check the path."
        ) from error
    if missing:
        raise InputError(
            f"{str(finetune)!r} holds no peft adapter: it has no {missing[0]}; save the adapter again with peft's "
            "save_pretrained, which writes safetensors. Nothing else is read."
        )
    return files


def is_hub_adapter(given: str) -> bool:
    """Whether `given` is a Hub id rather than a path."""
    return HUB_ID.fullmatch(given) is not None and ".." not in given and not Path(given).exists()


def adapter_folder(given: str, report: Reporter = silent) -> Path:
    """The folder of an adapter by a path or a Hub id; raises as `find_adapter` and `fetch_adapter`."""
    return fetch_adapter(given, report) if is_hub_adapter(given) else find_adapter(given)


def find_adapter(given: str) -> Path:
    """The folder of an adapter on this machine: the one given, or the only one inside it.

    Raises:
        InputError: when there is none, or more than one.
    """
    folder = Path(expanded(given)).absolute()
    try:
        inside = [] if (folder / ADAPTER_CONFIG).exists() else _subfolders(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(folder)[:200]!r} holds no peft adapter ({first_line(error)}); check the path."
        ) from error
    found = folder / _only(inside, str(folder)) if inside else folder
    adapter_files(found)
    return found


def _subfolders(folder: Path) -> list[str]:
    """The folders one or two levels below that hold an adapter's configuration."""
    patterns = (f"{depth}{ADAPTER_CONFIG}" for depth in ("*/", "*/*/"))
    return [str(file.parent.relative_to(folder)) for pattern in patterns for file in folder.glob(pattern)]


def _only(names: Iterable[str], where: str) -> str:
    """The one folder of adapters, the outermost if it is one itself; `InputError` naming them if there are several."""
    ordered = sorted(
        names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    )
    if "." in ordered or len(ordered) == 1:
        return "." if "." in ordered else ordered[0]
    shown = ", ".join(ordered[:6]) + (" …" if len(ordered) > 6 else "")
    raise InputError(f"{where!r} holds {len(ordered)} adapters ({shown}); give the folder of one of them.")


def fetch_adapter(hub_id: str, report: Reporter = silent) -> Path:
    """The local folder of an adapter on the Hub, of which its two files are fetched, and nothing if they are there.

    Raises:
        InputError: for an unknown, gated or private repository, and one without one adapter in safetensors.
        MachineError: when network or disk refuse.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return find_adapter(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, InputError):
        pass  # not on this machine, or not whole
    with hub_errors("adapter", hub_id):
        names = {file.rfilename for file in HfApi().model_info(hub_id).siblings or []}
        folders = [str(Path(name).parent) for name in names if Path(name).name == ADAPTER_CONFIG]
        if not folders:
            raise InputError(f"The Hub's {hub_id!r} holds no peft adapter: it has no {ADAPTER_CONFIG}.")
        folder = _only(folders, f"{hub_id} on the Hub")
        files = [str(Path(folder) / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        if files[1] not in names:
            raise InputError(
                f"The adapter {hub_id!r} has no {ADAPTER_WEIGHTS}, and other formats are not read because they can run "
                "code; use one that has it, or save it again with peft's save_pretrained."
            )
        for done, name in enumerate(files):
            report("download", done, len(files))
            file = Path(hf_hub_download(hub_id, name))
        report("download", len(files), len(files))
    return file.parent


def check_adapter(folder: Path) -> None:
    """Refuse a folder without an adapter, of a kind that is not read, or whose files contradict it (`InputError`)."""
    from safetensors import SafetensorError, safe_open

    adapter_files(folder)
    config = read_json(folder / ADAPTER_CONFIG)
    named = f"The adapter {str(folder)!r}"
    if config is None or not isinstance(config.get("peft_type"), str):
        raise InputError(f"{str(folder)!r} holds no peft adapter: it needs a readable {ADAPTER_CONFIG}.")
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"The weights of the adapter {str(folder)!r} are damaged ({first_line(error)}).") from error
    kind = config["peft_type"]
    if kind not in KINDS:
        does = f": {_OTHER_KINDS[kind]}, no change of weights" if kind in _OTHER_KINDS else ""
        raise InputError(f"{named} is of the kind {kind[:40]!r}{does}; only {', '.join(KINDS)} are read.")
    largest = max((side for shape in shapes for side in shape), default=0)
    pattern = config.get("rank_pattern") or {}
    ranks = [config.get("r", 1), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    least = 0 if kind == "OFT" else 1  # whose blocks are given by their size instead
    if not all(isinstance(rank, int) and least <= rank <= largest for rank in ranks):
        raise InputError(f"{named} states a rank that its weights do not have; save it again.")
    for setting, does in _UNREAD.items():
        if config.get(setting):
            raise InputError(f"{named} {does}.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_LOST_STARTS):
        raise InputError(
            f"{named} was begun with init_lora_weights={start[:40]!r}, which changed the base's weights by what it "
            "does not hold; save it again with peft's path_initial_model_for_weight_conversion."
        )
