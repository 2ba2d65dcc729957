"""Presets of deep clustering, merged networks, and one network for many photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import molt
from molt.cli import app
from molt.clustering import PRESETS, CachedClusterer, DeepClustering, fit, fitting
from molt.clustering._network import respond_shared
from molt.clustering.fitting import load_network, save_network
from molt.data import read_photo
from molt.structures import Features

SMALL: dict[str, Any] = {"channels": 8, "num_segments": 20}


def picture(seed: int, size: tuple[int, int] = (40, 50)) -> np.ndarray:
    random = np.random.default_rng(seed)
    image = np.repeat(np.repeat(random.random((4, 5, 3)), size[0] // 4, 0), size[1] // 5, 1)
    return (255 * (0.9 * image + 0.1 * random.random(image.shape))).astype(np.uint8)


def images(number: int = 2) -> Tensor:
    return torch.stack([torch.from_numpy(picture(seed)).permute(2, 0, 1) / 255 for seed in range(number)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(3):
        PIL.Image.fromarray(picture(seed)).save(photos / f"{seed}.png")
    return photos


@pytest.fixture
def checkpoint(tmp_path: Path, folder: Path) -> Path:
    path = tmp_path / "clusters.safetensors"
    fit(folder, path, steps=6, batch_size=2, working_size=32, **SMALL)
    return path


# Presets


def test_presets_are_what_the_documentation_says() -> None:
    published, fast = DeepClustering("published"), DeepClustering()
    assert (published.channels, published.layers, published.steps, published.num_segments) == (100, 2, 1000, 10000)
    assert (published.working_size, published.starts, published.merged) == (None, 1, 0)
    assert fast.preset == "fast" and fast.working_size == 112 and fast.channels == 32
    assert (fast.starts, fast.merged) == (4, 32) and fast.num_clusters == 32 and published.num_clusters == 100
    assert set(PRESETS) == {"published", "fast", "amortised"}


def test_an_argument_overrides_its_preset() -> None:
    fast = DeepClustering(steps=20, seed=3)
    assert (fast.preset, fast.steps, fast.seed) == ("fast", 20, 3)
    assert fast.settings == {**DeepClustering().settings, "steps": 20, "seed": 3}
    assert DeepClustering("published", working_size=224).working_size == 224
    assert DeepClustering(working_size=None).working_size is None
    every = {
        "channels": 5, "layers": 1, "steps": 3, "min_labels": 2, "num_segments": 9, "continuity": 0.5,
        "compactness": 7.0, "starts": 2, "merged": 4, "working_size": 33,
    }  # fmt: skip
    for preset in ("published", "fast"):
        made = DeepClustering(preset, **every)
        assert {name: made.settings[name] for name in every} == every


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"preset": "quick"}, ValueError, "preset must be one of published, fast, amortised, got 'quick'"),
        ({"preset": 3}, ValueError, "preset must be one of"),
        ({"preset": "amortised"}, ValueError, r"preset 'amortised' needs checkpoint=FILE.*molt fit-clusters"),
        ({"preset": "published", "starts": 2}, ValueError, "merged must be at least 1 where there are 2 starts, got 0"),
        ({"dtype": torch.float16}, ValueError, "dtype must be torch.float32, torch.bfloat16 or None"),
        ({"working_size": "large"}, TypeError, "working_size must be an integer"),
        ({"checkpoint": "no-such-file"}, FileNotFoundError, "checkpoint no-such-file does not exist"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        DeepClustering(**arguments)


# Merged networks


def test_several_networks_are_merged() -> None:
    cluster = DeepClustering(**SMALL, steps=2, working_size=None, merged=7, starts=3)
    labels, counts = cluster(images())
    assert labels.shape == (2, 40, 50) and counts.tolist() == [int(image.max()) + 1 for image in labels]
    assert counts.min() >= 2 and counts.max() <= 7
    assert torch.equal(cluster(images())[0], labels)
    other = DeepClustering(**SMALL, steps=2, working_size=None, merged=7, starts=3, seed=1)(images())[0]
    assert not torch.equal(other, labels)
    assert torch.equal(cluster(images()[1:])[0], labels[1:]), "a photo's labels do not depend on its batch"


def test_starts_begin_with_the_single_networks_state() -> None:
    one, three = DeepClustering(merged=0, starts=1), DeepClustering(starts=3)
    (single,), several = one.initial_states(), three.initial_states()
    assert len(several) == 3
    assert all(torch.equal(a, b) for a, b in zip(single, several[0], strict=True))
    assert not torch.equal(several[0][0], several[1][0]) and not torch.equal(several[1][0], several[2][0])


def test_merging_depends_less_on_the_seed_than_one_network() -> None:
    """Over six seeds: how far each pixel's cluster mean of a map moves, the map a ramp."""
    ramp = torch.linspace(0, 1, 50).expand(1, 1, 40, 50)

    def moved(**more: Any) -> float:
        maps = []
        for seed in range(6):
            labels, counts = DeepClustering(num_segments=40, working_size=None, seed=seed, **more)(images(1))
            maps.append(molt.ops.cluster_refine(ramp, labels, 1.0, counts))
        return float(torch.cat(maps).std(0).mean())

    assert moved(steps=5, starts=4, merged=10) < 0.8 * moved(steps=20, starts=1, merged=0)


