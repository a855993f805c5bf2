"""What a sweep tries: how many fine-tunes, their shape, and where the settings that are not given are searched.

No torch and no Optuna here, so a page can show a sweep's form and its space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from es2.core.errors import InputError, one_line
from es2.core.settings import Settings, setting
from es2.training.config import FinetuneConfig
from es2.training.terms import DEFAULT_OBJECTIVE, parse_objective

SEARCHED = {
    "layers": "layer_range",
    "objective": "objectives",
    "kl_weight": "kl_weights",
    "learning_rate": "rate_factors",
    "rank": "ranks",
}
"""The settings of a fine-tune that a sweep searches unless they are given, and the setting that says where."""

RATE = "rate_factor"
"""What a trial has in place of a learning rate that is searched: the factor on the automatic one, which differs between
objectives and target layers."""

SHAPE = ("steps", "pairs_per_step", "validation_prompts", "validate_every", "warmup_steps")
"""The settings of a fine-tune that have other usual values in a sweep."""

_ALPHA = FinetuneConfig.model_fields["alpha"].default // FinetuneConfig.model_fields["rank"].default
_LOWEST, _HIGHEST = 0.25, 0.9  # of the way through the model: the layers that are tried if none are given


class SweepConfig(Settings):
    """How many fine-tunes, their shape, and the space of the settings that are searched."""

    trials: int = setting(24, "Number of fine-tunes.", group="main", ge=1)
    minutes: float | None = setting(
        None,
        "Minutes after which no further trial begins, counted anew when the sweep is resumed; one at least is made. "
        "Automatic: no limit.",
        label="Minutes at most",
        group="main",
        step=5,
        gt=0,
    )
    defence: bool = setting(
        False,
        "Count how many harmful validation prompts every trial still refuses under an attack on its embeddings, as a "
        "third thing to weigh; only for a model that refuses.",
        label="Defence under attack",
        group="main",
    )
    layer_range: tuple[int, ...] | None = setting(
        None,
        "The lowest and the highest layer of the pairs that are tried. Automatic: from a quarter to nine tenths of the "
        "way through the model.",
        label="Layers between",
        group="own",
        of="layer",
    )
    objectives: tuple[str, ...] = setting(
        (DEFAULT_OBJECTIVE, "20*margin", "fisher"), "The objectives that are tried.", group="own", of="objective"
    )
    kl_weights: tuple[float, ...] = setting(
        (1.0, 100.0), "The lowest and the highest λ that are tried.", label="λ between", group="own"
    )
    rate_factors: tuple[float, ...] = setting(
        (0.1, 2.0),
        "The lowest and the highest learning rate that are tried, in units of the automatic one of a trial's objective "
        "and layers; 1 alone is the automatic one in every trial.",
        label="Learning rate between, ×",
        group="own",
    )
    ranks: tuple[int, ...] = setting(
        (4, 8, 16, 32), "The ranks of the LoRA matrices that are tried.", group="own", of="rank"
    )
    steps: int = setting(8, "Optimizer steps of a trial.", label="Steps of a trial", group="main", step=2, ge=1)
    pairs_per_step: int = setting(12, "Harmful prompts, and as many harmless ones, in every step.", step=4, ge=2)
    validation_prompts: int = setting(32, "Prompts of each label that a validation reads at most.", step=8, ge=2)
    validate_every: int = setting(
        4, "Steps between two validations; a trial is first judged after so many.", label="Steps between validations",
        ge=1,
    )  # fmt: skip
    warmup_steps: int = setting(2, "Steps over which the learning rate rises.", label="Warm-up steps", ge=0)


@dataclass(frozen=True)
class Space:
    """The settings that all trials share, and where the others are searched.

    Attributes:
        fixed: of `FinetuneConfig`, as JSON values; an `alpha` of None is twice the rank, as usual.
        layers: the lowest and the highest layer of a pair; None where they are fixed. So are the others.
        objective: the objectives.
        kl_weight, rate_factor: the lowest and the highest value, searched on a logarithmic scale; a single factor is
            that of every trial.
        rank: the ranks.
    """

    fixed: dict[str, Any]
    layers: tuple[int, ...] | None = None
    objective: tuple[str, ...] | None = None
    kl_weight: tuple[float, ...] | None = None
    rate_factor: tuple[float, ...] | None = None
    rank: tuple[int, ...] | None = None

    @property
    def searched(self) -> dict[str, list[Any]]:
        """The bounds or choices of every setting that is searched, by its name."""
        names = map(in_trial, SEARCHED)
        return {name: list(found) for name in names if (found := getattr(self, name)) is not None}

    @property
    def layers_tried(self) -> tuple[int, ...]:
        """Every layer that may be a target of a trial."""
        if self.layers is None:
            return tuple(sorted(self.fixed["layers"]))
        return tuple(range(self.layers[0], self.layers[1] + 1))

    @property
    def objectives_tried(self) -> tuple[str, ...]:
        """Every objective that a trial may have."""
        return (self.fixed["objective"],) if self.objective is None else self.objective

    def config(self, chosen: Mapping[str, Any]) -> FinetuneConfig:
        """The fine-tune of a trial at the automatic learning rate, unless one is fixed.

        `chosen` has the searched settings by name; its `rate_factor` is for the caller, who knows the weights.
        """
        values = self.fixed | {name: value for name, value in chosen.items() if name != RATE} | {"replies": False}
        if values.get("alpha") is None:
            values["alpha"] = _ALPHA * values["rank"]
        return FinetuneConfig(**values)

    def usual(self, recommended: Sequence[int]) -> dict[str, Any]:
        """The shipped defaults of the searched settings that lie in the space; of the layers those recommended."""
        found: dict[str, Any] = {}
        for name, bounds in self.searched.items():
            if name == "layers":
                if len(recommended) == 2 and bounds[0] <= min(recommended) and max(recommended) <= bounds[1]:
                    found[name] = sorted(recommended)
                continue
            value = 1.0 if name == RATE else FinetuneConfig.model_fields[name].default
            inside = value in bounds if name in ("objective", "rank") else bounds[0] <= value <= bounds[-1]
            if inside:
                found[name] = value
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"fixed": self.fixed, "searched": self.searched}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], what: str) -> Space:
        """What `to_dict` gave. Raises `InputError` where it is damaged or of a former version, which names `what`."""
        try:
            if "learning_rate" in document["searched"]:
                raise InputError(
                    f"{what} is of a former version, whose trials had learning rates of their own and not factors on "
                    "the automatic one; start a new sweep."
                )
            space = cls(dict(document["fixed"]), **{name: tuple(found) for name, found in document["searched"].items()})
            first_config(space)
        except (LookupError, TypeError, AttributeError) as error:
            why = one_line(repr(error))
            raise InputError(f"{what} is damaged: its space cannot be read ({why}); start a new sweep.") from error
        return space


def make_space(sweep: SweepConfig, given: Mapping[str, Any], n_layers: int) -> Space:
    """The space of a sweep: what is given is fixed, the rest of `SEARCHED` is searched.

    Args:
        sweep: its settings.
        given: settings of `FinetuneConfig`; those of `SEARCHED` and `alpha` may be None.
        n_layers: of the model.

    Raises:
        InputError: when nothing is left to search, or a range cannot be.
    """
    fixed = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    fixed |= {name: getattr(sweep, name) for name in SHAPE}
    searched: dict[str, Any] = {}
    for name, where in SEARCHED.items():
        stated = getattr(sweep, where) != SweepConfig.model_fields[where].default
        if fixed.get(name) is not None:
            if stated:
                raise InputError(f"{name} is given, so {where} has nothing to say; leave one of them out.")
            continue
        if name == "rank" and given.get("method") == "full":  # it has no meaning there
            if stated:
                raise InputError("Whole blocks have no rank; leave ranks out, or use --method lora.")
            fixed["rank"] = FinetuneConfig.model_fields["rank"].default
            continue
        fixed.pop(name, None)
        searched[in_trial(name)] = _bounds(name, where, getattr(sweep, where), n_layers)
    if not searched:
        raise InputError(
            f"Every setting is given, so there is nothing to search; leave out one of {', '.join(SEARCHED)}, or use "
            "`es2 finetune`."
        )
    return Space(fixed, **searched)


def _bounds(name: str, where: str, value: Any, n_layers: int) -> tuple[Any, ...]:
    """The checked bounds or choices of one setting."""
    if name == "layers" and value is None:
        value = (round(_LOWEST * (n_layers - 1)), round(_HIGHEST * (n_layers - 1)))
        if value[0] == value[1]:
            raise InputError("The model has one layer and no pairs of them; give --layers 0.")
    shown = ",".join(map(str, value))
    if name in ("objective", "rank"):
        if not value or len(set(value)) < len(value):
            raise InputError(f"{where} must name one at least and none twice, not {shown!r}.")
        for entry in value:
            if name == "objective":
                parse_objective(entry)
            elif entry < 1:
                raise InputError(f"{where} must be whole numbers of at least 1, not {shown!r}.")
        return tuple(value)
    alone = name == "learning_rate" and len(value) == 1
    if not alone and (len(value) != 2 or not value[0] < value[1]):
        raise InputError(f"{where} must be a lower and a higher value, such as 0.1,10, not {shown!r}.")
    if name == "layers":
        if value[0] < 0 or value[1] >= n_layers:
            raise InputError(f"{where} {shown} is outside of the model, whose layers are 0 to {n_layers - 1}.")
    elif value[0] <= 0:
        raise InputError(f"{where} must be positive, not {shown!r}; they are searched on a logarithmic scale.")
    return tuple(value)


def in_trial(name: str) -> str:
    """The name of one of `SEARCHED` among the settings of a trial."""
    return RATE if name == "learning_rate" else name


def _first(name: str, bounds: Sequence[Any]) -> Any:
    return tuple(bounds) if name == "layers" else bounds[0]


def most_compared(n_trials: int) -> int:
    """Number of trials that a sweep captures and compares at most: that takes as long as the fine-tune itself."""
    return -(-n_trials // 2)


def first_config(space: Space) -> FinetuneConfig:
    """Some fine-tune of the space: all of them have the same prompts, model and shape."""
    return space.config({name: _first(name, bounds) for name, bounds in space.searched.items()})
