"""Declared settings: what is refused, in which words, and how they come back from files and from text."""

from __future__ import annotations

import math
from typing import Any

import pytest

from es2.core.errors import InputError
from es2.core.settings import Settings, option_words, parse_list, setting


class Recipe(Settings):
    """Settings of every kind."""

    layers: tuple[int, ...] = setting(..., "Which.", of="layer")
    sugar: int = setting(2, "How much.", ge=1)
    steering_limit: int = setting(1, "One that had another name.", ge=1)
    heat: float = setting(0.5, "How hot.", gt=0)
    stir: bool = setting(False, "Whether to.")
    with_lid: bool = setting(True, "Whether to, usually.")
    cup: str | None = setting(None, "Which cup.", label="Cup", choices=("small", "large"))
    tastes: tuple[str, ...] = setting(("sweet",), "Which tastes.", of="taste", choices=("sweet", "sour"))
    shares: tuple[float, ...] | None = setting(None, "Which shares.", of="share")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "layers is missing; it must be a list of whole numbers."),
        ({"layers": (1,), "sugar": 10**20}, "Sugar cannot be 100000000000000000000: that is no number of 64 bits."),
        ({"layers": 5}, "layers must be a list of whole numbers, not 5."),
        ({"layers": (1.0,)}, "There is no layer 1.0: layers are whole numbers."),
        ({"sugar": 0}, "sugar must be a whole number of at least 1, not 0."),
        ({"sugar": True}, "sugar must be a whole number of at least 1, not True."),
        ({"sugar": "3"}, "sugar must be a whole number of at least 1, not '3'."),
        ({"heat": 0.0}, "heat must be a positive number, not 0.0."),
        ({"heat": math.nan}, "heat must be a positive number, not nan."),
        ({"stir": 1}, "stir must be true or false, not 1."),
        ({"cup": "huge"}, "Unknown cup 'huge'; one of small, large."),
        ({"tastes": ("sour", "salty")}, "Unknown taste 'salty'; one of sweet, sour."),
        ({"spice": 1}, "There is no setting 'spice'."),
    ],
)
def test_what_cannot_be_is_a_sentence(values: dict[str, Any], sentence: str) -> None:
    given = {} if not values else {"layers": (1,)} | values
    with pytest.raises(InputError) as refused:
        Recipe(**given)
    assert str(refused.value) == sentence


def test_a_file_gives_the_same_settings_back() -> None:
    recipe = Recipe(layers=(1, 2), heat=1, shares=(0.1, 0.2))
    assert Recipe.read(recipe.to_dict() | {"other": "ignored"}, "It") == recipe
    assert Recipe.read({"layers": [1], "push_limit": 4}, "It").steering_limit == 4  # by its former name


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({}, "It is damaged: it has no layers; mend it, or start anew."),
        ({"layers": ["1"]}, r"It is damaged: layers cannot be \['1'\]"),
        ({"layers": [1], "heat": 10**30}, "It is damaged: heat cannot be"),
        ({"layers": [1], "sugar": 0}, "It: sugar must be a whole number of at least 1, not 0"),
    ],
)
def test_a_file_that_cannot_be_is_named(document: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=f"^{sentence}"):
        Recipe.read(document, "It")


def test_lists_as_text() -> None:
    assert parse_list(Recipe, "layers", "12, 18") == (12, 18)
    assert parse_list(Recipe, "cup", "a,b") == "a,b"
    assert parse_list(Recipe, "shares", None) is None
    with pytest.raises(InputError, match=r"shares 'x' is no list of shares; write it like 0\.1,0\.2"):
        Recipe.from_text({"layers": "1", "shares": "x"})


def test_changes_are_checked_and_nothing_else_can_change() -> None:
    recipe = Recipe(layers=(1,))
    assert recipe.replace(sugar=3).sugar == 3
    with pytest.raises(InputError, match="sugar must be"):
        recipe.replace(sugar=0)
    with pytest.raises(ValueError, match="frozen"):
        recipe.sugar = 3  # type: ignore[misc]


def test_option_words() -> None:
    values = {"layers": [1, 2], "stir": True, "cup": None, "prompts": False, "kl_weight": 2.0}
    assert option_words(Recipe, values) == ["--layers", "1,2", "--stir", "--kl-weight", "2.0"]


@pytest.mark.parametrize(("value", "words"), [(True, ["--with-lid"]), (False, ["--no-with-lid"]), (None, [])])
def test_what_is_usually_on_is_turned_off_in_words(value: bool | None, words: list[str]) -> None:
    assert option_words(Recipe, {"with_lid": value, "stir": False}) == words
