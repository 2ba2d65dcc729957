"""The benchmark of the sweep: peers find the same boxes, and the gate sees every kind of difference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from molt import ops
from molt.benchmark import OPERATIONS, Inputs, gate
from molt.benchmark.peers_sweep import distinct_cuts, published_cuts, sweep_providers

LEVELS = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (2, 1, 13, 17), dtype=np.uint8) * 28)


def both(contours: bool, largest: bool) -> tuple[Inputs, object, list[tuple[np.ndarray, np.ndarray]]]:
    inputs = Inputs((LEVELS,), {"contours": contours, "connectivity": 8})
    truth = (ops.largest_at_cuts if largest else ops.sweep_boxes)(LEVELS, contours=contours)
    found = [
        provider.load()(LEVELS.numpy(), contours=contours, connectivity=8)
        for provider in sweep_providers(largest=largest)
        if contours or provider.kind != "published"
    ]
    return inputs, truth, found


@pytest.mark.parametrize("contours", [True, False])
@pytest.mark.parametrize("largest", [True, False])
def test_peers_find_the_same_and_differences_are_seen(contours: bool, largest: bool) -> None:
    inputs, truth, peers = both(contours, largest)
    compare = OPERATIONS["largest_at_cuts" if largest else "sweep_boxes"].compare
    assert len(peers) == 2 + contours
    for pairs, rows in peers:
        assert compare((pairs, rows), truth, inputs) == 0.0
        shuffled = np.random.default_rng(1).permutation(len(rows))
        assert compare((pairs, rows[shuffled]), truth, inputs) == 0.0
        for column in (3, 6, 7):
            wrong = rows.copy()
            wrong[5, column] += 1
            assert compare((pairs, wrong), truth, inputs) == gate.WRONG
        assert compare((pairs, rows[1:]), truth, inputs) == gate.WRONG
        assert compare((pairs, np.concatenate([rows, rows[:1]])), truth, inputs) == gate.WRONG
        seen = pairs[:, 2] != 28
        assert compare((pairs[seen], rows[rows[:, 2] != 28]), truth, inputs) == gate.WRONG, "a cut is missing"


def test_the_own_form_is_compared_row_by_row() -> None:
    inputs, truth, _ = both(True, False)
    assert gate.swept(truth, truth, inputs) == 0.0
    for field in ("boxes", "area", "first", "last", "hole"):
        values = getattr(truth, field).clone()
        values[2] = ~values[2] if values.dtype == torch.bool else values[2] + 1
        assert gate.swept(replace(truth, **{field: values}), truth, inputs) == gate.WRONG, field


def test_cuts() -> None:
    levels = np.array([[3, 9, 200]], np.uint8)
    assert distinct_cuts(levels) == [0, 3, 9]
    assert distinct_cuts(np.zeros((2, 2), np.uint8)) == []
    cuts = published_cuts(levels)
    assert len(cuts) == 1000
    assert cuts == [int(t * 200) for t in np.arange(0, 1, 0.001)]
    assert set(range(200)) == set(cuts)
