"""What the Triton kernels compile to, which needs no GPU: wide stores, no spilled registers, no atomics."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import gpu_budgets
import pytest
import torch

triton = pytest.importorskip("triton")
if not hasattr(triton, "backends") or "nvidia" not in getattr(triton.backends, "backends", {}):
    pytest.skip("Triton without its NVIDIA compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from molt.kernels import fuse_maps as fusion  # noqa: E402
from molt.kernels import kmeans as clusters  # noqa: E402

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# What the smallest of the current GPUs give one block.
SHARED_MEMORY = 99 * 1024

pytestmark = pytest.mark.skipif(
    bool(os.environ.get("TRITON_INTERPRET")), reason="TRITON_INTERPRET replaces the compiler"
)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_kernel(kernel, arguments, options, arch):
    """Compile for arguments as a launch would see them; tensors stand for pointers aligned to 16 bytes."""
    options = dict(options)
    names = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
    launch = {name: options.pop(name) for name in names if name in options}
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    assert given.keys() == set(kernel.arg_names)
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = given[name]
        if name in options:
            signature[name] = "constexpr"
        elif torch.is_tensor(value):
            signature[name] = TYPES[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]] if name not in fusion._FREE else []
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    constants = {(kernel.arg_names.index(name),): value for name, value in options.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)


def resources(compiled, path):
    """Registers a thread and bytes of stack, that is of spills."""
    path.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def check(compiled, path, row):
    ptx, meta = compiled.asm["ptx"], compiled.metadata
    assert not re.search(r"\.local|\b(atom|red)\.", ptx)
    registers, spilled = resources(compiled, path / "kernel.cubin")
    took = 32 * meta.num_warps, registers, meta.shared, spilled
    gpu_budgets.check(*gpu_budgets.of_triton(triton.__version__), row, meta.target.arch, *took)
    assert meta.shared <= SHARED_MEMORY
    return ptx


def fuse_source(scales, dtype, size, small=(14, 21, 28, 7)):
    maps = [torch.empty(4, 2, small[s], small[s], dtype=dtype) for s in range(scales)]
    arguments, options = fusion.plan(maps, size, [1 / scales] * scales, 132)
    out = torch.empty(0, dtype=dtype)
    return (out, out, *arguments), options | {"EXACT": scales == 1, "ADD": False, "CLAMP": True}


@pytest.mark.parametrize(
    ("dtype", "width", "store"),
    [
        (torch.float32, 224, "v4.b32"),
        (torch.float32, 100, "v4.b32"),
        (torch.float16, 224, "v4.b32"),
        (torch.bfloat16, 224, "v4.b32"),
        (torch.float16, 100, "v2.b32"),
        (torch.float32, 225, "b32"),
    ],
    ids=str,
)
def test_rows_are_stored_in_wide_words(dtype, width, store, tmp_path):
    compiled = compile_kernel(fusion._fuse_kernel, *fuse_source(3, dtype, (224, width)), 90)
    ptx = check(compiled, tmp_path, "_fuse_kernel of rare sizes")
    assert set(re.findall(r"st\.global\.([\w.]+)", ptx)) == {store}


@pytest.mark.parametrize("arch", gpu_budgets.ARCHITECTURES)
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_fuse_maps_keeps_its_state_in_registers(scales, arch, tmp_path):
    compiled = compile_kernel(fusion._fuse_kernel, *fuse_source(scales, torch.float32, (224, 224)), arch)
    check(compiled, tmp_path, f"_fuse_kernel {scales}")


@pytest.mark.parametrize(
    ("size", "small"),
    [
        ((480, 512), (14, 21, 28)),
        ((5, 40), (14, 3, 28)),
        ((4000, 6000), (300, 400, 500)),
        ((90000, 9000), (9, 9, 9000)),
    ],
    ids=["wide", "shrink", "large", "64-bit positions"],
)
def test_no_variant_of_three_scales_spills(size, small, tmp_path):
    arguments, options = fuse_source(3, torch.bfloat16, size, small)
    check(compile_kernel(fusion._fuse_kernel, arguments, options, 90), tmp_path, "_fuse_kernel of rare sizes")


def kmeans_sources(k, dtype):
    """The kernels as `kmeans` launches them, their arguments caught on the way."""
    caught = {}

    class Catch:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            assert all(isinstance(side, int) and side > 0 for side in grid)
            return lambda *arguments, **options: caught.setdefault(self.kernel, (arguments, options))

    names = ("_assign_kernel", "_sum_kernel", "_centre_kernel", "_total_kernel")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(clusters, name, Catch(getattr(clusters, name)))
        clusters.kmeans(torch.empty(2, 3000, 768, dtype=dtype), torch.empty(2, 2, k, 768), 1, True)
    assert len(caught) == len(names)
    return caught


@pytest.mark.parametrize("arch", gpu_budgets.ARCHITECTURES)
@pytest.mark.parametrize(("k", "dtype"), [(5, torch.float32), (32, torch.bfloat16), (100, torch.float32)], ids=str)
def test_kmeans(k, dtype, arch, tmp_path):
    for kernel, (arguments, options) in kmeans_sources(k, dtype).items():
        row = kernel.__name__ if kernel.__name__ in gpu_budgets.TRITON else f"{kernel.__name__} {k}"
        ptx = check(compile_kernel(kernel, arguments, options, arch), tmp_path, row)
        if "features" in kernel.arg_names:
            # Plain float32 products, and 16 bytes of features a load.
            assert "fma.rn.f32" in ptx and "mma" not in ptx
            assert re.search(r"ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global", ptx)
