"""Bilinear upsampling, per-map min-max and the weighted sum over scales, in one launch and one write."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

# More scales go in groups of this many, added up through a float32 buffer: state grows with each.
MOST_SCALES = 4
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PIXELS_A_THREAD = 8
_ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _first_sample(cell, small, large):
    """First of the `large` samples in a cell of `small`; `large` itself for the cell after the last."""
    first = (large * (2 * cell + 1) + small - 1) // (2 * small)
    return tl.where(cell <= 0, 0, tl.where(cell >= small, large, first))


@triton.jit
def _fraction(sample, cell, small, large, inverse):
    """How far in [0, 1] a sample lies between its cell's node and the next; negative (clamped) before the first."""
    rest = (2 * sample + 1) * small - large - 2 * large * cell
    return tl.maximum(rest, 0).to(tl.float32) * inverse


@triton.jit
def _load(pointer, offset, mask):
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _extremes(
    pointer, small_h, small_w, stride_h, stride_w, height, width, inverse_h, inverse_w,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """Least value and range of one upsampled map; the range is NaN where any node is NaN or infinite.

    Rounded arithmetic of a sample is monotone along an axis, so in a cell only the first and last sampled row and
    column can hold extremes.
    """
    low = tl.full([TILE_H, TILE_W], float("inf"), tl.float32)
    high = tl.full([TILE_H, TILE_W], float("-inf"), tl.float32)
    poison = tl.zeros([TILE_H, TILE_W], tl.float32)
    for left in range(0, small_w, TILE_W):
        i = left + tl.arange(0, TILE_W)
        wide_i = i.to(POSITION)
        x_first = _first_sample(wide_i, small_w, width)
        x_last = _first_sample(wide_i + 1, small_w, width) - 1
        tx_first = _fraction(x_first, wide_i, small_w, width, inverse_w)[None, :]
        tx_last = _fraction(x_last, wide_i, small_w, width, inverse_w)[None, :]
        at_0 = (i * stride_w)[None, :]
        at_1 = (tl.minimum(i + 1, small_w - 1) * stride_w)[None, :]
        for top in range(0, small_h, TILE_H):
            j = top + tl.arange(0, TILE_H)
            wide_j = j.to(POSITION)
            y_first = _first_sample(wide_j, small_h, height)
            y_last = _first_sample(wide_j + 1, small_h, height) - 1
            ty_first = _fraction(y_first, wide_j, small_h, height, inverse_h)[:, None]
            ty_last = _fraction(y_last, wide_j, small_h, height, inverse_h)[:, None]
            row_0 = (j * stride_h)[:, None]
            row_1 = (tl.minimum(j + 1, small_h - 1) * stride_h)[:, None]
            mask = (j < small_h)[:, None] & (i < small_w)[None, :]
            sampled = mask & (y_last >= y_first)[:, None] & (x_last >= x_first)[None, :]
            node = _load(pointer, row_0 + at_0, mask)
            across = _load(pointer, row_0 + at_1, mask) - node
            node_1 = _load(pointer, row_1 + at_0, mask)
            across_1 = _load(pointer, row_1 + at_1, mask) - node_1
            a = tl.fma(tx_first, across, node)
            b = tl.fma(tx_last, across, node)
            down_a = tl.fma(tx_first, across_1, node_1) - a
            down_b = tl.fma(tx_last, across_1, node_1) - b
            v0, v1 = tl.fma(ty_first, down_a, a), tl.fma(ty_last, down_a, a)
            v2, v3 = tl.fma(ty_first, down_b, b), tl.fma(ty_last, down_b, b)
            least = tl.minimum(tl.minimum(v0, v1, _ALL), tl.minimum(v2, v3, _ALL), _ALL)
            most = tl.maximum(tl.maximum(v0, v1, _ALL), tl.maximum(v2, v3, _ALL), _ALL)
            low = tl.where(sampled, tl.minimum(low, least), low)
            high = tl.where(sampled, tl.maximum(high, most), high)
            # Anything finite times zero is zero; NaN and infinity leave NaN.
            poison += tl.where(sampled, (most - least) * 0.0, 0.0) + node * 0.0
    least = tl.min(tl.min(low, 1), 0)
    return least, tl.max(tl.max(high, 1), 0) - least + tl.sum(tl.sum(poison, 1), 0)


@triton.jit
def _scaling(least, span, weight):
    """Return p, q, r such that (v * p + q) * r = weight * (v - least) / span; zeros for a constant map.

    p is a power of two, other than 1 only where 1 / span would overflow.
    """
    p = tl.where(span < 2.0**-126, 2.0**24, 1.0)
    scaled = span * p
    r = tl.div_rn(weight, tl.where(span == 0, 1.0, scaled))
    # The largest value times a reciprocal rounded down would miss `weight`; rounded up, the clamp cuts the excess.
    r = tl.where(scaled * r < weight, (r.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True), r)
    r = tl.where(span == 0, 0.0, tl.where(span < float("inf"), r, float("nan")))
    return p, -least * p, r


@triton.jit
def _row(pointer, offset, at_0, at_1, fraction):
    a = tl.load(pointer + offset + at_0).to(tl.float32)
    b = tl.load(pointer + offset + at_1).to(tl.float32)
    return tl.fma(fraction, b - a, a)


@triton.jit
def _two_rows(
    pointer, cell, rest, small_h, stride_h, height, at_0, at_1, fraction, p, q, r, EXACT: tl.constexpr
):  # fmt: skip
    """Horizontally interpolated upper row of a cell and the way down to its lower one, normalised unless EXACT."""
    upper = tl.minimum(cell, small_h - 1)
    # A cell whose only sampled row is its own upper one must not see the row below.
    below = tl.where((rest == 0) & (small_h >= height), upper, tl.minimum(upper + 1, small_h - 1))
    a = _row(pointer, upper * stride_h, at_0, at_1, fraction)
    b = _row(pointer, below * stride_h, at_0, at_1, fraction)
    if not EXACT:
        a = tl.fma(a, p, q) * r
        b = tl.fma(b, p, q) * r
    return a, b - a


# Specialising on sizes and strides would compile anew for most photos.
_FREE = ["channels", "height", "width_units", "rows", "splits", "blocks"]
_FREE += [f"{name}_{s}" for name in ("map", "weight", "h", "w", "sb", "sc", "sh", "sw") for s in range(MOST_SCALES)]


@triton.jit(do_not_specialize=_FREE)
def _fuse_kernel(
    out, partial, channels, height, width_units, rows, splits, blocks,
    map_0, weight_0, h_0, w_0, sb_0, sc_0, sh_0, sw_0,
    map_1, weight_1, h_1, w_1, sb_1, sc_1, sh_1, sw_1,
    map_2, weight_2, h_2, w_2, sb_2, sc_2, sh_2, sw_2,
    map_3, weight_3, h_3, w_3, sb_3, sc_3, sh_3, sw_3,
    SCALES: tl.constexpr, EXACT: tl.constexpr, ADD: tl.constexpr, CLAMP: tl.constexpr, WIDTH_ALIGN: tl.constexpr,
    BLOCK_W: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    maps, weights = (map_0, map_1, map_2, map_3), (weight_0, weight_1, weight_2, weight_3)
    small_hs, small_ws = (h_0, h_1, h_2, h_3), (w_0, w_1, w_2, w_3)
    strides_b, strides_c = (sb_0, sb_1, sb_2, sb_3), (sc_0, sc_1, sc_2, sc_3)
    strides_h, strides_w = (sh_0, sh_1, sh_2, sh_3), (sw_0, sw_1, sw_2, sw_3)
    # A product tells the compiler what divides the width, hence which stores can be wide.
    width = width_units * WIDTH_ALIGN
    program = tl.program_id(0)
    block = program % blocks
    split = program // blocks % splits
    map_index = program // blocks // splits
    batch = (map_index // channels).to(tl.int64)
    channel = (map_index % channels).to(tl.int64)
    inverse_h = tl.div_rn(1.0, (2 * height).to(tl.float32))
    inverse_w = tl.div_rn(1.0, (2 * width).to(tl.float32))
    x = block * BLOCK_W + tl.arange(0, BLOCK_W)
    wide_x = tl.minimum(x, width - 1).to(POSITION)
    y_begin = split * rows
    y_end = tl.minimum(y_begin + rows, height)

    pointers, scaling, columns, cells, rests, uppers, downs = (), (), (), (), (), (), ()
    base = tl.zeros([BLOCK_W], tl.float32)
    for s in tl.static_range(SCALES):
        small_h, small_w, stride_h, stride_w = small_hs[s], small_ws[s], strides_h[s], strides_w[s]
        pointer = maps[s] + batch * strides_b[s] + channel * strides_c[s]
        least, span = _extremes(
            pointer, small_h, small_w, stride_h, stride_w, height, width, inverse_h, inverse_w,
            TILE_H, TILE_W, POSITION,
        )  # fmt: skip
        p, q, r = _scaling(least, span, weights[s])

        n = tl.maximum((2 * wide_x + 1) * small_w - width, 0)
        i = n // (2 * width)
        rest_x = (n - i * (2 * width)).to(tl.int32)
        i = i.to(tl.int32)
        fraction = rest_x.to(tl.float32) * inverse_w
        at_0 = i * stride_w
        at_1 = tl.where(rest_x == 0, i, tl.minimum(i + 1, small_w - 1)) * stride_w

        n = (2 * y_begin.to(POSITION) + 1) * small_h - height
        cell = tl.maximum(n, 0) // (2 * height)
        rest = (n - cell * (2 * height)).to(tl.int32)
        cell = cell.to(tl.int32)
        a, d = _two_rows(pointer, cell, rest, small_h, stride_h, height, at_0, at_1, fraction, p, q, r, EXACT)
        base += a
        pointers, scaling, columns = pointers + (pointer,), scaling + (p, q, r), columns + (at_0, at_1, fraction)
        cells, rests, uppers, downs = cells + (cell,), rests + (rest,), uppers + (a,), downs + (d,)

    start = (map_index.to(tl.int64) * height + y_begin) * width
    mask = x < width
    for _ in range(y_begin, y_end):
        value = base
        for s in tl.static_range(SCALES):
            t = tl.maximum(rests[s], 0).to(tl.float32) * inverse_h
            value = tl.fma(t, downs[s], value)
        if EXACT:
            value = tl.fma(value, scaling[0], scaling[1]) * scaling[2]
        at = start + x
        start += width
        if ADD:
            value += tl.load(partial + at, mask=mask, other=0.0)
        if CLAMP:
            value = tl.minimum(tl.maximum(value, 0.0, _ALL), 1.0, _ALL)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)

        moved = False
        next_cells, next_rests, next_uppers, next_downs = (), (), (), ()
        for s in tl.static_range(SCALES):
            small_h, stride_h = small_hs[s], strides_h[s]
            step = small_h // height
            cell, rest, a, d = cells[s], rests[s] + 2 * (small_h - step * height), uppers[s], downs[s]
            if (step > 0) | (rest >= 2 * height):
                cell += step + (rest >= 2 * height).to(tl.int32)
                rest = tl.where(rest >= 2 * height, rest - 2 * height, rest)
                a, d = _two_rows(
                    pointers[s], cell, rest, small_h, stride_h, height, columns[3 * s], columns[3 * s + 1],
                    columns[3 * s + 2], scaling[3 * s], scaling[3 * s + 1], scaling[3 * s + 2], EXACT,
                )  # fmt: skip
                moved = True
            next_cells, next_rests = next_cells + (cell,), next_rests + (rest,)
            next_uppers, next_downs = next_uppers + (a,), next_downs + (d,)
        cells, rests, uppers, downs = next_cells, next_rests, next_uppers, next_downs
        if moved:
            base = uppers[0]
            for s in tl.static_range(1, SCALES):
                base += uppers[s]


def fuse_maps(maps: list[Tensor], size: tuple[int, int], weights: list[float]) -> Tensor:
    """Return the weighted sum over scales of each map upsampled to ``size`` and stretched to [0, 1].

    Args:
        maps: one (B, C, h, w) float16, bfloat16 or float32 tensor a scale, any strides; B, C, dtype, device agree.
        size: (H, W) of the result.
        weights: one finite number >= 0 a scale, summing to 1. One map of weight 1.0 attains 0 and 1 exactly.

    Returns:
        (B, C, H, W) contiguous, of the maps' dtype. Constant map: zeros. Any NaN or infinity in a map, or a range
        beyond float32: NaN, whatever its weight. Bits depend on nothing but the map's own values and ``size``.

    Raises:
        TypeError: float64, which has no Triton form.
    """
    first = maps[0]
    if first.dtype not in DTYPES:
        raise TypeError(f"maps: got {str(first.dtype).removeprefix('torch.')}, expected float16, bfloat16, float32")
    batch, channels = first.shape[:2]
    out = first.new_empty((batch, channels, *size))
    if out.numel() == 0:
        return out
    groups = [slice(i, i + MOST_SCALES) for i in range(0, len(maps), MOST_SCALES)]
    partial = out
    if len(groups) > 1 and out.dtype != torch.float32:
        partial = torch.empty_like(out, dtype=torch.float32)
    with torch.cuda.device_of(first):
        for index, group in enumerate(groups):
            last = index == len(groups) - 1
            arguments, options = plan(maps[group], size, weights[group], processors(first.device))
            options |= {"EXACT": weights == [1.0], "ADD": index > 0, "CLAMP": last}
            programs = batch * channels * arguments[4] * arguments[5]
            _fuse_kernel[(programs,)](out if last else partial, partial, *arguments, **options)
    return out


def plan(
    maps: list[Tensor], size: tuple[int, int], weights: list[float], processors: int
) -> tuple[tuple, dict[str, object]]:
    """Return the kernel's arguments after the two outputs, and its options but for EXACT, ADD and CLAMP."""
    height, width = size
    batch, channels = maps[0].shape[:2]
    # Offsets inside one map are 32-bit.
    maps = [
        m if (m.shape[2] - 1) * m.stride(2) + (m.shape[3] - 1) * m.stride(3) < 2**31 else m.contiguous() for m in maps
    ]
    largest = max(max(m.shape[2:]) for m in maps) + 256
    block = max(32, min(512, triton.next_power_of_2(width)))
    warps = max(1, block // (32 * PIXELS_A_THREAD))
    blocks = triton.cdiv(width, block)
    tile_w = min(128, triton.next_power_of_2(max(m.shape[3] for m in maps)))
    # Rows are split for few maps only, and never so fine that finding the extremes again costs more than the rows.
    cells = sum(m.shape[2] * m.shape[3] for m in maps)
    splits = triton.cdiv(16 * processors, batch * channels * blocks * warps)
    rows = max(16, triton.cdiv(cells, block), triton.cdiv(height, splits))
    align = 1
    while align < 16 // maps[0].element_size() and width % (2 * align) == 0:
        align *= 2
    scales = [(m, weight, *m.shape[2:], *m.stride()) for m, weight in zip(maps, weights, strict=True)]
    scales += [scales[0]] * (MOST_SCALES - len(scales))
    splits = triton.cdiv(height, rows)
    arguments = (channels, height, width // align, rows, splits, blocks, *itertools.chain(*scales))
    options: dict[str, object] = {
        "SCALES": len(maps),
        "WIDTH_ALIGN": align,
        "BLOCK_W": block,
        "TILE_H": max(1, 256 * warps // tile_w),
        "TILE_W": tile_w,
        "POSITION": tl.int32 if 2 * (largest + 1) * 2 * max(height, width) < 2**31 else tl.int64,
        "num_warps": warps,
        "enable_fp_fusion": False,
    }
    return arguments, options


def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 on the CPU, for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
