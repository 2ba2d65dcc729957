"""Score maps from files: which are found, which are refused, and what becomes of them."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from molt.data.annotations import DataError, Sample
from molt.evaluation.maps import MapError, StoredMaps, prepare, read_map, save_map


def sample(name: str, label: int = 0) -> Sample:
    return Sample(name, Path(name), label, np.zeros((0, 4)))


def put(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)
    return path


RAMP = np.linspace(0, 1, 12).reshape(3, 4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_come_as_they_are(tmp_path: Path, dtype: type) -> None:
    found = read_map(put(tmp_path / "a.npy", (5 * RAMP - 2).astype(dtype)))
    assert found.dtype == dtype and np.array_equal(found, (5 * RAMP - 2).astype(dtype))


def test_integers_are_divided_by_their_largest(tmp_path: Path) -> None:
    assert read_map(put(tmp_path / "a.npy", np.array([[0, 51, 255]], np.uint8))).tolist() == [[0, 0.2, 1]]
    PIL.Image.fromarray(np.array([[0, 51, 255]], np.uint8)).save(tmp_path / "b.png")
    assert read_map(tmp_path / "b.png").tolist() == [[0, 0.2, 1]]
    PIL.Image.fromarray(np.array([[0, 13107, 65535]], np.uint16)).save(tmp_path / "c.png")
    assert read_map(tmp_path / "c.png").tolist() == [[0, 0.2, 1]]


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("unpickled",)


def _bad_files(folder: Path) -> dict[str, Path]:
    put(folder / "three.npy", np.zeros((1, 4, 4), np.float32))
    put(folder / "empty.npy", np.zeros((0, 4), np.float32))
    put(folder / "long.npy", np.zeros((4, 4), np.int64))
    put(folder / "complex.npy", np.zeros((4, 4), np.complex64))
    put(folder / "nan.npy", np.array([[0, np.nan]]))
    put(folder / "infinite.npy", np.array([[0, np.inf]]))
    np.save(folder / "pickle.npy", np.array([[Bomb()]], dtype=object), allow_pickle=True)
    (folder / "nothing.npy").write_bytes(b"")
    (folder / "text.npy").write_text("not an array")
    whole = put(folder / "cut.npy", np.zeros((40, 40))).read_bytes()
    (folder / "cut.npy").write_bytes(whole[:500])
    with zipfile.ZipFile(folder / "archive.npy", "w") as archive:
        archive.writestr("x.npy", whole)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
    (folder / "huge.npy").write_bytes(head.getvalue())
    PIL.Image.new("RGB", (4, 4)).save(folder / "colour.png")
    PIL.Image.new("L", (4, 4)).save(folder / "jpeg.png", format="JPEG")
    (folder / "broken.png").write_bytes((folder / "colour.png").read_bytes()[:40])
    return {path.name: path for path in folder.iterdir()}


def test_every_bad_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = _bad_files(tmp_path / "maps")
    assert len(files) == 15
    for name, path in files.items():
        with pytest.raises(MapError, match=name) as caught:
            read_map(path)
        assert "\n" not in str(caught.value) and caught.value.expected
    assert not Path("unpickled").exists()


def test_files_are_found_by_the_photos_name(tmp_path: Path) -> None:
    samples = [sample(name) for name in ("val/x.jpg", "val/y.jpg", "z.png", "deep/er/w.jpeg", "one.jpg")]
    for number, name in enumerate(("val/x.jpg.npy", "val/y.npy", "z.png.npy", "w.npy")):
        put(tmp_path / name, np.full((2, 2), number / 10))
    PIL.Image.fromarray(np.full((2, 2), 102, np.uint8)).save(tmp_path / "one.png")
    stored = StoredMaps(tmp_path, samples)
    assert [round(float(values[0, 0]), 2) for values in stored(samples)] == [0, 0.1, 0.2, 0.3, 0.4]
    assert stored.problems == ()


def test_two_photos_never_share_a_stem(tmp_path: Path) -> None:
    put(tmp_path / "x.npy", RAMP)
    for names in (("a/x.jpg", "b/x.jpg"), ("x.jpg", "x.png")):
        with pytest.raises(DataError) as caught:
            StoredMaps(tmp_path, [sample(name) for name in names])
        assert len(caught.value.problems) == 2


def test_one_map_a_label_of_the_same_photo(tmp_path: Path) -> None:
    samples = [sample("a.jpg", 0), sample("a.jpg", 7)]
    save_map(tmp_path, samples[0], np.full((2, 2), 0.25), labelled=True)
    save_map(tmp_path, samples[1], np.full((2, 2), 0.5), labelled=True)
    assert [float(values[0, 0]) for values in StoredMaps(tmp_path, samples)(samples)] == [0.25, 0.5]


def test_missing_maps_stop_at_the_start_or_are_named(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg.npy", RAMP)
    put(tmp_path / "stray.npy", RAMP)
    (tmp_path / "bad.jpg.npy").write_bytes(b"x")
    samples = [sample("a.jpg"), sample("b.jpg"), sample("bad.jpg"), sample("c.jpg")]
    with pytest.raises(DataError) as caught:
        StoredMaps(tmp_path, samples)
    assert [problem.file.name for problem in caught.value.problems] == ["b.jpg", "c.jpg", "bad.jpg.npy"]
    stored = StoredMaps(tmp_path, samples, missing="zero")
    found = list(stored(samples))
    assert [isinstance(values, MapError) for values in found] == [False, True, True, True]
    assert [problem.file.name for problem in stored.problems] == ["stray.npy"]


def test_folder_and_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        StoredMaps(tmp_path / "none", [])
    with pytest.raises(ValueError, match="missing must be one of"):
        StoredMaps(tmp_path, [], missing="maybe")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["../out.jpg", "/etc/out.jpg", "a/../../out.jpg", "..\\out.jpg", "C:/out.jpg", ""])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "maps"
    folder.mkdir()
    with pytest.raises(ValueError, match="leads out"):
        save_map(folder, sample(name), RAMP)
    with pytest.raises(ValueError, match="leads out"):
        StoredMaps(folder, [sample(name)], missing="zero")
    assert [path.name for path in tmp_path.rglob("*")] == ["maps"]


def test_a_link_does_not_lead_out_either(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "maps" / "link").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="out of"):
        save_map(tmp_path / "maps", sample("link/a.jpg"), RAMP)
    assert not list((tmp_path / "other").iterdir())


def test_saved_maps_come_back(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((6, 6)).astype(np.float32)
    path = save_map(tmp_path / "new", sample("val/a.jpg"), values)
    assert path == tmp_path / "new" / "val" / "a.jpg.npy"
    assert np.array_equal(read_map(path), values)


@pytest.mark.parametrize(("kind", "mode"), [("cubic", "bicubic"), ("bilinear", "bilinear")])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 7), (14, 9), (50, 37), (33, 16)])
def test_resize_is_torchs(kind: str, mode: str, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(1).random(shape)
    expected = F.interpolate(torch.from_numpy(values)[None, None], (16, 16), mode=mode)[0, 0].clamp(0, 1)
    found = prepare(values, 16, resize=kind, normalize="none")  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["cubic", "bilinear"])
def test_resize_and_minmax_are_opencvs(kind: str) -> None:
    cv2 = pytest.importorskip("cv2")
    values = np.random.default_rng(2).normal(size=(14, 11))
    bigger = cv2.resize(values, (64, 64), interpolation=cv2.INTER_CUBIC if kind == "cubic" else cv2.INTER_LINEAR)
    expected = (bigger - bigger.min()) / (bigger.max() - bigger.min())
    np.testing.assert_allclose(prepare(values, 64, resize=kind), expected, atol=2e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(14, 14), (1, 9), (34, 27), (64, 10), (300, 400), (128, 65)])
def test_cubic_is_opencvs_to_the_last_digit(shape: tuple[int, int]) -> None:
    cv2 = pytest.importorskip("cv2")
    values = np.random.default_rng(3).random(shape)
    bigger = cv2.resize(values, (64, 64), interpolation=cv2.INTER_CUBIC)
    expected = (bigger - bigger.min()) / (bigger - bigger.min()).max()
    assert np.array_equal(prepare(values, 64), expected)


def test_normalisation() -> None:
    values = np.array([[-1.0, 0], [1, 3]])
    assert prepare(values, 2).tolist() == [[0, 0.25], [0.5, 1]]
    np.testing.assert_allclose(prepare(values, 2, normalize="max"), [[0, 0], [1 / 3, 1]], atol=1e-7)
    assert prepare(values / 4 + 0.25, 2, normalize="none").tolist() == [[0, 0.25], [0.5, 1]]
    assert not prepare(np.full((3, 3), 0.7), 5).any(), "a constant map becomes zeros"
    assert not prepare(np.full((3, 3), -2.0), 5, normalize="max").any()
    np.testing.assert_allclose(prepare(np.full((3, 3), 0.5), 5, normalize="none"), 0.5, atol=1e-15)


def test_views_that_are_not_contiguous() -> None:
    values = np.random.default_rng(3).random((20, 30))
    for view in (values[::2, ::3], values.T, values[::-1]):
        assert np.array_equal(prepare(view, 8), prepare(view.copy(), 8))


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        (np.zeros((2, 2, 2)), {}, "shape"),
        (np.zeros((0, 2)), {}, "shape"),
        (np.array([[np.nan, 1]]), {}, "NaN"),
        (np.array([[-np.inf, np.inf]]), {}, "infinite"),
        (np.array([[0, 1.5]]), {"normalize": "none"}, "1.5"),
        (np.array([[0, 1.0]]), {"resize": "none"}, "2x1"),
    ],
)
def test_what_cannot_be_scored_is_told(values: np.ndarray, options: dict, said: str) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(MapError, match=said):
        prepare(values, 4, **options)
