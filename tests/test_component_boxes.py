"""component_boxes and largest_box against a flood fill, on hard shapes and at the edge of their threshold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import molt
from molt import ops

BACKENDS = ["reference", "native"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAN, INF = math.nan, math.inf
STEPS = {4: [(0, 1), (0, -1), (1, 0), (-1, 0)]}
STEPS[8] = STEPS[4] + [(1, 1), (1, -1), (-1, 1), (-1, -1)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def filled(values: np.ndarray, threshold: float, neighbours: int) -> list[tuple]:
    """Flood fill in reading order: (box, area, mean), the largest first, of equals the first met."""
    if np.isnan(values).any():
        return []
    keep = (values >= threshold * values.max(initial=0)) & (values > 0)
    seen, found = np.zeros_like(keep), []
    for start in zip(*np.nonzero(keep), strict=True):
        if seen[start]:
            continue
        stack, inside = [start], []
        seen[start] = True
        while stack:
            y, x = stack.pop()
            inside.append((y, x))
            for dy, dx in STEPS[neighbours]:
                at = (y + dy, x + dx)
                if 0 <= at[0] < keep.shape[0] and 0 <= at[1] < keep.shape[1] and keep[at] and not seen[at]:
                    seen[at] = True
                    stack.append(at)
        ys, xs = zip(*inside, strict=True)
        box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
        found.append((box, len(inside), math.fsum(values[p] for p in inside) / len(inside)))
    return sorted(found, key=lambda item: -item[1])


def check(maps: torch.Tensor, threshold: float, connectivity: int, backend: str) -> list[tuple]:
    """Compare all three forms of the result with the flood fill, and return the rows expected."""
    given = {"connectivity": connectivity, "backend": backend}
    every = ops.component_boxes(maps, threshold, **given)
    first = ops.component_boxes(maps, threshold, largest=True, **given)
    boxes, area, mean = ops.largest_box(maps, threshold, **given)
    assert boxes.dtype == mean.dtype == torch.float32 and area.dtype == torch.int64
    assert every.boxes.dtype == every.mean.dtype == torch.float32
    assert every.area.dtype == every.image.dtype == every.channel.dtype == torch.int64
    rows = []
    for b in range(maps.shape[0]):
        for c in range(maps.shape[1]):
            own = filled(maps[b, c].double().numpy(), threshold, connectivity)
            rows += [(b, c, *row) for row in own]
            box, size, level = own[0] if own else ((0, 0, 0, 0), 0, 0.0)
            assert tuple(boxes[b, c].tolist()) == box and area[b, c] == size
            assert mean[b, c].item() == pytest.approx(level, rel=1e-6, abs=1e-44)
    heads = [row for i, row in enumerate(rows) if i == 0 or row[:2] != rows[i - 1][:2]]
    for found, wanted in ((every, rows), (first, heads)):
        assert found.boxes.shape == (len(wanted), 4)
        columns = zip(
            found.image.tolist(), found.channel.tolist(), found.boxes.tolist(), found.area.tolist(), strict=True
        )
        assert [(b, c, tuple(box), size) for b, c, box, size in columns] == [row[:4] for row in wanted]
        np.testing.assert_allclose(found.mean.double().numpy(), [row[4] for row in wanted], rtol=1e-6, atol=1e-44)
    return rows


def from_text(text: str) -> torch.Tensor:
    """One map: # is 1, + is 0.75, everything else 0."""
    lines = text.split()
    return torch.tensor([[[[{"#": 1.0, "+": 0.75}.get(sign, 0.0) for sign in line] for line in lines]]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_matches_a_flood_fill(dtype: torch.dtype, connectivity: int, backend: str) -> None:
    for shape in ((1, 1), (1, 40), (40, 1), (30, 2), (17, 23), (7, 8), (9, 9), (4, 31), (5, 33)):
        maps = torch.rand(2, 2, *shape, dtype=torch.float64).to(dtype)
        for threshold in (0.3, 0.55, 0.8, 1.0, 1e-9):
            assert check(maps, threshold, connectivity, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("connectivity", [4, 8])
def test_components_of_half_the_pixels(connectivity: int, backend: str) -> None:
    # Near the percolation thresholds components are large, winding and merge often.
    maps = (torch.rand(6, 1, 61, 67) < torch.linspace(0.35, 0.65, 6).view(6, 1, 1, 1)).float()
    check(maps * (0.5 + 0.5 * torch.rand_like(maps)), 0.5, connectivity, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_connectivity(backend: str) -> None:
    for text, four, eight in (
        ("#. .#", 2, 1),
        (".# #.", 2, 1),
        ("#.# .#. #.#", 5, 1),
        ("##. ..#", 2, 1),
        ("..# ##.", 2, 1),
        ("#..#", 2, 2),
        ("#.. ..# #..", 3, 3),
        ("#.#.# ##### .....", 1, 1),
        ("#.#.# #.#.# #####", 1, 1),
        ("#...# #.#.# ###.# #...# #####", 1, 1),
        (".###. #...# .###.", 4, 1),
        ("###.. ..... ..###", 2, 2),
    ):
        maps = from_text(text)
        for flipped in (maps, maps.flip(2), maps.flip(3), maps.flip(2, 3), maps.transpose(2, 3)):
            assert len(check(flipped, 0.5, 4, backend)) == four, text
            assert len(check(flipped, 0.5, 8, backend)) == eight, text


def spiral(side: int) -> torch.Tensor:
    """A path one pixel wide that winds inwards, with a gap of one pixel between its turns."""
    out = torch.zeros(side, side)
    y = x = 0
    dy, dx, out[0, 0] = 0, 1, 1
    steps = [side - 1]
    steps += [n for length in range(side - 1, 0, -2) for n in (length, length)]
    for length in steps:
        for _ in range(length):
            y, x = y + dy, x + dx
            out[y, x] = 1
        dy, dx = dx, -dy
    return out[None, None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("connectivity", [4, 8])
def test_long_windings_are_one(connectivity: int, backend: str) -> None:
    snake = torch.zeros(1, 1, 101, 99)
    snake[:, :, ::2] = 1
    snake[:, :, 1::4, -1], snake[:, :, 3::4, 0] = 1, 1
    comb = torch.zeros(1, 1, 80, 99)
    comb[:, :, :, ::2], comb[:, :, -1] = 1, 1
    bowls = torch.zeros(1, 1, 80, 99)  # bowls inside one another that only the last row joins
    for i in range(0, 48, 2):
        bowls[:, :, i:, i], bowls[:, :, i:, 98 - i] = 1, 1
    bowls[:, :, -1] = 1
    for maps in (spiral(101), snake, comb, bowls):
        for turned in (maps, maps.flip(2), maps.flip(3), maps.transpose(2, 3)):
            ((_, _, box, area, mean),) = check(turned, 0.5, connectivity, backend)
            assert box == (0, 0, turned.shape[3], turned.shape[2]) and area == maps.sum() and mean == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkerboards(backend: str) -> None:
    board = ((torch.arange(30)[:, None] + torch.arange(31)) % 2).float()[None, None]
    rows = check(board, 0.5, 4, backend)
    assert len(rows) == 465 and {row[3] for row in rows} == {1}
    ((_, _, box, area, _),) = check(board, 0.5, 8, backend)
    assert box == (0, 0, 31, 30) and area == 465


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_areas_the_first_met_leads(backend: str) -> None:
    # A column at the right begins in an earlier row than the bar at the left.
    maps = from_text("......# ......# ###...# ....... ..###.. ....... ##.....")
    wanted = [(6, 0, 7, 3), (0, 2, 3, 3), (2, 4, 5, 5), (0, 6, 2, 7)]
    assert [row[2] for row in check(maps, 0.5, 8, backend)] == wanted
    single = from_text("..#.# #.... ...#.")
    assert [row[2] for row in check(single, 0.5, 4, backend)] == [
        (2, 0, 3, 1),
        (4, 0, 5, 1),
        (0, 1, 1, 2),
        (3, 2, 4, 3),
    ]
    hooked = from_text("....## .#.... .#....")
    assert [row[2] for row in check(hooked, 0.5, 4, backend)] == [(4, 0, 6, 1), (1, 1, 2, 3)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_comparison_is_made_in_double(dtype: torch.dtype, backend: str) -> None:
    """Values right at threshold * maximum and their neighbours, where float32 arithmetic would decide otherwise."""
    generator = np.random.default_rng(1)
    decided_by_rounding = 0
    for threshold in [*generator.random(150).tolist(), 0.5, 0.1, 0.2, 0.7, 1 / 3, 1.0, 2.0 ** (-20)]:
        high = torch.rand((), dtype=torch.float64).mul(0.9).add(0.1).to(dtype)
        edge = torch.tensor(threshold * high.item(), dtype=torch.float64).to(dtype)
        up, down = (torch.nextafter(edge, torch.tensor(end, dtype=dtype)) for end in (INF, -INF))
        zero = torch.zeros((), dtype=dtype)
        # Alone between zeros, so that every pixel kept is a component of its own.
        row = torch.stack([high, zero, edge, zero, up, zero, down, zero, zero - 1]).clamp_max(high)
        wanted = [x for x, v in enumerate(row.double().tolist()) if v > 0 and v >= threshold * high.item()]
        found = ops.component_boxes(row.view(1, 1, 1, -1), threshold, backend=backend)
        assert found.boxes[:, 0].tolist() == wanted
        decided_by_rounding += (edge.double() < threshold * high.double()).item()
    assert dtype == torch.float64 or decided_by_rounding > 30, "the values do lie on both sides"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_and_tiny_thresholds(dtype: torch.dtype, backend: str) -> None:
    maps = torch.tensor([[[[0.0, 1.0, 2.0, 4.0, -4.0]]]], dtype=dtype)
    for threshold, left, right in ((0.5, 2, 4), (1.0, 3, 4), (0.25, 1, 4), (0.2500001, 2, 4), (5e-324, 1, 4)):
        ((_, _, box, _, _),) = check(maps, threshold, 8, backend)
        assert box == (left, 0, right, 1)
    least = torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype))
    tiny = torch.stack([least * 0, least, least * 2, least * 3]).view(1, 1, 1, 4)
    for threshold in (1e-3, 0.4, 0.7, 1.0):
        check(tiny, threshold, 4, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_nan_and_nothing(dtype: torch.dtype, backend: str) -> None:
    maps = torch.rand(1, 9, 5, 6).to(dtype) + 0.25
    maps[0, 0], maps[0, 1], maps[0, 2] = 0, -1, -0.0
    maps[0, 3, 4, 5], maps[0, 4, 0, 0] = NAN, NAN
    maps[0, 5, 1, 2], maps[0, 5, 1, 3], maps[0, 5, 4, 0] = INF, INF, INF
    maps[0, 6, 2, 2] = -INF
    maps[0, 7], maps[0, 7, 4, 5] = -INF, 0.5
    maps[0, 8, 0, 0], maps[0, 8, 4, 5] = INF, NAN
    rows = check(maps, 0.5, 8, backend)
    assert {row[1] for row in rows} == {5, 6, 7}
    assert [row[2:] for row in rows if row[1] == 5] == [((2, 1, 4, 2), 2, INF), ((0, 4, 1, 5), 1, INF)]
    assert [row[2] for row in rows if row[1] == 7] == [(5, 4, 6, 5)]
    maps.nan_to_num_(0)
    assert not check(maps[:, :3], 1e-9, 4, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_beside_every_lane(backend: str) -> None:
    maps = torch.rand(20, 1, 1, 19)
    maps[torch.arange(19), 0, 0, torch.arange(19)] = NAN
    assert set(ops.component_boxes(maps, 0.5, backend=backend).image.tolist()) == {19}


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend: str) -> None:
    for shape in ((0, 2, 3, 3), (2, 0, 3, 3)):
        check(torch.rand(shape), 0.5, 8, backend)


def test_a_large_map() -> None:
    maps = torch.nn.functional.interpolate(torch.rand(2, 1, 90, 80), (1500, 1400), mode="bilinear")
    maps[:, :, ::7, ::5] = 0
    forms = [ops.component_boxes(maps, 0.6, connectivity=4, backend=backend) for backend in BACKENDS]
    assert len(forms[0].area) > 1000
    for name in ("boxes", "area", "image", "channel"):
        assert torch.equal(getattr(forms[0], name), getattr(forms[1], name))
    torch.testing.assert_close(forms[0].mean, forms[1].mean, rtol=1e-6, atol=0)


def test_means_are_added_in_double() -> None:
    maps = torch.full((1, 1, 1000, 1001), 1.0009765625, dtype=torch.float16)
    maps[0, 0, 0, 0] = 1024
    (level,) = ops.component_boxes(maps, 1e-4, backend="native").mean.tolist()
    assert level == pytest.approx((1024 + 1000999 * 1.0009765625) / 1001000, rel=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_carry_no_gradient(backend: str) -> None:
    maps = torch.rand(1, 2, 4, 5, requires_grad=True)
    found = ops.component_boxes(maps, backend=backend)
    outputs = [found.boxes, found.area, found.mean, found.image, *ops.largest_box(maps, backend=backend)]
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", [ops.component_boxes, ops.largest_box])
@pytest.mark.parametrize(
    ("given", "error", "word"),
    [
        ({"threshold": 0}, ValueError, r"threshold: got 0, expected a number in \(0, 1\]"),
        ({"threshold": 1.5}, ValueError, "threshold: got 1.5"),
        ({"threshold": NAN}, ValueError, "threshold: got nan"),
        ({"threshold": "0.5"}, TypeError, "threshold: got str"),
        ({"threshold": True}, TypeError, "threshold: got bool"),
        ({"connectivity": 6}, ValueError, "connectivity: got 6, expected 4 or 8"),
        ({"maps": torch.rand(3)}, ValueError, r"maps: got shape \(3,\), expected \(h, w\), \(B, h, w\) or"),
        ({"maps": np.ones((1, 1, 1, 3, 3))}, ValueError, r"maps: got shape \(1, 1, 1, 3, 3\), expected \(h, w\)"),
        ({"maps": np.ones((3, 3), np.uint8)}, TypeError, "maps: got an array of uint8, expected float16"),
        ({"maps": [torch.rand(3, 3)]}, TypeError, "maps: got list"),
        ({"maps": torch.ones(1, 1, 3, 3, dtype=torch.int64)}, TypeError, "maps: got int64"),
        ({"maps": torch.rand(1, 1, 0, 3)}, ValueError, r"maps: got shape \(1, 1, 0, 3\)"),
        ({"maps": None}, TypeError, "maps: got NoneType"),
    ],
)
def test_arguments_are_checked(operator: object, given: dict, error: type, word: str, backend: str) -> None:
    with pytest.raises(error, match="^" + word):
        operator(**{"maps": torch.rand(1, 1, 4, 4), "backend": backend} | given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_being_captured_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the maps are looked at, and on a GPU alone."""
    with FakeTensorMode():
        maps = torch.empty(1, 1, 4, 5, device="cuda", dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for operator, instead in ((ops.component_boxes, "largest_box"), (ops.sweep_boxes, "largest_at_cuts")):
        name = operator.__name__
        with pytest.raises(
            RuntimeError, match=f"^{name}: got a call while a CUDA graph is captured, expected {instead}"
        ):
            operator(maps, backend=backend)
    assert len(ops.component_boxes(torch.ones(1, 1, 4, 5)).area) == 1
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(TypeError, match="^maps: got uint8"):
        ops.component_boxes(maps, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_what_refine_returns_is_taken(dtype: str, backend: str) -> None:
    """(H, W) and (B, H, W), tensors and arrays of any strides, give what (B, C, H, W) gives, in as few dimensions."""
    maps = np.zeros((2, 3, 8, 9), dtype)
    maps[0, 1, 2:4, 3:5] = 1
    maps[1, 1, 5, 6] = 1
    frozen = maps[:, 1].copy()
    frozen.flags.writeable = False
    expected = ops.largest_box(torch.from_numpy(maps.astype(float)), backend=backend)
    native = torch.from_numpy(maps.astype(np.float32))
    for stack in (maps[:, 1], frozen, maps[:, 1, ::-1][:, ::-1], native[:, 1], native.permute(0, 2, 3, 1)[..., 1]):
        found = ops.component_boxes(stack, backend=backend)
        assert found.boxes.tolist() == [[3, 2, 5, 4], [6, 5, 7, 6]]
        assert found.image.tolist() == [0, 1] and found.channel.tolist() == [0, 0]
        for got, whole in zip(ops.largest_box(stack, backend=backend), expected, strict=True):
            assert torch.equal(got, whole[:, 1])
        assert ops.component_boxes(stack[1], backend=backend).boxes.tolist() == [[6, 5, 7, 6]]
        for got, whole in zip(ops.largest_box(stack[1], backend=backend), expected, strict=True):
            assert torch.equal(got, whole[1, 1])
    assert all(torch.equal(*pair) for pair in zip(ops.largest_box(maps, backend=backend), expected, strict=True))
    refined = molt.refine(maps[:, 1].astype(np.float32), np.zeros((2, 8, 9, 3)), alpha=0)
    assert ops.component_boxes(refined, backend=backend).boxes.tolist() == [[3, 2, 5, 4], [6, 5, 7, 6]]
