"""sweep_boxes and largest_at_cuts as CUDA kernels, run on the CPU, against scipy at every cut."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

ROOT = Path(__file__).parents[2]


def components_at(levels: np.ndarray, cut: int, connectivity: int) -> list[tuple[int, ...]]:
    """First pixel, box and area of each component, by first pixel."""
    labels, count = ndimage.label(levels > cut, np.ones((3, 3)) if connectivity == 8 else None)
    if count == 0:
        return []
    _, first, area = np.unique(labels, return_index=True, return_counts=True)
    boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels, count)]
    # Without background the first number there is 1.
    return sorted((int(f), *box, int(n)) for f, box, n in zip(first[-count:], boxes, area[-count:], strict=True))


def swept(levels: torch.Tensor, connectivity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Emulator.sweep` and `Emulator.largest_at_cuts` have to give. A component that is as it was has its area."""
    rows = []
    largest = torch.zeros(*levels.shape[:2], 255, 5, dtype=torch.float64)
    for image, channel in np.ndindex(*levels.shape[:2]):
        own = levels[image, channel].numpy()
        alive: dict[tuple[int, ...], int] = {}
        ended: list[tuple[tuple[int, ...], int, int]] = []
        for cut in range(254, -1, -1):
            if cut + 1 not in own:  # as one cut above, where there is one
                largest[image, channel, cut] = largest[image, channel, min(cut + 1, 254)]
                continue
            there = components_at(own, cut, connectivity)
            for gone in set(alive) - set(there):
                ended.append((gone, cut + 1, alive.pop(gone)))
            for one in there:
                alive.setdefault(one, cut)
            largest[image, channel, cut] = torch.tensor(max(there, key=lambda one: (one[5], -one[0]))[1:])
        ended += [(one, 0, last) for one, last in alive.items()]
        ended.sort(key=lambda entry: (-entry[2], entry[0][0]))
        rows += [[*one[1:], first, last, image, channel] for one, first, last in ended]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 9), largest


