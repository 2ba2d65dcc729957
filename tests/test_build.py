import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

import molt
from molt import _backend, _extension

ROOT = Path(__file__).resolve().parents[1]
CU = ["csrc/cuda/some.cu"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("molt_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("env", "torch_cuda", "nvcc", "sources", "wanted", "why"),
    [
        ({}, "13.2", "/n/nvcc", CU, True, "on (nvcc /n/nvcc, torch's CUDA 13.2)"),
        ({"MOLT_CUDA": ""}, "13.2", "/n/nvcc", CU, True, "on "),
        ({"MOLT_CUDA": "1"}, "13.2", "/n/nvcc", CU, True, "on "),
        ({"MOLT_CUDA": "0"}, "13.2", "/n/nvcc", CU, False, "off (MOLT_CUDA=0)"),
        ({"MOLT_CUDA": "auto"}, None, "/n/nvcc", CU, False, "CPU build"),
        ({"MOLT_CUDA": "auto"}, "13.2", None, CU, False, "nvcc was not found"),
        ({}, "13.2", "/n/nvcc", [], False, "no .cu file"),
    ],
)
def test_cuda_is_decided_by_torch_and_nvcc(script, env, torch_cuda, nvcc, sources, wanted, why, monkeypatch):
    def no_gpu():
        raise AssertionError("the decision looked for a GPU")

    monkeypatch.setattr(torch.cuda, "is_available", no_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", no_gpu)
    monkeypatch.setattr(script, "cuda_version", lambda nvcc: "13.0")
    decision, reason = script.decide_cuda(env, torch_cuda, nvcc, sources)
    assert decision is wanted
    assert why in reason


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "sources", "why"),
    [(None, "/n/nvcc", CU, "CPU build"), ("13.2", None, CU, "nvcc was not found"), ("13.2", "/n/nvcc", [], "no .cu")],
)
def test_forced_cuda_that_cannot_be_is_an_error(script, torch_cuda, nvcc, sources, why):
    with pytest.raises(SystemExit, match=f"MOLT_CUDA=1, but .*{why}"):
        script.decide_cuda({"MOLT_CUDA": "1"}, torch_cuda, nvcc, sources)


