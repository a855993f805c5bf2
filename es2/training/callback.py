"""A callback for trainings with transformers or TRL: an activation set at every save, as `es2 capture` writes it.

Embeddings are read from the model in memory, under the key that the saved checkpoint's files give, so that commands and
the app find them there and load nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from es2.capture.capture import CaptureRequest, capture
from es2.capture.residuals import capture_residuals
from es2.core.errors import Es2Error, InputError
from es2.core.progress import Reporter
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.models.adapter_files import find_adapter
from es2.models.blocks import BlockHooks, find_blocks
from es2.models.catalogue import resolve
from es2.models.costs import DTYPES
from es2.models.fingerprint import fingerprint
from es2.models.folders import is_cached, model_folder
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.store.activation_set import ActivationSet
from es2.store.sources import OWN_HOOKS, POSITIONS
from es2.store.store import Store

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class RepresentationCallback(TrainerCallback):
    """Captures a prompt set at every save of a training.

    A saved model is then found as `--model CHECKPOINT`; a saved adapter when it is imported as a run of its base. A
    capture that fails is a warning, and the training goes on.

    Args:
        prompts: what `--prompts` takes, or a prompt set; its `probe` and `test` prompts are captured.
        positions: which tokens are read.
        rendering: how the model is given the prompts.
        store: by default that of the current home.

    Attributes:
        captured: the sets by step, in the main process.

    Raises:
        InputError: for prompts that cannot be read; at the beginning of a training whose model is quantised or sharded,
            or has no blocks that are found.
    """

    def __init__(
        self,
        prompts: str | PromptSet,
        *,
        positions: Sequence[str] = POSITIONS,
        rendering: Rendering = AS_THE_TEMPLATE,
        store: Store | None = None,
    ) -> None:
        self.prompts = (load_prompts(prompts) if isinstance(prompts, str) else prompts).measured()
        self.positions = tuple(positions)
        self.rendering = rendering
        self.store = store
        self.captured: dict[int, ActivationSet] = {}
        self._origin: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a model whose embeddings would not be those of its files."""
        model = kwargs["model"]
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise InputError(
                "The model of this training is sharded (FSDP or DeepSpeed), and a capture needs it whole; leave the "
                "RepresentationCallback out and capture the checkpoints with `es2 capture`."
            )
        own = _without_adapter_classes(model)
        if getattr(own, "is_quantized", False) or _dtype(own) not in DTYPES:
            raise InputError(
                "The model of this training is quantised, and its embeddings are not those of its files; leave the "
                "RepresentationCallback out and capture the checkpoints with `es2 capture`."
            )
        find_blocks(own)
        if own is not model and not _base_name(model):
            raise InputError(
                "The adapter of this training names no base model; load the model from a folder or the Hub, so that "
                "its base_model_name_or_path says which it is."
            )
        if own is model and state.is_world_process_zero:
            self._origin = _origin(str(own.name_or_path))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Capture the prompts under the model that was just saved, in the main process."""
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)).absolute() / f"checkpoint-{state.global_step}"
        try:
            self.captured[state.global_step] = self._capture(kwargs["model"], folder)
        except Es2Error as error:
            logger.warning("Step %d was saved but not captured: %s", state.global_step, error)

    def _capture(self, model: Any, folder: Path) -> ActivationSet:
        own = _without_adapter_classes(model)
        adapter = find_adapter(str(folder)) if own is not model else None

        def read(request: CaptureRequest, report: Reporter) -> dict[str, Float[np.ndarray, "layer prompt d_model"]]:
            request.learned.update(self._origin, hooks=OWN_HOOKS)
            with _as_for_reading(own):
                return capture_residuals(
                    BlockHooks(own), request.rendered, request.positions, into=request.into, report=report
                )

        return capture(
            str(folder) if adapter is None else _base_name(model),
            self.prompts,
            positions=self.positions,
            adapter=adapter,
            run=None if adapter is None else str(adapter),  # without one it would pass for the base's
            rendering=self.rendering,
            device=own.device.type,
            dtype=_dtype(own),
            store=self.store,
            read=read,
        ).activations


def _without_adapter_classes(model: Any) -> Any:
    """The transformers model itself; with peft its layers hold the adapter, which stays on."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _base_name(model: Any) -> str:
    (first, *_) = model.peft_config.values()
    return str(first.base_model_name_or_path or "")


def _origin(name: str) -> dict[str, str]:
    """What a set of the whole weights says of the model that the training began with, if that is known here."""
    try:
        spec = resolve(name)
        folder = model_folder(spec) if is_cached(spec) else None
        return {"base": spec.name} | ({"base_weights": fingerprint(folder).weights} if folder is not None else {})
    except Es2Error as error:
        logger.warning("The checkpoints of this training are of no known base (%s).", error)
        return {}


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


@contextmanager
def _as_for_reading(model: Any) -> Iterator[None]:
    """Without dropout, and with an attention that takes masks of packed rows; afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    attention = model.config._attn_implementation
    try:
        model.eval()
        model.config._attn_implementation = "sdpa" if attention != "eager" else attention
        yield
    finally:
        model.config._attn_implementation = attention
        for module in training:
            module.training = True
