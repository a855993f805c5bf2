"""What the app works out before somebody asks for it."""

from __future__ import annotations

from threading import Event

from app import artifacts


def test_the_layers_beside_are_made_ready_and_what_nobody_waits_for_is_given_up() -> None:
    begun, go_on, done = Event(), Event(), Event()
    seen: list[int] = []

    def slow(layer: int) -> None:
        seen.append(layer)
        begun.set()
        assert go_on.wait(30)

    artifacts.make_ready(slow, 4, 9)
    assert begun.wait(30)
    artifacts.make_ready(lambda layer: (seen.append(layer), done.set()), 8, 9)
    go_on.set()
    assert done.wait(30)
    assert seen == [5, 7], "layer 3 was given up, and there is no layer 9"