def test_merging_works_on_features_and_pixels_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = Features(torch.randn(2, 30, 12, generator=generator), (5, 6), (20, 24))
    labels, counts = DeepClustering(**SMALL, merged=5)(seen)
    assert labels.shape == (2, 20, 24) and counts.max() <= 5
    for size in ((1, 1), (1, 7), (2, 1)):
        labels, counts = DeepClustering(**SMALL)(torch.rand(1, 3, *size))
        assert labels.shape == (1, *size) and int(counts) == int(labels.max()) + 1


# One network for many photos


def test_fit_writes_a_network_that_amortised_reads(checkpoint: Path) -> None:
    cluster = DeepClustering("amortised", checkpoint=checkpoint)
    assert (cluster.channels, cluster.layers, cluster.steps, cluster.working_size) == (8, 2, 0, 32)
    labels, counts = cluster(images())
    assert labels.shape == (2, 40, 50) and counts.min() >= 2 and counts.max() <= 8
    network = load_network(checkpoint)
    direct = respond_shared(images(), network.state).argmax(1)
    at_size = DeepClustering("amortised", checkpoint=checkpoint, working_size=None)(images())[0]
    for image, expected in zip(at_size, direct, strict=True):
        pairs = set(zip(image.flatten().tolist(), expected.flatten().tolist(), strict=True))
        assert len(pairs) == len(image.unique()) == len(expected.unique()), "the same partition, by a forward pass"


def test_training_goes_on_from_a_checkpoint(checkpoint: Path) -> None:
    """With steps above 0 the network is an initial state."""
    still = DeepClustering("amortised", checkpoint=checkpoint)
    on = DeepClustering("amortised", checkpoint=checkpoint, steps=5, num_segments=20)
    assert not torch.equal(still(images())[0], on(images())[0])
    assert torch.equal(on.initial_states()[0][0], still.initial_states()[0][0])


def test_fit_learns_and_repeats_itself(tmp_path: Path, folder: Path) -> None:
    losses: list[float] = []
    result = fit(folder, tmp_path / "a", steps=40, batch_size=3, working_size=32, **SMALL,
                 on_step=lambda _, loss: losses.append(loss))  # fmt: skip
    assert result.photos == 3 and result.steps == 40 == len(losses) and not result.errors
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    fit(folder, tmp_path / "b", steps=40, batch_size=3, working_size=32, **SMALL)
    fit(folder, tmp_path / "c", steps=40, batch_size=3, working_size=32, seed=1, **SMALL)
    a, b, c = (load_network(tmp_path / name) for name in "abc")
    assert a.digest == b.digest != c.digest
    assert DeepClustering(checkpoint=tmp_path / "a", starts=1, merged=0).settings["checkpoint"] == a.digest


def test_fit_skips_and_names_what_it_cannot_read(tmp_path: Path, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    result = fit(folder, tmp_path / "a", steps=3, batch_size=4, working_size=32, **SMALL)
    assert result.photos == 3 and len(result.errors) == 1 and "broken.png" in str(result.errors[0])
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"photos: none of 1 can be read"):
        fit(tmp_path / "none", tmp_path / "b", steps=2, **SMALL)
    assert not (tmp_path / "b").exists()
    for photos, error, message in (
        ([], ValueError, "photos: got an empty list"),
        (tmp_path / "missing", FileNotFoundError, "is no folder"),
    ):
        with pytest.raises(error, match=message):
            fit(photos, tmp_path / "b")
    for name in ("steps", "batch_size", "channels", "layers", "num_segments", "working_size"):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            fit(folder, tmp_path / "b", **{name: 0})


