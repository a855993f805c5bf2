"""What identifies a model: digests of its weights, its adapter, its chat template and its tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from es2.core.errors import InputError
from es2.core.files import file_digest
from es2.models.adapter_files import adapter_files
from es2.models.model_files import PROCESSOR_FILES, first_line, read_config, weight_files


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a model: digests that change when its numbers or its prompts' tokens would.

    That of the weights covers the configuration (quantisation included); `None` means no adapter or no template.
    """

    weights: str
    adapter: str | None
    tokenizer: str
    chat_template: str | None

    def to_dict(self) -> dict[str, str | None]:
        return asdict(self)


def fingerprint(folder: Path, adapter: Path | None = None) -> Fingerprint:
    """The digests of a model folder, each file's remembered by path, size and time; `InputError` if it is none."""
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
            adapter=None if adapter is None else _digest([*map(file_digest, adapter_files(adapter))]),
            tokenizer=_digest([(path.name, file_digest(path)) for path in tokenizer]),
            chat_template=_chat_template_digest(folder),
        )
    except OSError as error:
        raise InputError(
            f"The model folder {str(folder)!r} cannot be read ({first_line(error)}); check its permissions."
        ) from error


def _chat_template_digest(folder: Path) -> str | None:
    """The digest of what `load_tokenizer` takes the template from: its own files, or an entry in one of settings."""
    own = folder / "chat_template.jinja"
    if further := sorted((folder / "additional_chat_templates").glob("*.jinja")):
        return _digest([(path.name, file_digest(path)) for path in (own, *further) if path.is_file()])
    if own.is_file():
        return file_digest(own)
    for settings in (folder / name for name in ("tokenizer_config.json", *PROCESSOR_FILES)):
        template = read_config(settings).get("chat_template") if settings.is_file() else None
        if template is not None:
            return _digest(template)
    return None


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
