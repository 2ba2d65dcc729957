"""The pipeline from photos to boxes, on a real photo and on made ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import skimage
import torch

import molt
from molt.clustering import TokenKMeans
from molt.data.images import PhotoError

CAT = Path(skimage.__file__).parent / "data" / "chelsea.png"


@pytest.fixture(scope="module")
def loc() -> molt.Localizer:
    return molt.Localizer(device="cpu")


@pytest.fixture(scope="module")
def weak() -> molt.Localizer:
    return molt.Localizer(weights="weak", device="cpu")


@pytest.fixture(scope="module")
def cat(loc: molt.Localizer) -> molt.Localization:
    return loc(CAT)


def test_a_cat_is_found(cat: molt.Localization) -> None:
    assert cat.size == (451, 300) and cat.names == ["Egyptian cat"] and cat.classes.tolist() == [285]
    assert cat.boxes.shape == (1, 4) and cat.boxes.dtype == torch.float32
    x0, y0, x1, y1 = cat.boxes[0].tolist()
    assert 0 <= x0 < x1 <= 451 and 0 <= y0 < y1 <= 300
    assert (x1 - x0) * (y1 - y0) > 0.4 * 451 * 300, "the cat fills most of the picture"
    assert 0.5 < cat.scores[0] < 1


def test_map_and_labels_have_the_photos_size(cat: molt.Localization) -> None:
    assert cat.map.shape == cat.labels.shape == (300, 451)
    assert cat.map.dtype == torch.float32 and cat.labels.dtype == torch.int32
    assert cat.map.min() >= 0 and 0.99 < cat.map.max() <= 1
    assert set(cat.labels.unique().tolist()) == set(range(int(cat.labels.max()) + 1))


def test_box_encloses_the_map_above_the_threshold(loc: molt.Localizer, cat: molt.Localization) -> None:
    """Every pixel at the threshold of the largest component lies in the box, and each side touches one."""
    from scipy import ndimage

    heat = cat.heat[0].numpy()
    labels, _ = ndimage.label(heat >= loc.threshold * heat.max(), np.ones((3, 3)))
    ys, xs = np.nonzero(labels == np.bincount(labels.ravel())[1:].argmax() + 1)
    scale = np.array([451 / 448, 300 / 448] * 2)
    expected = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) * scale
    assert np.allclose(cat.boxes[0].numpy(), expected, atol=1e-3)


def test_every_kind_of_input_agrees(loc: molt.Localizer, cat: molt.Localization) -> None:
    picture = PIL.Image.open(CAT).convert("RGB")
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for x in (str(CAT), picture, array, array.astype(np.float32) / 255, tensor, tensor.float() / 255):
        assert torch.allclose(loc(x).boxes, cat.boxes, atol=1.5), type(x)


def test_many_inputs_keep_their_order(loc: molt.Localizer, cat: molt.Localization, tmp_path: Path) -> None:
    picture = PIL.Image.open(CAT).convert("RGB")
    flipped = picture.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    (tmp_path / "b").mkdir()
    flipped.save(tmp_path / "a.png")
    picture.save(tmp_path / "b" / "c.webp", lossless=True)
    (tmp_path / "notes.txt").write_text("no photo")
    listed = loc([flipped, picture])
    folder = loc(tmp_path)
    assert [r.source.name for r in folder] == ["a.png", "c.webp"]
    for results in (listed, folder):
        assert torch.allclose(results[1].boxes, cat.boxes) and not torch.allclose(results[0].boxes, cat.boxes)
    batch = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in (flipped, picture)])
    both = loc(batch)
    assert torch.allclose(both[0].boxes, loc(batch[0]).boxes) and torch.allclose(both[1].boxes, loc(batch[1]).boxes)
    assert loc([]) == []


def test_batches_give_what_single_photos_give(loc: molt.Localizer) -> None:
    picture = PIL.Image.open(CAT).convert("RGB")
    photos = [picture, picture.rotate(180), picture.crop((100, 0, 400, 300))]
    together = [result for _, result in loc.stream(photos, batch_size=3)]
    for photo, result in zip(photos, together, strict=True):
        alone = loc(photo)
        assert torch.allclose(alone.heat, result.heat, atol=1e-3) and alone.names == result.names
        assert torch.allclose(alone.boxes, result.boxes, atol=2.0)


def test_stream_goes_on_after_a_bad_photo(loc: molt.Localizer, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"not a photo")
    for size in (1, 2, 3):
        results = list(loc.stream([bad, CAT, tmp_path / "missing.png"], batch_size=size))
        assert [type(r).__name__ for _, r in results] == ["PhotoError", "Localization", "PhotoError"]
        assert [source for source, _ in results] == [bad, CAT, tmp_path / "missing.png"]
    with pytest.raises(PhotoError, match=r"bad\.jpg"):
        loc([CAT, bad])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_photo_that_fails_costs_no_other(size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Here the clusterer fails on a dark photo, in whatever batch it is."""

    def picky(x: torch.Tensor, size: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if x.mean() < 0.15 or (x.flatten(1).mean(1) < 0.15).any():
            raise ValueError("it is too dark\nhere")
        return torch.zeros(len(x), *size, dtype=torch.int32), torch.ones(len(x), dtype=torch.int64)

    picky.takes_features = False  # type: ignore[attr-defined]
    loc = molt.Localizer(weights="weak", device="cpu", clusterer=picky)
    light = np.full((50, 60, 3), 200, np.uint8)
    light[10:30, 20:40] = 90
    sources = [light, light // 10, light, light[::-1].copy()]
    results = [result for _, result in loc.stream(sources, batch_size=size)]
    assert [type(result).__name__ for result in results] == ["Localization", "ValueError", *["Localization"] * 2]
    assert ("batch of" in caplog.text and "it is too dark" in caplog.text) == (size > 1)
    with pytest.raises(ValueError, match="too dark"):
        loc(sources)


@pytest.mark.parametrize("size", [1, 3])
def test_a_map_with_nan_is_an_error_of_its_photo(weak: molt.Localizer, size: int, monkeypatch: Any) -> None:
    """As where half precision overflows: here on the dark photo."""
    from dataclasses import replace

    def overflow(images: torch.Tensor, *rest: Any) -> Any:
        evidence = forward(images, *rest)
        dark = images.flatten(1).mean(1) < 0.15
        broken = [maps.where(~dark[:, None, None, None], torch.nan) for maps in evidence.maps]
        return replace(evidence, maps=broken)

    forward = weak.method.forward
    monkeypatch.setattr(weak.method, "forward", overflow)
    light = np.asarray(PIL.Image.open(CAT).convert("RGB"))
    results = [result for _, result in weak.stream([light, light // 10, light], batch_size=size)]
    assert [type(result).__name__ for result in results] == ["Localization", "ValueError", "Localization"]
    assert str(results[1]) == "the photo's map holds NaN or infinity"


def test_top_k_classes(loc: molt.Localizer) -> None:
    several = molt.Localizer(k=3, device="cpu")(CAT)
    assert several.heat.shape[0] == 3 and len(several) == 3
    assert several.names[0] == "Egyptian cat" and len(set(several.names)) == 3
    assert several.scores.tolist() == sorted(several.scores.tolist(), reverse=True)


def test_wanted_classes_and_the_class_agnostic_mode(loc: molt.Localizer, cat: molt.Localization) -> None:
    by_name, by_index = loc(CAT, classes="Egyptian cat"), loc(CAT, classes=285)
    assert torch.equal(by_name.boxes, cat.boxes) and torch.equal(by_index.boxes, cat.boxes)
    agnostic = loc(CAT, classes="object")
    assert agnostic.names == ["object"] and agnostic.classes.tolist() == [-1] and 0 < agnostic.scores[0] <= 1
    pair = loc(CAT, classes=["tabby", "object"])
    assert set(pair.names) == {"tabby, tabby cat", "object"}
    ordered = loc(CAT, classes=["tabby", "Egyptian cat"])
    assert ordered.names[0] == "Egyptian cat" and torch.allclose(ordered.map, cat.map, atol=1e-5)
    assert abs(loc.explain(CAT, classes=["tabby", "Egyptian cat"]).class_probability - float(cat.scores[0])) < 1e-5
    with pytest.raises(ValueError, match="tabbby.*tabby"):
        loc(CAT, classes="tabbby")
    with pytest.raises(ValueError, match="empty list"):
        loc(CAT, classes=[])


def test_indices_of_numpy_and_torch(weak: molt.Localizer) -> None:
    expected = weak(CAT, classes=285)
    for classes in (np.int64(285), np.array(285), torch.tensor(285), torch.tensor([285]), np.array([285]), (285,)):
        assert torch.equal(weak(CAT, classes=classes).boxes, expected.boxes), classes
    pair = torch.tensor([285, 281])
    for classes in (pair, pair.numpy(), list(pair), ["285", np.int64(281)]):
        assert sorted(weak(CAT, classes=classes).classes.tolist()) == [281, 285]
    with pytest.raises(TypeError, match=r"a class must be a name or an index, got 285\.0"):
        weak(CAT, classes=torch.tensor(285.0))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_classes_of_each_photo(weak: molt.Localizer, size: int, tmp_path: Path) -> None:
    """A row a photo, whatever the batch, also beside a photo that cannot be read and where rows differ in length."""
    picture = PIL.Image.open(CAT).convert("RGB")
    photos: list[Any] = [picture, picture.rotate(180), tmp_path / "missing.png", picture.rotate(90)]
    rows: list[Any] = [[285], ["golden retriever"], [1], np.array([281, 285])]
    alone = [
        weak(photo, classes=row) for photo, row in zip(photos, rows, strict=True) if isinstance(photo, type(picture))
    ]
    for sources in (photos, iter(photos)):
        found = [result for _, result in weak.stream(sources, rows, batch_size=size)]
        assert isinstance(found.pop(2), PhotoError)
        for got, wanted in zip(found, alone, strict=True):
            assert got.names == wanted.names and torch.allclose(got.boxes, wanted.boxes, atol=2.0)
    two = weak(photos[:2], classes=[["Egyptian cat"], [207]])
    for same in (
        torch.tensor([[285], [207]]),
        np.array([[285], [207]]),
        ((285,), (207,)),
        [torch.tensor([285]), [207]],
    ):
        assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(weak(photos[:2], classes=same), two, strict=True))
    assert [one.classes.tolist() for one in two] == [[285], [207]]
    assert weak(CAT, classes=[[285]]).classes.tolist() == [285]
    for wrong, text in (([[285]], "got 1 for 2 photos"), ([[285], 207], "got both"), ([[285], []], "empty list")):
        with pytest.raises(ValueError, match=text):
            weak(photos[:2], classes=wrong)
    with pytest.raises(ValueError, match="got 2 for 1 photo$"):
        weak(CAT, classes=[[285], [207]])
    for wrong, text in (([[285]], "fewer than photos"), ([[285]] * 3, "more than photos")):
        with pytest.raises(ValueError, match=text):
            list(weak.stream(iter(photos[:2]), wrong, batch_size=size))


def test_file_objects_and_batches_of_arrays(weak: molt.Localizer, tmp_path: Path, monkeypatch: Any) -> None:
    expected = weak(CAT)
    memory = io.BytesIO(CAT.read_bytes())
    assert torch.equal(weak(memory).boxes, expected.boxes) and weak(memory).source is memory
    assert weak.explain(memory).photo.size == (451, 300) and weak(memory).plot().size == (451, 300)
    pixels = np.asarray(PIL.Image.open(CAT).convert("RGB"))
    for batch in (np.stack([pixels, pixels]), np.stack([pixels] * 2) / 255, np.stack([pixels] * 2).astype(np.uint16)):
        assert [torch.equal(one.boxes, expected.boxes) for one in weak(batch)] == [True, True]
    grey = pixels[..., :1]
    for many in (np.stack([grey, grey]), torch.from_numpy(np.stack([grey[..., 0]] * 2))[:, None]):
        assert [one.size for one in weak(many)] == [(451, 300)] * 2
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(CAT.read_bytes())
    assert torch.equal(weak("~/photos/a.png").boxes, expected.boxes)
    assert [one.source for one in weak(Path("~/photos"))] == [tmp_path / "photos" / "a.png"]
    molt.Localizer(weights="weak", device="cpu", cache="~/labels")(pixels)
    assert any((tmp_path / "labels").rglob("*.png"))


def test_multi_gives_every_component_and_the_threshold_counts() -> None:
    low = molt.Localizer(multi=True, threshold=0.85, device="cpu")(CAT)
    assert low.scores.tolist() == sorted(low.scores.tolist(), reverse=True)
    tight = molt.Localizer(threshold=0.9, device="cpu")(CAT)
    area = ((tight.boxes[0, 2:] - tight.boxes[0, :2]).prod()).item()
    wide = molt.Localizer(threshold=0.1, device="cpu")(CAT)
    assert area < ((wide.boxes[0, 2:] - wide.boxes[0, :2]).prod()).item()


def test_multi_on_a_map_with_two_parts(loc: molt.Localizer) -> None:
    """Two components in one map give two boxes, scored by area."""
    from dataclasses import replace

    from molt.data.images import read_photo

    photo = read_photo(CAT, 448)
    maps = loc._maps(photo.pixels[None], None)
    refined = torch.zeros(1, 1, 448, 448)
    refined[..., 10:110, 20:120] = 1
    refined[..., 300:350, 300:400] = 0.8
    several = molt.Localizer(multi=True, device="cpu")
    result = several._boxes([photo], replace(maps, refined=refined))[0]
    scale = torch.tensor([451 / 448, 300 / 448] * 2)
    expected = torch.tensor([[20.0, 10, 120, 110], [300, 300, 400, 350]]) * scale
    assert torch.allclose(result.boxes, expected, atol=1e-3)
    assert torch.allclose(result.scores[1] / result.scores[0], torch.tensor(0.5), atol=1e-5)


def test_weak_uses_the_cnn_alone(weak: molt.Localizer) -> None:
    result = weak(CAT)
    assert len(weak.weights) == 1 and weak.weights[0].saw_masks == "no" and result.names == ["Egyptian cat"]
    assert len(result) == 1


def test_weights_are_said(loc: molt.Localizer, cat: molt.Localization) -> None:
    said = json.loads(cat.to_json())["weights"]
    assert [w["model"] for w in said] == ["tf_efficientnet_lite0.in1k", "vit_small_patch14_dinov2.lvd142m"]
    assert [w["saw_masks"] for w in said] == ["no", "probably"] and all(w["threshold"] == "measured" for w in said)


def test_another_backbone_is_not_measured(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path / "vit.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    other = molt.Localizer(backbone="vit_tiny_patch16_224", checkpoint=path, device="cpu")
    result = other(CAT)
    said = json.loads(result.to_json())["weights"][1]
    assert said["threshold"] == "not measured" and said["source"] == f"file {path}"
    assert len(result) == 1


@pytest.mark.parametrize("size", [(1, 1), (20000, 20), (3, 700)])
def test_odd_photos_are_answered(loc: molt.Localizer, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    result = loc(pixels)
    assert result.size == size and len(result) <= 1
    for x0, y0, x1, y1 in result.boxes.tolist():
        assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]


def test_a_blank_photo_is_answered(loc: molt.Localizer) -> None:
    result = loc(np.zeros((50, 60, 3), np.uint8))
    assert result.size == (60, 50) and result.heat.isfinite().all()


def test_explain_shows_every_stage(loc: molt.Localizer, cat: molt.Localization) -> None:
    stages = loc.explain(CAT)
    assert stages.photo.size == (451, 300) and stages.photo.mode == "RGB"
    assert [size for size, _ in stages.scale_maps] == [(224, 224), (336, 336), (448, 448)]
    assert stages.attention is None
    for maps in (stages.cam, *(m for _, m in stages.scale_maps)):
        assert maps.ndim == 2 and maps.amin() == 0 and maps.amax() == 1
    assert stages.fused.shape == stages.refined.shape == stages.clusters.shape == (448, 448)
    assert torch.equal(stages.result.boxes, cat.boxes)
    assert abs(stages.class_probability - float(cat.scores[0])) < 1e-6


def test_profile_books_every_stage() -> None:
    loc = molt.Localizer(weights="weak", profile=True, device="cpu")
    loc([CAT, CAT])
    rows = {row["stage"]: row for row in loc.profile.rows()}
    assert set(rows) == {"read", "pyramid", "forward", "seed", "fuse", "cluster", "refine", "boxes"}
    assert all(row["calls"] == 2 and row["seconds"] > 0 for row in rows.values())
    assert all(row["peak_mib"] > 100 for row in rows.values()), "a process with torch holds more than that"
    summary = loc.profile.summary()
    assert summary["photos"] == 2
    assert abs(summary["total_seconds"] - sum(row["seconds"] for row in rows.values())) < 1e-9
    ratio = summary["total_seconds"] / rows["forward"]["seconds"]
    assert summary["total_over_forwards"] == pytest.approx(ratio) and summary["seconds_per_photo"] > 0


def test_backends_agree(cat: molt.Localization) -> None:
    reference = molt.Localizer(backend="reference", device="cpu")(CAT)
    native = molt.Localizer(backend="native", device="cpu")(CAT)
    assert torch.allclose(reference.heat, native.heat, atol=1e-5)
    assert torch.allclose(reference.boxes, native.boxes, atol=2.0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "sliding"}, "method must be one of seeded, molt_deit_base, .*, got 'sliding'"),
        ({"weights": "strong"}, "weights must be 'default' or 'weak', got 'strong'"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 1001}, "k must be at most 1000, the number of classes, got 1001"),
        ({"threshold": 0}, "threshold must be in"),
        ({"threshold": 1.0}, "threshold must be in"),
        ({"alpha": 2}, "alpha must be 'auto' or a number in"),
        ({"device": "cudaa"}, "device 'cudaa' cannot be used here"),
        ({"backend": "fast"}, "fast"),
        ({"source": "web"}, "source must be"),
        ({"backbone": "nonsense"}, "nonsense"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        molt.Localizer(**{"device": "cpu", "weights": "weak"} | arguments)


def test_coco_and_json_forms(cat: molt.Localization) -> None:
    record = json.loads(cat.to_json())
    assert set(record) == {"path", "width", "height", "detections", "weights"}
    assert record["path"] == str(CAT) and (record["width"], record["height"]) == (451, 300)
    (detection,) = record["detections"]
    assert set(detection) == {"box", "class", "name", "score"} and detection["class"] == 285
    (coco,) = cat.to_coco(image_id=7)
    x0, y0, x1, y1 = detection["box"]
    assert coco == {
        "image_id": 7,
        "category_id": 285,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "score": detection["score"],
    }


def test_repr_and_plot(cat: molt.Localization) -> None:
    assert "Egyptian cat" in repr(cat) and "451x300" in repr(cat)
    picture = cat.plot()
    assert picture.mode == "RGB" and picture.size == (451, 300)
    assert np.asarray(picture).tobytes() != np.asarray(PIL.Image.open(CAT).convert("RGB")).tobytes()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"k": 1.5}, "k must be an integer, got 1.5"),
        ({"k": "x"}, "k must be an integer"),
        ({"threshold": "x"}, "threshold must be a number, got 'x'"),
        ({"alpha": True}, "alpha must be 'auto' or a number in .*got True"),
        ({"clusterer": "kmeans"}, "clusterer must be callable.*got 'kmeans'"),
        ({"clusterer": TokenKMeans}, r"build it first, TokenKMeans\(\)"),
    ],
)
def test_arguments_of_another_type_are_named(arguments: dict, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        molt.Localizer(**{"device": "cpu", "weights": "weak"} | arguments)