def test_fit_keeps_few_photos_in_memory(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads again is the same."""
    read = []
    monkeypatch.setattr(fitting, "read_photo", lambda source, size: read.append(source) or read_photo(source, size))
    for kept in (2**29, 2 * 10 * (20 * 24)):
        monkeypatch.setattr(fitting, "MOST_KEPT_BYTES", kept)
        read.clear()
        fit(folder, tmp_path / str(kept), steps=6, batch_size=2, working_size=24, **SMALL)
        assert (len(read) == 3) == (kept == 2**29) and 3 <= len(read) <= 12
    assert load_network(tmp_path / str(kept)).digest == load_network(tmp_path / str(2**29)).digest


def test_fit_goes_on_after_a_photo_of_any_kind_of_wrong(tmp_path: Path, folder: Path) -> None:
    cut = folder / "cut.png"
    cut.write_bytes((folder / "0.png").read_bytes()[:-200])
    photos = [folder / "0.png", object(), cut, torch.rand(3, 20, 20), tmp_path / "missing.png"]
    result = fit(photos, tmp_path / "a", steps=3, batch_size=5, working_size=24, **SMALL)
    assert result.photos == 2 and len(result.errors) == 3
    assert "photo 1: " in str(result.errors[0]) and "cut.png" in str(result.errors[1])
    assert all(error.__traceback__ is None for error in result.errors), "which would keep the photo in memory"


def test_fit_leaves_label_maps_among_the_photos_alone(tmp_path: Path, folder: Path) -> None:
    CachedClusterer(DeepClustering(**SMALL, steps=1), folder / "labels")(images())
    assert len(list(folder.rglob("*.png"))) == 5
    assert fit(folder, tmp_path / "a", steps=4, batch_size=5, working_size=24, **SMALL).photos == 3


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"photos": 5}, TypeError, "photos must be a folder or a list of photos, got int"),
        ({"device": "gpu0"}, ValueError, "device 'gpu0' cannot be used here"),
        ({"device": 3}, TypeError, "device must be a name"),
        ({"out": "."}, IsADirectoryError, "out: . is a folder"),
    ],
)
def test_fit_tells_wrong_arguments_before_it_trains(
    more: dict, error: type, message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        fit(**{"photos": folder, "out": tmp_path / "a", **more, "on_step": lambda *_: pytest.fail("it trains")})


def test_fit_takes_arrays_and_mixed_sizes(tmp_path: Path) -> None:
    photos = [picture(0), picture(1, (80, 30)), torch.rand(3, 20, 60)]
    assert fit(photos, tmp_path / "a", steps=2, batch_size=3, working_size=24, **SMALL).photos == 3


def test_a_cache_tells_checkpoints_apart(tmp_path: Path, folder: Path, checkpoint: Path) -> None:
    other = tmp_path / "other"
    fit(folder, other, steps=6, batch_size=2, working_size=32, seed=5, **SMALL)
    made = [CachedClusterer(DeepClustering("amortised", checkpoint=path), tmp_path / "labels")
            for path in (checkpoint, other, checkpoint)]  # fmt: skip
    for cluster in made:
        cluster(images())
    assert [cluster.misses for cluster in made] == [2, 2, 0]


def test_features_are_refused_where_a_checkpoint_saw_colours(checkpoint: Path) -> None:
    seen = Features(torch.rand(1, 4, 3), (2, 2), (8, 8))
    with pytest.raises(ValueError, match="x: got Features, expected images"):
        DeepClustering("amortised", checkpoint=checkpoint)(seen)
    with pytest.raises(ValueError, match=r"channels must be 8, as checkpoint .* has, got 16"):
        DeepClustering("amortised", checkpoint=checkpoint, channels=16)
    with pytest.raises(ValueError, match="starts must be 1 where a checkpoint"):
        DeepClustering(checkpoint=checkpoint)


def test_files_of_others_are_not_trusted(tmp_path: Path, checkpoint: Path) -> None:
    state = list(load_network(checkpoint).state)
    path = tmp_path / "wrong"

    def check(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DeepClustering("amortised", checkpoint=path)

    path.write_bytes(b"nothing of the kind")
    check("is not a safetensors file of molt")
    save_file({"000": torch.rand(3)}, path)
    check("holds no clustering network")
    save_network(path, state[:-1], 32)
    check("it has 11 tensors")
    save_network(path, [*state[:4], state[4][:, :3], *state[5:]], 32)
    check("does not hold together: it has")
    save_network(path, [value.double() for value in state], 32)
    check("expected finite float32")
    save_network(path, [value * float("nan") for value in state], 32)
    check("expected finite float32")
    save_network(path, state, 0)
    check("working_size must be")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_network(tmp_path)


def test_the_command_fits(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out.safetensors"
    (folder / "broken.png").write_bytes(b"no picture")
    options = ["fit-clusters", str(folder), "--out", str(out), "--steps", "2", "--batch", "4", "--channels", "4"]
    done = CliRunner().invoke(app, [*options, "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["photos"] == 3 and record["skipped"] == 1 and record["steps"] == 2
    assert "broken.png" in done.stderr and load_network(out).channels == 4
    done = CliRunner().invoke(app, [*options])
    assert "2 steps on 3 photos, 1 skipped" in done.stdout
    assert done.stderr.count("broken.png") == 1
    for more, code, text in (
        (["--steps", "0"], 2, "steps must be"),
        (["--device", "gpu0"], 2, "device 'gpu0' cannot be used"),
        (["--out", str(tmp_path)], 1, "is a folder"),
    ):
        done = CliRunner().invoke(app, [*options, *more])
        assert done.exit_code == code and text in " ".join(done.stderr.split()), done.stderr
    done = CliRunner().invoke(app, ["fit-clusters", str(tmp_path / "missing")])
    assert done.exit_code == 1 and "is no folder" in done.stderr
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no picture")
    done = CliRunner().invoke(app, ["fit-clusters", str(tmp_path / "bad"), "--out", str(tmp_path / "b")])
    assert done.exit_code == 1 and "none of 1 can be read" in " ".join(done.stderr.split())
