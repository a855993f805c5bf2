"""One projection for all steps: what moves apart, grows, or is damaged is seen to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from es2.analysis.film import MAX_FRAMES, FilmView, film_view
from es2.analysis.geometry import fit_frame
from es2.prompts.prompt_set import HARMFUL, HARMLESS
from es2.store.film import read_film, text_hash, write_frame

D_MODEL = 16
LABELS = np.array([HARMFUL, HARMLESS] * 20, dtype=np.int8)
SIDES = np.where(LABELS == HARMFUL, 0.5, -0.5)
TEXTS = tuple(f"prompt {row}" for row in range(len(LABELS)))
NOISE = np.random.default_rng(0).normal(size=(len(LABELS), D_MODEL))
CENTRE = 3.0 * np.random.default_rng(1).normal(size=D_MODEL)

Clouds = Callable[[int], np.ndarray]


def apart(distance: float, axis: int = 0) -> np.ndarray:
    """Two clouds at this distance along one dimension; another one holds the most of what they have in common."""
    clouds = NOISE + CENTRE
    clouds[:, 3] += 2.0 * NOISE[:, 3]
    clouds[:, axis] += distance * SIDES
    return clouds


def filmed(folder: Path, frames: dict[int, np.ndarray], *, raw: bool = False) -> FilmView | None:
    for step, clouds in frames.items():
        write_frame(
            folder,
            step,
            np.stack([clouds, 2.0 * clouds]).astype(np.float32),
            layers=(1, 2),
            labels=LABELS,
            texts=TEXTS,
            numbers={"margin": step / 100},
        )
    texts = {text_hash(text): text for text in TEXTS[:-1]}
    return film_view(read_film(folder), texts, raw=raw)


def distances(view: FilmView, axis: int = 0, layer: int = 0) -> np.ndarray:
    """How far the two clouds' means are apart at each step."""
    points = view.points[:, layer, :, axis]
    return points[:, LABELS == HARMFUL].mean(axis=1) - points[:, LABELS == HARMLESS].mean(axis=1)


def test_clouds_that_move_apart_do_so_along_x(tmp_path: Path) -> None:
    frames = {0: apart(4.0), 8: apart(6.0), 16: apart(8.0)}
    view = filmed(tmp_path, frames)
    assert view is not None
    assert view.steps == (0, 8, 16)
    assert view.points.shape == (3, 2, len(LABELS), 2)
    ruler = fit_frame(frames[0], LABELS)
    np.testing.assert_allclose(view.points[0, 0, :, 0], ruler.normalise(frames[0]) @ ruler.direction, atol=2e-3)
    assert (np.diff(distances(view)) > 0.1).all()
    np.testing.assert_allclose(view.points[:, 1], view.points[:, 0], atol=2e-3), "lengths are each layer's own"
    assert [now["margin"] for now in view.numbers] == [0.0, 0.08, 0.16]
    assert view.texts[0] == TEXTS[0]
    assert view.texts[-1] is None, "this one is not in the prompt set"


def test_y_is_what_is_largest_beside_x_and_shows_another_direction(tmp_path: Path) -> None:
    view = filmed(tmp_path, {0: apart(4.0), 8: apart(4.0) + apart(12.0, axis=5) - apart(0.0)})
    assert view is not None
    heights = distances(view, axis=1)
    assert abs(heights[0]) < 0.1
    assert heights[1] > 0.4, "upwards is harmful"
    shared = filmed(tmp_path / "still", {0: apart(4.0), 8: apart(4.5)})
    assert shared is not None
    spread = np.corrcoef(shared.points[0, 0, :, 1], NOISE[:, 3])[0, 1]
    assert abs(spread) > 0.95


def test_inflation_is_seen_in_raw_lengths_alone(tmp_path: Path) -> None:
    frames = {0: apart(4.0), 8: 3.0 * apart(4.0)}
    view, raw = (filmed(tmp_path, frames, raw=raw) for raw in (False, True))
    assert view is not None
    assert raw is not None
    np.testing.assert_allclose(view.points[1], view.points[0], atol=2e-3)
    np.testing.assert_allclose(view.lengths, [[1, 1], [3, 3]], rtol=1e-3)
    np.testing.assert_allclose(raw.points[1], 3 * raw.points[0], rtol=1e-2, atol=2e-2)
    assert "own units" in raw.axes[0]
    assert "scale-free" in view.axes[1]


@pytest.mark.parametrize("damaged", [0, 8, 16])
def test_a_damaged_frame_is_left_out_and_counted(damaged: int, tmp_path: Path) -> None:
    filmed(tmp_path, {step: apart(4.0 + step) for step in (0, 8, 16, 24)})
    path = tmp_path / f"{damaged:08d}.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    view = film_view(read_film(tmp_path))
    assert view is not None
    assert view.steps == tuple(step for step in (0, 8, 16, 24) if step != damaged)
    assert view.n_lost == 1
    assert set(view.texts) == {None}


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    view = filmed(tmp_path, {0: apart(4.0), 8: np.full_like(NOISE, np.nan), 16: apart(5.0)})
    assert view is not None
    assert view.steps == (0, 16)


@pytest.mark.parametrize("frames", [{}, {0: apart(4.0)}, {0: np.full_like(NOISE, np.inf), 8: apart(4.0)}])
def test_it_takes_two_frames(frames: dict[int, np.ndarray], tmp_path: Path) -> None:
    assert filmed(tmp_path, frames) is None


def test_clouds_without_a_difference_are_points_all_the_same(tmp_path: Path) -> None:
    flat = np.zeros_like(NOISE)
    view = filmed(tmp_path, {0: flat, 8: flat})
    assert view is not None
    assert not view.points.any()


def test_of_many_frames_some_are_shown_with_both_ends(tmp_path: Path) -> None:
    view = filmed(tmp_path, {step: apart(4.0 + step / 50) for step in range(MAX_FRAMES + 15)})
    assert view is not None
    assert len(view.steps) == MAX_FRAMES
    assert (view.steps[0], view.steps[-1]) == (0, MAX_FRAMES + 14)
    assert view.n_lost == 0
