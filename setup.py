"""Builds molt._C (C++, stable ABI, pybind11) and, where there are CUDA sources and a CUDA compiler, molt._C_cuda.

Environment: MOLT_SKIP_EXT=1 leaves the extensions out, MOLT_REQUIRE_EXT=1 makes a failed build an error,
MOLT_CUDA=auto|0|1 chooses CUDA, TORCH_CUDA_ARCH_LIST its architectures, MAX_JOBS the compiler processes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import setuptools
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ABI_TARGET = "0x020a000000000000"
OLDEST_TORCH = (2, 10)  # which ABI_TARGET means; molt/_extension.py refuses older ones too
# No fused multiply-add, so that every x86 CPU computes the same bits; traps off lets half conversions vectorise.
FLAGS = ["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-g0", "-Wall"]
# As on the CPU, no fused multiply-add; line numbers cost no speed and let profilers name them.
NVCC_FLAGS = ["-O3", "-fmad=false", "-lineinfo"]
NOTE = "_build_note.txt"
OLDEST_SETUPTOOLS = 77  # as pyproject.toml asks where the build is isolated


def switch(env: Mapping[str, str], name: str) -> bool:
    """Read a 0/1 variable."""
    value = env.get(name, "0") or "0"
    if value not in ("0", "1"):
        raise SystemExit(f"{name}={value!r}: expected 0 or 1")
    return value == "1"


def find_nvcc(env: Mapping[str, str]) -> str | None:
    """Return the CUDA compiler's path."""
    for home in (env.get("CUDA_HOME"), env.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    if found := shutil.which("nvcc", path=env.get("PATH")):
        return found
    default = Path("/usr/local/cuda/bin/nvcc")
    return str(default) if default.exists() else None


def cuda_home(nvcc: str) -> str:
    """Return the toolkit that nvcc belongs to. What is found on PATH may be a script that calls the real one."""
    asked = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stderr
    for line in said.splitlines():
        if line.startswith("#$ _HERE_="):
            return str(Path(line.split("=", 1)[1].strip()).parent)
    return str(Path(nvcc).parent.parent)


def cuda_version(nvcc: str) -> str:
    """Return the version that nvcc says it is of, or "" where it says none."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else ""


def decide_cuda(env: Mapping[str, str], torch_cuda: str | None, nvcc: str | None, sources: list) -> tuple[bool, str]:
    """Say whether to build the CUDA extension, and why. No GPU is looked for."""
    wish = env.get("MOLT_CUDA", "auto") or "auto"
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"MOLT_CUDA={wish!r}: expected auto, 0 or 1")
    if wish == "0":
        return False, "off (MOLT_CUDA=0)"
    missing = None
    if not sources:
        missing = "csrc/cuda holds no .cu file"
    elif torch_cuda is None:
        missing = "this torch is a CPU build (torch.version.cuda is None)"
    elif nvcc is None:
        missing = "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)"
    elif (version := cuda_version(nvcc)).partition(".")[0] not in ("", torch_cuda.partition(".")[0]):
        missing = f"nvcc {nvcc} is of CUDA {version} and torch of CUDA {torch_cuda}, another major version"
    if missing is None:
        return True, f"on (nvcc {nvcc}, torch's CUDA {torch_cuda})"
    if wish == "1":
        raise SystemExit(f"MOLT_CUDA=1, but {missing}")
    return False, f"off ({missing})"


def default_archs(env: Mapping[str, str]) -> str:
    """Return the architectures to build for: the user's, else two whose code every GPU from Ampere on can run.

    8.0 runs on all of 8.x, 9.0 on Hopper, and the driver compiles 9.0's PTX for what came after.
    """
    return env.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"


def extensions(env: Mapping[str, str]) -> tuple[list[Any], str]:
    """Return the extension modules and the line that sums up the decision."""
    import pybind11
    import torch
    from torch.utils import cpp_extension

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        wanted = f"torch {'.'.join(map(str, OLDEST_TORCH))} or later (it had {torch.__version__})"
        raise ImportError(f"the build needs {wanted}", name=wanted)
    flags = ["/O2"] if os.name == "nt" else FLAGS
    cuda_sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
    nvcc = find_nvcc(env)
    with_cuda, why = decide_cuda(env, torch.version.cuda, nvcc, cuda_sources)
    archs = default_archs(env) if with_cuda else ""
    macros = [
        ("TORCH_TARGET_VERSION", ABI_TARGET),
        ("TORCH_STABLE_ONLY", None),
        ("MOLT_BUILD_TORCH", f'"{torch.__version__}"'),
        ("MOLT_BUILD_FLAGS", f'"{shlex.join(flags)}"'),
        ("MOLT_CUDA_ARCHS", f'"{archs}"'),
        ("MOLT_CUDA_NOTE", '"on"' if with_cuda else f'"{why}"'),
    ]
    cpu = sorted(str(p.relative_to(ROOT)) for pattern in ("*.cpp", "cpu/*.cpp") for p in (ROOT / "csrc").glob(pattern))
    headers = [str(p.relative_to(ROOT)) for ending in ("h", "cuh") for p in ROOT.glob(f"csrc/**/*.{ending}")]
    found = [
        cpp_extension.CppExtension(
            "molt._C",
            cpu,
            include_dirs=[pybind11.get_include()],
            define_macros=macros,
            extra_compile_args=flags,
            depends=headers,
        )
    ]
    if with_cuda and nvcc:
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        cpp_extension.CUDA_HOME = cuda_home(nvcc)
        found.append(
            cpp_extension.CUDAExtension(
                "molt._C_cuda",
                cuda_sources,
                define_macros=[*macros, ("USE_CUDA", None)],
                extra_compile_args={"cxx": flags, "nvcc": NVCC_FLAGS},
                depends=headers,
            )
        )
    return found, f"torch {torch.__version__}, ABI target 2.10, CUDA {why}{f', archs {archs}' if archs else ''}"


def builder(require: bool) -> type[build_ext]:
    """Return torch's build_ext, which on failure leaves a note instead of an extension unless `require`."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            for extension in self.extensions:
                extension.define_macros.append(("MOLT_VERSION", f'"{self.distribution.get_version()}"'))
            files = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
            folder = files[0].parent
            asked = {"compiler": self.compiler, "inplace": self.inplace, "force": True}
            reason = self.attempt()
            for file in files if reason is not None else ():
                file.unlink(missing_ok=True)  # an older build's, with other operators
            if reason is not None and len(self.extensions) > 1:
                # A CUDA compiler that fails must not take the CPU operators along.
                self.extensions = [e for e in self.extensions if e.name == "molt._C"]
                # A run that fails leaves its own state behind; force, as what molt._C says of itself changes.
                vars(self).update(asked)
                said = {"MOLT_CUDA_NOTE": '"off (the build failed)"', "MOLT_CUDA_ARCHS": '""'}
                for extension in self.extensions:
                    extension.define_macros = [(name, said.get(name, value)) for name, value in extension.define_macros]
                reason = self.attempt() or f"CUDA: {reason}"
            write_note(folder, reason)

        def attempt(self) -> str | None:
            try:
                super().run()
            except Exception as error:
                if require:
                    raise
                said = " ".join(str(error).split())[:200]
                return f"the build failed: {type(error).__name__}: {said} (pip install -v shows what the compiler said)"
            return None

    return Build


def write_note(folder: Path, reason: str | None) -> None:
    """Leave the reason beside the package for molt.config(), or take an old one away."""
    note = folder / NOTE
    if reason is None:
        note.unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(reason + "\n", encoding="utf-8")
    lost = "without molt._C_cuda" if reason.startswith("CUDA: ") else "pure Python, without molt._C"
    print(f"molt: {lost}: {reason}", file=sys.stderr)


def pure(reason: str) -> type[build_py]:
    """Return a build_py that records why there is no extension."""

    class BuildPy(build_py):
        def run(self) -> None:
            super().run()
            write_note(ROOT / "molt" if self.editable_mode else Path(self.build_lib) / "molt", reason)

    return BuildPy


def main() -> None:
    """Run setuptools."""
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        # It would call the licence in pyproject.toml invalid.
        wanted = f"{OLDEST_SETUPTOOLS} or later: pip install --upgrade 'setuptools>={OLDEST_SETUPTOOLS}'"
        raise SystemExit(f"molt: this is setuptools {setuptools.__version__}, and the build needs {wanted}")
    os.chdir(ROOT)
    packages = [*find_packages(include=["molt", "molt.*"]), "molt.data.heads"]  # the last holds data alone
    package_dir = {}
    if not (ROOT / "molt" / "kernels").is_dir():
        packages.append("molt.kernels")
        package_dir["molt.kernels"] = "kernels"

    require = switch(os.environ, "MOLT_REQUIRE_EXT")
    modules: list[Any] = []
    commands: dict[str, Any] = {}
    if switch(os.environ, "MOLT_SKIP_EXT"):
        if require:
            raise SystemExit("MOLT_SKIP_EXT=1 and MOLT_REQUIRE_EXT=1 exclude each other")
        summary = "pure Python (MOLT_SKIP_EXT=1)"
        commands["build_py"] = pure("it was left out on purpose (MOLT_SKIP_EXT=1)")
    else:
        try:
            modules, summary = extensions(os.environ)
            commands["build_ext"] = builder(require or os.environ.get("MOLT_CUDA") == "1")
        except ImportError as error:
            if require:
                raise SystemExit(f"MOLT_REQUIRE_EXT=1, but {error}; install torch and pybind11 first") from error
            summary = f"pure Python ({error})"
            commands["build_py"] = pure(f"the build had no {error.name}")
    print(f"molt: {summary}", file=sys.stderr)
    setup(packages=packages, package_dir=package_dir, ext_modules=modules, cmdclass=commands)


if __name__ == "__main__":
    main()
