"""Lloyd's iterations of k-means for few clusters, on all images and restarts at once."""

# Kernels are written in Triton's language.
# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Points a partial sum covers. Fixed like all blocks, so that the order of every sum is fixed too.
STRIP = tl.constexpr(1024)

_FREE = ["points", "dim_units", "k", "restarts", "stride_b", "stride_n", "stride_d", "blocks", "strips"]


@triton.jit
def _vectors(features, rows, columns, points, dim, stride_n, stride_d, UNIT: tl.constexpr):
    """(rows, columns) of one image in float32, 0 outside."""
    along = columns if UNIT else columns.to(tl.int64) * stride_d
    offset = rows.to(tl.int64)[:, None] * stride_n + along[None, :]
    mask = (rows < points)[:, None] & (columns < dim)[None, :]
    return tl.load(features + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_FREE)
def _assign_kernel(
    features, centres, labels, scores, points, dim_units, k, restarts, stride_b, stride_n, stride_d, blocks,
    ALIGN: tl.constexpr, UNIT: tl.constexpr, SCORE: tl.constexpr, K_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Label of the largest 2 x.c - |c|^2, the lowest of equals; the sum of these over the block where SCORE."""
    dim = dim_units * ALIGN
    program = tl.program_id(0)
    block = program % blocks
    run = (program // blocks).to(tl.int64)
    features += run // restarts * stride_b * ALIGN
    centres += run * k * dim
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    cluster = tl.arange(0, K_PAD)
    product = tl.zeros([BLOCK_N, K_PAD], tl.float32)
    square = tl.zeros([K_PAD], tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = _vectors(features, n, d, points, dim, stride_n * ALIGN, stride_d, UNIT)
        mask = (cluster < k)[:, None] & (d < dim)[None, :]
        c = tl.load(centres + cluster[:, None] * dim + d[None, :], mask=mask, other=0.0)
        product = tl.dot(x, tl.trans(c), product, input_precision="ieee")
        square += tl.sum(c * c, 1)
    affinity = tl.fma(product, 2.0, -square[None, :])
    # NaN never wins: the label stays in range whatever the input.
    valid = (cluster < k)[None, :] & (affinity == affinity)  # noqa: PLR0124
    affinity = tl.where(valid, affinity, float("-inf"))
    tl.store(labels + run * points + n, tl.argmax(affinity, 1, tie_break_left=True).to(tl.int32), mask=n < points)
    if SCORE:
        best = tl.where(n < points, tl.max(affinity, 1), 0.0)
        tl.store(scores + run * blocks + block, tl.sum(best, 0))


@triton.jit(do_not_specialize=_FREE)
def _sum_kernel(
    features, labels, sums, counts, points, dim_units, k, restarts, stride_b, stride_n, stride_d, blocks, strips,
    ALIGN: tl.constexpr, UNIT: tl.constexpr, K_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums and counts of each cluster over one strip of points and one block of columns."""
    dim = dim_units * ALIGN
    program = tl.program_id(0)
    block = program % blocks
    strip = program // blocks % strips
    run = (program // blocks // strips).to(tl.int64)
    features += run // restarts * stride_b * ALIGN
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    cluster = tl.arange(0, K_PAD)
    total = tl.zeros([K_PAD, BLOCK_D], tl.float32)
    count = tl.zeros([K_PAD], tl.int32)
    begin = strip * STRIP
    for start in range(begin, tl.minimum(begin + STRIP, points), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        label = tl.load(labels + run * points + n, mask=n < points, other=-1)
        member = cluster[:, None] == label[None, :]
        x = _vectors(features, n, d, points, dim, stride_n * ALIGN, stride_d, UNIT)
        total = tl.dot(member.to(tl.float32), x, total, input_precision="ieee")
        count += tl.sum(member.to(tl.int32), 1)
    slot = (run * strips + strip) * k + cluster
    mask = (cluster < k)[:, None] & (d < dim)[None, :]
    tl.store(sums + slot[:, None] * dim + d[None, :], total, mask=mask)
    if block == 0:
        tl.store(counts + slot, count, mask=cluster < k)


@triton.jit(do_not_specialize=_FREE)
def _centre_kernel(
    sums, counts, centres, dim_units, k, strips,
    ALIGN: tl.constexpr, COSINE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One cluster's mean over the strips, of unit length where COSINE; a cluster without points keeps its centre."""
    dim = dim_units * ALIGN
    program = tl.program_id(0)
    cluster = program % k
    run = (program // k).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    count = tl.zeros([], tl.int32)
    for strip in range(0, strips):
        slot = (run * strips + strip) * k + cluster
        total += tl.load(sums + slot * dim + d, mask=d < dim, other=0.0)
        count += tl.load(counts + slot)
    if count > 0:
        mean = tl.div_rn(total, count.to(tl.float32))
        if COSINE:
            length = tl.sqrt_rn(tl.sum(mean * mean, 0))
            mean = tl.div_rn(mean, tl.maximum(length, 1e-12))
        tl.store(centres + (run * k + cluster) * dim + d, mean, mask=d < dim)


@triton.jit(do_not_specialize=_FREE)
def _total_kernel(scores, totals, blocks, CHUNK: tl.constexpr):
    """Add up the blocks' scores of one run."""
    run = tl.program_id(0).to(tl.int64)
    total = tl.zeros([CHUNK], tl.float32)
    for start in range(0, blocks, CHUNK):
        i = start + tl.arange(0, CHUNK)
        total += tl.load(scores + run * blocks + i, mask=i < blocks, other=0.0)
    tl.store(totals + run, tl.sum(total, 0))


def kmeans(features: Tensor, centres: Tensor, iterations: int, cosine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``iterations`` rounds of assignment and update, then assign once more.

    Args:
        features: (B, N, D) float16, bfloat16 or float32, any strides; of unit length where ``cosine``.
        centres: (B, R, k, D) float32, the starts of R restarts; left as they are.
        iterations: rounds, at least 0; none is left out.
        cosine: centres are means brought to unit length instead of plain means.

    Returns:
        labels (B, R, N) int32, of equal affinities the lowest; centres (B, R, k, D) float32, an empty cluster's
        unmoved; score (B, R) float32, the sum over points of 2 x.c - |c|^2 at their centre. An image's results do
        not depend on the others. NaN or infinite features spread to the centres of their own image and restart;
        labels stay in [0, k), and a point with no affinity that is a number scores minus infinity.

    Raises:
        TypeError: float64, which has no Triton form.
    """
    if features.dtype not in DTYPES:
        raise TypeError(
            f"features: got {str(features.dtype).removeprefix('torch.')}, expected float16, bfloat16, float32"
        )
    batch, points, dim = features.shape
    restarts, k = centres.shape[1:3]
    runs = batch * restarts
    centres = centres.clone(memory_format=torch.contiguous_format)
    labels = torch.zeros((batch, restarts, points), dtype=torch.int32, device=features.device)
    score = centres.new_zeros((batch, restarts))
    if labels.numel() == 0 or dim == 0:
        return labels, centres, score

    options = {"K_PAD": max(16, triton.next_power_of_2(k))}
    options |= {"enable_fp_fusion": False, "num_warps": 4 if k <= 64 else 8}
    align = alignment(features)
    options |= {"ALIGN": align, "UNIT": features.stride(2) == 1}
    units, strides = dim // align, (features.stride(0) // align, features.stride(1) // align, features.stride(2))
    # From 64 points a block, Triton 3.6 multiplies in TF32 on Blackwell, whatever precision it is asked for.
    block_n, block_d = 32, 64 if k <= 64 else 32
    assign = options | {"BLOCK_N": block_n, "BLOCK_D": block_d // 2}
    update = options | {"BLOCK_N": block_n, "BLOCK_D": block_d}
    blocks, d_blocks = triton.cdiv(points, block_n), triton.cdiv(dim, block_d)
    strips = triton.cdiv(points, STRIP.value)
    sums = centres.new_empty((runs, strips, k, dim))
    counts = labels.new_empty((runs, strips, k))
    scores = centres.new_empty((runs, blocks))
    shape = (points, units, k, restarts, *strides)
    with torch.cuda.device_of(features):
        for _ in range(iterations):
            _assign_kernel[(runs * blocks,)](features, centres, labels, scores, *shape, blocks, SCORE=False, **assign)
            _sum_kernel[(runs * strips * d_blocks,)](features, labels, sums, counts, *shape, d_blocks, strips, **update)
            _centre_kernel[(runs * k,)](
                sums, counts, centres, units, k, strips,
                ALIGN=align, COSINE=cosine, BLOCK_D=triton.next_power_of_2(dim), enable_fp_fusion=False,
            )  # fmt: skip
        _assign_kernel[(runs * blocks,)](features, centres, labels, scores, *shape, blocks, SCORE=True, **assign)
        _total_kernel[(runs,)](scores, score, blocks, CHUNK=256, enable_fp_fusion=False)
    return labels, centres, score


def alignment(features: Tensor) -> int:
    """Largest power of two up to 16 bytes that divides dim and both outer strides, 1 where columns are apart."""
    align = 1
    if features.stride(2) == 1:
        while align < 16 // features.element_size() and all(
            size % (2 * align) == 0 for size in (features.shape[2], *features.stride()[:2])
        ):
            align *= 2
    return align
