"""What each kernel may take of a GPU, and what is left of an SM's warps then."""

from __future__ import annotations

ARCHITECTURES = (80, 90, 100)
WARPS, BLOCKS = 64, 32  # that an SM holds at most, whatever they take
SHARED = {80: 164, 90: 228, 100: 228}  # KiB of an SM, of which each block takes one for itself

# Most registers of a thread and fewest warps of an SM, on sm_80, sm_90 and sm_100. One more register than the step of
# eight a kernel is on, or one block less, is over it.
CUDA = {
    "elect_kernel": ((32, 64), (32, 64), (32, 64)),
    "winner_kernel": ((32, 64), (32, 64), (32, 64)),
    "vote_kernel": ((32, 64), (40, 48), (32, 64)),
    "gather_kernel": ((40, 48), (40, 48), (40, 48)),
    "run_kernel": ((32, 64), (32, 64), (32, 64)),
    "peak_kernel": ((32, 64), (32, 64), (32, 64)),
    "box_kernel": ((32, 64), (32, 64), (32, 64)),
    "list_kernel": ((40, 48), (40, 48), (32, 64)),
    "largest_kernel": ((32, 64), (32, 64), (32, 64)),
    "flatten_kernel": ((32, 64), (32, 64), (32, 64)),
    "unite_kernel": ((32, 64), (32, 64), (32, 64)),
    "refine_kernel Stored": ((128, 16), (80, 24), (80, 24)),
    "refine_kernel Fused": ((96, 16), (80, 24), (80, 24)),
    "wide_sum_kernel": ((96, 16), (96, 20), (96, 20)),
    "wide_paint_kernel": ((48, 40), (48, 40), (48, 40)),
    "number_kernel": ((32, 64), (32, 64), (32, 64)),
    "normalise_kernel": ((80, 24), (80, 24), (96, 20)),
    "sweep_kernel SmallMap": ((40, 48), (48, 40), (56, 36)),
    "sweep_kernel MiddleMap": ((40, 48), (48, 32), (56, 32)),
    "sweep_kernel LargeMap": ((48, 32), (56, 32), (56, 32)),
    "sweep_write_kernel": ((32, 64), (32, 64), (32, 64)),
    "sweep_gather_kernel": ((32, 64), (32, 64), (32, 64)),
    "sweep_offsets_kernel": ((32, 64), (32, 64), (32, 64)),
    "sweep_largest_kernel": ((32, 64), (32, 64), (32, 64)),
}
# By scales of fuse_maps and clusters of kmeans; of Triton 3.8, with torch 2.14.
TRITON = {
    "_fuse_kernel 1": ((72, 28), (80, 24), (72, 28)),
    "_fuse_kernel 2": ((128, 16), (128, 16), (128, 16)),
    "_fuse_kernel 3": ((208, 8), (208, 8), (208, 8)),
    "_fuse_kernel 4": ((168, 12), (168, 12), (168, 12)),
    "_fuse_kernel of rare sizes": ((240, 8), (240, 8), (240, 8)),
    "_assign_kernel 5": ((56, 36), (56, 36), (56, 36)),
    "_assign_kernel 32": ((64, 32), (72, 28), (64, 32)),
    "_assign_kernel 100": ((112, 16), (80, 24), (104, 16)),
    "_sum_kernel 5": ((64, 32), (80, 24), (72, 28)),
    "_sum_kernel 32": ((72, 28), (72, 28), (96, 20)),
    "_sum_kernel 100": ((80, 24), (128, 16), (128, 16)),
    "_centre_kernel": ((40, 48), (40, 48), (40, 48)),
    "_total_kernel": ((32, 64), (32, 64), (32, 64)),
}
# What others compile otherwise: 3.6 comes with torch 2.10 and 2.11, 3.9 with 2.15.
TRITON_3_6 = TRITON | {
    "_fuse_kernel 1": ((72, 28), (80, 24), (80, 24)),
    "_assign_kernel 5": ((64, 32), (64, 32), (56, 36)),
    "_assign_kernel 32": ((64, 32), (64, 32), (72, 28)),
    "_assign_kernel 100": ((112, 16), (120, 16), (80, 24)),
    "_sum_kernel 5": ((72, 28), (72, 28), (72, 28)),
    "_sum_kernel 32": ((96, 20), (96, 20), (96, 20)),
    "_sum_kernel 100": ((120, 16), (128, 16), (128, 16)),
    "_centre_kernel": ((48, 40), (40, 48), (40, 48)),
}
TRITON_3_9 = TRITON | {
    "_fuse_kernel of rare sizes": ((248, 8), (248, 8), (248, 8)),
    "_sum_kernel 32": ((72, 28), (96, 20), (96, 20)),
}
VERSIONS = {"3.6": TRITON_3_6, "3.8": TRITON, "3.9": TRITON_3_9}
# Bytes of a thread's registers that may go to memory; 0 where nothing is said.
SPILLS = {("refine_kernel Stored", 100): 8, ("normalise_kernel", 80): 8, ("wide_paint_kernel", 90): 8}
TRITON_SPILLS = {"3.6": {("_sum_kernel 100", 100): 8}, "3.9": {("_assign_kernel 100", 100): 16}}


def resident_warps(arch: int, threads: int, registers: int, shared: int) -> int:
    """Return how many warps of a kernel an SM holds. Each of its four quarters has 16 Ki registers."""
    own = -(-threads // 32)
    fitting = 4 * (16384 // (-(-registers // 8) * 8 * 32))
    blocks = min(fitting // own, WARPS // own, BLOCKS, SHARED[arch] * 1024 // (shared + 1024))
    return blocks * own


def of_triton(version: str) -> tuple[dict, dict]:
    """Return rows and spills of a version of Triton; of one not measured half the warps, and some spills."""
    minor = ".".join(version.split(".")[:2])
    if minor in VERSIONS:
        return VERSIONS[minor], TRITON_SPILLS.get(minor, {})
    rows = {name: tuple((255, fewest // 2) for _, fewest in row) for name, row in TRITON.items()}
    return rows, {(name, arch): 16 for name in rows for arch in ARCHITECTURES}


def check(
    budgets: dict, spills: dict, kernel: str, arch: int, threads: int, registers: int, shared: int, spilled: int
) -> None:
    """Assert that a kernel keeps to its row."""
    most, fewest = budgets[kernel][ARCHITECTURES.index(arch)]
    warps = resident_warps(arch, threads, registers, shared)
    said = f"{kernel} on sm_{arch}: {registers} registers, {warps} warps, {spilled} bytes spilled"
    assert registers <= most and warps >= fewest and spilled <= spills.get((kernel, arch), 0), said
