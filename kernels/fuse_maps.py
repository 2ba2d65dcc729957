"""Bilinear upsampling, per-map min-max and the weighted sum over scales, in one launch and one write."""

# ruff: noqa: RUF005  (the kernel language adds tuples and does not unpack into them)
# Kernels are written in Triton's language.
# mypy: ignore-errors
from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

# More scales go in groups of this many, added up through a float32 buffer: state grows with each.
MOST_SCALES = 4
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALL = tl.constexpr(tl.PropagateNan.ALL)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _first_sample(cell, small, large):
    """First of the `large` samples in a cell of `small`; `large` itself for the cell after the last.

    Cell -1 holds the samples before the first node.
    """
    first = (large * (2 * cell + 1) + small - 1) // (2 * small)
    return tl.where(cell < 0, 0, tl.where(cell >= small, large, first))


@triton.jit
def _fraction(sample, cell, small, large, inverse):
    """How far in [0, 1] a sample lies from its cell's node to the next one."""
    rest = (2 * sample + 1) * small - large - 2 * large * cell
    return tl.maximum(rest, 0).to(tl.float32) * inverse


@triton.jit
def _load(row, offset, TYPE: tl.constexpr):
    """Values at unsigned byte offsets: a 64-bit scalar plus an unsigned 32-bit register is one address mode."""
    return tl.load((row + offset).to(tl.pointer_type(TYPE), bitcast=True)).to(tl.float32)


