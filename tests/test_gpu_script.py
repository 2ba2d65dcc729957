"""benchmarks/gpu.py: bounded steps, none of which hides the next; what ended well is not run again."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 600  # seconds of a part, so that it fits where commands are cut off at ten minutes


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def steps_known(out: Path) -> dict[str, dict[str, object]]:
    with tarfile.open(out / "logs.tar.gz") as archive:
        file = archive.extractfile("steps.json")
        assert file is not None
        found: dict[str, dict[str, object]] = json.load(file)
    return found


def is_alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_step_that_outlasts_its_limit_is_killed_and_the_next_runs(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    child = tmp_path / "child"
    stubborn = f"""
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
one = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(child)!r}).write_text(str(one.pid))
print("begun", flush=True)
time.sleep(60)
"""
    out = tmp_path / "out"
    work = [
        gpu.Step("slow", "build", 2, python(stubborn), "slow.json"),
        gpu.Step("fails", "build", 20, python("print('a fault'); raise SystemExit(3)"), "fails.json"),
        gpu.Step("good", "build", 20, python(f"open({str(out / 'good.json')!r}, 'w').write('{{}}')"), "good.json"),
    ]
    began = time.monotonic()
    assert gpu.run(out, work, "sources") == 1
    assert time.monotonic() - began < 20 and not is_alive(int(child.read_text()))
    told = capsys.readouterr().out
    assert "killed at its limit of 2 s" in told and "exit code 3" in told and "a fault" in told
    assert "did not end well: slow, fails;" in told
    known = steps_known(out)
    assert [known[name]["ok"] for name in ("slow", "fails", "good")] == [False, False, True]
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert set(archive.getnames()) == {"steps.json", "slow.log", "fails.log", "good.log"}
        log = archive.extractfile("slow.log")
        assert log is not None and log.read() == b"begun\n", "what a killed step printed is kept"
    assert {path.name for path in out.iterdir()} == {"good.json", "logs.tar.gz"}


def test_what_ended_well_is_not_run_again(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, calls = tmp_path / "out", tmp_path / "calls"
    text = f"open({str(calls)!r}, 'a').write('x'); open({str(out / 'a.json')!r}, 'w').write('{{}}')"
    step = gpu.Step("a", "build", 20, python(text), "a.json")
    assert gpu.run(out, [step], "one") == gpu.run(out, [step], "one") == 0
    assert calls.read_text() == "x" and "ended well before" in capsys.readouterr().out
    assert gpu.run(out, [step], "other sources") == 0 and calls.read_text() == "xx"
    (out / "a.json").unlink()
    assert gpu.run(out, [step], "other sources") == 0 and calls.read_text() == "xxx", "its result was gone"
    bad = replace(step, command=python(f"{text}; raise SystemExit(1)"))
    assert gpu.run(out, [bad], "third") == gpu.run(out, [bad], "third") == 1 and calls.read_text() == "xxxxx"


def test_rows_that_are_left_and_targets_that_are_missed_are_told(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    row = {"operation": "fuse_maps", "case": "small", "note": None, "targets": {"share": 0.8}, "missed": ["share"]}
    (out / "operators.json").write_text(json.dumps({"rows": [row | {"share": 0.5}]}))
    step = gpu.Step("operators", "full", 20, python(""), "operators.json", kind="rows")
    assert gpu.run(out, [step], "one") == 0, "a missed target is a result"
    assert "target missed: fuse_maps, small: share, asked 0.8, got 0.5" in capsys.readouterr().out
    left = {"note": "not run: the 2 minutes were over", "targets": {}, "missed": []}
    (out / "operators.json").write_text(json.dumps({"rows": [left]}))
    assert gpu.run(out, [step], "two") == 1
    assert "1 rows are left for want of time" in capsys.readouterr().out


def test_tests_are_counted_from_what_pytest_prints(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('x', [(1, 2), 3], ids=str)\n"
        "def test_a(x): assert x == 3\ndef test_b(): pytest.skip('no')\n"
    )
    log, report = tmp_path / "log", tmp_path / "tests.json"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests"]
    for more in ([], ["-n", "1"]):
        with log.open("w") as file:
            subprocess.run([*command, *more], cwd=tmp_path, stdout=file, check=False)
        why = gpu.add_tests(report, "-".join(["tests", *more]), log, "exit code 1")
        assert why == "exit code 1: 1 tests, first tests/test_it.py::test_a[(1, 2)]"
    found = json.loads(report.read_text())
    assert [one["counts"] for one in found.values()] == [{"failed": 1, "passed": 1, "skipped": 1}] * 2
    log.write_text("")
    assert gpu.add_tests(report, "none", log, None) == "no test passed", "is no success"
    log.write_text("tests/test_it.py::test_b SKIPPED (no) [100%]\n")
    assert gpu.add_tests(report, "skipped", log, None) == "no test passed"


def test_a_build_is_done_when_both_halves_are_there(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """setup.py ends well with the CPU half alone; the next run must try the other again."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (tmp_path / "molt").mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    calls = tmp_path / "calls"
    step = gpu.Step("build", "build", 20, python(f"open({str(calls)!r}, 'a').write('x')"), "build.json")
    for number, half in enumerate(("_C", "_C_cuda"), 1):
        assert gpu.run(tmp_path / "out", [step], "one") == 0
        assert calls.read_text() == "x" * number
        (tmp_path / "molt" / f"{half}{suffix}").touch()
    assert gpu.run(tmp_path / "out", [step], "one") == 0 and calls.read_text() == "xx"


