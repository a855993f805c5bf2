"""`.gguf` files: the parts of a split one found and joined, and their tensors read into a model, none of them missing.

transformers reads one file, and gives random weights to what that file lacks.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError
from es2.core.files import content_key, file_digest, give_usual_mode, user_cache
from es2.core.progress import Reporter
from es2.models.model_files import CONVERSION, TIED, first_line, read_config, save_tokenizer
from es2.models.weight_checks import check_loaded

if TYPE_CHECKING:
    from gguf import GGUFReader

_HEAD = "output.weight"
_NOT_WEIGHTS = re.compile(
    r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.nextn\."
)  # tables, and heads ahead
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def gguf_parts(gguf: Path) -> list[Path]:
    """The files of a model of which one is given: its parts in their order, or itself alone.

    Raises:
        InputError: when a part is not beside it.
    """
    named = _PART.fullmatch(gguf.name)
    if named is None or int(named["count"]) < 2:
        return [gguf]
    count = int(named["count"])
    parts = [gguf.with_name(f"{named['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    absent = [part.name for part in parts if not part.is_file()]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise InputError(
            f"{gguf.name!r} is one of {count} parts of a model, and {absent[0]!r}{more} is not in "
            f"{str(gguf.parent)!r}; put all parts there."
        )
    return parts


def gguf_folder(gguf: Path) -> Path:
    """Where the converted model of a `.gguf` file lies, or will lie, by its content.

    Raises:
        InputError: when it is unreadable, or a part is missing.
    """
    parts = gguf_parts(gguf)
    try:
        digests = [file_digest(part) for part in parts]
    except OSError as error:
        raise InputError(f"{str(gguf)!r} cannot be read ({error.strerror}); check its permissions.") from error
    key = digests[0][:24] if len(digests) == 1 else content_key({"parts": digests})
    return user_cache() / "models" / f"gguf-{key}-v{CONVERSION}"


def count_gguf_parameters(gguf: Path) -> int:
    """The number of weights in a `.gguf` file and its other parts; takes seconds to read the vocabulary.

    Raises:
        InputError: when it is no GGUF file, or a part is missing.
    """
    return sum(int(tensor.n_elements) for reader in _read(gguf_parts(gguf)) for tensor in reader.tensors)


def _read(parts: Sequence[Path]) -> list[GGUFReader]:
    """The parts opened, which together hold every tensor that the first says there are."""
    from gguf import GGUFReader

    try:
        readers = [GGUFReader(part) for part in parts]
        n_parts, n_tensors = (_number(readers[0], f"split.{name}") for name in ("count", "tensors.count"))
    except (OSError, ValueError, LookupError, OverflowError, MemoryError) as error:
        raise InputError(
            f"{parts[0].name!r} is not a GGUF file, or damaged ({first_line(error)}); download it again."
        ) from error
    found = sum(len(reader.tensors) for reader in readers)
    if n_parts is not None and n_parts != len(parts):
        raise InputError(
            f"{parts[0].name!r} is one of {n_parts} parts of a model and is named as if it were the whole; give the "
            "parts their own names (…-00001-of-00002.gguf), side by side."
        )
    for place, reader in enumerate(readers):
        if (own := _number(reader, "split.no")) is not None and own != place:
            raise InputError(
                f"{parts[place].name!r} says of itself that it is part {own + 1} of the model; download it again."
            )
    names = [tensor.name for reader in readers for tensor in reader.tensors]
    if (doubled := next((name for name, count in Counter(names).items() if count > 1), None)) is not None:
        raise InputError(f"{parts[0].name!r} has the tensor {doubled!r} twice; download all parts again.")
    if n_tensors is not None and n_tensors != found:
        raise InputError(f"{parts[0].name!r} lacks {n_tensors - found} of its {n_tensors} tensors; download it again.")
    return readers


def _number(reader: GGUFReader, name: str) -> int | None:
    field = reader.get_field(name)
    return None if field is None else int(field.contents())


def _join(readers: Sequence[GGUFReader], target: Path) -> None:
    """Write the tensors of all parts into one file, with what the first says of the model."""
    from gguf import GGUFValueType, GGUFWriter

    first = readers[0]
    architecture = first.get_field("general.architecture")
    writer = GGUFWriter(target, str(architecture.contents()) if architecture is not None else "")
    for field in first.fields.values():
        if field.name.startswith(("GGUF.", "split.")) or field.name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        data: Any = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()


def convert_gguf(gguf: Path, folder: Path, report: Reporter) -> None:
    """Write the float32 weights, the configuration and the tokenizer of a `.gguf` file into `folder`.

    Raises:
        InputError: when the file is damaged or lacks tensors, or is of an architecture that transformers cannot read.
    """
    parts = gguf_parts(gguf)
    readers = _read(parts)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        whole = gguf
        if len(parts) > 1:
            whole = Path(scratch) / "model.gguf"
            _join(readers, whole)
        sizes = {tensor.name: int(tensor.n_elements) for reader in readers for tensor in reader.tensors}
        label = readers[0].get_field("general.size_label")
        _check_head(gguf.name, sizes, None if label is None else str(label.contents()))
        del readers
        _convert(whole, gguf.name, sizes, folder, report)


def _check_head(name: str, sizes: Mapping[str, int], label: str | None) -> None:
    """Refuse a file without an LM head of its own whose size, as it says itself, is that of one with it.

    Raises:
        InputError: when it is. Where a file says nothing of its size, `head_doubt` is all that can be said.
    """
    from gguf.utility import model_weight_count_rounded_notation as rounded

    embeddings, total = sizes.get("token_embd.weight", 0), sum(sizes.values())
    if _HEAD in sizes or label is None or rounded(total) == label:
        return
    if rounded(total + embeddings) == label:
        raise InputError(
            f"The GGUF file {name!r} lacks the LM head ({_HEAD}): it says that it has {label} weights, and has "
            f"{rounded(total)}; download it again."
        )


def head_doubt(folder: Path, name: str) -> str | None:
    """A sentence on a converted file without an LM head of its own, where models of its kind mostly have one."""
    config = read_config(folder / "config.json")
    if not config.get("tie_word_embeddings") or config.get("model_type") in TIED:
        return None
    return (
        f"The GGUF file {name!r} has no LM head of its own ({_HEAD}), so its embedding matrix serves as one; if the "
        "model it was made from has a head, the file has lost it: embeddings are right even so, replies and KL are not."
    )


def _check_all_read(model: Any, name: str, sizes: Mapping[str, int]) -> None:
    """Refuse a file with weights that transformers passed over, which it does in silence (`InputError`)."""
    apart = {_HEAD} if model.config.tie_word_embeddings else set()
    stated = sum(size for tensor, size in sizes.items() if tensor not in apart and not _NOT_WEIGHTS.match(tensor))
    read = sum(weight.numel() for weight in model.parameters())
    if stated > read:
        raise InputError(
            f"The GGUF file {name!r} has {stated - read:,} weights that transformers does not read in a "
            f"{model.config.model_type} model, so another model would be captured; use the model's safetensors "
            "folder or Hub id instead."
        )


def _convert(gguf: Path, name: str, sizes: Mapping[str, int], folder: Path, report: Reporter) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # `report` says how far it is
    if bar := getattr(modeling_gguf_pytorch_utils, "tqdm", None):  # the one bar that does not ask
        modeling_gguf_pytorch_utils.tqdm = partial(bar, disable=True)
    report("convert", 0, 2)
    try:
        source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **source
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"The GGUF file {name!r} cannot be converted ({first_line(error)}): it is damaged, or of a kind that "
            "transformers does not read; use the model's safetensors folder or Hub id instead."
        ) from error
    model, loading = loaded
    check_loaded(model, loading, f"The GGUF file {name!r}")
    _check_all_read(model, name, sizes)
    report("convert", 1, 2)
    # A model read from GGUF counts as quantised and refuses to be saved; a plain one takes over its weights.
    del model.config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    give_usual_mode(*folder.glob("*.safetensors"))
    save_tokenizer(tokenizer, folder)
    report("convert", 2, 2)