def test_an_nvcc_of_another_major_version_builds_no_cuda(script, tmp_path):
    """torch refuses to compile with it; what it says of itself decides, a minor version does not."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    why = f"nvcc {nvcc} is of CUDA 13.0 and torch of CUDA 12.8, another major version"
    assert script.decide_cuda({}, "12.8", str(nvcc), CU) == (False, f"off ({why})")
    assert script.decide_cuda({}, "13.2", str(nvcc), CU)[0]
    with pytest.raises(SystemExit, match=re.escape(f"MOLT_CUDA=1, but {why}")):
        script.decide_cuda({"MOLT_CUDA": "1"}, "12.8", str(nvcc), CU)


def test_wrong_switches_are_errors(script):
    with pytest.raises(SystemExit, match="MOLT_CUDA='yes': expected auto, 0 or 1"):
        script.decide_cuda({"MOLT_CUDA": "yes"}, "13.2", "/n/nvcc", CU)
    with pytest.raises(SystemExit, match="MOLT_SKIP_EXT='on': expected 0 or 1"):
        script.switch({"MOLT_SKIP_EXT": "on"}, "MOLT_SKIP_EXT")
    assert script.switch({"MOLT_SKIP_EXT": "1"}, "MOLT_SKIP_EXT") is True
    assert script.switch({"MOLT_SKIP_EXT": ""}, "MOLT_SKIP_EXT") is False
    assert script.switch({}, "MOLT_SKIP_EXT") is False


def test_skip_and_require_exclude_each_other(script, monkeypatch):
    monkeypatch.setenv("MOLT_SKIP_EXT", "1")
    monkeypatch.setenv("MOLT_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match="exclude each other"):
        script.main()


def test_setuptools_too_old_is_told_before_it_reads_pyproject(script, monkeypatch):
    assert f'"setuptools>={script.OLDEST_SETUPTOOLS}"' in (ROOT / "pyproject.toml").read_text()
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(
        SystemExit, match=r"setuptools 65\.5\.0, and the build needs 77 or later: pip install --upgrade"
    ):
        script.main()


def test_nvcc_is_found_through_the_environment(script, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    assert script.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": ""}) == str(nvcc)
    assert script.find_nvcc({"PATH": str(nvcc.parent)}) == str(nvcc)


def test_architectures(script):
    assert script.default_archs({"TORCH_CUDA_ARCH_LIST": "12.0"}) == "12.0"
    assert script.default_archs({}) == "8.0;9.0+PTX"


def test_toolkit_is_the_one_that_nvcc_names(script, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho '#$ _HERE_=/opt/cuda-13.0/bin' >&2\n")
    nvcc.chmod(0o755)
    assert script.cuda_home(str(nvcc)) == "/opt/cuda-13.0"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert script.cuda_home(str(nvcc)) == str(tmp_path.parent)


def test_every_cpp_file_is_compiled(script, monkeypatch):
    monkeypatch.setenv("MOLT_CUDA", "0")
    monkeypatch.chdir(ROOT)
    (module,), summary = script.extensions({"MOLT_CUDA": "0"})
    assert sorted(module.sources) == sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    assert "CUDA off (MOLT_CUDA=0)" in summary
    assert "\n" not in summary
    assert ("TORCH_TARGET_VERSION", "0x020a000000000000") in module.define_macros
    assert not any(flag.startswith(("-march", "-mavx", "-std", "-ffast-math")) for flag in module.extra_compile_args)


def test_note_comes_and_goes(script, tmp_path):
    script.write_note(tmp_path / "molt", "because")
    assert (tmp_path / "molt" / script.NOTE).read_text() == "because\n"
    script.write_note(tmp_path / "molt", None)
    script.write_note(tmp_path / "molt", None)
    assert not list((tmp_path / "molt").iterdir())
    assert _extension._NOTE.name == script.NOTE


def test_build_config():
    config = _extension.CPU.module.build_config()
    assert config["molt"] == molt.__version__
    assert config["torch_abi_target"] == "2.10"
    assert config["compiler"].split()[0] in ("gcc", "clang", "msvc")
    assert "-ffp-contract=off" in config["flags"]
    assert config["cuda_archs"] is None or isinstance(config["cuda_archs"], str)
    assert config["torch"].split(".")[0] == "2"


def test_reason_when_the_module_does_not_load(monkeypatch, tmp_path):
    assert _extension._load("molt._nothing").module is None
    note = tmp_path / "note.txt"
    monkeypatch.setattr(_extension, "_NOTE", note)
    assert _extension._load("molt._nothing").reason == "molt._nothing is not there: it was not built"
    note.write_text("no compiler\n")
    assert _extension._load("molt._nothing").reason == "molt._nothing is not there: no compiler"
    (tmp_path / "broken_extension.py").write_text("raise ImportError('undefined symbol: x')")
    (tmp_path / "needy_extension.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert _extension._load("broken_extension").reason == "broken_extension does not load: undefined symbol: x"
    assert "No module named 'not_there_at_all'" in _extension._load("needy_extension").reason


@pytest.mark.parametrize("version", ["2.9.1+cu130", "1.13.0"])
def test_a_torch_too_old_is_told_when_built_and_when_loaded(script, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs torch 2\.10 or later \(it had {re.escape(version)}\)") as raised:
        script.extensions({})
    assert "\n" not in f"the build had no {raised.value.name}"
    found = _extension._load("molt._C")
    assert found.module is None
    assert found.reason == f"this is torch {version}, and molt needs 2.10 or later"
    assert script.OLDEST_TORCH == _extension.OLDEST_TORCH
    assert int(script.ABI_TARGET, 16) >> 48 == script.OLDEST_TORCH[0] << 8 | script.OLDEST_TORCH[1]


@pytest.mark.parametrize(
    ("compiled", "capability", "fits"),
    [
        ("8.0;9.0+PTX", (7, 5), False),
        ("8.0;9.0+PTX", (8, 9), True),
        ("8.0;9.0+PTX", (9, 0), True),
        ("8.0;9.0+PTX", (12, 0), True),
        ("8.6", (8, 0), False),
        ("8.0 8.6", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("Hopper", (7, 0), True),
    ],
)
def test_a_gpu_older_than_the_kernels_gets_the_reference(monkeypatch, compiled, capability, fits):
    """A name like Hopper is nobody's number here: the launch tells."""
    module = SimpleNamespace(build_config=lambda: {"cuda_archs": compiled})
    monkeypatch.setattr(_extension, "CPU", _extension.Extension("molt._C", module, None))
    monkeypatch.setattr(_extension, "CUDA", _extension.Extension("molt._C_cuda", module, None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(_extension, "unfit_gpu", _extension.unfit_gpu.__wrapped__)
    device = torch.device("cuda", 0)
    assert _backend.use_native("cluster_refine", device, "auto") is fits
    if not fits:
        number = ".".join(map(str, capability))
        text = f"Tesla T4 has compute capability {number}, and molt._C_cuda was compiled for {compiled}; "
        with pytest.raises(RuntimeError, match=re.escape(text) + f".*TORCH_CUDA_ARCH_LIST={number} "):
            _backend.use_native("cluster_refine", device, "native")


def test_bare_kernels_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    with pytest.raises(ImportError, match=r"import it as 'molt\.kernels'"):
        importlib.import_module("kernels")
    assert importlib.import_module("molt.kernels").__name__ == "molt.kernels"


def test_a_failed_cuda_build_keeps_the_cpu_half(script, monkeypatch, tmp_path):
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension

    runs = []

    def run(self):
        runs.append([extension.name for extension in self.extensions])
        assert self.compiler is None, "each run makes its compiler from a name"
        assert self.inplace, "setuptools takes this away until a run has ended well"
        self.compiler, self.inplace = object(), False
        if "molt._C_cuda" in runs[-1]:
            raise OSError("nvcc broke")

    monkeypatch.setattr(BuildExtension, "run", run)
    for require in (False, True):
        runs.clear()
        extensions = [setuptools.Extension(name, [], define_macros=macros()) for name in ("molt._C", "molt._C_cuda")]
        build = script.builder(require)(Distribution({"name": "molt", "version": "1", "ext_modules": extensions}))
        build.initialize_options()
        build.build_lib, build.build_temp, build.inplace = str(tmp_path), str(tmp_path), True
        monkeypatch.setattr(build, "get_ext_fullpath", lambda name: str(tmp_path / f"{name.replace('.', '/')}.so"))
        build.extensions = extensions
        older = tmp_path / "molt" / "_C_cuda.so"
        older.parent.mkdir(exist_ok=True)
        older.touch()
        if require:
            with pytest.raises(OSError, match="nvcc broke"):
                build.run()
            continue
        build.run()
        assert runs == [["molt._C", "molt._C_cuda"], ["molt._C"]]
        said = dict(extensions[0].define_macros)
        assert said["MOLT_CUDA_NOTE"] == '"off (the build failed)"' and said["MOLT_CUDA_ARCHS"] == '""'
        assert (tmp_path / "molt" / script.NOTE).read_text().startswith("CUDA: the build failed: OSError: nvcc broke")
        assert not older.exists(), "an older build's kernels would be loaded beside new schemas"


def macros():
    return [("MOLT_CUDA_NOTE", '"on"'), ("MOLT_CUDA_ARCHS", '"9.0"')]
