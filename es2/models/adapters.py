"""Fine-tunes applied to their base model: peft adapters of any origin, and blocks that a full fine-tune changed."""

from __future__ import annotations

import logging
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError, MachineError
from es2.models.adapter_fit import fit_adapter, write_renamed
from es2.models.architecture import emptied
from es2.models.device import is_out_of_memory
from es2.models.model_files import first_line
from es2.models.tensors import load_tensors

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_TOKENS = 16  # of the text on which a merged model is compared with the adapter beside its model
_MERGED = {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.02}
"""How far a merged model's logits may be from those, relative, in the median of tokens. In half precision it rounds."""


def apply_finetune(model: Any, finetune: Path, *, merge: bool = False) -> None:
    """Make a base model the tuned one, in place.

    Args:
        model: from `es2.models.loading.load_model`.
        finetune: the folder of an adapter, or the file of the blocks that a full fine-tune changed.
        merge: whether an adapter is merged into the weights, as hooks and exports need it, or keeps layers of its own.

    Raises:
        InputError: when the fine-tune is none, is damaged, does not fit the model, or is another model once merged.
        MachineError: when memory runs out, the fine-tune cannot be read, or the model lies partly on the disk.
    """
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise MachineError(
            f"The model {Path(model.name_or_path).name!r} lies partly on the disk, where no fine-tune can be merged "
            "into it; export it merged (`es2 export --merged`) where there is memory enough, and capture that folder."
        )
    if finetune.is_file():
        _copy_blocks(model, finetune)
        return
    fit = fit_adapter(finetune, partial(emptied, model))
    if not fit.renamed:
        _apply_adapter(model, finetune, merge)
        return
    logger.warning("%s", fit.doubts(model.name_or_path)[0])
    with tempfile.TemporaryDirectory() as scratch:
        write_renamed(finetune, fit, Path(scratch) / "adapter")
        _apply_adapter(model, Path(scratch) / "adapter", merge)


def _apply_adapter(model: Any, adapter: Path, merge: bool) -> None:
    from peft import PeftModel

    fits = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are missing, which an import says in its own words
            adapted: Any = PeftModel.from_pretrained(model, str(adapter)).eval()
        if not merge:
            return
        beside = _logits(adapted)
        fits = True
        adapted.merge_and_unload()
        merged = _logits(model)
    except Exception as error:  # peft has no exceptions of its own: a wrong configuration fails wherever it is used
        if is_out_of_memory(error):
            raise MachineError(f"The memory is too small for the adapter {str(adapter)!r}.") from error
        if fits:
            raise InputError(
                f"The adapter {str(adapter)!r} cannot be merged ({first_line(error)}); train one of another kind."
            ) from error
        raise InputError(
            f"The adapter {str(adapter)!r} does not fit the model ({first_line(error)}); "
            "give the model it was trained on."
        ) from error
    difference = float(((merged - beside).norm(dim=-1) / beside.norm(dim=-1)).median())
    if difference > _MERGED[str(model.dtype).removeprefix("torch.")]:
        raise InputError(
            f"The adapter {str(adapter)!r} cannot be merged exactly (the logits are {difference:.1%} off those with it "
            "beside the weights); train one of another kind."
        )


def _logits(model: Any) -> Tensor:
    """The logits of a short text that is the same for every model: `[token, vocabulary]`, in float32."""
    import torch

    embeddings = model.get_input_embeddings().weight
    device = "cpu" if embeddings.is_meta else embeddings.device  # those of weights that wait elsewhere are moved there
    tokens = torch.arange(1, _TOKENS + 1, device=device) * 7919 % len(embeddings)
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0].float()
    return logits


def _copy_blocks(model: Any, weights: Path) -> None:
    import torch

    tensors, _ = load_tensors(weights)
    own = dict(model.named_parameters())
    unknown = [name for name, tensor in tensors.items() if name not in own or own[name].shape != tensor.shape]
    if unknown:
        raise InputError(f"The weights {str(weights)!r} do not fit this model (the first: {unknown[0]}).")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
