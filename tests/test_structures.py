"""The data classes' own rules."""

from __future__ import annotations

import json

import pytest
import torch

from molt import Features, Localization, WeightsInfo


def localization(**changes: object) -> Localization:
    values: dict = {
        "boxes": torch.tensor([[1.0, 2, 3, 4], [0, 0, 9, 9]]),
        "classes": torch.tensor([3, -1]),
        "names": ["a, b", "object"],
        "scores": torch.tensor([0.75, 0.25]),
        "size": (20, 10),
        "heat": torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]),
        "clusters": torch.tensor([[0, 1]], dtype=torch.int32),
        "source": "some/photo.jpg",
        "weights": (WeightsInfo("net", "file x", "unknown", False),),
    }
    return Localization(**(values | changes))


def test_features_check_their_grid() -> None:
    with pytest.raises(ValueError, match=r"patches must be \(B, 6, D\) for a 2x3 grid, got shape \(1, 5, 4\)"):
        Features(torch.zeros(1, 5, 4), (2, 3), (28, 42))
    features = Features(torch.arange(24.0).view(1, 6, 4), (2, 3), (28, 42))
    assert features.as_map().shape == (1, 4, 2, 3) and features.as_map()[0, 1, 1, 2] == 21


def test_map_and_labels_are_stretched_to_the_photo() -> None:
    result = localization()
    assert result.map.shape == result.labels.shape == (10, 20)
    assert result.map[0, 0] == 0 and result.map[5, -1] > 0.9999 and 0.4 < result.map[3, 9] < 0.6
    assert result.labels[:, :10].eq(0).all() and result.labels[:, 10:].eq(1).all()
    assert result.labels.dtype == torch.int32


def test_large_labels_survive() -> None:
    result = localization(clusters=torch.tensor([[2**24 - 1, 2**24 - 2]], dtype=torch.int32))
    assert result.labels.unique().tolist() == [2**24 - 2, 2**24 - 1]


def test_json_is_one_line_of_plain_values() -> None:
    text = localization(names=["a\nb", "ü"]).to_json()
    assert "\n" not in text
    record = json.loads(text)
    assert record["path"] == "some/photo.jpg" and record["width"] == 20 and record["height"] == 10
    first = record["detections"][0]
    assert first == {"box": [1, 2, 3, 4], "class": 3, "name": "a\nb", "score": 0.75}
    assert record["weights"] == [
        {"model": "net", "source": "file x", "saw_masks": "unknown", "threshold": "not measured"}
    ]


def test_nothing_found_is_a_result() -> None:
    empty = localization(boxes=torch.zeros(0, 4), classes=torch.zeros(0), names=[], scores=torch.zeros(0))
    assert len(empty) == 0 and empty.to_dict()["detections"] == [] and empty.to_coco() == []
    assert "nothing found" in repr(empty)


def test_plot_needs_a_photo() -> None:
    with pytest.raises(ValueError, match="image must be given"):
        localization(source=None).plot()
    picture = localization(source=None).plot(torch.full((3, 10, 20), 0.5))
    assert picture.size == (20, 10)


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        localization().size = (1, 1)