def noise(shape: tuple[int, ...], count: int = 256, seed: int = 0) -> torch.Tensor:
    """`count` levels over the whole range, 0 and 255 among them."""
    drawn = torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))
    return (drawn * 255 // max(count - 1, 1)).byte()


def smooth(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    batch, channels, height, width = shape
    small = torch.rand(batch, channels, height // 8 + 2, width // 8 + 2, generator=torch.Generator().manual_seed(seed))
    maps = torch.nn.functional.interpolate(small, (height, width), mode="bicubic")
    return (maps.clamp(0, 1) * 255).byte()


def picture(name: str, size: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    ring = torch.minimum(torch.minimum(y, x), torch.minimum(size - 1 - y, size - 1 - x))
    spiral = (ring % 2 == 0) | ((y == x + 1) & (x < size // 2))
    return {
        "black": y * 0,
        "constant": y * 0 + 255,
        "dim": y * 0 + 1,
        "board": (y + x) % 2 * 200 + 1,
        "islands": (y % 2 == 0) * (x % 2 == 0) * 100,
        "spiral": spiral * (255 - (y + x) % 7 * 30),
        "walls": (x % 2 == 0) * 200 + (y == size - 1) * 20,
        "hill": 255 - (y - size // 2).abs() * 9 - (x - size // 2).abs() * 3,
        "growing up": y * 255 // size,
        "crossing": ((y == x) | (y + x == size - 1)) * (50 + x),
    }[name].byte()[None, None]


def check(emulator, levels: torch.Tensor, connectivity: int, **schedule: int) -> None:
    rows, largest = swept(levels, connectivity)
    assert torch.equal(emulator.sweep(levels, connectivity, **schedule), rows)
    assert torch.equal(emulator.largest_at_cuts(levels, connectivity, **schedule), largest)


SMALL = [(1, 1, 1, 1), (2, 1, 1, 40), (1, 2, 40, 1), (3, 2, 2, 2), (2, 2, 7, 7), (1, 1, 13, 21), (1, 1, 32, 64)]


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("connectivity", [4, 8])
def test_noise(emulator, shape, connectivity):
    for seed, count in enumerate((2, 3, 9, 256) if shape[2] * shape[3] < 1000 else (4,)):
        check(emulator, noise(shape, count, seed), connectivity, seed=seed, resident=seed + 1)


@pytest.mark.parametrize("shape", [(2, 1, 15, 17), (1, 1, 30, 33)], ids=str)
@pytest.mark.parametrize("connectivity", [4, 8])
def test_smooth(emulator, shape, connectivity):
    for seed in range(2):
        check(emulator, smooth(shape, seed), connectivity, seed=seed, resident=2)


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1, 50, 61), (1, 1, 1, 2500), (1, 1, 2049, 1)], ids=str)
def test_larger_blocks(emulator, shape, connectivity):
    check(emulator, noise(shape, 3), connectivity, seed=1, resident=2)


def test_the_largest_blocks(emulator):
    """More pixels than shared memory has marks for: bits in global memory, in more than one turn."""
    levels = torch.zeros(1, 1, 257, 520, dtype=torch.uint8)
    levels[..., 3:20, 5:30] = noise((17, 25), 5)
    levels[..., 250:, 490:] = noise((7, 30), 4)
    check(emulator, levels, 8, seed=1)


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize(
    "name",
    ["black", "constant", "dim", "board", "islands", "spiral", "walls", "hill", "growing up", "crossing"],
)
def test_pictures(emulator, name, connectivity):
    for seed in range(2):
        check(emulator, picture(name, 23), connectivity, seed=seed)
    check(emulator, picture(name, 49).clamp(max=201), connectivity) if name in ("spiral", "board") else None


def test_of_equal_areas_the_one_met_first_leads(emulator):
    levels = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    levels[0, 0, 0, 7], levels[0, 0, 4, 1], levels[0, 0, 8, 5] = 10, 20, 30
    levels[0, 0, 8, 6] = 5
    largest = emulator.largest_at_cuts(levels)[0, 0]
    assert largest[29].tolist() == [5, 8, 6, 9, 1]
    assert largest[19].tolist() == [1, 4, 2, 5, 1]
    assert largest[9].tolist() == [7, 0, 8, 1, 1]
    assert largest[4].tolist() == [5, 8, 7, 9, 2]
    assert largest[30:].eq(0).all()


def test_a_row_lasts_from_cut_to_cut(emulator):
    levels = torch.tensor([[[[3, 0, 7, 7], [0, 0, 0, 200]]]], dtype=torch.uint8)
    rows = emulator.sweep(levels, 8)[:, :7].tolist()
    assert rows == [[3, 1, 4, 2, 1, 7, 199], [2, 0, 4, 2, 3, 0, 6], [0, 0, 1, 1, 1, 0, 2]]


def test_bits_do_not_depend_on_the_schedule(emulator):
    levels = torch.cat([noise((1, 2, 19, 23), 12), smooth((1, 2, 19, 23))])
    first = emulator.sweep(levels, resident=1)
    for seed in (1, 2, 3):
        assert torch.equal(emulator.sweep(levels, seed=seed, resident=2 * seed), first)


@pytest.mark.parametrize("most", [1, 20_000])
def test_little_scratch_changes_nothing(emulator, most):
    levels = noise((5, 2, 11, 13), 9)
    levels[3] = 0
    want = emulator.sweep(levels), emulator.largest_at_cuts(levels)
    with emulator.scratch(most):
        got = emulator.sweep(levels), emulator.largest_at_cuts(levels)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_many_maps(emulator):
    """More maps than one turn of the sum over maps takes."""
    few = noise((10, 1, 1, 2), 4)
    want = swept(few, 8)[0].repeat(103, 1, 1)
    want[..., 7] += 10 * torch.arange(103)[:, None]
    assert torch.equal(emulator.sweep(few.repeat(103, 1, 1, 1)), want.flatten(0, 1))


def test_no_barrier_can_be_left_out(wrong_sweep):
    """With any one missing, some schedule of a few gives other numbers."""
    lines = {}
    for start, name in ((1, "sweep.cuh"), (1001, "sweep_launch.cuh")):
        text = (ROOT / "csrc/cuda" / name).read_text().splitlines()
        lines |= {number: name for number, line in enumerate(text, start) if "__syncthreads()" in line}
    assert len(lines) >= 10
    levels = torch.cat([noise((3, 1, 15, 16), 5), smooth((3, 1, 15, 16))])
    run = wrong_sweep.run_without
    run.restype = ctypes.c_double

    def results(line: int):
        for seed in range(8):
            given = ctypes.c_uint(line), ctypes.c_uint64(seed), ctypes.c_void_p(levels.data_ptr()), ctypes.c_int64(6)
            yield run(*given, 15, 16)

    (right,) = set(results(0))
    assert right > 0
    for line, name in lines.items():
        assert any(result != right for result in results(line)), f"{name}:{line % 1000}"
