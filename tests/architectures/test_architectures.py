"""The tables of `docs/architectures.md` are what is seen, and no cell of them is wrong."""

from __future__ import annotations

import pytest

from tests.architectures.cells import COLUMNS
from tests.architectures.configs import ARCHITECTURES
from tests.architectures.outcomes import GOOD, outcomes_in
from tests.architectures.table import MARK, PAGE, adapter_rows, row

_TABLES = PAGE.read_text(encoding="utf-8").partition(MARK)[2]
WRITTEN, ADAPTERS = outcomes_in(_TABLES, len(COLUMNS)), outcomes_in(_TABLES, 1)


@pytest.mark.long
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_cell_is_right_and_as_the_page_says(name: str) -> None:
    cells = row(name).cells
    wrong = {column: cell.detail for column, cell in cells.items() if cell.outcome not in GOOD}
    assert not wrong
    assert [cell.outcome for cell in cells.values()] == WRITTEN.get(name), "write the page anew"


@pytest.mark.long
def test_every_kind_of_adapter_is_as_the_page_says() -> None:
    assert {kind.name: [cell.outcome for cell in kind.cells.values()] for kind in adapter_rows()} == ADAPTERS


def test_the_page_has_every_row_and_no_wrong_cell() -> None:
    assert list(WRITTEN) == list(ARCHITECTURES)
    assert len(WRITTEN) >= 60
    assert {word for words in (*WRITTEN.values(), *ADAPTERS.values()) for word in words} <= set(GOOD)
