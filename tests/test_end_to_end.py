"""`molt benchmark --end-to-end`: what it compares is comparable, and no row is lost."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import molt as package
from molt import cli
from molt.benchmark import agreement, device_name, end_to_end, photos, pipelines
from molt.benchmark.configurations import (
    CELLS,
    PROVIDERS,
    Configuration,
    configurations,
    find_targets,
    rehearsed,
)
from molt.benchmark.registry import NotRun
from molt.clustering import DeepClustering, TokenKMeans

pytestmark = pytest.mark.usefixtures("one_thread")

COLUMNS = {"method", "clusterer", "provider", "batch", "size", "headline", "dtype", "scales", "trained", "note"}
COLUMNS |= {"ms", "p20_ms", "p80_ms", "runs", "photos_per_s", "bare_ms", "bare_photos_per_s", "ratio", "results_ms"}
COLUMNS |= {"peak_mib", "extrapolated", "photos_timed", "steps_timed", "steps_full", "step_ms", "stages"}
COLUMNS |= {"weights", "targets", "missed", "speedup_published", "speedup_published_bincount"}
COLUMNS |= {"iou_reference", "ari_reference", "photos_compared", "hits", "photos_hit"}


@functools.cache
def model(size: int) -> package.MOLT:
    torch.manual_seed(0)
    made = package.create_model("molt_deit_tiny", 5, (32, size), pretrained=False)
    for transformer in made.transformers:
        transformer.backbone.model.blocks = transformer.backbone.model.blocks[:2]
        for block in transformer.backbone.model.blocks:
            block.attn.qkv.weight.data *= 8
    made.mark_trained(True)
    return made


def tiny(device: str = "cpu", size: int = 48, pretrained: bool = True) -> package.Localizer:
    return package.Localizer(copy.deepcopy(model(size)), device=device, alpha=0.5)


real_clusterer = pipelines.make_clusterer


def small_clusterer(name: str, steps: int | None = None, dtype: Any = None, tiny: bool = False) -> Any:
    if name == "deep_published":
        return DeepClustering("published", channels=8, steps=steps or 1000, num_segments=40, min_labels=1)
    if name == "deep_fast":
        return DeepClustering(channels=8, steps=1, num_segments=40, working_size=32, starts=2, merged=5)
    return real_clusterer(name)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "METHODS", {"molt_tiny": pipelines.Method(tiny)})
    monkeypatch.setattr(pipelines, "make_clusterer", small_clusterer)
    monkeypatch.setattr(end_to_end, "SECONDS", {"cpu": 0.01})


@pytest.fixture
def bench(registered: None) -> end_to_end.Bench:
    return end_to_end.Bench("cpu", seconds=0.01)


def one(clusterer: str = "none", provider: str = "native", batch: int = 2, **options: Any) -> Configuration:
    return Configuration("molt_tiny", clusterer, provider, batch, 48, headline=True, **options)


def molt(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_identical_results_agree_fully() -> None:
    maps = torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(4, (9, 11), generator=torch.Generator().manual_seed(1))
    assert agreement.mask_iou(maps, maps, 0.5).tolist() == [1, 1, 1]
    assert agreement.adjusted_rand(labels, labels) == 1
    assert agreement.adjusted_rand(labels, (labels + 3) % 4) == 1, "the numbers of clusters do not matter"
    assert agreement.adjusted_rand(labels * 0, labels * 0) == 1


def test_mask_iou_by_hand() -> None:
    first, second = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    first[0, :2], second[0, 1:3] = 1, 0.2  # two rows each, one shared
    first[1, 0] = 1  # against nothing
    first[0, 3, 3] = 0.49  # below the threshold
    assert agreement.mask_iou(first, second, 0.5).tolist() == [pytest.approx(1 / 3), 0, 1]


def test_adjusted_rand_by_hand_and_by_scikit_learn() -> None:
    first, second = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 2]])
    assert agreement.adjusted_rand(first, second) == pytest.approx(4 / 7)
    assert agreement.adjusted_rand(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 0, 1]])) == pytest.approx(-0.5)
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    for kinds in (2, 7, 500):
        first = torch.randint(kinds, (31, 17), generator=generator)
        second = torch.where(torch.rand(31, 17, generator=generator) < 0.7, first, 3)
        expected = metrics.adjusted_rand_score(first.flatten(), second.flatten())
        assert agreement.adjusted_rand(first, second.int()) == pytest.approx(expected)
    with pytest.raises(ValueError, match="expected one, not empty"):
        agreement.adjusted_rand(first, second[:4])


def test_best_iou_by_hand() -> None:
    truth = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    assert agreement.best_iou(torch.tensor([20.0, 0, 25, 10]), truth) == pytest.approx(0.5)
    assert agreement.best_iou(torch.tensor([11.0, 0, 19, 10]), truth) == 0
    assert agreement.best_iou(None, truth) == 0


def found(refined: torch.Tensor, labels: torch.Tensor | None, box: list[float] | None) -> pipelines.Found:
    return pipelines.Found(refined, labels, [None if box is None else torch.tensor(box)])


def test_columns_on_quality() -> None:
    maps, labels = torch.eye(6)[None], torch.arange(36).view(1, 6, 6) % 3
    same = found(maps, labels, [0.0, 0, 6, 6])
    other = found(maps.flip(1), labels, None)
    truth = (torch.tensor([[0.0, 0, 6, 5]]), torch.tensor([[0.0, 0, 6, 5]]))
    row = end_to_end.compare([same, other], [same, same], 0.5, truth)
    assert row == {
        "iou_reference": 0.5,
        "ari_reference": 1,
        "photos_compared": 2,
        "hits": 0.5,
        "photos_hit": 2,
    }
    row = end_to_end.compare([same], [same, same], 0.5, truth)
    assert row["hits"] is None and row["photos_compared"] == 1, "a part of the photos would not compare"
    row = end_to_end.compare([found(maps, None, None)], [found(maps, None, None)], 0.5, None)
    assert row["ari_reference"] is None and row["hits"] is None and row["iou_reference"] == 1


def test_ratio_is_whole_over_bare() -> None:
    row = end_to_end.empty_row(one(), torch.float32)
    end_to_end.add_times(row, {"whole": [30.0, 20.0, 40.0], "bare": [10.0, 20.0, 15.0]}, 2, 2)
    assert row["ms"] == 30 and row["bare_ms"] == 15 and row["ratio"] == 2 and row["runs"] == 3
    assert row["p20_ms"] == pytest.approx(24) and row["p80_ms"] == pytest.approx(36)
    assert row["photos_per_s"] == pytest.approx(2 / 0.03) and row["bare_photos_per_s"] == pytest.approx(2 / 0.015)
    assert row["extrapolated"] is False and row["steps_full"] is None


def test_fewer_photos_and_steps_are_extrapolated_and_flagged() -> None:
    row = end_to_end.empty_row(one(), torch.float32)
    end_to_end.add_times(row, {"whole": [30.0], "bare": [10.0]}, 8, 2)
    assert row["ms"] == 120 and row["ratio"] == 12 and row["extrapolated"] is True and row["photos_timed"] == 2
    row = end_to_end.empty_row(one(), torch.float32)
    end_to_end.add_times(row, {"whole": [1000.0], "start": [200.0], "bare": [10.0]}, 4, 2, 24)
    assert row["step_ms"] == 20 and row["steps_timed"] == 24 and row["steps_full"] == 1000, "a step and photo"
    assert row["ms"] == pytest.approx(2 * (1000 + 976 * 40)) and row["extrapolated"] is True


def test_stages_are_those_of_the_batch() -> None:
    profile = [
        {"stage": "forward", "calls": 2, "seconds": 0.01, "peak_mib": 5.0},
        {"stage": "cluster", "calls": 2, "seconds": 0.02, "peak_mib": None},
    ]
    rows = end_to_end.stages(profile, 4, 2, 100.0)
    assert [row["ms"] for row in rows] == [pytest.approx(20), pytest.approx(240)]
    assert rows[0]["photos_per_s"] == pytest.approx(200) and rows[0]["peak_mib"] == 5 and rows[1]["peak_mib"] is None


def images(number: int = 2, size: int = 48) -> torch.Tensor:
    return photos.Photos("made", photos.made((size, size))).batch(number, "cpu")


@pytest.mark.usefixtures("our_superpixels")
@pytest.mark.parametrize("clusterer", ["none", "deep_published"])
@pytest.mark.parametrize("vote", ["numpy", "bincount"])
def test_published_and_library_agree(clusterer: str, vote: Any) -> None:
    loc, made = tiny(), small_clusterer(clusterer, 3)
    loops = pipelines.literal(loc, made, vote, loc._stage, images(3))
    for backend in ("reference", "native"):
        loc.backend = backend
        ours = pipelines.library(loc, made, images(3))
        assert ours.refined.shape == loops.refined.shape == (3, 48, 48)
        assert torch.allclose(ours.refined, loops.refined, atol=1e-3)
        assert agreement.mask_iou(ours.refined, loops.refined, loc.threshold).min() > 0.99
        for a, b in zip(ours.boxes, loops.boxes, strict=True):
            assert a is not None and b is not None and agreement.best_iou(a, b[None]) > 0.95
        if clusterer == "none":
            assert ours.labels is None and loops.labels is None
            continue
        for a, b in zip(ours.labels, loops.labels, strict=True):
            assert int(b.max()) > 0 and agreement.adjusted_rand(a, b) > 0.99


def test_boxes_are_the_localizers() -> None:
    loc = tiny()
    clusterer = TokenKMeans()
    mine = pipelines.library(loc, clusterer, images(3)).boxes
    loc.clusterer = clusterer
    for box, result in zip(mine, loc(images(3)), strict=True):
        assert torch.equal(box, result.boxes[0])


def test_papers_loops_are_those_of_the_paper() -> None:
    loc = tiny()
    with pytest.raises(NotRun, match="cluster by a network a photo only"):
        pipelines.literal(loc, TokenKMeans(), "numpy", loc._stage, images())
    with pytest.raises(NotRun, match="do not merge several"):
        pipelines.literal(loc, small_clusterer("deep_fast"), "numpy", loc._stage, images())
    loc.method = torch.nn.Identity()
    with pytest.raises(NotRun, match="those of molt_"):
        pipelines.literal(loc, None, "numpy", loc._stage, images())
    with pytest.raises(NotRun, match="Identity are not known"):
        pipelines.bare(loc, images())


def test_bare_forward_passes_have_the_weights_and_no_hooks() -> None:
    loc = tiny()
    network = loc.method.model
    seen: list[torch.Tensor] = []
    transformer = network.transformer(1)
    x = network.pyramid(images())[1]
    with torch.inference_mode():
        logits = pipelines._transformer(transformer)(x)
        assert torch.allclose(logits, transformer(x), atol=1e-5)
    vit = transformer.backbone.model
    net = pipelines.without_hooks(vit)
    assert all(a is b for a, b in zip(net.parameters(), vit.parameters(), strict=True))
    hooks = [module for module in vit.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooks and not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    for block in vit.blocks:
        block.attn.q_norm.register_forward_hook(lambda module, args, output: seen.append(output))
    pipelines.bare(loc, images())()
    assert not seen, "and the network itself keeps its own"


def test_scales_are_multiples_of_the_patch() -> None:
    assert pipelines.scales(448, 14) == (224, 336, 448) and pipelines.scales(224, 14) == (112, 168, 224)
    assert pipelines.scales(224, 16) == (112, 160, 224) and pipelines.scales(5, 14) == (14, 14, 14)


def test_clusters_do_not_depend_on_autocast() -> None:
    """Autocast keeps its copies of weights, so that a network trained under it would not move."""
    loc = tiny()
    loc.clusterer = DeepClustering(channels=8, steps=5, num_segments=40)
    expected = loc._maps(images(), None)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loc._maps(images(), None)
    assert torch.equal(cast.clusters, expected.clusters) and len(expected.clusters.unique()) > 1
    assert cast.evidence.maps[0].dtype == torch.bfloat16, "the networks are under it"
    assert loc._boxes([photos.as_photo(image) for image in images()], cast)[0].boxes.dtype == torch.float32


def test_photos_of_a_folder_with_boxes(tmp_path: Path) -> None:
    for name in ("b", "a", "nobox"):
        PIL.Image.new("RGB", (40, 20), "red").save(tmp_path / f"{name}.png")
    assert photos.load(tmp_path, (10, 20)).boxes is None
    (tmp_path / "boxes.csv").write_text("photo,animal,x0,y0,x1,y1\na,cat,0,0,20,10\nb,cat,4,4,8,8\nb,dog,0,0,40,20\n")
    given = photos.load(tmp_path, (10, 20))
    assert given.images.shape == (2, 3, 10, 20) and given.boxes is not None
    assert given.boxes[0].tolist() == [[0, 0, 10, 5]] and given.boxes[1].tolist() == [[2, 2, 4, 4], [0, 0, 20, 10]]
    batch = given.batch(3, "cpu")
    assert batch.shape[0] == 3 and torch.equal(batch[0], batch[2])


@pytest.mark.parametrize(
    ("table", "said"),
    [(None, "holds no photos"), ("photo,x0\na,1\n", "expected columns"), ("photo,x0,y0,x1,y1\n", "names none")],
)
def test_folders_that_cannot_be_used(table: str | None, said: str, tmp_path: Path) -> None:
    if table is not None:
        PIL.Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
        (tmp_path / "boxes.csv").write_text(table)
    with pytest.raises(ValueError, match=said):
        photos.load(tmp_path, (10, 10))


def test_photos_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert photos.load(None, (16, 16)).source == "scikit-image's samples"

    def nothing() -> Any:
        raise FileNotFoundError("no scikit-image")

    monkeypatch.setattr(photos, "sample_photos", nothing)
    made, again = photos.load(None, (16, 24)), photos.load(None, (16, 24))
    assert made.source == "made from a seed" and torch.equal(made.images, again.images)
    assert made.images.shape[1:] == (3, 16, 24) and 0 <= made.images.min() < made.images.max() <= 1


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_row(bench: end_to_end.Bench, provider: str) -> None:
    loops = provider.startswith("published")
    row = bench.row(one("none" if loops else "deep_fast", provider, batch=3))
    assert set(row) == COLUMNS and row["note"] is None, row["note"]
    assert row["ratio"] == pytest.approx(row["ms"] / row["bare_ms"]) and row["ratio"] > 1
    assert row["runs"] >= end_to_end.LEAST_ROUNDS and row["scales"] == [32, 48]
    stages = [stage["stage"] for stage in row["stages"]]
    clusters = [] if loops else ["cluster", "refine"]
    assert stages == ["pyramid", "forward", "cam", "fuse", *clusters, "boxes"]
    assert all(stage["ms"] > 0 for stage in row["stages"])
    assert row["iou_reference"] > 0.99 and row["photos_compared"] == 2
    assert row["ari_reference"] is None if loops else row["ari_reference"] > 0.99
    assert row["hits"] is None, "no true boxes were given"
    assert row["extrapolated"] is loops and row["photos_timed"] == (2 if loops else 3)
    assert (row["results_ms"] is None) == loops
    if provider == "reference":
        assert row["iou_reference"] == row["ari_reference"] == 1


@pytest.mark.parametrize("provider", ["native", "published"])
def test_full_steps_are_extrapolated(bench: end_to_end.Bench, provider: str) -> None:
    row = bench.row(one("deep_published", provider))
    assert row["note"] is None and row["extrapolated"] is True
    assert (row["photos_timed"], row["steps_timed"], row["steps_full"]) == (1, 24, 1000)
    assert row["ms"] > 2 * 900 * row["step_ms"] and row["iou_reference"] is None
    cluster = next(stage["ms"] for stage in row["stages"] if stage["stage"] == "cluster")
    assert cluster > 2 * 900 * row["step_ms"]


def test_stages_make_up_the_whole(bench: end_to_end.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(TokenKMeans):
        def __call__(self, *arguments: Any) -> Any:
            time.sleep(0.3)
            return super().__call__(*arguments)

    monkeypatch.setattr(pipelines, "make_clusterer", lambda name, steps=None, dtype=None, tiny=False: Slow())
    row = bench.row(one("token_kmeans"))
    assert row["note"] is None and row["ms"] > 300 > row["bare_ms"], "the clusterer is no forward pass"
    milliseconds = {stage["stage"]: stage["ms"] for stage in row["stages"]}
    assert max(milliseconds, key=lambda name: milliseconds[name]) == "cluster" and milliseconds["cluster"] > 300
    assert 300 < sum(milliseconds.values()) < 2 * row["ms"]


def test_half_precision_is_for_both(registered: None) -> None:
    seen: list[torch.dtype] = []
    bench = end_to_end.Bench("cpu", dtype=torch.bfloat16, seconds=0.01)
    bench.row(one())

    def hooked(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        seen.append(output.dtype)

    bench._built["molt_tiny", 48][0].method.model.transformer(0).backbone.model.blocks[0].mlp.register_forward_hook(
        hooked
    )
    row = bench.row(one())
    assert row["dtype"] == "bfloat16" and row["note"] is None and set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (ValueError("no\nsuch thing"), "raises ValueError: no"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory: CUDA out of memory. Tried"),
        (NotRun("no such preset"), "not run: no such preset"),
        (RuntimeError("fuse_maps: backend 'native' cannot run: gone"), "not run: fuse_maps: backend 'native' cannot"),
    ],
)
def test_a_failed_configuration_is_a_row(
    bench: end_to_end.Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, note: str
) -> None:
    def fails(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(pipelines, "library", fails)
    row = bench.row(one())
    assert set(row) == COLUMNS and row["note"].startswith(note) and row["ms"] is None
    assert bool(end_to_end.failed([row])) == note.startswith("raises")
    monkeypatch.undo()


def test_a_network_that_cannot_be_built_is_a_row(bench: end_to_end.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: str, size: int) -> Any:
        raise FileNotFoundError("no weights")

    methods = {"molt_tiny": pipelines.Method(tiny), "molt_gone": pipelines.Method(missing)}
    monkeypatch.setattr(pipelines, "METHODS", methods)
    gone = Configuration("molt_gone", "none", "native", 1, 48, headline=False)
    rows = [bench.row(what) for what in (one(), gone, one())]
    assert [row["note"] for row in rows] == [None, "raises FileNotFoundError: no weights", None]


def test_configurations_begin_with_the_headline() -> None:
    for device, cells in CELLS.items():
        work = configurations(device)
        headline = [what for what in work if what.headline]
        assert work[: len(headline)] == headline == configurations(device, quick=True)
        assert {(what.batch, what.size) for what in headline} == {cells[0]} and len(set(work)) == len(work)
        assert {(what.batch, what.size) for what in work} == set(cells)
        assert {what.provider for what in headline if what.method == "seeded"} == {"native", "reference"}
        assert {what.provider for what in headline} == set(PROVIDERS)
        assert {what.clusterer for what in headline} == set(pipelines.CLUSTERERS)
        assert not any(what.clusterer == "deep_published" and not what.headline for what in work)
    work = configurations("cpu", batches=[1, 2], sizes=[56], clusterers=["deep_published"], providers=["published"])
    assert [(what.method, what.batch) for what in work] == [("molt_dinov2_small", 1), ("molt_dinov2_small", 2)]


@pytest.fixture
def command(registered: None, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any] | None]]:
    """Run it on the CPU; return the exit code and what the file holds then."""

    def run(*arguments: object) -> tuple[int, dict[str, Any] | None]:
        code = molt("benchmark", "--end-to-end", "--device", "cpu", "--out", tmp_path, *arguments)
        path = tmp_path / device_name("cpu") / "end_to_end.json"
        return code, json.loads(path.read_text()) if path.exists() else None

    return run


CHOICE = ("--method", "molt_tiny", "--batch", "1", "--size", "48")


def test_command_writes_a_report(command: Any, capsys: pytest.CaptureFixture) -> None:
    code, report = command(*CHOICE, "--clusterer", "none,deep_fast", "--providers", "native,published")
    out, err = capsys.readouterr()
    assert code == 0 and "molt_tiny: 1 x 48 px, float32" in out and "end_to_end.json" in err
    assert report["schema"] == end_to_end.SCHEMA and report["device"] == device_name("cpu") and report["cuda"] is None
    assert report["photos"] == "scikit-image's samples" and report["dtype"] == "float32" and report["quick"] is False
    assert {"threads", "versions", "commit", "modified", "date", "seconds_total"} <= set(report)
    assert [(row["clusterer"], row["provider"]) for row in report["rows"]] == [
        ("none", "native"),
        ("none", "published"),
        ("deep_fast", "native"),
    ]
    assert all(set(row) == COLUMNS and row["ms"] > 0 for row in report["rows"])
    code, _ = command(*CHOICE, "--clusterer", "none", "--providers", "native", "--json")
    assert code == 0 and len(json.loads(capsys.readouterr().out)["rows"]) == 1


def test_command_fails_where_a_configuration_raises(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fails(*arguments: Any) -> Any:
        raise ValueError("a fault")

    monkeypatch.setattr(pipelines, "literal", fails)
    code, report = command(*CHOICE, "--clusterer", "none")
    notes = {row["provider"]: row["note"] for row in report["rows"]}
    assert code == 1 and notes == {"native": None, "reference": None, "published": "raises ValueError: a fault"}
    assert "molt_tiny, none, published: raises ValueError: a fault" in capsys.readouterr().err


def test_an_interruption_keeps_the_rows(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stopped(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines, "literal", stopped)
    code, report = command(*CHOICE, "--clusterer", "none")
    assert code == 130 and [row["provider"] for row in report["rows"]] == ["native", "reference"]
    assert all(row["ms"] > 0 for row in report["rows"])
    assert "interrupted; 2 rows are in" in capsys.readouterr().err


def test_the_time_bounds_the_run(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0])
    monkeypatch.setattr(end_to_end.time, "monotonic", lambda: next(ticks, 100.0))
    code, report = command(*CHOICE, "--clusterer", "none", "--minutes", "0.5")
    assert code == 0
    assert [row["note"] for row in report["rows"]] == [None, *["not run: the 0.5 minutes were over"] * 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--end-to-end", "fuse_maps"], "measures no operator, got fuse_maps"),
        (["--end-to-end", "--method", "nobody"], "--method nobody: no such name here; expected"),
        (["--end-to-end", "--clusterer", ","], "--clusterer: names nothing"),
        (["--end-to-end", "--batch", "1,x"], "--batch 1,x: expected whole numbers of at least 1"),
        (["--end-to-end", "--size", "16"], "--size 16: expected whole numbers of at least 32"),
        (["--end-to-end", "--dtype", "float64"], "--dtype float64: no such name here"),
        (["--end-to-end", "--minutes", "0"], "--minutes 0: expected a number above 0"),
        (["--end-to-end", "--photos", "nowhere"], "--photos nowhere holds no photos"),
        (["--end-to-end", "--method", "seeded", "--providers", "published"], "nothing to measure"),
        (["--batch", "1"], "--batch: goes with --end-to-end only"),
        (["--photos", "nowhere"], "--photos: goes with --end-to-end only"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert molt("benchmark", "--device", "cpu", "--out", tmp_path, *arguments) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_list_names_the_configurations(capsys: pytest.CaptureFixture) -> None:
    assert molt("benchmark", "--end-to-end", "--list", "--device", "cuda") == 0
    assert capsys.readouterr().out.splitlines()[0] == "* seeded, none, native, 64 x 448 px"


def plots() -> Any:
    spec = importlib.util.spec_from_file_location("plots", Path(__file__).parents[1] / "benchmarks" / "plots.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_and_plot_come_from_the_report(bench: end_to_end.Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = []
    for provider, whole in (("native", 11.0), ("reference", 15.0), ("published", 400.0)):
        row = end_to_end.empty_row(one("deep_fast", provider), torch.float32)
        end_to_end.add_times(row, {"whole": [whole], "bare": [10.0]}, 2, 1 if provider == "published" else 2)
        rows.append(row | {"trained": False, "iou_reference": 0.98765, "ari_reference": 1.0})
    rows.append(end_to_end.empty_row(one("deep_amortised"), torch.float32) | {"note": "not run: no preset"})
    report = end_to_end.report(rows, bench, quick=True, seconds_total=1) | {"device": "toaster"}
    path = tmp_path / "end_to_end.json"
    path.write_text(json.dumps(report))
    draw = plots()
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{draw.WHOLE_BEGIN}\nold\n{draw.WHOLE_END}\n\nafter\n")
    assert draw.main([str(path)], tmp_path) == 0
    text = page.read_text()
    line = "| `molt_tiny`, random head | deep_fast | 182 | 1.10 x | 1.50 x |  | ~80 x | 0.988, 1.000 |"
    assert line in text and "| `molt_tiny` | deep_amortised | not run: no preset | | | | | |" in text
    assert "`toaster`" in text and "2 x 48 px, float32" in text and text.endswith("\nafter\n") and "old" not in text
    folder = tmp_path / "benchmarks" / "results" / "toaster"
    assert {file.name for file in folder.iterdir()} == {"end_to_end.json", "end_to_end.svg"}
    svg = (folder / "end_to_end.svg").read_text()
    assert "deep_fast, published" in svg and "~80 x" in svg and "1.10 x" in svg
    assert draw.main(["--check"], tmp_path) == 0
    page.write_text(text.replace("1.50 x", "1.60 x"))
    assert draw.main(["--check"], tmp_path) == 1
    partial = tmp_path / "partial.json"
    partial.write_text(json.dumps(report | {"rows": rows[1:]}))
    with pytest.raises(ValueError, match="lacks cases that .* has .of deep_fast."):
        draw.main([str(partial)], tmp_path)


def test_amortised_rows_are_timed_only(bench: end_to_end.Bench) -> None:
    row = bench.row(one("deep_amortised"))
    assert row["note"] is None and row["ratio"] > 1 and row["extrapolated"] is False
    assert row["iou_reference"] is None and row["ari_reference"] is None and row["hits"] is None
    made = real_clusterer("deep_amortised")
    assert made is real_clusterer("deep_amortised"), "fitted once"
    assert real_clusterer("deep_amortised", None, torch.bfloat16).dtype == torch.bfloat16


def test_folders_photos_that_fail_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    for number in range(3):
        PIL.Image.new("RGB", (20, 10), (number, 9, 9)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    assert len(photos.load(tmp_path, (8, 8)).images) == 2 and "1.png" in caplog.text
    monkeypatch.setattr(photos, "MOST", 1)
    assert len(photos.load(tmp_path, (8, 8)).images) == 1 and "only the first 1" in caplog.text
    (tmp_path / "0.png").unlink()
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match="none of its photos can be read"):
        photos.load(tmp_path, (8, 8))


@pytest.mark.parametrize("weights", ["default", "weak"])
def test_the_whole_sees_what_the_bare_passes_see(weights: str) -> None:
    """The same networks, at the same sides, as often, whatever the method does besides."""
    loc = pipelines._seeded("cpu", 56, weights)
    x = photos.made(loc.method.size)[:1]
    seen: list[tuple[int, int]] = []

    def count(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        # Each network's first layer is the one that colours go into.
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 3:
            seen.append((module.out_channels, given[0].shape[-1]))

    bare = pipelines.bare(loc, x)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        pipelines.library(loc, None, x)
        whole, seen[:] = sorted(seen), []
        bare()
    finally:
        hook.remove()
    assert len(whole) == len(seen) >= 4
    for (width, side), (bare_width, bare_side) in zip(whole, sorted(seen), strict=True):
        # A CNN's photos are padded to its stride, which is the library's own doing.
        assert width == bare_width and 0 <= side - bare_side < 32


def test_a_reference_that_fails_takes_no_times_along(bench: end_to_end.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pipelines.library

    def fails(loc: package.Localizer, *arguments: Any) -> Any:
        if loc.backend == "reference":
            raise ValueError("a fault")
        return library(loc, *arguments)

    monkeypatch.setattr(pipelines, "library", fails)
    row = bench.row(one())
    assert row["ms"] > 0 and row["iou_reference"] is None and not end_to_end.failed([row])
    assert row["note"] == "not compared: the reference raises ValueError: a fault"
    assert end_to_end.failed([bench.row(one(provider="reference"))])


def test_random_weights_are_told_and_no_box_is_judged(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def build(device: str, size: int, pretrained: bool = True) -> package.Localizer:
        asked.append(pretrained)
        return tiny(device, size)

    monkeypatch.setattr(pipelines, "METHODS", {"molt_tiny": pipelines.Method(build)})
    load = photos.load
    boxes = tuple(torch.tensor([[0.0, 0, 48, 48]]) for _ in load(None, (8, 8)).images)
    monkeypatch.setattr(photos, "load", lambda *a: photos.Photos("made", load(*a).images, boxes))
    rows = [end_to_end.Bench("cpu", seconds=0, pretrained=pretrained).row(one()) for pretrained in (True, False)]
    assert asked == [True, False] and [row["weights"] for row in rows] == ["pretrained", "random"]
    assert [row["trained"] for row in rows] == [True, False]
    assert rows[0]["hits"] is not None and rows[1]["hits"] is None and rows[1]["iou_reference"] == 1
    loc = pipelines.METHODS["molt_tiny"].build("cpu", 48)
    assert loc.weights[0].source == "random"


def test_seeded_takes_random_weights() -> None:
    (seeded, again) = (pipelines._seeded("cpu", 56, pretrained=False) for _ in range(2))
    assert [info.source for info in seeded.weights] == ["random", "random"]
    first, second = (next(loc.method.vit.model.parameters()) for loc in (seeded, again))
    assert torch.equal(first, second), "of a seed"


def test_targets_of_configurations() -> None:
    work = configurations("cuda", targets=True)
    assert work == [what for what in configurations("cuda") if what in work] == configurations("cuda")[: len(work)]
    assert {(what.batch, what.size) for what in work} == {(64, 448)} and len(work) == 11
    asked = {str(what): find_targets("cuda", what) for what in work}
    assert asked["molt_dinov2_small, token_kmeans, native, 64 x 448 px"] == {"ratio": 1.4}
    loops = [what for what in work if what.provider.startswith("published")]
    assert len(loops) == 2 and not any(asked[str(what)] for what in loops), "there to be compared with"
    assert configurations("cpu", targets=True) == [] and not any(find_targets("cpu", what) for what in work)
    assert {(what.batch, what.size) for what in rehearsed(work)} == {(2, 56)} and len(rehearsed(work)) == len(work)


def test_times_faster_than_the_papers_loops() -> None:
    rows = []
    for provider, ms in (("native", 10.0), ("published_bincount", 90.0), ("published", 900.0)):
        rows.append(end_to_end.empty_row(one("deep_published", provider), torch.float32) | {"ms": ms})
    rows[0]["targets"] = {"speedup_published": 100.0, "speedup_published_bincount": 8.0}
    end_to_end.add_speedups(rows)
    assert rows[0]["speedup_published"] == 90 and rows[0]["speedup_published_bincount"] == 9
    assert rows[0]["missed"] == ["speedup_published"] and rows[2]["missed"] == []


def test_command_goes_on_with_an_earlier_report(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = (*CHOICE, "--clusterer", "none", "--resume")
    code, first = command(*chosen, "--providers", "reference")
    measured: list[str] = []
    row = end_to_end.Bench.row

    def watched(self: end_to_end.Bench, what: Configuration) -> Any:
        measured.append(what.provider)
        return row(self, what)

    monkeypatch.setattr(end_to_end.Bench, "row", watched)
    code, report = command(*chosen, "--providers", "native,reference")
    assert code == 0 and measured == ["native"] and report["rows"][0] == first["rows"][0] and len(report["rows"]) == 2
    code, report = command(*chosen, "--providers", "native", "--random-weights")
    assert code == 0 and measured == ["native", "native"], "of other weights: measured anew"
    assert [one["weights"] for one in report["rows"]] == ["random"]