@triton.jit
def _extremes(
    pointer, small_h, small_w, stride_h, stride_w, height, width, inverse_h, inverse_w,
    TILE: tl.constexpr, SHRINK: tl.constexpr, POSITION: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Least value and range of one upsampled map; the range is NaN where any node is NaN or infinite.

    Rounded arithmetic of a sample is monotone along an axis, so in a cell only the first and last sampled row and
    column can hold extremes. SHRINK: there may be cells without a sample.
    """
    low = tl.full([TILE], LARGEST, tl.float32)
    high = tl.full([TILE], -LARGEST, tl.float32)
    # One lane a row: brings small maps into the cache at once.
    lane = tl.minimum(tl.arange(0, TILE), small_h - 1)
    poison = _load(pointer, (lane * stride_h).to(tl.uint32), TYPE) * 0.0
    for left in range(0, small_w, TILE):
        # A cell met twice changes no extreme, so columns beyond the last need no mask.
        i = tl.minimum(left + tl.arange(0, TILE), small_w - 1)
        wide_i = i.to(POSITION)
        x_first = tl.where(i == 0, 0, _first_sample(wide_i, small_w, width))
        x_last = _first_sample(wide_i + 1, small_w, width) - 1
        tx_first = _fraction(x_first, wide_i, small_w, width, inverse_w)
        tx_last = _fraction(x_last, wide_i, small_w, width, inverse_w)
        at_0 = (i * stride_w).to(tl.uint32)
        next_i = tl.minimum(i + 1, small_w - 1)
        if SHRINK:
            next_i = tl.where((tx_first == 0) & (small_w >= width), i, next_i)
        at_1 = (next_i * stride_w).to(tl.uint32)
        node = _load(pointer, at_0, TYPE)
        next_node = _load(pointer, at_1, TYPE)
        upper_a = tl.fma(tx_first, next_node - node, node)
        upper_b = tl.fma(tx_last, next_node - node, node)
        # The row below a cell is asked for one cell ahead.
        y_first = tl.zeros([], POSITION)
        for row in range(-1, small_h):
            j = tl.cast(row, POSITION)
            ahead = tl.minimum(row + 2, small_h - 1) * stride_h
            below, next_below = _load(pointer + ahead, at_0, TYPE), _load(pointer + ahead, at_1, TYPE)
            y_next = _first_sample(j + 1, small_h, height)
            # Less the way that is left to the lower row.
            node_at = height + 2 * height * (j + 1)
            to_first = (2 * y_first + 1) * small_h - node_at
            ty_first = to_first.to(tl.float32) * inverse_h
            ty_last = ((2 * y_next - 1) * small_h - node_at).to(tl.float32) * inverse_h
            lower_a = tl.fma(tx_first, next_node - node, node)
            lower_b = tl.fma(tx_last, next_node - node, node)
            end_a, end_b = lower_a, lower_b
            if SHRINK:
                # As in _below.
                direct = (to_first == -2 * height) & (small_h >= height)
                end_a, end_b = tl.where(direct, upper_a, lower_a), tl.where(direct, upper_b, lower_b)
            v0, v1 = tl.fma(ty_first, end_a - upper_a, end_a), tl.fma(ty_last, end_a - upper_a, end_a)
            v2, v3 = tl.fma(ty_first, end_b - upper_b, end_b), tl.fma(ty_last, end_b - upper_b, end_b)
            least = tl.minimum(tl.minimum(v0, v1, ALL), tl.minimum(v2, v3, ALL), ALL)
            most = tl.maximum(tl.maximum(v0, v1, ALL), tl.maximum(v2, v3, ALL), ALL)
            if SHRINK:
                sampled = (y_next > y_first) & (x_last >= x_first)
                low = tl.where(sampled, tl.minimum(low, least, ALL), low)
                high = tl.where(sampled, tl.maximum(high, most, ALL), high)
            else:
                low, high = tl.minimum(low, least, ALL), tl.maximum(high, most, ALL)
            # Anything finite times zero is zero; NaN and infinity leave NaN.
            poison = tl.fma(node, 0.0, poison)
            upper_a, upper_b, node, next_node, y_first = lower_a, lower_b, below, next_below, y_next
    poison += low * 0.0 + high * 0.0
    least = tl.min(low, 0)
    return least, tl.max(high, 0) - least + tl.sum(poison, 0)


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
def _row(pointer, offset, at_0, at_1, fraction, p, q, r, TYPE: tl.constexpr, EXACT: tl.constexpr):
    """One row of nodes interpolated horizontally, normalised unless EXACT."""
    a = _load(pointer + offset, at_0, TYPE)
    row = tl.fma(fraction, _load(pointer + offset, at_1, TYPE) - a, a)
    if not EXACT:
        row = tl.fma(row, p, q) * r
    return row


@triton.jit
def _below(cell, rest, small_h, height, SHRINK: tl.constexpr):
    """The row below a cell's upper one; the same where the only sampled row is the upper one itself."""
    below = tl.minimum(cell + 1, small_h - 1)
    if SHRINK:
        below = tl.where((rest == -2 * height) & (small_h >= height), cell, below)
    return below


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
    SCALES: tl.constexpr, EXACT: tl.constexpr, ADD: tl.constexpr, CLAMP: tl.constexpr, SHRINK: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr, BLOCK_W: tl.constexpr, TILE: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = map_0.dtype.element_ty
    BYTES: tl.constexpr = TYPE.primitive_bitwidth // 8
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
    turn = 2 * height
    inverse_h = tl.div_rn(1.0, turn.to(tl.float32))
    inverse_w = tl.div_rn(1.0, (2 * width).to(tl.float32))
    x = block * BLOCK_W + tl.arange(0, BLOCK_W)
    wide_x = tl.minimum(x, width - 1).to(POSITION)
    y_begin = split * rows
    y_end = tl.minimum(y_begin + rows, height)

    pointers, pitches, scaling = (), (), ()
    for s in tl.static_range(SCALES):
        stride_h, stride_w = strides_h[s] * BYTES, strides_w[s] * BYTES
        pointer = maps[s] + batch * strides_b[s] + channel * strides_c[s]
        pointer = pointer.to(tl.pointer_type(tl.uint8), bitcast=True)
        least, span = _extremes(
            pointer, small_hs[s], small_ws[s], stride_h, stride_w, height, width, inverse_h, inverse_w,
            TILE, SHRINK, POSITION, TYPE,
        )  # fmt: skip
        p, q, r = _scaling(least, span, weights[s])
        pointers, pitches, scaling = pointers + (pointer,), pitches + (stride_h,), scaling + (p, q, r)

    columns, steps, gains, cells, rests, lowers, downs = (), (), (), (), (), (), ()
    for s in tl.static_range(SCALES):
        small_h, small_w, stride_w = small_hs[s], small_ws[s], strides_w[s] * BYTES
        n = tl.maximum((2 * wide_x + 1) * small_w - width, 0)
        i = n // (2 * width)
        rest = (n - i * (2 * width)).to(tl.int32)
        i = i.to(tl.int32)
        at_0 = (i * stride_w).to(tl.uint32)
        at_1 = (tl.where(rest == 0, i, tl.minimum(i + 1, small_w - 1)) * stride_w).to(tl.uint32)
        columns = columns + (at_0, at_1, rest.to(tl.float32) * inverse_w)

        step = small_h // height
        gain = 2 * (small_h - step * height)
        n = (2 * y_begin.to(POSITION) + 1) * small_h - height
        cell = (n + turn) // turn - 1
        rest = (n - cell * turn).to(tl.int32) - turn
        cell = cell.to(tl.int32)
        upper = tl.maximum(cell, 0) * pitches[s]
        b = _row(
            pointers[s], upper, at_0, at_1, columns[3 * s + 2], scaling[3 * s], scaling[3 * s + 1],
            scaling[3 * s + 2], TYPE, EXACT,
        )  # fmt: skip
        # The rest runs from -turn to 0 on the way to the lower row. One move short of the first row: the loop
        # starts with it.
        steps, gains = steps + (step,), gains + (gain,)
        cells, rests = cells + (cell - step - 1,), rests + (rest + turn - gain,)
        lowers, downs = lowers + (b,), downs + (tl.zeros([BLOCK_W], tl.float32),)

    start = (map_index.to(tl.int64) * height + y_begin) * width
    mask = x < width
    for _ in range(y_begin, y_end):
        next_cells, next_rests, next_lowers, next_downs = (), (), (), ()
        for s in tl.static_range(SCALES):
            small_h, cell, rest, b, d = small_hs[s], cells[s], rests[s] + gains[s], lowers[s], downs[s]
            at_0, at_1, fraction = columns[3 * s], columns[3 * s + 1], columns[3 * s + 2]
            p, q, r = scaling[3 * s], scaling[3 * s + 1], scaling[3 * s + 2]
            change = rest >= 0
            if SHRINK:
                change = change | (steps[s] > 0)
            if change:
                if SHRINK:
                    cell += steps[s] + (rest >= 0).to(tl.int32)
                    rest = tl.where(rest >= 0, rest - turn, rest)
                    upper = tl.maximum(cell, 0)
                    a = _row(pointers[s], upper * pitches[s], at_0, at_1, fraction, p, q, r, TYPE, EXACT)
                else:
                    cell += 1
                    rest -= turn
                    a = b
                below = _below(cell, rest, small_h, height, SHRINK)
                b = _row(pointers[s], below * pitches[s], at_0, at_1, fraction, p, q, r, TYPE, EXACT)
                d = b - a
            next_cells, next_rests = next_cells + (cell,), next_rests + (rest,)
            next_lowers, next_downs = next_lowers + (b,), next_downs + (d,)
        cells, rests, lowers, downs = next_cells, next_rests, next_lowers, next_downs
        value = tl.fma(rests[0].to(tl.float32) * inverse_h, downs[0], lowers[0])
        for s in tl.static_range(1, SCALES):
            value += tl.fma(rests[s].to(tl.float32) * inverse_h, downs[s], lowers[s])
        if EXACT:
            value = tl.fma(value, scaling[0], scaling[1]) * scaling[2]
        at = start + x
        start += width
        if ADD:
            value += tl.load(partial + at, mask=mask, other=0.0)
        if CLAMP:
            value = tl.minimum(tl.maximum(value, 0.0, ALL), 1.0, ALL)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


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
            options |= {"EXACT": list(weights) == [1.0], "ADD": index > 0, "CLAMP": last}
            programs = batch * channels * arguments[4] * arguments[5]
            _fuse_kernel[(programs,)](out if last else partial, partial, *arguments, **options)
    return out


def plan(
    maps: list[Tensor], size: tuple[int, int], weights: list[float], processors: int
) -> tuple[tuple, dict[str, object]]:
    """Return the kernel's arguments after the two outputs, and its options but for EXACT, ADD and CLAMP."""
    height, width = size
    batch, channels = maps[0].shape[:2]
    maps = [m if reach(m) < 2**31 else m.contiguous() for m in maps]
    largest = max(max(m.shape[2:]) for m in maps) + 256
    block = max(32, min(512, triton.next_power_of_2(width)))
    warps = max(1, block // (256 if len(maps) < MOST_SCALES else 128))
    blocks = triton.cdiv(width, block)
    # Rows are split for few maps only, and never so fine that finding the extremes again costs more than the rows.
    cells = sum(m.shape[2] * m.shape[3] for m in maps)
    splits = triton.cdiv(16 * processors, batch * channels * blocks * warps)
    rows = max(16, triton.cdiv(cells, block), triton.cdiv(height, splits))
    align = 1
    while align < 16 // maps[0].element_size() and width % (2 * align) == 0:
        align *= 2
    scales = [(m, float(weight), *m.shape[2:], *m.stride()) for m, weight in zip(maps, weights, strict=True)]
    scales += [scales[0]] * (MOST_SCALES - len(scales))
    splits = triton.cdiv(height, rows)
    arguments = (channels, height, width // align, rows, splits, blocks, *itertools.chain(*scales))
    options: dict[str, object] = {
        "SCALES": len(maps),
        "SHRINK": any(m.shape[2] >= height or m.shape[3] > width for m in maps),
        "WIDTH_ALIGN": align,
        "BLOCK_W": block,
        "TILE": min(256 * warps, triton.next_power_of_2(max(m.shape[3] for m in maps))),
        "POSITION": tl.int32 if 2 * (largest + 1) * 2 * max(height, width) < 2**31 else tl.int64,
        "num_warps": warps,
        # Left alone, the assembler stops at 128 for four scales on some architectures, and spills.
        "maxnreg": 200 if len(maps) == MOST_SCALES else None,
        "enable_fp_fusion": False,
    }
    return arguments, options


def reach(maps: Tensor) -> int:
    """Bytes from a map's first to its last value: the kernel's offsets inside one map are 32-bit."""
    return maps.element_size() * sum(
        (size - 1) * stride for size, stride in zip(maps.shape[2:], maps.stride()[2:], strict=True)
    )


def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 on the CPU, for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