def test_a_torch_that_does_not_import_is_one_line(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LOOKS", "raise ImportError('libcudart.so.13: cannot open')")
    with pytest.raises(SystemExit):
        gpu.main(["--dry"])
    told = capsys.readouterr().err
    assert told.endswith("cannot use its torch: ImportError: libcudart.so.13: cannot open\n") and told.count("\n") == 1


def test_a_dry_run_takes_the_steps_of_the_real_one(gpu: ModuleType, tmp_path: Path) -> None:
    real, dry = (gpu.steps(tmp_path, dry=dry, arch="9.0", random=True) for dry in (False, True))
    keys = ("name", "part", "file", "kind")
    assert [[getattr(s, k) for k in keys] for s in real] == [[getattr(s, k) for k in keys] for s in dry]
    assert len({step.file for step in real} | {gpu.ARCHIVE}) == 8
    assert {step.part for step in real} == set(gpu.PARTS) and gpu.PARTS[:2] == ("build", "target")
    for part in gpu.PARTS:
        limits = [step.seconds for step in real if step.part == part]
        assert sum(limits) + 2 * gpu.GRACE * len(limits) < LONGEST, part
    assert sum(step.seconds for step in real if step.part == "build") <= 180
    assert not any("cuda" in step.command for step in dry)
    assert all("--random-weights" in s.command for s in real if s.name.startswith("end-to-end"))
    for asked in (step for step in real if "--minutes" in step.command):
        assert 60 * float(asked.command[asked.command.index("--minutes") + 1]) < asked.seconds


def test_sources_are_told_apart(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("csrc/cuda/a.cu", "molt/a.py", "kernels/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    before = gpu.digest("h200")
    assert gpu.digest("h200") == before != gpu.digest("h100")
    (tmp_path / "csrc/cuda/a.cu").write_text("two")
    assert gpu.digest("h200") != before


@pytest.mark.parametrize("part", ["", "-build", "-test", "-target", "-full"])
def test_make_hands_over(part: str, tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    fake.chmod(0o755)
    command = ["make", "--no-print-directory", f"gpu{part}", f"PYTHON={fake}", "OUT=there", "PHOTOS=photos"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
    words = ["benchmarks/gpu.py", "--out", "there", "--photos", "photos", *([part[1:]] if part else [])]
    assert done.stdout.split() == words and done.returncode != 0


def test_few_triton_variants_are_compiled_on_a_gpu() -> None:
    """By the tests that launch most; others on a GPU launch what these do."""
    pytest.importorskip("triton")
    tests = ["tests/test_triton_kernels.py", "tests/test_gpu.py::test_operators_agree_with_the_cpu"]
    tests += [f"tests/test_gpu_ops.py::test_{name}_agrees_with_{truth}" for name, truth in
              (("fusion", "float64"), ("kmeans", "the_cpu"))]  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "triton_variants"]
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *tests], cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    number = re.search(r"^variants: (\d+)", done.stdout, re.MULTILINE)
    assert number and 50 <= int(number[1]) <= 64, done.stdout[-2000:]
    # What cannot be without a GPU, after its launches; whatever else fails may have launched too little.
    known = {"test_kmeans_nan_stays_in_its_image", "test_kmeans_empty", "test_graph_capture"}
    known |= {"test_operators_agree_with_the_cpu"}
    assert set(re.findall(r"^FAILED \S+::(\w+)", done.stdout, re.MULTILINE)) <= known, done.stdout[-2000:]
