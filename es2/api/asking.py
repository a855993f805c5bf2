"""How Python asks: models, prompts and settings as people write them there, and errors that name arguments.

A setting has one home, its declaration (docs/settings.md); a function takes every setting of its command by name.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

import numpy as np

from es2.api.progress import Progress, shown
from es2.capture.config import CaptureConfig
from es2.charts.frames import prompts_frame
from es2.core.errors import Es2Error, InputError
from es2.core.rendering import Rendering, read_system_prompt
from es2.core.settings import Settings, parse_list, setting
from es2.jobs.running import StoppedError
from es2.models.catalogue import DEFAULT_MODEL
from es2.models.costs import DTYPES
from es2.prompts.benchmarks import absolute_source
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet

if TYPE_CHECKING:
    import pandas as pd

    from es2.api.outcomes import Run
    from es2.jobs.job import Job
    from es2.workflow.prepare import Prepared


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_OPTION = re.compile(r"(`[^`]*`)|--(no-)?([a-z]+(?:-[a-z0-9]+)*)")


@dataclass(frozen=True)
class Prompts(PromptSet):
    """Labelled prompts with their splits, and the source that they came from.

    Attributes:
        source: what `load_prompts` was given, with absolute paths; a run keeps it.
    """

    source: str = "builtin"

    def to_frame(self) -> pd.DataFrame:
        """A row for each prompt: `prompt`, `label`, `category`, `split` and `pair`."""
        return prompts_frame(self, np.arange(len(self)), {}, {})


class Place(Settings):
    """Where a model runs, of functions whose other settings say nothing of it."""

    device: str | None = setting(None, str(CaptureConfig.model_fields["device"].description))
    dtype: str | None = setting(None, str(CaptureConfig.model_fields["dtype"].description), choices=tuple(DTYPES))


ModelLike: TypeAlias = "str | PathLike[str]"
PromptsLike: TypeAlias = "str | PathLike[str] | PromptSet"
RunLike: TypeAlias = "str | Job | Run"


def in_python(sentence: str) -> str:
    """A sentence about the command line's options as one about arguments; commands in backticks stay as they are."""

    def argument(found: re.Match[str]) -> str:
        if found[1]:
            return found[1]
        return found[3].replace("-", "_") + ("=False" if found[2] else "")

    return _OPTION.sub(argument, sentence)


def public(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function whose errors speak of Python's arguments, and that raises `KeyboardInterrupt` when it is stopped."""

    @wraps(function)
    def call(*arguments: Arguments.args, **settings: Arguments.kwargs) -> Result:
        try:
            return function(*arguments, **settings)
        except StoppedError as error:
            raise KeyboardInterrupt(str(error)) from error
        except Es2Error as error:
            error.args = (in_python(str(error)), *error.args[1:])
            raise

    return call


def path_of(given: object, what: str) -> str:
    """A name or path as text. Raises `InputError` for anything else, which the sentence calls `what`."""
    if isinstance(given, str | PathLike):
        return str(fspath(given))
    raise InputError(f"{what} is given by a name or a path, not by a {type(given).__name__}.")


def prompts_of(prompts: PromptsLike) -> PromptSet:
    """The prompt set that was given, or that its source names. Raises as `load_prompts`."""
    if not isinstance(prompts, str | PathLike | PromptSet):
        raise InputError(
            f"Prompts are a source or what es2.load_prompts returned, not a {type(prompts).__name__}; write them to a "
            "file (columns prompt, label) and give its path."
        )
    return prompts if isinstance(prompts, PromptSet) else with_source(fspath(prompts))


def with_source(source: str) -> Prompts:
    """The prompts of a source, which stays with them. Raises as `load_prompts`."""
    found = load_prompts(source)
    parts = {field.name: getattr(found, field.name) for field in fields(PromptSet)}
    return Prompts(**parts, source=absolute_source(source))


def source_of(prompts: PromptSet) -> str:
    """Where prompts come from, for a run, whose process reads them again.

    Raises:
        InputError: for a selection, which no file names.
    """
    if isinstance(prompts, Prompts):
        return prompts.source
    raise InputError(
        f"The prompts {prompts.name!r} were selected in Python, and a run reads its prompts from their source; write "
        "them to a file (columns prompt, label, pair, split) and give its path."
    )


def job_of(run: RunLike) -> Job:
    """The run that an id, a `Run` or a `Job` names. Raises `InputError` for no run."""
    from es2.jobs.job import Job
    from es2.workflow.runs import open_run

    return run if isinstance(run, Job) else open_run(str(getattr(run, "id", run)))


def run_of(run: RunLike | None) -> Job | None:
    """As `job_of`; None for None."""
    return None if run is None else job_of(run)


def model_of(model: ModelLike | None, run: Job | None) -> str:
    """The model's name: the one given, else the run's, else the default."""
    if model is not None:
        return path_of(model, "A model")
    return DEFAULT_MODEL if run is None else str(run.config.get("model"))


def sorted_settings(settings: Mapping[str, Any], *kinds: type[Settings]) -> list[dict[str, Any]]:
    """The given settings by the declarations that have them, each by the first one.

    numpy's numbers, lists and paths are taken; a system prompt `@FILE` is read, template arguments may be a dict.

    Raises:
        InputError: for a setting that none of them has.
    """
    found: list[dict[str, Any]] = [{} for _ in kinds]
    for name, value in settings.items():
        place = next((place for place, kind in enumerate(kinds) if name in kind.model_fields), None)
        if place is None:
            known = sorted({known for kind in kinds for known in kind.model_fields})
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}" if near else f"there are {', '.join(known)}"
            raise InputError(f"There is no setting {name[:40]!r}; {hint}.")
        found[place][name] = parse_list(kinds[place], name, _plain(_rendered(name, value)))
    return found


def rendering_of(settings: Mapping[str, Any]) -> Rendering:
    """The part of some settings that says how the model is given its prompts."""
    return Rendering(**{name: value for name, value in settings.items() if name in Rendering.model_fields})


def prepared_for(
    model: ModelLike | None,
    prompts: PromptSet,
    run: Job | None,
    against: Job | None,
    rendering: Mapping[str, Any],
    place: Mapping[str, Any],
    progress: Progress,
    **more: Any,
) -> Prepared:
    """What is captured and analysed of these models and prompts; arguments and errors as of `prepare`."""
    from es2.workflow.prepare import prepare

    with shown(progress) as report:
        return prepare(
            model_of(model, run),
            prompts,
            run=run,
            against=against,
            rendering=Rendering(**rendering),
            report=report,
            **dict(Place(**place)),
            **more,
        )


def _rendered(name: str, value: Any) -> Any:
    if name == "system_prompt" and isinstance(value, str):
        return read_system_prompt(value)
    if name == "template_arg" and isinstance(value, Mapping):
        return tuple(f"{key}={json.dumps(entry)}" for key, entry in value.items())
    return value


def _plain(value: Any) -> Any:
    """A value of numpy or pathlib as Python's own."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | range | list | tuple):
        return tuple(_plain(entry) for entry in value)
    return fspath(value) if isinstance(value, PathLike) else value
