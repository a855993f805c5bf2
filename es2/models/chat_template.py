"""Prompts as a model reads them: under its chat template, as tokens, with the positions to embed.

The date that some templates insert is pinned, so that a text has the same tokens on every day. A template that rewrites
or swallows a text is refused, since the model would then read another prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError
from es2.models.batching import n_alike
from es2.models.model_files import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PINNED_DATE = datetime(2024, 7, 26)
"""The date for templates that insert today's: the one that Llama's own template falls back to."""


@dataclass(frozen=True)
class Rendered:
    """Prompts as the model gets them.

    Attributes:
        token_ids: the tokens of each prompt, unpadded, generation prompt included.
        last_instruction: for each prompt, the index of the last token of the user's own text.
        templated: whether a chat template was applied; `False` for models that have none.
    """

    token_ids: tuple[tuple[int, ...], ...]
    last_instruction: tuple[int, ...]
    templated: bool

    @property
    def n_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(map(len, self.token_ids))

    @property
    def digest(self) -> str:
        """Identifies the tokens and the positions read from them."""
        data = json.dumps([self.token_ids, self.last_instruction], separators=(",", ":")).encode()
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    def select(self, rows: Sequence[int]) -> Rendered:
        """Some of the prompts."""
        token_ids = tuple(self.token_ids[row] for row in rows)
        return Rendered(token_ids, tuple(self.last_instruction[row] for row in rows), self.templated)

    def columns(self, position: str) -> list[int]:
        """For each prompt, the index of the token whose embedding `position` names."""
        if position == "last":
            return [len(tokens) - 1 for tokens in self.token_ids]
        return list(self.last_instruction)


def render(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Rendered:
    """Texts as the model reads them: one user message under the chat template, with the generation prompt.

    Templates that ask for today's date get `PINNED_DATE`. Without a chat template the plain text is tokenised.

    Raises:
        InputError: when the template refuses or rewrites a text, or the tokenizer has no character spans of tokens.
    """
    if not tokenizer.is_fast:
        raise InputError("This model's tokenizer has no fast version (tokenizer.json); use a model that has one.")
    templated = tokenizer.chat_template is not None
    prefix, tail = "", ""
    strings = list(texts)
    if templated:
        template = _pinned_template(tokenizer)
        mark = "(the user's text)"
        prefix, tail, in_parts = _around(tokenizer, template, mark)
        strings = [_apply(tokenizer, template, text, in_parts, f"fails on the prompt {shown(text)}") for text in texts]
    encoded = tokenizer(strings, add_special_tokens=not templated, return_offsets_mapping=True, verbose=False)
    last_instruction = []
    for text, string, spans in zip(texts, strings, encoded["offset_mapping"], strict=True):
        own = string[len(prefix) : len(string) - len(tail)].rstrip()
        last_character = len(prefix) + len(own) - 1
        covering = [i for i, (start, end) in enumerate(spans) if start <= last_character < end]
        if not (string.startswith(prefix) and string.endswith(tail) and own and covering):
            raise InputError(f"The model's chat template or tokenizer swallows the prompt {shown(text)}; remove it.")
        if own.strip() != text.strip():
            raise InputError(
                f"The model's chat template rewrites the prompt {shown(text)}, so the model would read another one; "
                "remove it, or use another model."
            )
        last_instruction.append(covering[-1])
    return Rendered(tuple(map(tuple, encoded["input_ids"])), tuple(last_instruction), templated)


def template_prefix(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shared prefix: the tokens with which every prompt under the chat template begins, whatever its text."""
    # Two texts without a common beginning show where the prefix ends, also when the prompts all begin with one word.
    every = [*map(tuple, prompts), *render(tokenizer, ("A", "1")).token_ids]
    first, last = min(every), max(every)  # what these two share, all between them share
    return first[: min(n_alike(first, last), min(map(len, every)) - 1)]


def _pinned_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template behind a macro that hides transformers' clock of the same name.

    Templates cannot be given a function: transformers replaces everything but plain data.
    """
    letters = [*"aAbBcCdDeFgGhHIjmMnpPrRSTuUVwWxXyYf", *(f"-{letter}" for letter in "dejmyHIMS")]
    directives = {f"%{letter}": PINNED_DATE.strftime(f"%{letter}") for letter in letters}
    replaced = "".join(f" | replace('{directive}', '{value}')" for directive, value in directives.items())
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(map(repr, tokenizer.chat_template))
        raise InputError(
            f"This model has the chat templates {names} and none called 'default', so it is unclear which is meant; "
            "name one of them 'default' in its tokenizer_config.json."
        )
    # The newline is swallowed (trim_blocks), so the template begins at the start of a line, as it does by itself.
    return (
        f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{tokenizer.get_chat_template()}"
    )


def _around(tokenizer: PreTrainedTokenizerBase, template: str, mark: str) -> tuple[str, str, bool]:
    """What stands before and after a user's text, and whether the template takes it in a list of parts only."""
    refused: InputError | None = None
    for in_parts in (False, True):
        try:
            what = "refuses a conversation of one user's message"
            prefix, found, tail = _apply(tokenizer, template, mark, in_parts, what).partition(mark)
        except InputError as error:
            refused = refused or error
            continue
        if found and mark not in tail:
            return prefix, tail, in_parts
    raise refused or InputError(
        "This model's chat template does not show the user's text exactly once; use another model."
    )


def _apply(tokenizer: PreTrainedTokenizerBase, template: str, text: str, in_parts: bool, what: str) -> str:
    """The rendered text; an error says `what` the template does."""
    from jinja2 import TemplateError

    content = [{"type": "text", "text": text}] if in_parts else text
    message: dict[str, Any] = {"role": "user", "content": content}
    try:
        return str(
            tokenizer.apply_chat_template([message], chat_template=template, tokenize=False, add_generation_prompt=True)
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise InputError(f"The model's chat template {what} ({first_line(error)}); use another model.") from error


def shown(text: str) -> str:
    """A prompt as error messages quote it."""
    return repr(text if len(text) <= 80 else text[:80] + "…")
