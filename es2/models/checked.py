"""What is refused before anything is captured: models whose check failed, and those that cannot be tuned.

What `es2 check` finds is remembered by the model's files and the libraries' versions.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from es2.core.errors import InputError, MachineError
from es2.core.files import content_key, read_json, user_cache, write_json
from es2.models.batching import SHARING_VERIFIED
from es2.models.blocks import find_blocks, output_of
from es2.models.fingerprint import fingerprint
from es2.models.model_files import model_type, read_config

logger = logging.getLogger(__name__)

_FOLDER = "checks"
_CHECKS = 1  # raise it when a check would find something else in the same model

_READ = ("weights", "tokens", "template", "positions", "blocks", "embeddings", "adapter")
CONCERNS = {
    "capture": _READ,
    "finetune": (*_READ, "head", "finetune"),
    "evaluate": (*_READ, "head", "replies"),
}
"""By what is about to be done, the checks that it relies on."""


def _memo(folder: Path, adapter: Path | None) -> Path:
    libraries = ("torch", "transformers", "transformer-lens", "peft", "tokenizers")
    decides = {
        "checks": _CHECKS,
        "model": fingerprint(folder, adapter).to_dict(),
        "versions": {name: version(name) for name in libraries},
    }
    return user_cache() / _FOLDER / f"{content_key(decides)}.json"


def remember_check(folder: Path, adapter: Path | None, result: Mapping[str, Any]) -> None:
    """Keep a check's result; one that cannot be kept is a warning."""
    memo = _memo(folder, adapter)
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, dict(result))
    except OSError as error:
        logger.warning("%s cannot be written (%s), so nothing is refused by what the check found.", memo, error)


def known_check(folder: Path, adapter: Path | None = None) -> dict[str, Any] | None:
    """The last check of a model folder, with this adapter or without; None if it was not checked."""
    return read_json(_memo(folder, adapter))


def refuse_failed(folder: Path, adapter: Path | None, purpose: str) -> None:
    """Raise `InputError` where a check found something wrong with a model that `purpose`, of `CONCERNS`, relies on."""
    if not (user_cache() / _FOLDER).is_dir() or not any(folder.glob("*.safetensors")):
        return  # nothing was checked here, or there are no weights yet: their digests cost time
    for part in {None, adapter if adapter is not None and adapter.is_dir() else None}:
        for found in (known_check(folder, part) or {}).get("checks", ()):
            if found.get("passed") is False and found.get("name") in CONCERNS[purpose]:
                what = "an adapter on the model" if found["name"] == "adapter" else "the model"
                raise InputError(
                    f"`es2 check` found {what} in {str(folder)!r} wrong ({found['name']}): "
                    f"{str(found['sentence']).rstrip('.')}; mend that and check again."
                )


def refuse_untunable(folder: Path, method: str = "lora") -> None:
    """Raise `InputError` for a model that a fine-tune by this method could not work with; no weights are read.

    An architecture without tests is looked at once, in a process of its own: the app imports no torch.
    """
    refuse_failed(folder, None, "finetune")
    config = read_config(folder / "config.json")
    if method == "experts" and "expert" not in str(config):
        raise InputError(f"The model in {str(folder)!r} is no mixture of experts; use --method lora.")
    if model_type(folder) in SHARING_VERIFIED:
        return
    key = content_key({"config": config, "versions": [version("transformers"), version("torch")]})
    memo = user_cache() / "structures" / f"{key}.json"
    known = read_json(memo)
    if known is None:
        command = [sys.executable, "-P", "-m", "es2.models.checked", str(folder)]
        looked = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        if looked.returncode not in (0, InputError.exit_code):
            raise MachineError(f"The model in {str(folder)!r} could not be looked at: {looked.stderr.strip()[-300:]}")
        known = {"refused": looked.stdout.strip()}
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(memo, known)
        except OSError as error:
            logger.warning("%s cannot be written (%s), so the model is looked at again next time.", memo, error)
    if known["refused"]:
        raise InputError(str(known["refused"]))


def _have_stream(block: Any, inputs: Any, output: Any) -> None:
    output_of(output)


def look_at(folder: Path) -> None:
    """Raise `InputError` where the model of a folder, built without weights, has no blocks or head for a fine-tune."""
    import torch

    from es2.models.architecture import empty_model

    model: Any = empty_model(folder)
    config = model.config
    blocks = find_blocks(model)[1]
    model.tie_weights()
    weights = [{id(weight) for weight in block.parameters()} for block in blocks]
    if sum(map(len, weights)) > len(set[int]().union(*weights)):
        raise InputError(
            f"The {config.model_type!r} model has the same weights in several blocks, so an adapter on one of them "
            "would change the others too; it can be captured, but not tuned."
        )
    for block in blocks:
        block.register_forward_hook(_have_stream)
    head, called = model.get_output_embeddings(), []
    for part in model.children():
        if part is not head and part is not model.base_model and blocks[0] not in part.modules():
            part.register_forward_hook(lambda part, inputs, output: called.append(part))
    try:
        mask = torch.zeros(1, 1, 4, 4, device="meta")  # one that is made would be looked into, and has no values
        model(torch.zeros(1, 4, dtype=torch.long, device="meta"), attention_mask=mask, use_cache=False)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        logger.debug("The %s model does not run without weights: %s", config.model_type, error)
    if called:
        raise InputError(
            f"The {config.model_type!r} model has more than one linear map between its blocks and its logits, so its "
            "KL is unknown here; use another architecture."
        )
    if not isinstance(head, torch.nn.Linear):
        raise InputError(f"The {config.model_type!r} model has no plain linear head, so its KL is unknown here.")


if __name__ == "__main__":
    try:
        look_at(Path(sys.argv[1]))
    except InputError as error:
        sys.stdout.write(str(error))
        sys.exit(error.exit_code)
