"""Vectors among a prompt's tokens, under numbers that no vocabulary has.

Such a prompt is run, shared, padded and cached as any other: the model gets a token that it knows in the vector's
place, and the vector replaces that token's embedding. What scales embeddings afterwards scales vectors alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError
from es2.models.batching import rounding_of, trial_tokens
from es2.models.blocks import decoder_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor


_AT_ONCE = 8192  # embeddings, for the mean of their lengths
_TRIED, _REPLACED = 12, 5  # tokens of a trial, and the one that a vector replaces


class SoftTokens:
    """A context in which a model reads `vectors[i]` where a prompt has the token `first + i`.

    Args:
        model: a transformers causal language model, with or without an adapter inside.
        vectors: as long as `embeddings_of` returns them; may be replaced between passes, and takes gradients.

    Attributes:
        first: number of tokens of the vocabulary.
    """

    def __init__(self, model: Any, vectors: Float[Tensor, "vector width"]) -> None:
        self.vectors = vectors
        self.first = int(model.get_input_embeddings().weight.shape[0])
        self._model = model
        self._places: Any = None  # of vectors in the pass under way, and which
        self._numbers: Any = None
        self._handles: list[Any] = []

    def __enter__(self) -> SoftTokens:
        for module in dict.fromkeys((self._model, decoder_of(self._model))):  # either may be called
            self._handles.append(module.register_forward_pre_hook(self._take, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._forget, always_call=True))
        self._handles.append(self._model.get_input_embeddings().register_forward_hook(self._put))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _take(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note where vectors are wanted, and put a known token there."""
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None or tokens.is_floating_point():
            return None
        places = tokens >= self.first
        if not bool(places.any()):
            return None
        self._places, self._numbers = places, tokens[places] - self.first
        known = tokens.masked_fill(places, 0)
        return ((known, *args[1:]), kwargs) if args else (args, kwargs | {"input_ids": known})

    def _put(self, module: Any, args: Any, output: Any) -> Any:
        """The embeddings with the vectors in their places."""
        if self._places is None:
            return None
        replaced = output.clone()
        replaced[self._places.to(output.device)] = self.vectors[self._numbers].to(output.device, output.dtype)
        return replaced

    def _forget(self, *pass_: object) -> None:
        self._places = self._numbers = None


def embeddings_of(model: Any, tokens: Sequence[int]) -> Float[Tensor, "token width"]:
    """What a model's own embedding layer gives for tokens of its vocabulary."""
    import torch

    layer = model.get_input_embeddings()
    with torch.no_grad():
        found: Tensor = layer(torch.tensor([list(tokens)], device=layer.weight.device))[0]
    return found


def mean_embedding_norm(model: Any) -> float:
    """The mean length of the embeddings of all tokens of a model's vocabulary."""
    size = int(model.get_input_embeddings().weight.shape[0])
    parts = [range(start, min(size, start + _AT_ONCE)) for start in range(0, size, _AT_ONCE)]
    return sum(float(embeddings_of(model, part).double().norm(dim=-1).sum()) for part in parts) / size


def refuse_other_readers(model: Any) -> None:
    """Raise `InputError` for a model that reads its tokens elsewhere than through its embedding layer, too.

    Tried on a vector that is a token's own embedding, which has to give that token's logits.
    """
    import torch

    tokens = trial_tokens(model, _TRIED)
    try:
        vector = embeddings_of(model, [tokens[_REPLACED]])
        with torch.inference_mode(), SoftTokens(model, vector) as soft:
            expected, found = (
                model(torch.tensor([given], device=model.device), use_cache=False).logits
                for given in (tokens, [*tokens[:_REPLACED], soft.first, *tokens[_REPLACED + 1 :]])
            )
        same = bool((found - expected).abs().max() <= rounding_of(model) * expected.abs().max())
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        raise _refusal(model) from error
    if not same:
        raise _refusal(model)


def _refusal(model: Any) -> InputError:
    return InputError(
        f"The {model.config.model_type!r} model reads its prompts not through its embedding layer alone, so no soft "
        "prompt can be put into them; leave it out (--soft-budgets '')."
    )
