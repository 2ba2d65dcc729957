"""Photos of every odd and broken kind."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageFile
import pytest
import torch

from molt.data.images import PhotoError, find_photos, load_photo, photo_suffixes, read_photo

AVIF = PIL.features.check("avif")
RED, GREEN, BLUE = (220, 30, 20), (30, 200, 40), (20, 40, 210)


def quarters(width: int = 80, height: int = 40) -> PIL.Image.Image:
    """Red top left, green top right, blue below: every turn and flip of it differs."""
    image = PIL.Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    return image


def near(pixel: object, wanted: tuple[int, ...], tolerance: int = 12) -> bool:
    return max(abs(int(a) - b) for a, b in zip(pixel, wanted, strict=True)) <= tolerance


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
@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tif", *(["avif"] if AVIF else [])])
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
    with PIL.Image.open(path) as opened:
        assert read_photo(opened, 64).size == (800, 400)
    again = load_photo(load_photo(path))
    assert is_quarters(again) and again.size == (800, 400), "turned once, not twice"
    wide = load_photo(path).resize((160, 40), PIL.Image.Resampling.BICUBIC)
    pixels = read_photo(path, (40, 160)).pixels * 255
    assert (pixels - torch.from_numpy(np.array(wide)).permute(2, 0, 1)).abs().mean() < 1
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
        return resize(self, *args, **options)

    monkeypatch.setattr(PIL.Image.Image, "resize", spy)
    photo = read_photo(path, 100)
    assert decoded == [(200, 100)] and photo.size == (1600, 800)
    direct = torch.from_numpy(np.asarray(resize(load_photo(path), (100, 100), PIL.Image.Resampling.BICUBIC)).copy())
    assert (photo.pixels - direct.permute(2, 0, 1) / 255).abs().mean() < 0.01


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (700, 1500)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_is_never_decoded_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], orientation: int
) -> None:
    path, exif = tmp_path / "big.jpg", PIL.Image.Exif()
    exif[0x0112] = orientation
    image = quarters(1600, 800)
    for turn in STORED[orientation]:
        image = image.transpose(turn)
    image.save(path, quality=95, exif=exif)
    seen = []
    resize = PIL.Image.Image.resize

    def spy(self: PIL.Image.Image, *args: object, **options: object) -> PIL.Image.Image:
        seen.append(self.size)
        return resize(self, *args, **options)

    monkeypatch.setattr(PIL.Image.Image, "resize", spy)
    assert read_photo(path, size).size == (1600, 800)
    ((width, height),) = seen
    assert height >= size[0] and width >= size[1] and width == 2 * height


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
    assert np.asarray(load_photo(dark))[0, :, 0].tolist() == [0, 200], "what fits 8 bits is taken as 8 bits"
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


@pytest.mark.parametrize("size", [(1, 1), (20000, 20), (20, 20000), (3, 5000)])
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
    (np.zeros((4, 4, 2), np.uint8), r"\(H, W, 3\), got \(4, 4, 2\)"),
    (np.zeros((3, 8, 9), np.uint8), r"got \(3, 8, 9\); a torch tensor"),
    (np.zeros((1, 4, 4, 3), np.uint8), r"got \(1, 4, 4, 3\); take one photo"),
    (np.zeros((0, 4, 3), np.uint8), "no pixels"),
    (np.zeros((4, 0), np.uint8), r"no pixels: shape \(4, 0\)"),
    (np.array(0.5), r"got \(\)"),
    (np.zeros(5), r"got \(5,\)"),
    (np.zeros((4, 4, 5), np.uint8), r"got \(4, 4, 5\)$"),
    (np.zeros((4, 4, 3), complex), "got complex128"),
    (np.zeros((4, 4, 3), object), "got object"),
    (np.full((4, 4, 3), "x"), "got <U1"),
    (np.array([[0.5, np.nan], [0.5, 0.5]]), "NaN"),
    (np.array([[-np.inf, 0.5]], np.float16), "infinite"),
    (np.zeros((4, 4, 3), "M8[s]"), "got datetime64"),
    (np.full((4, 4, 3), -0.01), r"got -0\.01 to -0\.01 \(clip it\)"),
    (torch.full((3, 4, 4), float("nan")), "NaN"),
    (torch.full((3, 4, 4), -float("inf")), "infinite"),
    (torch.full((3, 4, 4), -2.0), "normalised"),
    (torch.zeros(8, 9, 3), r"got \(8, 9, 3\); a NumPy array"),
    (torch.zeros(2, 3, 8, 9), r"got \(2, 3, 8, 9\); take one photo"),
    (torch.zeros(3, 0, 4), "no pixels"),
    (torch.tensor(0.5), r"got \(\)"),
    (torch.zeros(4, 4, 4, dtype=torch.uint8), r"got \(4, 4, 4\)$"),
    (torch.zeros(3, 4, 4, dtype=torch.complex64), "got torch.complex64"),
    (torch.zeros(3, 4, 4).to_sparse(), "dense"),
    (torch.full((3, 4, 4), float("inf"), dtype=torch.bfloat16), "infinite"),
    (PIL.Image.new("RGB", (0, 5)), "no pixels"),
    (PIL.Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "NaN"),
]


@pytest.mark.parametrize(("source", "message"), BAD_ARRAYS)
def test_bad_values(source: object, message: str) -> None:
    for read in (load_photo, lambda x: read_photo(x, 16)):
        with pytest.raises(PhotoError, match=message) as caught:
            read(source)
        kind = {np.ndarray: "the array ", torch.Tensor: "the tensor "}.get(type(source), "the picture: ")
        assert str(caught.value).startswith(kind) and "\n" not in str(caught.value)


def test_wrong_type() -> None:
    for source in (None, 3, b"bytes", [1, 2], np.float32(1)):
        for read in (load_photo, lambda x: read_photo(x, 16)):
            with pytest.raises(TypeError, match=f"got {type(source).__name__}$"):
                read(source)


def test_wrong_size() -> None:
    for source in (quarters(), torch.zeros(3, 4, 4)):
        for size in (0, -3, (0, 5), (5, -1), (3,), (3, 4, 5)):
            with pytest.raises(ValueError, match="size must be one side or"):
                read_photo(source, size)
        for wrong in (2.5, None, "32", (2.5, 3)):
            with pytest.raises(TypeError, match="size must be an int or"):
                read_photo(source, wrong)
        assert read_photo(source, np.int64(6)).pixels.shape == (3, 6, 6)
        both = [torch.Size([6, 7]), (np.int64(6), np.int32(7)), np.array([6, 7]), torch.tensor([6, 7])]
        assert [read_photo(source, size).pixels.shape for size in both] == [(3, 6, 7)] * 4


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
        "empty.jpg": "the file is empty",
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
    monkeypatch.setenv("MOLT_MAX_PIXELS", "²")
    with pytest.raises(PhotoError, match="positive integer"):
        load_photo(path)
    # Above Pillow's own limit: the header passes, and the missing pixels are noticed.
    before = PIL.Image.MAX_IMAGE_PIXELS
    monkeypatch.setenv("MOLT_MAX_PIXELS", "1000")
    (tmp_path / "bomb.png").write_bytes(png_header(30000, 20000))
    with pytest.raises(PhotoError, match="1,000"):
        load_photo(tmp_path / "bomb.png")
    monkeypatch.setenv("MOLT_MAX_PIXELS", "600000000")
    monkeypatch.setattr(PIL.Image.Image, "load", lambda self: (_ for _ in ()).throw(OSError("pixels were asked for")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PhotoError, match="pixels were asked for"):
            load_photo(tmp_path / "bomb.png")
    assert before == PIL.Image.MAX_IMAGE_PIXELS


def test_suffixes() -> None:
    found = photo_suffixes()
    assert {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".mpo"} <= found
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in found)
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


def test_folder_oddities(tmp_path: Path) -> None:
    quarters().save(tmp_path / ".hidden.png")
    (tmp_path / ".cache").mkdir()
    quarters().save(tmp_path / ".cache" / "a.png")
    (tmp_path / ".png").write_text("a name, no suffix")
    (tmp_path / "script.py").write_text("")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.PnG"))
    quarters().save(odd)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    found, others = find_photos(tmp_path)
    assert found == sorted([tmp_path / "broken.jpg", odd])
    assert others == 5, "a hidden folder, two hidden files, a script, and a link to itself"
    assert load_photo(odd).size == (80, 40)
    with pytest.raises(PhotoError, match=r"broken\.jpg: no such file"):
        load_photo(tmp_path / "broken.jpg")
    (tmp_path / "empty").mkdir()
    assert find_photos(tmp_path / "empty") == ([], 0)
    (tmp_path / "root").symlink_to(tmp_path / ".cache")
    assert find_photos(tmp_path / "root") == ([tmp_path / "root" / "a.png"], 0), "the folder asked for may be a link"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            lambda p: PermissionError(13, "Permission denied", p),
            r"closed: the folder cannot be read \(Permission denied",
        ),
        (lambda p: PermissionError(), r": the folder cannot be read \(PermissionError\)$"),
    ],
)
def test_unreadable_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[str], OSError], message: str
) -> None:
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise error(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PhotoError, match=message) as caught:
        find_photos(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.png"
    quarters().save(path)

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for owner, name in ((PIL.Image, "open"), (Path, "stat")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(PhotoError) as caught:
                load_photo(path)
        assert str(caught.value) == f"{path}: cannot be read (Permission denied)"


def test_any_decoder_error_becomes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    quarters().save(path)
    for error, reason in (
        (OSError("two\nlines"), "two lines"),
        (MemoryError(), "MemoryError"),
        (SyntaxError("broken"), "broken"),
        (IndexError("two\r\nlines"), "two  lines"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(PIL.ImageFile.ImageFile, "load", lambda self, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(PhotoError) as caught:
                load_photo(path)
        assert str(caught.value) == f"{path}: cannot be decoded ({reason})" and caught.value.__cause__ is error


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_truncated_anywhere(tmp_path: Path) -> None:
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    for form in ("jpg", "png", "gif", "webp", "tif", "bmp", *(["avif"] if AVIF else [])):
        path = tmp_path / f"a.{form}"
        noise.save(path)
        whole = path.read_bytes()
        for part in (0.01, 0.1, 0.5, 0.9):  # of a TIFF Pillow also warns
            path.write_bytes(whole[: max(1, int(len(whole) * part))])
            for read in (load_photo, lambda x: read_photo(x, 16)):
                with pytest.raises(PhotoError) as caught:
                    read(path)
                assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


STUBS = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "h5": b"\x89HDF\r\n\x1a\n" + b"\0" * 100,
    "grib": b"GRIB\0\0\0\1" + b"\0" * 100,
    "bufr": b"BUFR\0\0\0\1" + b"\0" * 100,
    "wmf": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 100, 100, 72) + b"\0" * 6 + b"\1\0\t\0" + b"\0" * 60,
    "mpg": b"\x00\x00\x01\xb3\x14\x00\xf0" + b"\0" * 100,
    "pdf": b"%PDF-1.7\n" + b"\0" * 100,
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'></svg>\n",
    "im": b"Image type: L image\r\nName: x\r\nImage size (x*y): 4*4\r\n",
    "zero": b"\0" * 600,
}


@pytest.mark.parametrize("kind", STUBS)
@pytest.mark.parametrize("lie", ["", ".jpg", ".png"])
def test_what_is_no_photo_is_refused(tmp_path: Path, kind: str, lie: str) -> None:
    path = tmp_path / f"a.{kind}{lie}"
    path.write_bytes(STUBS[kind])
    with pytest.raises(PhotoError) as caught:
        load_photo(path)
    assert str(caught.value) == f"{path}: not a photo that Pillow can read"
    assert find_photos(tmp_path) == (([path], 0) if lie else ([], 1))


def huge(form: str, folder: Path) -> Path:
    """A small file whose header declares an enormous picture."""
    path = folder / f"huge.{form}"
    if form == "png":
        path.write_bytes(png_header(100_000, 100_000))
        return path
    quarters().save(path)
    data = bytearray(path.read_bytes())
    if form == "jpg":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">2H", 65500, 65500)
    elif form == "bmp":
        data[18:26] = struct.pack("<2i", 100_000, 100_000)
    else:
        at = data.index(b"\x2c\0\0\0\0") + 5  # the frame, larger than its canvas
        data[6:10] = data[at : at + 4] = struct.pack("<2H", 65535, 65535)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("form", ["png", "jpg", "gif", "bmp"])
def test_bombs_are_refused_before_decoding(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = huge(form, tmp_path)
    plain = tmp_path / "plain.png"
    quarters().save(plain)

    def explode(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", explode)
    for limit, shown in (("", "178,956,970"), ("3000", "3,000")):
        monkeypatch.setenv("MOLT_MAX_PIXELS", limit)
        for read in (load_photo, lambda x: read_photo(x, 16)):
            with pytest.raises(PhotoError, match=rf"huge\.{form}: .* limit of {shown} \("):
                read(path)
    with pytest.raises(PhotoError, match=r"plain\.png: 80x40 pixels are over the limit of 3,000"):
        load_photo(plain)


def test_compressed_text_bomb(tmp_path: Path) -> None:
    data = png_header(1, 1)
    text = b"a\0\0" + zlib.compress(b"a" * (1 << 24))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
    with pytest.raises(PhotoError, match=r"a\.png: cannot be decoded \(Decompressed data too large"):
        load_photo(tmp_path / "a.png")


def test_limit_and_pillows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    quarters().save(path)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PhotoError, match=r"a\.png: more pixels than the limit"):
        load_photo(path)
    monkeypatch.setenv("MOLT_MAX_PIXELS", "3200")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_photo(path).size == (80, 40)
        with ThreadPoolExecutor(8) as pool:
            assert {p.size for p in pool.map(load_photo, [path] * 64)} == {(80, 40)}
    assert PIL.Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(PhotoError):
        load_photo(tmp_path / "missing.png")
    (tmp_path / "bad.png").write_text("text")
    with pytest.raises(PhotoError, match="not a photo"):
        load_photo(tmp_path / "bad.png")
    assert PIL.Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    assert load_photo(path).size == (80, 40)
    monkeypatch.setenv("MOLT_MAX_PIXELS", "3199")
    with pytest.raises(PhotoError, match="3,199"):
        load_photo(path)


def test_limit_counts_the_whole_jpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    quarters(800, 400).save(path)
    monkeypatch.setenv("MOLT_MAX_PIXELS", "319999")
    with pytest.raises(PhotoError, match="800x400 pixels are over the limit of 319,999"):
        read_photo(path, 16)  # not what is decoded of it


def interlaced(image: PIL.Image.Image) -> bytes:
    """The picture as an Adam7 PNG, which Pillow cannot write."""
    pixels = np.asarray(image)
    rows = b""
    for y, x, dy, dx in (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ):
        for row in pixels[y::dy, x::dx]:
            rows += b"\0" + row.tobytes() if len(row) else b""
    plain = png_header(*image.size)
    head = plain[16:28] + b"\1"
    body = zlib.compress(rows)
    parts = [(b"IHDR", head), (b"IDAT", body), (b"IEND", b"")]
    return plain[:8] + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    )


def test_interlaced_progressive_and_wrong_suffix(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (37, 53, 3), np.uint8))
    (tmp_path / "adam7.png").write_bytes(interlaced(image))
    with PIL.Image.open(tmp_path / "adam7.png") as opened:
        assert opened.info["interlace"] == 1
    image.save(tmp_path / "png.jpg", "PNG")
    image.save(tmp_path / "gone", "PNG")
    image.save(tmp_path / "webp.png", "WEBP", lossless=True)
    image.save(tmp_path / "tiff.gif", "TIFF")
    for name in ("adam7.png", "png.jpg", "gone", "webp.png", "tiff.gif"):
        assert np.array_equal(np.asarray(load_photo(tmp_path / name)), np.asarray(image)), name
    quarters(160, 80).save(tmp_path / "progressive.jpg", progressive=True, quality=95)
    quarters(160, 80).save(tmp_path / "jpeg.png", "JPEG", quality=95)
    for name in ("progressive.jpg", "jpeg.png"):
        photo = read_photo(tmp_path / name, 16)
        assert is_quarters(load_photo(tmp_path / name)) and photo.size == (160, 80)
        assert near(photo.pixels[:, 2, 2] * 255, RED) and near(photo.pixels[:, 2, 13] * 255, GREEN)


@pytest.mark.parametrize("size", [(20000, 20), (20, 20000)])
def test_long_photos_keep_their_ends(tmp_path: Path, size: tuple[int, int]) -> None:
    for form in ("png", "jpg"):
        path = tmp_path / f"long.{form}"
        quarters(*size).save(path, quality=95)
        pixels = read_photo(path, (32, 48)).pixels * 255
        for at, colour in (((4, 4), RED), ((4, 43), GREEN), ((27, 4), BLUE), ((27, 43), BLUE)):
            assert near(pixels[:, at[0], at[1]], colour), (form, at)


def test_deep_grey_files(tmp_path: Path) -> None:
    def levels(name: str) -> list[int]:
        image = np.asarray(load_photo(tmp_path / name))
        assert (image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all()
        return image[0, :, 0].tolist()

    def save(name: str, values: list[float], kind: type, **options: object) -> None:
        PIL.Image.fromarray(np.array([values], kind)).save(tmp_path / name, **options)

    save("float.tif", [0, 0.25, 1], np.float32)
    save("float255.tif", [0, 77, 255], np.float32)
    save("negative.tif", [-2, 0, 2], np.float32)
    save("int.tif", [-100, 0, 100], np.int32)
    save("large.tif", [0, 500_000, 1_000_000], np.int32)
    save("flat.tif", [1e6, 1e6, 1e6], np.float32)
    assert levels("float.tif") == [0, 64, 255]
    assert levels("float255.tif") == [0, 77, 255]
    for name in ("negative.tif", "int.tif", "large.tif"):
        assert levels(name) in ([0, 127, 255], [0, 128, 255]), name
    assert levels("flat.tif") == [0, 0, 0]
    big_endian = PIL.Image.frombytes("I;16B", (3, 1), np.array([0, 25700, 65535], ">u2").tobytes())
    big_endian.save(tmp_path / "big.tif")
    assert levels("big.tif") == [0, 100, 255]
    dark = PIL.Image.frombytes("I;16B", (2, 1), np.array([0, 200], ">u2").tobytes())
    dark.save(tmp_path / "dark.tif")
    assert levels("dark.tif") == [0, 200], "by what it shows, not by its depth"
    for bad in (np.nan, np.inf):
        save("bad.tif", [0, bad, 1], np.float32)
        with pytest.raises(PhotoError, match=r"bad\.tif: cannot be decoded \(NaN or infinite"):
            load_photo(tmp_path / "bad.tif")
    # 16-bit grey whose value 1000 is transparent
    head, body = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0), zlib.compress(b"\0" + struct.pack(">2H", 1000, 25700))
    parts = [(b"IHDR", head), (b"tRNS", struct.pack(">H", 1000)), (b"IDAT", body), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    (tmp_path / "clear.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert levels("clear.png") == [255, 100]


def test_more_modes(tmp_path: Path) -> None:
    for form, options in (
        ("webp", {"lossless": True}),
        ("avif", {"quality": 95}),
        ("jp2", {}),
        ("bmp", {}),
        ("tif", {}),
    ):
        if form == "avif" and not AVIF:
            continue
        path = tmp_path / f"a.{form}"
        quarters().save(path, **options)
        assert is_quarters(load_photo(path)) and read_photo(path, 8).size == (80, 40), form
    clear = quarters().convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 20, 80, 40))
    for form in ("webp", "tif", *(["avif"] if AVIF else [])):
        clear.save(tmp_path / f"clear.{form}", quality=95)
        image = load_photo(tmp_path / f"clear.{form}")
        assert near(image.getpixel((60, 35)), (255,) * 3, 2) and near(image.getpixel((5, 5)), RED, 20), form
    clear.save(tmp_path / "clear.gif")
    assert load_photo(tmp_path / "clear.gif").getpixel((60, 35)) == (255, 255, 255)
    # Half transparent black on white, in a palette whose every entry has its own alpha.
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, *RED])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "half.png", transparency=bytes([128, 255]))
    image = load_photo(tmp_path / "half.png")
    assert image.getpixel((0, 0)) == (127, 127, 127) and image.getpixel((1, 0)) == RED
    bits = PIL.Image.fromarray(np.array([[True, False, True]]))
    assert bits.mode == "1"
    for form in ("png", "tif", "bmp"):
        bits.save(tmp_path / f"bits.{form}")
        assert np.asarray(load_photo(tmp_path / f"bits.{form}"))[0, :, 1].tolist() == [255, 0, 255], form
    for mode in ("CMYK", "YCbCr", "HSV", "LAB", "RGBX"):
        assert load_photo(PIL.Image.new(mode, (3, 2))).mode == "RGB", mode


def test_small_jpegs_and_all_lossless_files_agree_exactly(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (41, 57, 3), np.uint8))
    for name, options in (("a.png", {}), ("a.bmp", {}), ("a.tif", {}), ("a.webp", {"lossless": True}), ("a.jpg", {})):
        path = tmp_path / name
        image.save(path, **options)
        for size in ((41, 57), 32, (80, 70)):
            wanted = read_photo(path, size)
            with PIL.Image.open(path) as opened:
                array = np.asarray(opened)
                for source in (str(path), opened, array, array / 255, array.astype(np.uint16) * 257):
                    photo = read_photo(source, size)
                    assert torch.equal(photo.pixels, wanted.pixels) and photo.size == (57, 41), (name, size)
                    assert photo.source is source
            assert wanted.pixels.min() >= 0 and wanted.pixels.max() <= 1 and wanted.pixels.dtype == torch.float32
    assert torch.equal(read_photo(image, (41, 57)).pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)


def test_every_source_is_antialiased(tmp_path: Path) -> None:
    board = np.indices((512, 512)).sum(0) % 2 * np.uint8(255)
    board = board.astype(np.uint8)
    image = PIL.Image.fromarray(np.stack([board] * 3, 2))
    sources: list[object] = [image, np.asarray(image), board, np.asarray(image) / 255, board.astype(bool)]
    sources += [board.astype(np.uint16) * 257, PIL.Image.fromarray(board), image.convert("1"), image.convert("P")]
    sources += [image.convert("RGBA"), torch.from_numpy(np.array(image)).permute(2, 0, 1)]
    sources += [torch.from_numpy(np.array(image)).permute(2, 0, 1).half() / 255]
    for name, options in (("a.png", {}), ("a.jpg", {"quality": 95}), ("a.webp", {"lossless": True}), ("a.tif", {})):
        image.save(tmp_path / name, **options)
        sources.append(tmp_path / name)
    for number, source in enumerate(sources):
        for side in (32, 37):  # at 32 plain bilinear happens to be grey too
            photo = read_photo(source, side)
            assert photo.size == (512, 512) and photo.pixels.shape == (3, side, side)
            assert (photo.pixels - 0.5).abs().max() < 0.03, (number, side)


def test_arrays_of_every_layout_are_left_alone() -> None:
    image = quarters()
    array = np.array(image)
    wide = np.zeros((80, 160, 3), np.uint8)
    wide[::2, ::2] = array
    frozen = array.copy()
    frozen.flags.writeable = False
    layouts = {
        "sliced": wide[::2, ::2],
        "transposed": np.ascontiguousarray(array.transpose(1, 0, 2)).transpose(1, 0, 2),
        "channels first": np.ascontiguousarray(array.transpose(2, 0, 1)).transpose(1, 2, 0),
        "BGR seen as RGB": np.ascontiguousarray(array[..., ::-1])[..., ::-1],
        "Fortran": np.asfortranarray(array),
        "read-only": frozen,
        "big-endian": (array / 255).astype(">f4"),
        "half": (array / 255).astype(np.float16),
        "opaque": np.dstack([array, np.full((40, 80), 255, np.uint8)]),
        "uint16": array.astype(np.uint16) * 257,
    }
    for name, source in layouts.items():
        before, strides = source.copy(), source.strides
        assert np.array_equal(np.asarray(load_photo(source)), array), name
        read_photo(source, 20).pixels.zero_()
        read_photo(source, (40, 80)).pixels.zero_()
        assert np.array_equal(source, before) and source.strides == strides, name
    grey = np.array([[0, 100, 255]], np.uint8)
    for source in (grey, grey / 255, grey.astype(np.uint16) * 257):
        assert np.asarray(load_photo(source))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]
    half = np.zeros((1, 1, 4), np.float32)
    half[..., 3] = 0.5
    assert near(load_photo(half).getpixel((0, 0)), (127,) * 3, 1)


def test_pictures_are_left_alone() -> None:
    image = quarters().convert("RGBA")
    image.info["exif"] = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    before, info = image.copy(), dict(image.info)
    loaded = load_photo(image)
    assert loaded.size == (40, 80) and loaded.info == {}
    loaded.paste((0, 0, 0), (0, 0, 40, 80))
    assert image.tobytes() == before.tobytes() and image.info == info and image.size == (80, 40)
    rgb = quarters()
    load_photo(rgb).paste((0, 0, 0), (0, 0, 80, 40))
    assert is_quarters(rgb)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_every_layout_are_left_alone(dtype: torch.dtype) -> None:
    plain = torch.from_numpy(np.array(quarters())).permute(2, 0, 1)
    tensor = plain.clone() if dtype == torch.uint8 else (plain / 255).to(dtype)
    wide = torch.zeros(3, 80, 160, dtype=dtype)
    wide[:, ::2, ::2] = tensor
    tolerance = {torch.bfloat16: 0.5, torch.float16: 0.1}.get(dtype, 1e-4)
    grad = [tensor.clone().requires_grad_()] if dtype.is_floating_point else []
    for source in (tensor, tensor.contiguous(), wide[:, ::2, ::2], *grad):
        before = source.detach().clone()
        same, small = read_photo(source, (40, 80)), read_photo(source, (20, 40))
        for photo in (same, small):
            assert photo.pixels.dtype == torch.float32 and not photo.pixels.requires_grad and photo.size == (80, 40)
        assert (same.pixels * 255 - plain).abs().max() <= tolerance
        assert near(small.pixels[:, 4, 4] * 255, RED, 2) and near(small.pixels[:, 4, 36] * 255, GREEN, 2)
        assert near(small.pixels[:, 15, 20] * 255, BLUE, 2)
        assert is_quarters(load_photo(source))
        same.pixels.zero_()
        assert torch.equal(source.detach(), before), "the result is no view of the source"
    flat = torch.tensor([0.2, 0.4, 0.6]).to(dtype).view(3, 1, 1).expand(3, 8, 8) if dtype != torch.uint8 else None
    if flat is not None:
        read_photo(flat, 8).pixels.zero_()
        assert flat[1, 0, 0] == torch.tensor(0.4).to(dtype)


def test_threads_and_open_files(tmp_path: Path) -> None:
    paths = []
    for number in range(8):
        path = tmp_path / f"{number}.{('jpg', 'png', 'webp', 'tif')[number % 4]}"
        PIL.Image.fromarray(np.random.default_rng(number).integers(0, 255, (90, 70, 3), np.uint8)).save(path)
        paths.append(path)
    (tmp_path / "bad.png").write_bytes(paths[1].read_bytes()[:200])
    wanted = [read_photo(path, 24).pixels for path in paths]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda path: read_photo(path, 24).pixels, paths * 8))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted * 8, strict=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_photo(paths[0])
        with pytest.raises(PhotoError):
            load_photo(tmp_path / "bad.png")
    assert not [w for w in caught if issubclass(w.category, ResourceWarning)], "files are closed"
    for path in paths:
        path.unlink()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_stay_on_their_device() -> None:
    tensor = torch.rand(3, 40, 80)
    photo = read_photo(tensor.cuda(), 16)
    assert photo.pixels.is_cuda and (photo.pixels.cpu() - read_photo(tensor, 16).pixels).abs().max() < 1e-5
    assert load_photo(tensor.cuda()).tobytes() == load_photo(tensor).tobytes()


def test_resized_tensors_stay_in_range() -> None:
    assert read_photo(torch.ones(3, 397, 397), 224).pixels.max() == 1, "rounding may go just above"
