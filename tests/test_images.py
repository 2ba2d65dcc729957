"""Photos of every odd and broken kind."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.features
import PIL.Image
import pytest
import torch

from molt.data.images import PhotoError, find_photos, load_photo, photo_suffixes, read_photo

RED, GREEN, BLUE = (220, 30, 20), (30, 200, 40), (20, 40, 210)


def quarters(width: int = 80, height: int = 40) -> PIL.Image.Image:
    """Red top left, green top right, blue below: every turn and flip of it differs."""
    image = PIL.Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    return image


def near(pixel: object, wanted: tuple[int, ...], tolerance: int = 12) -> bool:
    return max(abs(int(a) - b) for a, b in zip(pixel, wanted, strict=True)) <= tolerance  # type: ignore[call-overload]


def is_quarters(image: PIL.Image.Image) -> bool:
    w, h = image.size
    corners = [(w // 8, h // 8), (w - 1 - w // 8, h // 8), (w // 8, h - 1 - h // 8), (w - 1 - w // 8, h - 1 - h // 8)]
    return all(near(image.getpixel(at), c) for at, c in zip(corners, (RED, GREEN, BLUE, BLUE), strict=True))


def test_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    quarters().save(path)
    full, photo = load_photo(path), read_photo(str(path), (20, 30))
    assert full.mode == "RGB" and full.size == (80, 40) and is_quarters(full)
    assert photo.pixels.shape == (3, 20, 30) and photo.pixels.dtype == torch.float32
    assert photo.size == (80, 40) and photo.source == str(path)
    assert near(photo.pixels[:, 2, 2] * 255, RED) and near(photo.pixels[:, 18, 28] * 255, BLUE)


# What must be done to an upright picture so that the mark brings it back.
STORED = {
    1: [],
    2: [PIL.Image.Transpose.FLIP_LEFT_RIGHT],
    3: [PIL.Image.Transpose.ROTATE_180],
    4: [PIL.Image.Transpose.FLIP_TOP_BOTTOM],
    5: [PIL.Image.Transpose.TRANSPOSE],
    6: [PIL.Image.Transpose.ROTATE_90],
    7: [PIL.Image.Transpose.TRANSVERSE],
    8: [PIL.Image.Transpose.ROTATE_270],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, form: str) -> None:
    image = quarters(800, 400)
    for turn in STORED[orientation]:
        image = image.transpose(turn)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{form}"
    image.save(path, exif=exif, quality=95)
    assert is_quarters(load_photo(path)) and load_photo(path).size == (800, 400)
    with PIL.Image.open(path) as opened:
        assert is_quarters(load_photo(opened))
    small = read_photo(path, 64)
    assert small.size == (800, 400), "of the upright original, whatever was decoded"
    assert near(small.pixels[:, 8, 8] * 255, RED) and near(small.pixels[:, 8, 56] * 255, GREEN)
    assert near(small.pixels[:, 56, 8] * 255, BLUE)


def test_a_jpeg_is_decoded_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.jpg"
    quarters(1600, 800).save(path, quality=95)
    decoded = []
    resize = PIL.Image.Image.resize

    def spy(self: PIL.Image.Image, *args: object, **options: object) -> PIL.Image.Image:
        decoded.append(self.size)
        return resize(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(PIL.Image.Image, "resize", spy)
    photo = read_photo(path, 100)
    assert decoded == [(200, 100)] and photo.size == (1600, 800)
    direct = torch.from_numpy(np.asarray(resize(load_photo(path), (100, 100), PIL.Image.Resampling.BICUBIC)).copy())
    assert (photo.pixels - direct.permute(2, 0, 1) / 255).abs().mean() < 0.01


def test_broken_exif_counts_as_upright(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    quarters().save(path, exif=b"Exif\x00\x00garbage that is no TIFF header", quality=95)
    assert is_quarters(load_photo(path)) and read_photo(path, 16).size == (80, 40)
    exif = PIL.Image.Exif()
    exif[0x0112] = 99
    quarters().save(path, exif=exif, quality=95)
    assert is_quarters(load_photo(path))


def test_transparency_shows_white(tmp_path: Path) -> None:
    rgba = quarters().convert("RGBA")
    rgba.paste((0, 0, 0, 0), (0, 20, 80, 40))
    la = PIL.Image.new("LA", (80, 40), (100, 255))
    la.paste((0, 0), (0, 20, 80, 40))
    palette = PIL.Image.new("P", (80, 40), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.paste(0, (0, 20, 80, 40))
    rgba.save(tmp_path / "rgba.png")
    la.save(tmp_path / "la.png")
    palette.save(tmp_path / "p.png", transparency=0)
    PIL.Image.new("RGB", (80, 40), (1, 2, 3)).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    for name, top in (("rgba", RED), ("la", (100,) * 3), ("p", RED), ("rgb", (255,) * 3)):
        image = load_photo(tmp_path / f"{name}.png")
        assert image.mode == "RGB" and image.getpixel((5, 35)) == (255, 255, 255), name
        assert near(image.getpixel((5, 5)), top, 0), name
    half = PIL.Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert near(load_photo(half).getpixel((0, 0)), (127,) * 3, 1)
    assert load_photo(half.convert("RGBa")).getpixel((0, 0)) == load_photo(half).getpixel((0, 0))


def test_deep_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.array([[0, 257, 25700, 65535]], np.uint16)
    PIL.Image.fromarray(ramp).save(tmp_path / "16.png")
    PIL.Image.fromarray(ramp).save(tmp_path / "16.tif")
    PIL.Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "32.tif")
    for name in ("16.png", "16.tif", "32.tif"):
        assert np.asarray(load_photo(tmp_path / name))[0, :, 0].tolist() == [0, 1, 100, 255], name
    assert np.asarray(load_photo(ramp))[0, :, 0].tolist() == [0, 1, 100, 255]
    assert np.asarray(load_photo(ramp.astype(">u2")))[0, :, 0].tolist() == [0, 1, 100, 255]
    dark = PIL.Image.fromarray(np.array([[0, 200]], np.uint16))
    assert np.asarray(load_photo(dark))[0, :, 0].tolist() == [0, 1], "dark 16-bit grey is no 8-bit grey"
    for values in ([0.0, 0.5, 1.0], [0.0, 128.0, 255.0], [-1000.0, 3.0, 1000.0]):
        grey = PIL.Image.fromarray(np.array([values], np.float32))
        assert grey.mode == "F" and np.asarray(load_photo(grey))[0, :, 0].tolist() == [0, 128, 255], values


def test_other_modes(tmp_path: Path) -> None:
    quarters().convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert near(load_photo(tmp_path / "cmyk.jpg").getpixel((5, 5)), RED, 25)
    assert near(read_photo(tmp_path / "cmyk.jpg", 16).pixels[:, 2, 2] * 255, RED, 25)
    PIL.Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    assert load_photo(tmp_path / "bit.png").getpixel((3, 3)) == (255, 255, 255)
    PIL.Image.new("L", (8, 8), 77).save(tmp_path / "grey.jpg")
    assert near(load_photo(tmp_path / "grey.jpg").getpixel((3, 3)), (77,) * 3, 2)
    first, second = quarters(), PIL.Image.new("RGB", (80, 40), GREEN)
    for form in ("gif", "webp", "png"):
        first.save(tmp_path / f"moving.{form}", save_all=True, append_images=[second], duration=50)
        with PIL.Image.open(tmp_path / f"moving.{form}") as opened:
            assert opened.n_frames == 2
        assert is_quarters(load_photo(tmp_path / f"moving.{form}")), form


@pytest.mark.parametrize("size", [(1, 1), (20000, 20), (3, 5000)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    for form in ("png", "jpg"):
        path = tmp_path / f"odd.{form}"
        PIL.Image.new("RGB", size, RED).save(path)
        photo = read_photo(path, (32, 48))
        assert photo.size == size and photo.pixels.shape == (3, 32, 48)
        assert near(photo.pixels[:, 16, 24] * 255, RED)


def test_arrays_and_tensors_agree_with_the_picture() -> None:
    image = quarters()
    array = np.asarray(image)
    for same in (array, array / np.float32(255), (array / 255), array[::-1][::-1]):
        assert np.array_equal(np.asarray(load_photo(same)), array)
        assert torch.equal(read_photo(same, 20).pixels, read_photo(image, 20).pixels)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for same in (tensor, tensor / 255, (tensor / 255).double(), (tensor / 255).requires_grad_()):
        assert np.array_equal(np.asarray(load_photo(same)), array)
        photo = read_photo(same, (20, 40))
        assert photo.size == (80, 40) and photo.pixels.dtype == torch.float32 and not photo.pixels.requires_grad
        assert near(photo.pixels[:, 2, 2] * 255, RED) and near(photo.pixels[:, 2, 38] * 255, GREEN)
    assert load_photo(array[..., 0]).getpixel((5, 5)) == (RED[0],) * 3
    assert load_photo(np.full((4, 4, 4), 0.0)).getpixel((0, 0)) == (255, 255, 255), "transparent"
    assert load_photo(np.ones((4, 4), bool)).getpixel((0, 0)) == (255, 255, 255)


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    for source in (stripes, torch.from_numpy(stripes).permute(2, 0, 1)):
        pixels = read_photo(source, 50).pixels
        assert (pixels - 0.5).abs().max() < 0.05


BAD_ARRAYS = [
    (np.full((4, 4, 3), np.nan, np.float32), "NaN"),
    (np.full((4, 4, 3), np.inf), "infinite"),
    (np.full((4, 4, 3), -1.5), r"-1\.5.*normalised"),
    (np.full((4, 4, 3), 200.0), r"200.*0\.\.255"),
    (np.zeros((4, 4, 2), np.uint8), r"\(H, W, 3\), got \(4, 4, 2\)"),
    (np.zeros((3, 8, 9), np.uint8), r"got \(3, 8, 9\); a torch tensor"),
    (np.zeros((1, 4, 4, 3), np.uint8), r"got \(1, 4, 4, 3\)"),
    (np.zeros((0, 4, 3), np.uint8), "no pixels"),
    (np.zeros((4, 4, 3), np.int64), "int64"),
    (torch.full((3, 4, 4), float("nan")), "NaN"),
    (torch.full((3, 4, 4), -float("inf")), "infinite"),
    (torch.full((3, 4, 4), -2.0), "normalised"),
    (torch.full((3, 4, 4), 255.0), r"0\.\.255"),
    (torch.zeros(8, 9, 3), r"got \(8, 9, 3\); a NumPy array"),
    (torch.zeros(2, 3, 8, 9), r"got \(2, 3, 8, 9\); take one photo"),
    (torch.zeros(3, 0, 4), "no pixels"),
    (torch.zeros(3, 4, 4, dtype=torch.int64), "int64"),
    (PIL.Image.new("RGB", (0, 5)), "no pixels"),
    (PIL.Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "NaN"),
]


@pytest.mark.parametrize(("source", "message"), BAD_ARRAYS)
def test_bad_values(source: object, message: str) -> None:
    for read in (load_photo, lambda x: read_photo(x, 16)):
        with pytest.raises(PhotoError, match=message) as caught:
            read(source)
        assert "\n" not in str(caught.value)


def test_wrong_type() -> None:
    for source in (None, 3, b"bytes", [1, 2]):
        with pytest.raises(TypeError, match=f"got {type(source).__name__}"):
            read_photo(source, 16)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def bad_files(folder: Path) -> dict[str, str]:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    PIL.Image.fromarray(noise).save(folder / "whole.jpg")
    PIL.Image.fromarray(noise).save(folder / "whole.png")
    for form in ("jpg", "png"):
        data = (folder / f"whole.{form}").read_bytes()
        (folder / f"truncated.{form}").write_bytes(data[: len(data) // 2])
        (folder / f"head.{form}").write_bytes(data[:10])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no photo at all")
    (folder / "folder.jpg").mkdir()
    (folder / "bomb.png").write_bytes(png_header(20000, 20000))
    (folder / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    (folder / "grid.grib").write_bytes(b"GRIB" + b"\0" * 3 + b"\1" + b"\0" * 60)
    (folder / "film.mpg").write_bytes(b"\x00\x00\x01\xb3\x14\x00\xf0" + b"\0" * 60)
    os.mkfifo(folder / "pipe.jpg")
    return {
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "head.jpg": "not a photo|cannot be decoded",
        "head.png": "not a photo|cannot be decoded",
        "empty.jpg": "empty",
        "text.jpg": "not a photo that Pillow can read",
        "folder.jpg": "is a folder",
        "bomb.png": "178,956,970",
        "script.eps": "not a photo",
        "grid.grib": "not a photo",
        "film.mpg": "not a photo",
        "missing.jpg": "no such file",
        "pipe.jpg": "not a regular file",
        "whole.png/below.jpg": "no such file",
        "n" * 300 + ".jpg": "cannot be read",
        "nul\0.jpg": "no such file",
    }


def test_bad_files_give_one_line_that_names_them(tmp_path: Path) -> None:
    for name, message in bad_files(tmp_path).items():
        for read in (load_photo, lambda x: read_photo(x, 16)):
            with pytest.raises(PhotoError, match=message) as caught:
                read(tmp_path / name)
            assert Path(name.replace("\0", " ")).name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(PhotoError) as caught:
        load_photo(tmp_path / "two\nlines.jpg")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    quarters().save(path)
    path.chmod(0)
    with pytest.raises(PhotoError, match=r"secret\.png: cannot be read \(Permission denied\)"):
        load_photo(path)


def test_pixel_limit_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    quarters().save(path)
    monkeypatch.setenv("MOLT_MAX_PIXELS", "3199")
    with pytest.raises(PhotoError, match=r"a\.png: 80x40 pixels are over the limit of 3,199"):
        load_photo(path)
    monkeypatch.setenv("MOLT_MAX_PIXELS", "3200")
    assert load_photo(path).size == (80, 40)
    monkeypatch.setenv("MOLT_MAX_PIXELS", "many")
    with pytest.raises(PhotoError, match="positive integer, got 'many'"):
        load_photo(path)
    # Above Pillow's own limit: the header passes, and the missing pixels are noticed.
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", PIL.Image.MAX_IMAGE_PIXELS)
    monkeypatch.setenv("MOLT_MAX_PIXELS", "1000")
    (tmp_path / "bomb.png").write_bytes(png_header(30000, 20000))
    with pytest.raises(PhotoError, match="1,000"):
        load_photo(tmp_path / "bomb.png")
    monkeypatch.setenv("MOLT_MAX_PIXELS", "600000000")
    monkeypatch.setattr(PIL.Image.Image, "load", lambda self: (_ for _ in ()).throw(OSError("pixels were asked for")))
    with pytest.raises(PhotoError, match="pixels were asked for"):
        load_photo(tmp_path / "bomb.png")


def test_suffixes() -> None:
    found = photo_suffixes()
    assert {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".mpo"} <= found
    assert (".webp" in found) == PIL.features.check("webp") and (".avif" in found) == PIL.features.check("avif")
    assert not {".eps", ".ps", ".pdf", ".wmf", ".emf", ".h5", ".hdf", ".grib", ".bufr", ".mpg", ".mpeg"} & found


def test_folder_listing(tmp_path: Path) -> None:
    below, elsewhere = tmp_path / "photos" / "b" / "c", tmp_path / "elsewhere"
    below.mkdir(parents=True)
    elsewhere.mkdir()
    root = tmp_path / "photos"
    wanted = [root / "a.JPG", root / "z.webp", root / "b" / "x.tif", below / "y.png"]
    if PIL.features.check("avif"):
        wanted.append(root / "m.avif")
    for path in [*wanted, elsewhere / "linked.png"]:
        quarters().save(path)
    (root / "notes.txt").write_text("")
    (below / "figure.eps").write_text("")
    (below / "noend").write_text("")
    (root / "link").symlink_to(elsewhere, target_is_directory=True)
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "linked.png").symlink_to(elsewhere / "linked.png")
    found, others = find_photos(root)
    assert found == sorted([*wanted, root / "linked.png"]) and others == 3
    assert all(load_photo(path).size == (80, 40) for path in found)
    assert find_photos(str(root))[0] == found
    for missing in (tmp_path / "nowhere", root / "z.webp"):
        with pytest.raises(PhotoError, match=rf"{missing.name}: the folder cannot be read"):
            find_photos(missing)
