"""`molt benchmark`: the registry is complete, wrong results get no time, reports and tables hold what was measured."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from molt import _files, benchmark, cli, ops
from molt.benchmark import OPERATIONS, Case, Inputs, NotRun, Operation, Provider, gate, timing
from molt.benchmark import cases as inputs_of
from molt.benchmark import run as runner
from molt.benchmark.targets import add_missed

ROOT = Path(__file__).parents[1]
FIELDS = {
    "operation",
    "case",
    "headline",
    "provider",
    "kind",
    "match",
    "max_error",
    "note",
    "median_ms",
    "p20_ms",
    "p80_ms",
}
FIELDS |= {"speedup_compiled", "images_per_s", "fill_ms", "launch_ms", "launch_ratio", "targets", "missed"}
FIELDS |= {"runs", "bytes", "GBps", "share", "speedup_reference", "speedup_peer", "extra_bytes"}


def fake(*extra: Provider, backward: bool = False) -> Operation:
    """Twice the input."""

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def provider(name: str, kind: Any, run: Callable[..., Any] = double) -> Provider:
        return Provider(name, kind, lambda: run, differentiable=True)

    return Operation(
        name="double",
        cases=(Case("small", "cpu", 4, headline=True, backward=backward), Case("large", "cpu", 8, backward=backward)),
        make=lambda case, generator: Inputs((torch.rand(case.images, 3, generator=generator),)),
        providers=(provider("reference", "reference"), provider("native", "native"), *extra),
        moved=lambda inputs: 2 * inputs.args[0].numel() * 4,
        counted="everything",
        compare=gate.values,
        tolerance={torch.float32: 1e-6},
        limit="copy",
        shape=lambda inputs: tuple(inputs.args[0].shape),
    )


def peer(run: Callable[..., Any], **options: Any) -> Provider:
    return Provider("peer", "peer", lambda: run, **options)


def rows_of(operation: Operation, number: int = 0, **options: Any) -> dict[str, dict[str, Any]]:
    rows = benchmark.run_case(operation, operation.cases[number], seconds=0.001, **options)
    return {row["provider"]: row for row in rows}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def register(*operations: Operation) -> None:
        monkeypatch.setattr(benchmark, "OPERATIONS", {operation.name: operation for operation in operations})

    return register


def molt(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_every_public_operator_is_registered() -> None:
    functions = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert functions <= set(OPERATIONS)
    for name, operation in OPERATIONS.items():
        assert operation.name == name
        kinds = [provider.kind for provider in operation.providers]
        assert kinds.count("reference") == kinds.count("native") == 1 and "peer" in kinds
        names = [provider.name for provider in operation.providers]
        assert len(set(names)) == len(names)
        for device in ("cpu", "cuda"):
            cases = operation.cases_on(device)
            assert len({case.name for case in cases}) == len(cases)
            assert sum(case.headline for case in cases) == 1 == len(operation.cases_on(device, quick=True))
            assert all(case.dtype in operation.tolerance for case in cases)
            assert operation.shape is not None or not any(case.backward for case in cases)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_inputs_come_from_the_seed_and_their_bytes_are_counted(name: str) -> None:
    operation = OPERATIONS[name]
    case = min(operation.cases_on("cpu"), key=lambda case: case.images)
    case = dataclasses.replace(case, images=2)

    def make(seed: int) -> Inputs:
        return operation.make(case, torch.Generator().manual_seed(seed))

    first, again, other = (gate.tensors([make(seed).args[0]], "cpu") for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert operation.moved(make(3)) >= sum(tensor.numel() * tensor.element_size() for tensor in first)


def test_large_gpu_cases_write_a_gibibyte() -> None:
    for name in ("upsample_normalize", "fuse_maps", "cluster_refine", "fuse_and_refine"):
        large = [
            case
            for case in OPERATIONS[name].cases_on("cuda")
            if case.images * inputs_of.SIDE**2 * case.dtype.itemsize >= 2**30
        ]
        assert {case.dtype for case in large} == {torch.float32, torch.float16}
        assert any(case.headline for case in large), "the case that torch.compile runs on too, and first"
    refined = [case.options for case in OPERATIONS["cluster_refine"].cases_on("cuda") if case.images == inputs_of.LARGE]
    for kind in ("blocks", "random"):
        for clusters in (32, 256):
            for labels in (torch.uint8, torch.int32):
                assert {"k": clusters, "labels": labels, "kind": kind} in refined


@pytest.mark.parametrize("name", ["cluster_mean", "cluster_refine", "cluster_vote"])
def test_peers_of_the_cluster_operators_agree(name: str) -> None:
    operation = OPERATIONS[name]
    case = operation.cases_on("cpu")[0]
    case = dataclasses.replace(case, images=1, options={**case.options, "k": 7})
    inputs = operation.make(case, torch.Generator().manual_seed(0))
    results = {}
    for provider in operation.providers:
        if provider.kind not in ("peer", "published"):
            continue
        try:
            run = provider.resolve(case)
        except NotRun:
            continue
        mine = gate.changed(inputs, lambda tensor: tensor.numpy()) if provider.numpy else inputs
        results[provider.name] = run(*mine.args, **mine.kwargs)
    assert len(results) >= 3
    first = results.pop("published")
    for other, result in results.items():
        assert operation.compare(result, first, inputs) <= operation.tolerance[torch.float32], other


def test_scatter_packages_are_called_as_they_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the packages' signature; not every pyg-lib has the function."""
    (tmp_path / "torch_scatter.py").write_text(
        "import torch\n"
        "def scatter_mean(src, index, dim=-1, out=None, dim_size=None):\n"
        "    shape = [*src.shape]; shape[dim] = dim_size\n"
        "    return src.new_zeros(shape).scatter_reduce(dim, index, src, 'mean', include_self=False)\n"
    )
    (tmp_path / "pyg_lib.py").write_text("class ops: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("torch_scatter", "pyg_lib"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    operation = OPERATIONS["cluster_refine"]
    case = dataclasses.replace(operation.cases_on("cpu")[0], images=1)
    inputs = operation.make(case, torch.Generator().manual_seed(0))
    peers = {provider.name: provider for provider in operation.providers}
    result = peers["torch_scatter"].resolve(case)(*inputs.args)
    truth = peers["scatter_add"].resolve(case)(*gate.upcast(inputs).args)
    assert operation.compare(result, truth, inputs) <= operation.tolerance[torch.float32]
    with pytest.raises(NotRun, match="this pyg-lib has no scatter_mean"):
        peers["pyg_lib"].resolve(case)
    for name in ("torch_scatter", "pyg_lib"):
        sys.modules.pop(name)


def test_right_providers_are_timed_and_compared() -> None:
    rows = rows_of(fake(peer(lambda x: x + x)))
    assert set(rows) == {"reference", "native", "peer", "copy"}
    for name, row in rows.items():
        assert set(row) == FIELDS
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["runs"] >= timing.LEAST_RUNS
        assert row["GBps"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        if name == "copy":
            continue
        assert row["match"] is True and row["max_error"] <= 1e-6
        assert row["share"] == pytest.approx(rows["copy"]["median_ms"] / row["median_ms"])
        assert row["speedup_reference"] == pytest.approx(rows["reference"]["median_ms"] / row["median_ms"])
        assert row["speedup_peer"] == pytest.approx(rows["peer"]["median_ms"] / row["median_ms"])


@pytest.mark.parametrize(
    ("run", "note", "error"),
    [
        (lambda x: x * 2.01, r"does not match: 0\.0\d", True),
        (lambda x: x[:1] * 2, "does not match: inf", False),
        (lambda x: (x * 2).fill_(torch.nan), "does not match: inf", False),
        (lambda x: x @ x, "raises RuntimeError: ", False),
    ],
)
def test_a_wrong_provider_gets_no_time(run: Callable[..., Any], note: str, error: bool) -> None:
    rows = rows_of(fake(peer(run)))
    wrong = rows["peer"]
    assert wrong["match"] is False and wrong["median_ms"] is None and re.match(note, wrong["note"])
    assert (wrong["max_error"] is not None) == error
    assert benchmark.failed(rows.values()) == [wrong]
    assert rows["native"]["median_ms"] is not None and rows["native"]["speedup_peer"] is None


def test_backward_is_checked_and_timed() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    rows = rows_of(fake(peer(Halved.apply, differentiable=True), backward=True))
    assert rows["native"]["median_ms"] is not None and rows["native"]["max_error"] <= 1e-6
    assert rows["peer"]["match"] is False, "right forward, wrong gradient"
    rows = rows_of(fake(peer(lambda x: x * 2), backward=True))
    assert rows["peer"]["note"] == "not run: has no backward" and rows["peer"]["match"] is None


def test_what_cannot_run_is_a_row_that_says_why() -> None:
    absent = peer(lambda x: x, package="no_such_package", distribution="no-such-package")
    assert rows_of(fake(absent))["peer"]["note"] == "not run: no-such-package is not installed"
    slow = peer(lambda x: x * 2, most_images=4)
    assert rows_of(fake(slow))["peer"]["match"] is True
    assert rows_of(fake(slow), 1)["peer"]["note"] == "not run: too slow for more than 4 images"
    gpu = peer(lambda x: x, devices=("cuda",))
    assert rows_of(fake(gpu))["peer"]["note"] == "not run: runs on cuda only"


def test_a_missing_operator_or_kernel_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = fake()
    native = benchmark.registry.operator("cluster_sing", "native")
    with pytest.raises(NotRun, match=r"molt\.ops has no cluster_sing"):
        native()

    def sing(x: torch.Tensor, *, backend: str) -> torch.Tensor:
        if backend == "native":
            raise RuntimeError("cluster_sing: backend 'native' cannot run: no kernel for cpu tensors")
        return x * 2

    monkeypatch.setattr(ops, "cluster_sing", sing, raising=False)
    providers = (operation.providers[0], Provider("native", "native", native))
    rows = rows_of(dataclasses.replace(operation, providers=providers))
    assert rows["native"]["note"] == "not run: no kernel for cpu tensors" and not benchmark.failed(rows.values())


def test_without_a_truth_everything_fails() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no float64")

    operation = fake()
    reference = dataclasses.replace(operation.providers[0], load=lambda: broken)
    rows = rows_of(dataclasses.replace(operation, providers=(reference, operation.providers[1])))
    assert all(row["match"] is False and "no float64" in row["note"] for row in rows.values()) and len(rows) == 2


def test_components_may_come_in_any_order_but_must_be_equal() -> None:
    box = torch.tensor([[0.0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 6, 6]])
    one = (box, torch.tensor([1, 1, 4]), torch.tensor([0.5, 0.6, 0.7]), torch.zeros(3).long(), torch.zeros(3).long())
    swapped = tuple(part[[1, 0, 2]] for part in one)
    nothing = Inputs((torch.zeros(1),))
    assert gate.boxes(one, swapped, nothing) == 0
    assert gate.boxes(one, (*swapped[:2], swapped[2] + 0.25, *swapped[3:]), nothing) == pytest.approx(0.25)
    assert gate.boxes(one, tuple(part[:2] for part in one), nothing) == gate.WRONG
    assert gate.boxes(one, (one[0], one[1] + 1, *one[2:]), nothing) == gate.WRONG


def test_clusters_are_compared_by_distance_and_must_be_in_range() -> None:
    x = torch.rand(2, 50, 4, generator=torch.Generator().manual_seed(0))
    centres = x[:, :2].clone()
    labels = torch.cdist(x, centres).argmin(-1).int()
    inputs = Inputs((x, 2))
    assert gate.clusters((labels, centres), (labels, centres.double()), inputs) == 0
    assert gate.clusters((1 - labels, centres), (labels, centres), inputs) > 0.1
    assert gate.clusters((labels + 2, centres), (labels, centres), inputs) == gate.WRONG
    assert gate.clusters((labels, centres * torch.nan), (labels, centres), inputs) == gate.WRONG
    assert gate.labels(labels, labels.long(), inputs) == 0 and gate.labels(labels, 1 - labels, inputs) == 1


def test_providers_take_turns() -> None:
    seen: list[str] = []
    runs = {name: lambda turn, name=name: seen.append(name) for name in "ab"}
    times = timing.measure(runs, timing.CpuClock(), 0.0)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys("ab", timing.LEAST_RUNS)
    assert seen == [*"aabb", *"abbaabbaab"], "two calls each to warm up, then rounds that start with another"
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2.0 and timing.quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory can be reset on Linux only")
def test_extra_memory_is_what_a_call_holds_beyond_its_result() -> None:
    def hungry() -> torch.Tensor:
        return torch.ones(64 * 2**20, dtype=torch.uint8)[:1024].clone()

    found = timing.extra_bytes(hungry, torch.device("cpu"))
    assert found is not None and 56 * 2**20 < found < 96 * 2**20
    plain = timing.extra_bytes(lambda: torch.ones(64 * 2**20, dtype=torch.uint8), torch.device("cpu"))
    assert plain is not None and plain < 16 * 2**20


def test_device_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert benchmark.device_name("cpu") == "cpu-2-cores"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert benchmark.device_name("cuda") == "nvidia-h200"


def test_command_writes_a_report(
    registered: Any, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(fake(peer(lambda x: x + x), backward=False))
    written = []
    whole = _files.whole_file
    monkeypatch.setattr(_files, "whole_file", lambda path: written.append(path) or whole(path))
    assert molt("benchmark", "--device", "cpu", "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    assert "double: small" in out and "double: large" in out and "reference" in out
    path = tmp_path / benchmark.device_name("cpu") / "operators.json"
    assert str(path) in err and written == [path, path], "whole, after every case"
    found = json.loads(path.read_text())
    assert found["schema"] == 1 and found["device"] == benchmark.device_name("cpu")
    assert found["versions"]["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert {"molt", "python", "numpy"} <= set(found["versions"])
    assert found["commit"] is None or re.fullmatch("[0-9a-f]{40}", found["commit"])
    assert len(found["rows"]) == 8 and all(set(row) == FIELDS for row in found["rows"])
    assert [row["case"] for row in found["rows"]] == ["small"] * 4 + ["large"] * 4
    assert molt("benchmark", "--quick", "--device", "cpu", "--json", "--providers", "native", "--out", tmp_path) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["provider"] for row in printed["rows"]] == ["native", "copy"] and printed["quick"] is True


def test_command_fails_on_a_wrong_result(registered: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    registered(fake(peer(lambda x: x * 3)))
    assert molt("benchmark", "--quick", "--device", "cpu", "--out", tmp_path) == 1
    out, err = capsys.readouterr()
    assert re.search(r"│ peer +│ does not match: [.\d]+ +│ +│", out), "no time beside it"
    assert re.search(r"double, small: peer does not match", err)


def test_command_stops_beginning_cases_when_the_time_is_over(
    registered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(fake())
    ticks = iter([0.0, 1.0, 100.0])
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(ticks))
    assert molt("benchmark", "--device", "cpu", "--minutes", "0.5", "--out", tmp_path) == 0
    (path,) = tmp_path.rglob("operators.json")
    notes = {(row["case"], row["provider"]): row["note"] for row in json.loads(path.read_text())["rows"]}
    assert notes["small", "native"] is None and notes["large", "native"] == "not run: the 0.5 minutes were over"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cluster_sing"], "no operation cluster_sing"),
        (["--providers", "native,nobody"], "--providers nobody: no such name here"),
        (["--providers", ","], "--providers: names nothing"),
        (["--device", "tpu"], "--device tpu: expected cpu or cuda"),
        (["--minutes", "0"], "--minutes 0: expected a number above 0"),
        (["--device", "cpu", "--out", "FILE"], "where a folder is needed"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    arguments = [str(tmp_path / "file") if argument == "FILE" else argument for argument in arguments]
    assert molt("benchmark", *arguments) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_must_be_there(capsys: pytest.CaptureFixture) -> None:
    assert molt("benchmark", "--device", "cuda") == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_list_names_everything(capsys: pytest.CaptureFixture) -> None:
    assert molt("benchmark", "--list", "--device", "cuda") == 0
    out = capsys.readouterr().out
    for name, operation in OPERATIONS.items():
        assert name in out
        assert all(case.name in out for case in operation.cases_on("cuda"))
        assert ", ".join(provider.name for provider in operation.providers) in out


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plots", ROOT / "benchmarks" / "plots.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def site(tmp_path: Path, plots: ModuleType) -> tuple[Path, Path]:
    """A repository with a place for the table, and a report."""
    (tmp_path / "README.md").write_text(f"before\n\n{plots.BEGIN}\nold\n{plots.END}\n\nafter\n")
    rows = benchmark.run_case(fake(peer(lambda x: x + x)), fake().cases[0], seconds=0.001)
    for row, time in zip(rows, (8.0, 2.0, 4.0, 1.0), strict=True):
        row |= {"median_ms": time, "speedup_reference": 8 / time, "speedup_peer": 4 / time, "share": 1 / time}
    report = benchmark.report(rows, "cpu", quick=True, seconds_total=1) | {"device": "toaster"}
    path = tmp_path / "operators.json"
    path.write_text(json.dumps(report))
    return tmp_path, path


def test_table_and_plots_come_from_the_report(site: tuple[Path, Path], plots: ModuleType) -> None:
    pytest.importorskip("matplotlib")
    root, path = site
    assert plots.main([str(path)], root) == 0
    text = (root / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| `double` | small | 2.00 ms | 4.00 x | 2.00 x (peer) | 50% of copy |" in text
    svg = (root / "benchmarks" / "results" / "toaster" / "double.svg").read_text()
    assert "native" in svg and "2.00 ms" in svg
    assert plots.main(["--check"], root) == 0
    plots.main([], root)
    assert svg == (root / "benchmarks" / "results" / "toaster" / "double.svg").read_text(), "the same bytes again"


def test_check_finds_a_changed_number(
    site: tuple[Path, Path], plots: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    root, path = site
    plots.main([str(path)], root)
    page = root / "README.md"
    page.write_text(page.read_text().replace("4.00 x", "4.10 x"))
    assert plots.main(["--check"], root) == 1
    assert "README.md" in capsys.readouterr().err and "4.10 x" in page.read_text(), "and leaves it alone"


def test_a_partial_report_takes_no_fuller_ones_place(site: tuple[Path, Path], plots: ModuleType) -> None:
    pytest.importorskip("matplotlib")
    root, path = site
    assert plots.main([str(path)], root) == 0
    report = json.loads(path.read_text())
    report["rows"] = [row | {"case": "another"} for row in report["rows"]]
    partial = path.with_name("partial.json")
    partial.write_text(json.dumps(report))
    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="lacks cases that .* has"):
        plots.main([str(partial)], root)
    assert before == {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="there is no such file"):
        plots.main([str(path.with_name("nothing.json"))], root)


def test_committed_tables_are_those_of_the_committed_reports(plots: ModuleType) -> None:
    assert plots.pages(ROOT) == [ROOT / "README.md"]
    assert plots.main(["--check"]) == 0


def test_targets_are_told_and_stand_in_the_readme(site: tuple[Path, Path], plots: ModuleType) -> None:
    pytest.importorskip("matplotlib")
    root, path = site
    page = root / "README.md"
    page.write_text(page.read_text() + f"\n{plots.GPU_BEGIN}\n{plots.GPU_END}\n")
    assert plots.main([str(path)], root) == 0 and plots.NO_GPU in page.read_text()
    report = json.loads(path.read_text())
    native = next(row for row in report["rows"] if row["provider"] == "native")
    native["targets"] = {"share": 0.25, "speedup_peer": 3.0, "launch_ratio": 2.0}
    add_missed(report["rows"])
    assert native["missed"] == ["speedup_peer", "launch_ratio"], "one is too small, one was not measured"
    path.write_text(json.dumps(report))
    assert plots.main([str(path)], root) == 0
    text = page.read_text()
    assert plots.NO_GPU not in text and "| `double` | small | share at least 0.25 | 0.5 |" in text
    assert "speedup_peer at least 3 | **2, missed** |" in text
    assert "launch_ratio at most 2 | **not measured, missed** |" in text
    row = {"model": "molt_deit_small", "sizes": [224], "ratio_timm": 0.8, "note": "a slow disk"}
    row |= {"targets": {"ratio_timm": 0.9}, "missed": ["ratio_timm"]}
    about = {key: report[key] for key in ("device", "cuda", "threads", "versions", "date")}
    training = root / "benchmarks" / "results" / "toaster" / "training_speed.json"
    training.write_text(json.dumps(about | {"loop": [row]}))
    assert plots.main([], root) == 0
    asked = "| `molt_deit_small` | 224 px, fine-tuning | ratio_timm at least 0.9 | **0.8, missed** | a slow disk |"
    assert asked in page.read_text()
    path.write_text(json.dumps(report | {"rehearsal": True}))
    with pytest.raises(ValueError, match="rehearsal, whose times mean nothing"):
        plots.main([str(path)], root)


def test_targets_are_a_gpus(capsys: pytest.CaptureFixture) -> None:
    for more in ([], ["--end-to-end"]):
        assert molt("benchmark", "--targets", "--device", "cpu", *more) == 2
        assert "--targets: they are a GPU's" in capsys.readouterr().err


def test_a_rehearsal_is_told_and_kept_apart(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert molt("benchmark", "largest_at_cuts", "--targets", "--rehearse", "--providers", "native") == 0
    said = capsys.readouterr()
    assert "times mean nothing" in said.out and "missed" not in said.out and "reached" not in said.out
    assert [str(path) for path in Path().rglob("*.json")] == ["molt-benchmark/rehearsal/operators.json"]
    for more, text in (
        (("slic", "--targets", "--rehearse"), "--targets: nothing is asked of slic"),
        (("--rehearse", "--device", "cuda"), "--rehearse: runs on the CPU, got --device cuda"),
    ):
        assert molt("benchmark", *more) == 2
        assert text in capsys.readouterr().err
    assert molt("benchmark", "slic", "fuse_maps", "--targets", "--list") == 0
    listed = capsys.readouterr().out
    assert "share 0.8" in listed and listed.count("(asked: ") == 2 and "backward" not in listed, "without a GPU too"


def test_targets_come_first_and_alone() -> None:
    asked = [(o.name, case) for o in OPERATIONS.values() for case in o.cases_on("cuda", targets=True)]
    assert len(asked) == 14 and all(case.targets for _, case in asked)
    assert not any(case.targets for o in OPERATIONS.values() for case in o.cases_on("cpu"))
    large = {case.name: case.targets for name, case in asked if name == "cluster_refine" and case.images > 8}
    assert len(large) == 8 and {targets["speedup_peer"] for targets in large.values()} == {3.0}
    rehearsed = [case for o in OPERATIONS.values() for case in o.rehearsed(targets=True)]
    assert [case.name for case in rehearsed] == [case.name for _, case in asked]
    assert all(case.device == "cpu" and case.images <= 2 for case in rehearsed)


def test_a_provider_that_fails_while_timed_takes_no_other_along() -> None:
    calls = iter(range(100))

    def fails_later(x: torch.Tensor) -> torch.Tensor:
        if next(calls):
            raise ValueError("no more")
        return x * 2

    rows = rows_of(fake(peer(fails_later)))
    assert rows["peer"]["note"] == "raises ValueError: no more" and rows["peer"]["match"] is False
    assert rows["native"]["median_ms"] > 0 and rows["native"]["speedup_peer"] is None


def test_a_launch_is_timed_beside_small_cases() -> None:
    operation = fake()
    case = dataclasses.replace(operation.cases[0], targets={"launch_ratio": 2.0})
    (native,) = (row for row in benchmark.run_case(operation, case, seconds=0.001) if row["provider"] == "native")
    assert native["launch_ms"] > 0 and native["fill_ms"] > 0 and native["targets"] == {"launch_ratio": 2.0}
    assert native["launch_ratio"] == pytest.approx(native["median_ms"] / (native["fill_ms"] + native["launch_ms"]))


def test_a_run_goes_on_with_an_earlier_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "operators.json"
    command = ["benchmark", "upsample_normalize", "--rehearse", "--resume", "--out", path]
    assert molt(*command, "--targets") == 0
    first = json.loads(path.read_text())
    assert first["rehearsal"] is True and len({row["case"] for row in first["rows"]}) == 2
    timed: list[str] = []
    run_case = runner.run_case

    def watched(operation: Operation, case: Case, **options: Any) -> Any:
        timed.append(case.name)
        return run_case(operation, case, **options)

    monkeypatch.setattr(runner, "run_case", watched)
    assert molt(*command, "--providers", "reference,native") == 0
    rows = json.loads(path.read_text())["rows"]
    names = [case.name for case in OPERATIONS["upsample_normalize"].cases_on("cuda")]
    assert {row["case"] for row in rows} == set(names) and rows[: len(first["rows"])] == first["rows"]
    assert sorted(timed) == sorted(set(names) - {row["case"] for row in first["rows"]})
    path.write_text(json.dumps(first | {"sources": "others"}))
    timed.clear()
    assert molt(*command, "--targets", "--providers", "reference,native") == 0 and len(timed) == 2
    for broken in ("[]", "{"):
        path.write_text(broken)
        timed.clear()
        assert molt(*command, "--targets", "--providers", "reference,native") == 0 and len(timed) == 2
