"""The files of model folders, and folders fetched from the Hugging Face Hub.

Folders are made under a lock and renamed, so one that exists is whole. Only safetensors are fetched: older formats can
run code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError, MachineError
from es2.core.files import lock, new_folder, numbered, writing
from es2.core.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PROCESSOR_FILES = ("processor_config.json", "chat_template.json")
"""Where a processor's chat template may lie, in the order in which transformers prefers them."""

WEIGHTS = "model.safetensors"
TIED = ("gpt2", "gemma", "gemma2", "gemma3_text", "opt", "bloom")
"""Kinds of model whose LM head is their embedding matrix where the configuration does not say."""
CONVERSION = 1  # raise it when a converted folder would hold other numbers than before


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(". ")


def read_config(path: Path) -> dict[str, Any]:
    """A model folder's JSON file; `InputError` when it cannot be read or holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({first_line(error)}); fetch the model again.") from error
    if not isinstance(content, dict) or not isinstance(content.get("text_config"), dict | None):
        raise InputError(f"{str(path)!r} holds no JSON object, or none of a model; fetch the model again.")
    return content


def model_type(folder: Path) -> str | None:
    """What transformers calls the architecture of the model in a folder; raises as `read_config`."""
    return read_config(folder / "config.json").get("model_type")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read, by name; `InputError` if one is missing."""
    index = folder / f"{WEIGHTS}.index.json"
    names = [WEIGHTS]
    if not (folder / names[0]).is_file() and index.is_file():
        parts = read_config(index).get("weight_map")
        names = sorted(set(map(str, parts.values()))) if isinstance(parts, dict) and parts else names
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"The model folder {str(folder)!r} lacks the weights {missing[0]!r}; only safetensors are read, "
            "so fetch the missing file, or convert other formats with transformers' save_pretrained."
        )
    return [folder / name for name in names]


def make_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, made if it is not there yet: `fill` writes the content into an empty folder.

    Raises:
        MachineError: when the disk refuses; nothing is left behind. And what `fill` raises.
    """
    if folder.is_dir():
        return folder
    parent = folder.parent
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
    with lock(parent, folder.name):
        if not folder.is_dir():  # another process may have made it while this one waited
            with new_folder(parent, parent, folder.name) as made:
                fill(made)
    return folder


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer into a folder; a full disk is an `OSError`, where its library raises `Exception`."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise numbered(error, folder) from error


def find_snapshot(hub_id: str) -> Path | None:
    """The complete local copy of a Hub model, `None` without one. Asks no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
        weight_files(folder)
    except (LocalEntryNotFoundError, HFValidationError, InputError):
        return None
    return folder


@contextmanager
def hub_errors(what: str, hub_id: str) -> Iterator[None]:
    """Raise what the Hub refuses in a `with` block as `InputError` (unknown, gated, private) or `MachineError`."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise InputError(
            f"The {what} {hub_id!r} is gated: accept its licence on its Hugging Face page, then run `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"The Hugging Face Hub has no {what} {hub_id!r} that you may read; "
            "check the name, or run `hf auth login` if it is a private one."
        ) from error
    except (HTTPError, OSError) as error:
        instead = "use a local folder or the default model" if what == "model" else "use a local folder"
        raise MachineError(
            f"The {what} {hub_id!r} cannot be fetched from the Hugging Face Hub ({first_line(error)}); "
            f"check network and disk, or {instead}."
        ) from error


def is_unreachable(error: BaseException) -> bool:
    """Whether an error of a fetch means that there is no connection to the Hub, rather than that it refused."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    kinds = (HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError)
    return isinstance(error, kinds) and getattr(error, "response", None) is None


def fetch_snapshot(hub_id: str, report: Reporter) -> Path:
    """Fetch a model from the Hub into transformers' own cache, file by file so that it can be cancelled between two.

    Raises:
        InputError: for an unknown, gated, private or incomplete model, and one without safetensors.
        MachineError: when network or disk refuse.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with hub_errors("model", hub_id):
        files = HfApi().model_info(hub_id, files_metadata=True).siblings or []
        # The weights last: a copy whose weights are there is complete.
        wanted = sorted(
            (file.rfilename.endswith(".safetensors"), file.rfilename, file.size or 0)
            for file in files
            if re.fullmatch(
                r"(?!consolidated)[^/]+\.(json|jinja|model|txt|safetensors)|additional_chat_templates/[^/]+\.jinja",
                file.rfilename,
            )
        )
        if not any(is_weights for is_weights, _, _ in wanted):
            raise InputError(
                f"The Hub's {hub_id!r} holds no safetensors weights, and other formats are not read because they can "
                "run code; use a model that has them."
            )
        total = sum(size for _, _, size in wanted)
        done = 0
        report("download", 0, total)
        for _, name, size in wanted:
            hf_hub_download(hub_id, name)
            done += size
            report("download", done, total)
    folder = find_snapshot(hub_id)
    if folder is None:
        raise InputError(f"The Hub's {hub_id!r} is incomplete: its index names weight files that are not there.")
    return folder
