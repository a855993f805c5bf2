"""Names in files of earlier versions, and today's names for them.

Files of every version are read under today's names. Keys of content go on being made from the former names, so that
artifacts on disk are found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TODAY = {
    "by_cost": "by_C",
    "costs": "Cs",
    "n_pushed": "n_steered",
    "push": "steering",
    "push_limit": "steering_limit",
    "rest_deviation": "orthogonal_std",
    "rest_ratio": "orthogonal_std_ratio",
    "self_accuracy": "in_domain_accuracy",
    "self_auroc": "in_domain_auroc",
    "watch_every": "validate_every",
    "watch_fisher_ratio": "validation_fisher_ratio",
    "watch_kl_prompt": "validation_kl_prompt",
    "watch_kl_reply": "validation_kl_reply",
    "watch_mean_difference_margin": "validation_mean_difference_margin",
    "watch_prompts": "validation_prompts",
    "watched": "validations",
}
"""Today's name by the former one."""

_FORMER = {today: former for former, today in TODAY.items()}


def todays_names(value: Any) -> Any:
    """A JSON value with every entry, at any depth, under today's name."""
    return _renamed(value, TODAY)


def former_names(value: Any) -> Any:
    """A JSON value with every entry, at any depth, under its former name, for keys that are made from it."""
    return _renamed(value, _FORMER)


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(name, name): _renamed(entry, names) for name, entry in value.items()}
    if isinstance(value, list):
        return [_renamed(entry, names) for entry in value]
    return value
