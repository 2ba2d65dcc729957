"""What the CUDA compiler makes of the kernels. Needs nvcc, no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gpu_budgets
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
    """PTX for sm_90, and of each kernel and architecture its spills, registers and static shared memory in bytes."""

    ptx: str
    kernels: dict[tuple[str, int], dict[str, int]]


def compile_source(nvcc: str, flags: list[str], source: Path, folder: Path) -> Compiled:
    command = [nvcc, "-std=c++17", *flags, "-Werror", "all-warnings", "-Xptxas", "-v", "-fatbin"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in gpu_budgets.ARCHITECTURES]
    keep = ["--keep", "--keep-dir", str(folder), "-o", str(folder / f"{source.stem}.fatbin")]
    done = subprocess.run([*command, *keep, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pattern = re.compile(
        r"'(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        re.DOTALL,
    )
    kernels = {}
    for block in done.stderr.split("Compiling entry function ")[1:]:
        found = pattern.match(block.split("Compile time")[0])
        assert found, block
        name, *numbers = found.groups(default="0")
        arch, stack, stores, loads, registers, shared = map(int, numbers)
        kernels[name, arch] = {"spilled": max(stack, stores, loads), "registers": registers, "shared": shared}
    return Compiled((folder / f"{source.stem}.compute_90.ptx").read_text(), kernels)


@pytest.fixture(scope="module")
def compiler() -> tuple[str, list[str]]:
    script = setup_script()
    nvcc = script.find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip("nvcc is not there (CUDA_HOME, PATH, /usr/local/cuda)")
    return nvcc, [flag for flag in script.NVCC_FLAGS if flag != "-lineinfo"]


@pytest.fixture(scope="module")
def compiled(compiler, tmp_path_factory) -> dict[str, Compiled]:
    folders = [tmp_path_factory.mktemp(source.stem) for source in KERNELS]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: compile_source(*compiler, *job), zip(KERNELS, folders, strict=True)))
    return {source.stem: one for source, one in zip(KERNELS, found, strict=True)}


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


def threads_of(kernel: str, ptx: str) -> int:
    """Return the threads of a block that a kernel's launch bounds name."""
    found = re.search(r"\.maxntid (\d+)", entry(ptx, kernel))
    assert found, kernel
    return int(found[1])


def row_of(kernel: str) -> str:
    """Return a mangled kernel's row in the table: its name without types of maps."""
    found = re.search(r"\d([a-z_]+_kernel)", kernel)
    assert found, kernel
    return " ".join([found[1], *re.findall(r"Stored|Fused(?!Scales)|SmallMap|MiddleMap|LargeMap", kernel)])


def test_kernels_keep_to_their_budgets(compiled):
    """Registers, the warps of an SM that they and shared memory leave, and spills."""
    met = set()
    for file in compiled.values():
        for (name, arch), took in file.kernels.items():
            met.add((row_of(name), arch))
            threads = threads_of(name, file.ptx)
            gpu_budgets.check(gpu_budgets.CUDA, gpu_budgets.SPILLS, row_of(name), arch, threads, **took)
    assert met == {(row, arch) for row in gpu_budgets.CUDA for arch in gpu_budgets.ARCHITECTURES}


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


def test_kernels_do_not_include_torch():
    """What makes them compile in seconds, and outside torch."""
    for path in (ROOT / "csrc/cuda").glob("*"):
        if path.name not in ("ops_cuda.cu", "call.h"):
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
