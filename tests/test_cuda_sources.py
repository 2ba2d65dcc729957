"""What the CUDA compiler makes of the kernels. Needs nvcc, no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = [p for p in sorted((ROOT / "csrc/cuda").glob("*.cu")) if p.stem != "ops_cuda"]
REFINE = [p for p in KERNELS if p.stem.startswith("refine_")]


def setup_script():
    spec = importlib.util.spec_from_file_location("molt_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Compiled:
    """PTX, and of each kernel its stack frame, spills, registers and static shared memory in bytes."""

    ptx: str
    kernels: dict[str, dict[str, int]]


def compile_for(nvcc: str, flags: list[str], source: Path, folder: Path, arch: int) -> Compiled:
    command = [nvcc, "-std=c++17", *flags, f"-arch=sm_{arch}", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
    keep = ["--keep", "--keep-dir", str(folder), "-o", str(folder / f"{source.stem}.cubin")]
    done = subprocess.run([*command, *keep, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    blocks = re.split(r"Function properties for ", done.stderr)[1:]
    pattern = re.compile(
        r"(\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        re.DOTALL,
    )
    kernels = {}
    for block in blocks:
        found = pattern.match(block.split("Compile time")[0])
        assert found, block
        name, *numbers = found.groups(default="0")
        kernels[name] = dict(zip(("stack", "stores", "loads", "registers", "shared"), map(int, numbers), strict=True))
    return Compiled((folder / f"{source.stem}.ptx").read_text(), kernels)


@pytest.fixture(scope="module")
def compiler() -> tuple[str, list[str]]:
    script = setup_script()
    nvcc = script.find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip("nvcc is not there (CUDA_HOME, PATH, /usr/local/cuda)")
    return nvcc, [flag for flag in script.NVCC_FLAGS if flag != "-lineinfo"]


@pytest.fixture(scope="module")
def compiled(compiler, tmp_path_factory) -> dict[str, Compiled]:
    return {source.stem: compile_for(*compiler, source, tmp_path_factory.mktemp(source.stem), 90) for source in KERNELS}


def test_the_toolkit_is_the_one_nvcc_names(compiler, tmp_path):
    """Not the folder of a script that calls nvcc."""
    script = setup_script()
    home = Path(script.cuda_home(compiler[0]))
    assert (home / "include" / "cuda_runtime.h").exists()
    caller = tmp_path / "bin" / "nvcc"
    caller.parent.mkdir()
    caller.write_text(f'#!/bin/sh\nexec {compiler[0]} "$@"\n')
    caller.chmod(0o755)
    assert Path(script.cuda_home(str(caller))) == home
    caller.write_text("#!/bin/sh\n")
    assert script.cuda_home(str(caller)) == str(tmp_path)


def test_there_are_kernels():
    assert [p.stem for p in KERNELS] == [
        "cluster_vote",
        "components",
        "refine_bfloat16",
        "refine_float16",
        "refine_float32",
        "refine_float64",
        "sweep",
    ]


def test_no_hot_kernel_spills(compiled):
    """A spilled register costs memory traffic; kernels over tiny maps or for rare sizes may have one."""
    seen = 0
    for name, kernel in ((n, k) for file in compiled.values() for n, k in file.kernels.items()):
        if "normalise_kernel" in name or "wide_" in name:
            continue
        seen += 1
        assert (kernel["stack"], kernel["stores"], kernel["loads"]) == (0, 0, 0), name
    assert seen >= 25


def test_enough_blocks_fit_an_sm(compiled):
    """Six blocks of four warps: 64 Ki registers and 227 KiB of shared memory, of which a block reserves 1 KiB."""
    for source in REFINE:
        kernels = [k for name, k in compiled[source.stem].kernels.items() if "refine_kernel" in name]
        assert len(kernels) == 2
        for kernel in kernels:
            warp_registers = -(-kernel["registers"] // 8) * 8 * 32
            assert 6 * 4 * warp_registers <= 65536
            assert 6 * (kernel["shared"] + 1024) <= 227 * 1024
            assert kernel["shared"] <= 48 * 1024


def test_sweeping_blocks_fit_an_sm(compiled):
    """As many as the kernels ask for: 64 Ki registers, 227 KiB of shared memory, of which a block reserves 1 KiB."""
    for size, threads, blocks in (("SmallMap", 64, 16), ("MiddleMap", 512, 2), ("LargeMap", 1024, 1)):
        (kernel,) = [k for name, k in compiled["sweep"].kernels.items() if "sweep_kernel" in name and size in name]
        assert blocks * threads * -(-kernel["registers"] // 8) * 8 <= 65536
        assert blocks * (kernel["shared"] + 1024) <= 227 * 1024
        assert kernel["shared"] <= 48 * 1024


def test_no_float_atomics(compiled):
    for file in compiled.values():
        atomics = re.findall(r"^\s*(?:@%?\w+\s+)?((?:atom|red)\.(?:global|shared)\S*)", file.ptx, re.MULTILINE)
        assert atomics or "winner" in file.ptx
        assert not [a for a in atomics if re.search(r"\.(f16|f32|f64|bf16)", a)]
        assert not re.search(r"(?:atom|red)\.\S*\.(?:f16|bf16|f32|f64)\S*\s+(?:%\w+,\s*)?\[", file.ptx)


def test_no_fused_multiply_add(compiled):
    """The CPU has none either, and the emulator's bits are the GPU's. Division is built of them, inside."""
    for stem, file in compiled.items():
        assert not re.search(r"^\s*fma\.rn\.(f32|f64)", file.ptx, re.MULTILINE), stem


def entry(ptx: str, *parts: str) -> str:
    """The text of the one kernel whose name holds all parts."""
    bodies = re.split(r"^(?:\.visible )?\.entry ", ptx, flags=re.MULTILINE)[1:]
    found = [body for body in bodies if all(part in body.split("(")[0] for part in parts)]
    assert len(found) == 1
    return found[0]


def test_blocks_hand_over_by_release_and_acquire(compiled):
    """One ordered instruction a step, which carries its own fence; tickets order nothing."""
    for source in REFINE:
        for maps in ("Stored", "Fused"):
            text = entry(compiled[source.stem].ptx, "refine_kernel", maps)
            counted = re.findall(r"^\s*((?:atom|red)\.\S+)", text, re.MULTILINE)
            ticket = "atom.global.add.u32"
            given = ["atom.acq_rel.gpu.global.add.u32", "red.release.gpu.global.add.u32"]
            assert sorted(counted) == sorted([ticket, ticket, *given])
            assert set(re.findall(r"ld\.(?:acquire|relaxed)\S*", text)) == {"ld.acquire.gpu.global.u32"}
    for stem, file in compiled.items():
        assert not re.search(
            r"^\s*(?:@!?%?\w+\s+)?(?:membar|fence|ld\.volatile|st\.volatile)", file.ptx, re.MULTILINE
        ), stem


def test_maps_move_sixteen_bytes_at_a_time(compiled):
    stored = entry(compiled["refine_float32"].ptx, "refine_kernel", "Stored")
    assert len(re.findall(r"ld\.global\.cg\.v4\.f32", stored)) >= 4
    assert len(re.findall(r"ld\.global\.cs\.v4\.f32", stored)) >= 4
    assert len(re.findall(r"st\.global\.cs\.v4\.f32", stored)) >= 4
    assert len(re.findall(r"ld\.global\.cg\.v4\.[usb]32", stored)) >= 8  # labels
    assert re.search(r"st\.global\.cs\.v4\.f32", entry(compiled["refine_float32"].ptx, "refine_kernel", "Fused"))
    for half in ("refine_float16", "refine_bfloat16"):
        stored = entry(compiled[half].ptx, "refine_kernel", "Stored")
        assert len(re.findall(r"ld\.global\.c[gs]\.v2\.[usb]32", stored)) >= 8
        assert len(re.findall(r"st\.global\.cs\.v2\.[usb]32", stored)) >= 4
    stored = entry(compiled["refine_float64"].ptx, "refine_kernel", "Stored")
    assert len(re.findall(r"ld\.global\.cg\.v2\.f64", stored)) >= 4


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("stem", ["refine_float32", "components", "sweep"])
def test_other_architectures_compile(compiler, arch, stem, tmp_path):
    source = ROOT / "csrc/cuda" / f"{stem}.cu"
    assert compile_for(*compiler, source, tmp_path, arch).kernels


def test_kernels_do_not_include_torch():
    """What makes them compile in seconds, and outside torch."""
    for path in (ROOT / "csrc/cuda").glob("*"):
        if path.stem != "ops_cuda":
            assert not re.search(r"#include\s*<(torch|ATen|c10|Python)", path.read_text()), path.name


def test_no_kernel_launch_goes_unchecked():
    for path in (ROOT / "csrc/cuda").glob("*.cuh"):
        text = path.read_text()
        if path.name == "device.cuh":
            continue
        launches = re.findall(r"MOLT_LAUNCH\([^;]*;\s*\n\s*(\S+)", text)
        assert all(after.startswith("MOLT_CHECK_LAUNCH") for after in launches), path.name
        assert "<<<" not in text
        assert not re.search(r"cudaMalloc|cudaDeviceSynchronize|cudaFree", text)
