"""Every kind of adapter is merged to what peft computes, or refused with a sentence that names it."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.architectures.adapters import KINDS, rows


@pytest.mark.long
def test_no_kind_of_adapter_becomes_another_model() -> None:
    found = rows()
    assert not [row for row in found if row.outcome not in ("equal", "refused")]
    assert all("\n" not in (row.sentence or "") for row in found)
    counts = Counter(row.outcome for row in found)
    assert len(found) == len(KINDS) > 20
    assert counts["equal"] > 2 * counts["refused"]
