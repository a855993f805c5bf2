"""Reference values without the product's code: plain transformers and peft, one prompt at a time.

No padding, no cache, the attention that the model is loaded with, and forward hooks on the model's own blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float

OTHER_PARTS = ("vision", "visual", "audio", "image")
"""Words in the names of parts of a multimodal model that are not its language model."""


class NoStreamError(Exception):
    """The blocks do not hand one residual stream on, so there is nothing to compare with."""


@dataclass(frozen=True)
class Pass:
    """One prompt's pass: what every block gives, by layer, and the logits of every token."""

    outputs: dict[int, Tensor]
    logits: Float[Tensor, "token vocab"]

    @property
    def states(self) -> Float[Tensor, "layer token d_model"]:
        """The residual stream after every block; raises `NoStreamError`."""
        shapes = {tuple(output.shape) for output in self.outputs.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 3:
            raise NoStreamError(f"the blocks give {sorted(shapes)}, which is no single residual stream")
        return torch.cat([self.outputs[layer] for layer in sorted(self.outputs)]).float()


@dataclass(frozen=True)
class Push:
    """A steering of every token from a prompt's last one on: against `direction`, by `budget` of its own length."""

    layer: int
    direction: Float[Tensor, "d_model"]
    budget: float
    start: int


class Plain:
    """A model as a user of transformers has it.

    Attributes:
        model: without or with a live adapter inside.
        blocks: of its language model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.blocks = blocks_of(model)

    @torch.no_grad()
    def read(self, tokens: Sequence[int], push: Push | None = None) -> Pass:
        """All tokens in one pass."""
        with _outputs(self.blocks, push) as outputs:
            logits = self.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return Pass(outputs, logits.float())

    def reply(
        self, prompt: Sequence[int], n_tokens: int, ends: frozenset[int], push: Push | None = None
    ) -> tuple[list[int], list[Tensor]]:
        """Greedy decoding by whole passes: the reply, its end included, and the logits that gave its tokens."""
        reply: list[int] = []
        read: list[Tensor] = []
        with torch.no_grad(), _outputs(self.blocks, push):
            while len(reply) < n_tokens and not (reply and reply[-1] in ends):
                tokens = torch.tensor([[*prompt, *reply]])
                read.append(self.model(input_ids=tokens, use_cache=False).logits[0, -1].float())
                reply.append(int(read[-1].argmax()))
        return reply, read


def load(folder: Path, adapter: Path | None = None) -> Plain:
    """The model of a folder as transformers loads it, with an adapter of peft's live inside if one is given."""
    from peft import PeftModel
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    causal = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    model = auto.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        PeftModel.from_pretrained(model, str(adapter))  # it goes into the model, whose own blocks stay
    return Plain(model)


def blocks_of(model: Any) -> nn.ModuleList:
    """The list of as many modules as the language model has layers."""
    config = model.config.get_text_config()
    sizes = {getattr(config, name, None) for name in ("num_layers", "num_hidden_layers")}
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in sizes and not any(word in name for word in OTHER_PARTS)
    ]
    return found[0]


@contextmanager
def _outputs(blocks: nn.ModuleList, push: Push | None) -> Iterator[dict[int, Tensor]]:
    """What the blocks give in the passes inside, the latest by layer."""
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            state = output[0] if isinstance(output, tuple | list) else output
            if push is None or push.layer != layer:
                outputs[layer] = state
                return None
            moved = state.clone()
            later = state[:, push.start :].double()
            lengths = push.budget * later.norm(dim=-1, keepdim=True)
            moved[:, push.start :] = (later - lengths * push.direction.double()).to(state.dtype)
            outputs[layer] = moved
            return type(output)([moved, *output[1:]]) if isinstance(output, tuple | list) else moved

        return hook

    handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(blocks)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def render(tokenizer: Any, texts: Sequence[str]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The tokens of each text as a user's message, and the index of the last token of the text itself."""
    prompts, places = [], []
    for text in texts:
        message = [{"role": "user", "content": text}]
        string = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(string, add_special_tokens=False, return_offsets_mapping=True)
        end = string.index(text) + len(text) - 1
        prompts.append(tuple(encoded["input_ids"]))
        places.append(max(i for i, (start, stop) in enumerate(encoded["offset_mapping"]) if start <= end < stop))
    return prompts, places


def divergence(base: Float[Tensor, "token vocab"], tuned: Float[Tensor, "token vocab"]) -> Float[Tensor, "token"]:
    """KL(base ‖ tuned) of every token's distribution, in nats."""
    log_base, log_tuned = base.double().log_softmax(-1), tuned.double().log_softmax(-1)
    return (log_base.exp() * (log_base - log_tuned)).sum(-1)


def relative(found: Tensor, expected: Tensor) -> Tensor:
    """The length of the difference of each vector, in units of the expected one's own length."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)
