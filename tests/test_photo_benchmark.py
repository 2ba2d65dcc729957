"""The benchmark's own tools: the container reader, the boxes, the scores."""

from __future__ import annotations

import csv
import importlib.util
import struct
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "photos"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"photo_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def container(version: int) -> bytes:
    """A Qt resource container: /plain.txt, /sub/packed.txt (zlib)."""
    packed = b"packed words " * 20
    squeezed = struct.pack(">I", len(packed)) + zlib.compress(packed)
    blocks = [b"plain words", squeezed]
    data, offsets = b"", []
    for block in blocks:
        offsets.append(len(data))
        data += struct.pack(">I", len(block)) + block
    names, name_at = b"", {}
    for name in ("plain.txt", "sub", "packed.txt"):
        name_at[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    tail = b"\0" * 8 if version >= 2 else b""
    tree = struct.pack(">IHII", 0, 2, 2, 1) + tail
    tree += struct.pack(">IHHHI", name_at["plain.txt"], 0, 0, 0, offsets[0]) + tail
    tree += struct.pack(">IHII", name_at["sub"], 2, 1, 3) + tail
    tree += struct.pack(">IHHHI", name_at["packed.txt"], 1, 0, 0, offsets[1]) + tail
    header = 4 + 16
    positions = (version, header, header + len(tree), header + len(tree) + len(data))
    return b"qres" + struct.pack(">4I", *positions) + tree + data + names


@pytest.mark.parametrize("version", [1, 2])
def test_reader_unpacks_a_container(version: int, tmp_path: Path) -> None:
    fetch = load("fetch")
    path = tmp_path / "made.rcc"
    path.write_bytes(container(version))
    rcc = fetch.RccFile.open(path)
    members = rcc.members()
    assert set(members) == {"plain.txt", "sub/packed.txt"}
    assert rcc.read(members["plain.txt"]) == b"plain words"
    assert rcc.read(members["sub/packed.txt"]) == b"packed words " * 20
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a Qt resource container"):
        fetch.RccFile.open(path)


def test_boxes_are_whole() -> None:
    with (FOLDER / "boxes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["photo"] for row in rows}) == 22 and len(rows) == 29
    for row in rows:
        left, top, right, bottom = (float(row[k]) for k in ("left", "top", "right", "bottom"))
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1, row


def test_best_iou_takes_the_box_that_fits() -> None:
    evaluate = load("evaluate")
    maps = torch.zeros(1, 1, 448, 448)
    maps[..., 112:336, 0:224] = 1
    truth = torch.tensor([[50.0, 25, 100, 75], [0, 25, 50, 75]])
    assert evaluate.best_iou(maps, 0.5, truth, (100, 100)) == pytest.approx(1)
    assert evaluate.best_iou(maps * 0, 0.5, truth, (100, 100)) == 0


def test_interval_holds_the_mean_and_narrows() -> None:
    evaluate = load("evaluate")
    values = np.random.default_rng(1).random(50)
    low, high = evaluate.interval(values)
    assert low < values.mean() < high
    wide = evaluate.interval(values[:10])
    assert wide[1] - wide[0] > high - low
