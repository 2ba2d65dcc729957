"""How wheels are made: what the repair leaves out is what torch brings, and the recipes agree with one another."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils import cpp_extension

import molt

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WHEELS = PROJECT["tool"]["cibuildwheel"]
WORKFLOW = ROOT / ".github" / "workflows" / "wheels.yml"
TAGS = ["cp311", "cp312", "cp313", "cp314"]

# Every manylinux policy from 2.17 on lets a wheel take these from the system (PEP 600); the last is the loader.
SYSTEM = re.compile(r"lib(gcc_s|stdc\+\+|c|m|dl|rt|pthread|util|atomic)\.so\.\d|ld-linux-[\w-]+\.so\.\d")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="wheels are made for Linux only")


def excludes() -> list[str]:
    words = shlex.split(WHEELS["linux"]["repair-wheel-command"])
    assert words[:2] == ["auditwheel", "repair"] and words[-3:] == ["--wheel-dir", "{dest_dir}", "{wheel}"]
    assert words[2:-3:2] == ["--exclude"] * (len(words[2:-3]) // 2)
    return words[3:-3:2]


def excluded(library: str) -> bool:
    return any(fnmatch.fnmatchcase(library, pattern) for pattern in excludes())


def needed(file: Path) -> list[str]:
    done = subprocess.run(["readelf", "--dynamic", "--wide", file], capture_output=True, text=True, check=True)
    return re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", done.stdout)


def test_built_extensions_need_only_torch_and_the_system() -> None:
    built = sorted(Path(molt.__file__).parent.glob("_C*.so"))
    assert built, "molt is not compiled here"
    for file in built:
        libraries = needed(file)
        assert "libc10.so" in libraries or "libtorch_cuda.so" in libraries, libraries
        assert [name for name in libraries if not excluded(name) and not SYSTEM.fullmatch(name)] == [], file.name


def test_a_cuda_extension_would_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch has a CUDA extension linked with, built here or not; pybind11's torch_python among them."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    libraries = cpp_extension.CUDAExtension("molt._C_cuda", ["x.cu"]).libraries
    assert {"torch_cuda", "cudart"} <= set(libraries)
    files = [f"lib{name}.so" + (".13" if name == "cudart" else "") for name in libraries]
    assert [name for name in files if not excluded(name)] == []


def test_excludes_name_what_torch_ships_and_nothing_of_the_system() -> None:
    shipped = {path.name for path in (Path(torch.__file__).parent / "lib").glob("*.so")}
    assert {"libc10.so", "libtorch.so", "libtorch_cpu.so"} <= {name for name in shipped if excluded(name)}
    assert not [name for name in ("libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6") if excluded(name)]
    assert not [name for name in ("libgomp.so.1", "libcuda.so.1", "libcublas.so.13") if excluded(name)]


def test_one_wheel_for_each_python_the_package_admits() -> None:
    assert WHEELS["build"] == [f"{tag}-*" for tag in TAGS]
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.15"
    named = [line.rsplit(" ", 1)[1] for line in PROJECT["project"]["classifiers"] if ":: 3." in line]
    assert [f"cp{version.replace('.', '')}" for version in named] == TAGS


def test_cibuildwheel_installs_what_the_build_needs() -> None:
    """Without isolation nothing else does."""
    assert WHEELS["build-frontend"] == {"name": "pip", "args": ["--no-build-isolation"]}
    installed = {word for command in WHEELS["before-build"] for word in shlex.split(command)}
    for requirement in PROJECT["build-system"]["requires"]:
        assert requirement in installed or requirement.split(">=")[0] in installed, requirement
    assert "torch" in shlex.split(WHEELS["before-test"])


def test_named_scripts_are_there_and_parse() -> None:
    commands = [WHEELS["linux"]["before-all"], WHEELS["test-command"]]
    scripts = [ROOT / re.findall(r"\{project\}/(\S+)", command)[0] for command in commands]
    assert [path.name for path in scripts] == ["cuda_toolkit.sh", "check_installed.py"]
    for path in [scripts[0], ROOT / "tests" / "install_matrix.sh"]:
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and not done.stderr, done.stderr
    compile(scripts[1].read_text(encoding="utf-8"), scripts[1], "exec")


@pytest.mark.parametrize(("local", "expected"), [("", "0.1.0"), ("cu130", "0.1.0+cu130")])
def test_local_version(local: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / ".github").mkdir()
    (tmp_path / "molt").mkdir()
    shutil.copy(ROOT / ".github" / "cuda_toolkit.sh", tmp_path / ".github")
    source = '"""molt."""\n\n__version__ = "0.1.0"\n'
    (tmp_path / "molt" / "__init__.py").write_text(source)
    env = {"PATH": "/usr/bin:/bin", "LOCAL_VERSION": local, "MOLT_CUDA": "0"}
    subprocess.run(["bash", tmp_path / ".github" / "cuda_toolkit.sh"], env=env, check=True)
    assert (tmp_path / "molt" / "__init__.py").read_text() == source.replace("0.1.0", expected)


def test_workflow_agrees_with_the_configuration() -> None:
    job = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]["wheels"]
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == TAGS
    variants = {entry["variant"]: entry for entry in matrix["include"]}
    assert list(variants) == matrix["variant"] == ["cpu", "cu130"]
    assert variants["cpu"] == {"variant": "cpu", "cuda": "0"}
    cuda = variants["cu130"]
    assert cuda["cuda"] == "1" and cuda["local"] == "cu130" == "cu" + cuda["toolkit"].replace(".", "")
    assert cuda["archs"].split(";")[0] == "8.0" and cuda["archs"].endswith("+PTX")
    # What a step sets reaches the container only where cibuildwheel passes it on.
    assert set(job["env"]) - {"CIBW_BUILD"} <= set(WHEELS["linux"]["environment-pass"])
    used = {name for entry in variants.values() for name in entry} | {"python"}
    assert set(re.findall(r"\$\{\{ matrix\.(\w+) \}\}", WORKFLOW.read_text(encoding="utf-8"))) == used


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_wheel_repairs_with_the_same_command(tmp_path: Path) -> None:
    """The command is run on stand-ins for pip and auditwheel, so that what make hands the shell is seen."""
    tools, tree = tmp_path / "venv" / "bin", tmp_path / "tree"
    tools.mkdir(parents=True)
    tree.mkdir()
    (tools.parent / ".torch").touch()
    for file in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / file, tree)
    record = 'printf "%s\\n" "$@" >> "$RECORD"\n'
    (tools / "python").symlink_to(sys.executable)
    (tools / "pip").write_text(
        '#!/bin/sh\ncase "$1" in wheel) mkdir -p build/wheel dist; touch build/wheel/a-1-py3-none-any.whl;; esac\n'
    )
    (tools / "auditwheel").write_text(
        f"#!/bin/sh\n{record}cd dist && {sys.executable} -m zipfile -c a-1-py3-none-any.whl ../Makefile\n"
    )
    for tool in ("pip", "auditwheel"):
        (tools / tool).chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "RECORD": str(tmp_path / "arguments")}
    command = ["make", "wheel", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[0] == "repair" and arguments[2:-3:2] == excludes()
    assert arguments[-3:] == ["--wheel-dir", "dist", "build/wheel/a-1-py3-none-any.whl"]
    assert "Makefile" in done.stdout
