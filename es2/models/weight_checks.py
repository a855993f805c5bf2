"""Whether a model's files hold its weights, all of them and no others; transformers fills what they lack at random.

Headers are read before memory is spent, and what transformers reports of a load is judged after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError
from es2.models.model_files import WEIGHTS, first_line, read_config, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BUFFERS = r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(masked_)?bias|position_ids|_extra_state)$"
_OTHER_PARTS = (
    r"(^|\.)(vision_tower|vision_model|vision_encoder|visual|vision_embed_tokens|image_newline|audio_tower|audio_model|"
    r"audio_encoder|embed_vision|embed_audio|multi_modal_projector|mm_projector|vision_projection|patch_merger|connector|"
    r"talker|token2wav|code2wav)(\.|$)"
)
_HARMLESS = re.compile(rf"{_BUFFERS}|{_OTHER_PARTS}|^(model\.)?mtp(\.|_)|\.nextn\.")
"""Weights that a language model is whole without: buffers of old versions, the other parts of a multimodal model, heads
that predict further tokens."""

_NUMBER = re.compile(r"\.(\d+)\.")  # of a block, in a weight's name


def count_parameters(folder: Path) -> int:
    """The number of weights in a folder, from the files' headers alone.

    Raises:
        InputError: when a file is missing or damaged, or lacks weights that the folder's index says it has.
    """
    from safetensors import SafetensorError, safe_open

    total, there = 0, set[str]()
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as tensors:
                names = tensors.keys()
                total += sum(prod(tensors.get_slice(name).get_shape()) for name in names)
                there.update(names)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"The weights {str(file)!r} are damaged ({first_line(error)}); fetch them again."
            ) from error
    listed = _listed(folder)
    if lacking := sorted(name for name in listed if name not in there and not _HARMLESS.search(name)):
        raise InputError(
            f"The weights {str(folder / str(listed[lacking[0]]))!r} lack {len(lacking)} that the folder's index lists "
            f"(the first: {lacking[0]}); fetch them again."
        )
    return total


def _listed(folder: Path) -> Mapping[str, str]:
    """The file of every weight, as the folder's index has it, if the folder has one that counts."""
    if (folder / WEIGHTS).is_file() or not (folder / f"{WEIGHTS}.index.json").is_file():
        return {}
    listed = read_config(folder / f"{WEIGHTS}.index.json").get("weight_map")
    return listed if isinstance(listed, dict) else {}


def check_loaded(model: PreTrainedModel, loading: Mapping[str, Any], where: str) -> None:
    """Refuse a model that transformers loaded from `where` with weights missing, of other shapes, or left over.

    Args:
        loading: what `from_pretrained` gives with `output_loading_info`.
        where: the beginning of the sentence.

    Raises:
        InputError: naming the first of them.
    """
    if missing := sorted(loading["missing_keys"]):
        raise InputError(
            f"{where} lacks {len(missing)} of the model's weights (the first: {missing[0]}); fetch it again."
        )
    if mismatched := sorted(loading["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise InputError(
            f"{where} has {len(mismatched)} weights of another shape than its configuration says (the first: {name}, "
            f"{tuple(found)} instead of {tuple(wanted)}); fetch it again, with the config.json that belongs to it."
        )
    config = model.config.get_text_config()
    n_layers = int(getattr(config, "num_hidden_layers", 0))
    ahead = range(n_layers, n_layers + int(getattr(config, "num_nextn_predict_layers", 0) or 0))
    left_over = [
        name
        for name in sorted(loading["unexpected_keys"])
        if not _HARMLESS.search(name) and not ((number := _NUMBER.search(name)) and int(number[1]) in ahead)
    ]
    if left_over:
        raise InputError(
            f"{where} has {len(left_over)} weights that its architecture has no place for (the first: {left_over[0]}), "
            "so its configuration is another model's, or it needs code of its own; fetch it again, or use another one."
        )
