"""What is decided of a rendering: read, combined, and left out of JSON where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest

from es2.core.errors import InputError
from es2.core.rendering import AS_THE_TEMPLATE, Rendering, read_system_prompt
from es2.core.settings import option_words


def test_nothing_decided_is_nothing_in_json() -> None:
    assert AS_THE_TEMPLATE.to_dict() == {}
    assert Rendering(system_prompt="default", thinking="default").settled == AS_THE_TEMPLATE
    assert Rendering(thinking="off").to_dict() == {"thinking": "off"}


def test_arguments_are_json_or_text_in_one_spelling() -> None:
    given = Rendering(template_arg=("b=low", "a=False", "c=[1, 2]", 'd="512"', "e=512", "f=null"))
    assert given.arguments == {"a": False, "b": "low", "c": [1, 2], "d": "512", "e": 512, "f": None}
    assert Rendering(template_arg=given.template_arg) == given
    assert Rendering.from_dict(given.to_dict()) == given
    assert option_words(Rendering, given.to_dict())[:2] == ["--template-arg=a=false", '--template-arg=b="low"']


@pytest.mark.parametrize("wrong", ["effort", "=low", "an effort=low", "a=1,a=2", "x-y=1"])
def test_what_is_no_argument_is_refused(wrong: str) -> None:
    with pytest.raises(InputError, match="template argument"):
        Rendering(template_arg=tuple(wrong.split(",")))


def test_what_one_leaves_open_another_decides() -> None:
    run = Rendering(system_prompt="Be brief.", thinking="off")
    assert Rendering(thinking="on").over(run) == Rendering(system_prompt="Be brief.", thinking="on")
    assert Rendering(system_prompt="default").over(run).settled == Rendering(thinking="off")


def test_a_system_prompt_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "system.txt"
    file.write_bytes("\ufeffBe brief.\r\nAnd @ease.\n\n".encode())
    assert read_system_prompt(f"@{file}") == "Be brief.\nAnd @ease."
    assert read_system_prompt("Be brief.") == "Be brief."
    file.write_bytes(b"\xff\xfe\xfa")
    for wrong in (file, tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="cannot be read"):
            read_system_prompt(f"@{wrong}")
    with pytest.raises(InputError, match="blank"):
        Rendering(system_prompt=" \n")
