"""One prompt as a model gets it, token by token around its end, and what the chat template lets one choose.

For the app, which loads neither torch nor transformers: a process of its own renders the prompt, without torch, and
ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import Es2Error, InputError, MachineError, one_line
from es2.core.rendering import AS_THE_TEMPLATE, NONE, Rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N_OF_REQUEST = 24
"""Tokens of the user's text that are shown one by one; those before them are shown as text."""

_SECONDS = 120
# Of transformers only tokenizers are needed, which take a second; torch takes five.
_COMMAND = "import sys; sys.modules['torch'] = None; from es2.models.preview import answer; answer()"


@dataclass(frozen=True)
class Preview:
    """One rendered prompt.

    Attributes:
        before: its text before the tokens that are shown one by one.
        pieces: the text of each of those tokens; a character of several tokens is whole in the last of them.
        n_before: number of tokens in `before`.
        request: the number of the first and of the last token of the user's text, counted from the prompt's first.
        last: where the last token lies, in words.
        system_prompt, default_system_prompt: as in `PromptFrame.to_dict`.
    """

    before: str
    pieces: tuple[str, ...]
    n_before: int
    request: tuple[int, int]
    last: str
    system_prompt: str | None
    default_system_prompt: str | None

    @property
    def n_after(self) -> int:
        """Number of tokens after the user's text."""
        return self.n_before + len(self.pieces) - 1 - self.request[1]


@dataclass(frozen=True)
class Choices:
    """What a chat template lets one choose.

    Attributes:
        templated: whether the model has a chat template at all.
        system_prompt: whether it takes a text as a system prompt.
        none: whether a system prompt of its own can be left out.
        thinking: whether it has a switch of thinking that is known.
        default_system_prompt: the system prompt that it puts in by itself.
        arguments: what it knows by name, in words.
    """

    templated: bool
    system_prompt: bool
    none: bool
    thinking: bool
    default_system_prompt: str | None
    arguments: str


def preview(tokenizer: PreTrainedTokenizerBase, text: str, rendering: Rendering = AS_THE_TEMPLATE) -> Preview:
    """A prompt as the model gets it; raises as `es2.models.chat_template.render`."""
    from es2.models.chat_template import prompt_frame, render

    rendered = render(tokenizer, [text], rendering)
    about = prompt_frame(tokenizer, rendering).to_dict()
    (tokens,), (first,), (last,) = rendered.token_ids, rendered.first_instruction, rendered.last_instruction
    start = max(first, last + 1 - N_OF_REQUEST)
    return Preview(
        "".join(_pieces(tokenizer, tokens[:start], whole=True)),
        tuple(_pieces(tokenizer, tokens[start:])),
        start,
        (first, last),
        about["last"],
        about["system_prompt"],
        about["default_system_prompt"],
    )


def choices(tokenizer: PreTrainedTokenizerBase) -> Choices:
    """What the tokenizer's chat template lets one choose, found by trying; raises where it renders no prompt."""
    from es2.models.chat_template import prompt_frame
    from es2.models.template_settings import names_in

    def takes(**settings: Any) -> bool:
        try:
            prompt_frame(tokenizer, Rendering(**settings))
        except InputError:
            return False
        return True

    frame = prompt_frame(tokenizer)
    own = frame.own_system_prompt
    return Choices(
        templated=frame.template is not None,
        system_prompt=takes(system_prompt="Answer in verse."),
        none=own is not None and takes(system_prompt=NONE),
        thinking=takes(thinking="on"),
        default_system_prompt=own,
        arguments=names_in(frame.template) if frame.template is not None else "none",
    )


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, whole: bool = False) -> list[str]:
    """What each token adds to the text, or the text of all."""

    def text(end: int) -> str:
        return str(tokenizer.decode(list(tokens[:end]), clean_up_tokenization_spaces=False))

    if whole:
        return [text(len(tokens))]
    found, shown = [], 0
    for end in range(1, len(tokens) + 1):
        until = text(end)
        is_part = until.endswith("\ufffd") and end < len(tokens)  # of a character
        found.append("" if is_part else until[shown:])
        shown = shown if is_part else len(until)
    return found


def ask(folder: Path, text: str, rendering: Rendering = AS_THE_TEMPLATE) -> tuple[Choices, Preview | InputError]:
    """What `choices` and `preview` say of a model folder, from a process of its own.

    A preview that cannot be is returned as its sentence, since the choices are needed to mend it.

    Raises:
        InputError: when the folder's tokenizer or its chat template cannot be used at all.
        MachineError: when the process cannot be started, or gives no answer.
    """
    question = {"folder": str(folder.absolute()), "text": text, "rendering": rendering.to_dict()}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _COMMAND],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=_SECONDS,
            cwd=Path(__file__).parents[2],
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        raise MachineError(f"The prompt's rendering cannot be shown ({one_line(error)}); try again.") from error
    if "choices" not in found:
        raise InputError(found["error"])
    shown = found.get("preview")
    return Choices(**found["choices"]), InputError(found["error"]) if shown is None else Preview(
        **shown | {"pieces": tuple(shown["pieces"]), "request": tuple(shown["request"])}
    )


def answer() -> None:
    """Answer one question of `ask`, on the standard streams; it is JSON in ASCII, whatever their encoding."""
    from es2.models.loading import load_tokenizer

    question = json.loads(sys.stdin.read())
    found: dict[str, Any] = {}
    try:
        tokenizer = load_tokenizer(Path(question["folder"]))
        found["choices"] = asdict(choices(tokenizer))
        rendering = Rendering.read(question["rendering"], "The rendering")
        found["preview"] = asdict(preview(tokenizer, question["text"], rendering))
    except Es2Error as error:
        found["error"] = str(error)
    sys.stdout.write(f"\n{json.dumps(found)}\n")
