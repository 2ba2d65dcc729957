"""Pixels of every dtype and shape, in files and in memory, come out by one rule."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from molt.data.images import PhotoError, load_photo, read_photo

GREY = np.random.default_rng(0).integers(3, 233, (9, 13)).astype(np.uint8)
COLOURS = np.random.default_rng(1).integers(3, 233, (9, 13, 3)).astype(np.uint8)


def png16(values: np.ndarray, kind: int, transparent: tuple[int, ...] = ()) -> bytes:
    """A 16-bit PNG of colour type ``kind``, its rows filtered by what lies above."""
    rows = values.astype(">u2").reshape(len(values), -1).view(np.uint8)
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    body = b"".join(b"\2" + row.tobytes() for row in rows - above)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    if transparent:
        parts.insert(1, (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(
    values: np.ndarray, photometric: int, order: str = "<", *, packed: bool = False, turn: int = 1, planes: int = 1
) -> bytes:
    """A TIFF of one strip, deflated where ``packed``; photometric 0 is a negative, 2 RGB; 2 planes: bands apart."""
    channels = values.shape[2] if values.ndim == 3 else 1
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if packed else data
    data += b"\0" * (len(data) % 2)
    bits = struct.pack(f"{order}{channels}H", *[values.dtype.itemsize * 8] * channels)
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = [(256, 4, values.shape[1]), (257, 4, len(values)), (258, 3, values.dtype.itemsize * 8), (259, 3, 1)]
    tags[3] = (259, 3, 8 if packed else 1)
    tags += [(262, 3, photometric), (273, 4, 8), (274, 3, turn), (277, 3, channels), (278, 4, len(values))]
    tags += [(279, 4, len(data)), (284, 3, planes), *([(338, 3, 2)] if channels == 4 else []), (339, 3, kind)]
    table = b""
    for number, width, value in tags:
        if number == 258 and channels > 2:
            table += struct.pack(f"{order}HHII", number, 3, channels, 8 + len(data))
        else:
            form = f"{order}HHIHH" if width == 3 else f"{order}HHII"
            table += struct.pack(form, number, width, 1, value, *([0] if width == 3 else []))
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data) + len(bits))
    return start + data + bits + struct.pack(f"{order}H", len(tags)) + table + b"\0" * 4


def levels(source: Any) -> np.ndarray:
    """What load_photo shows; read_photo must show the same."""
    shown = np.asarray(load_photo(source))
    read = read_photo(source, shown.shape[:2]).pixels.permute(1, 2, 0) * 255
    assert np.abs(read.numpy() - shown).max() <= 0.501
    return shown.astype(int)


def off(source: Any, wanted: np.ndarray) -> int:
    """Largest difference in levels."""
    wanted = wanted if wanted.ndim == 3 else wanted[..., None]
    return int(np.abs(levels(source) - wanted).max())


@pytest.mark.parametrize("bits", range(8, 17))
@pytest.mark.parametrize("photo", [GREY, COLOURS], ids=["grey", "colour"])
def test_deep_photos_look_as_those_of_8_bits(tmp_path: Path, bits: int, photo: np.ndarray) -> None:
    """The same photo with the bits of a camera, in each dtype that holds them, in files, arrays and tensors."""
    deep = np.round(photo * ((2**bits - 1) / 255)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(png16(deep, 0 if deep.ndim == 2 else 2))
    for order in "<>":
        for packed in (False, True):
            name = f"{'le' if order == '<' else 'be'}{packed}.tif"
            (tmp_path / name).write_bytes(tiff(deep, 1 if deep.ndim == 2 else 2, order, packed=packed))
    sources: list[Any] = list(tmp_path.iterdir())
    assert len(sources) == 5
    sources += [io.BytesIO((tmp_path / "a.png").read_bytes()), PIL.Image.open(tmp_path / "a.png")]
    sources += [deep.astype(kind) for kind in (np.uint16, ">u2", np.uint32, np.int32, np.int64, np.uint64)]
    sources += [deep.astype(kind) for kind in (np.float32, np.float64)]
    first = torch.from_numpy(deep) if deep.ndim == 2 else torch.from_numpy(deep).permute(2, 0, 1)
    sources += [first.to(kind) for kind in (torch.uint16, torch.int32, torch.int64, torch.float32, torch.float64)]
    if bits < 16:
        sources += [deep.astype(np.int16), first.to(torch.int16), first.half(), deep.astype(np.float16)]
    for source in sources:
        assert off(source, photo) <= 1, source


def test_twelve_of_sixteen_bits_are_not_black(tmp_path: Path) -> None:
    PIL.Image.fromarray(GREY.astype(np.uint16) * 16).save(tmp_path / "a.png")
    PIL.Image.fromarray(GREY.astype(np.uint16) * 16).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        assert off(tmp_path / name, GREY) <= 1


def test_what_fits_8_bits_or_one_is_never_stretched() -> None:
    low = np.array([[3, 100, 101]])
    for kind in (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int64):
        assert levels(low.astype(kind))[0, :, 0].tolist() == [3, 100, 101]
        assert off(torch.from_numpy(low.astype(kind)), low) == 0
    for kind in (np.float16, np.float32, np.float64, ">f4"):
        assert levels((low / 255).astype(kind))[0, :, 0].tolist() == [3, 100, 101]
    assert levels(torch.from_numpy(low / 255).bfloat16())[0, :, 0].tolist() == [3, 100, 101]
    for bits in (np.array([[True, False]]), torch.tensor([[True, False]])):
        assert levels(bits)[0, :, 0].tolist() == [255, 0]


STRETCHED = [
    np.array([[-1000, 1000, 3000]], np.int16),
    np.array([[0, 50_000, 100_000]], np.int32),
    np.array([[30_000, 30_100, 30_200]], np.uint16),  # a thermal camera's counts
    np.array([[0.0, 0.5, 1.0001]], np.float32) * np.float32(1.0),
    np.array([[290.0, 295.0, 300.0]], np.float32),
    np.array([[0, 1e9, 2e9]]),
]


@pytest.mark.parametrize("values", STRETCHED, ids=str)
def test_other_values_are_stretched(tmp_path: Path, values: np.ndarray) -> None:
    sources: list[Any] = [values, torch.from_numpy(values), values[..., None], torch.from_numpy(values)[None]]
    sources += [np.stack([values] * 3, -1)]
    if values.dtype.itemsize == 4 or values.dtype == np.uint16:
        PIL.Image.fromarray(values).save(tmp_path / "a.tif")
        sources += [tmp_path / "a.tif", PIL.Image.fromarray(values)]
    for source in sources:
        assert levels(source)[0, :, 1].tolist() in ([0, 127, 255], [0, 128, 255]), source


def test_channels_are_stretched_together_and_photos_apart() -> None:
    photo = np.array([[[-10, 0, 10], [0, 10, 20]]], np.int16)
    assert levels(photo).tolist() == [[[0, 85, 170], [85, 170, 255]]]
    batch = torch.from_numpy(np.stack([photo, photo * 2])).permute(0, 3, 1, 2)
    assert levels(batch[0]).tolist() == levels(batch[1]).tolist()


def test_one_value_has_no_range() -> None:
    for value, shown in ((65535, 255), (25700, 100), (-5, 0), (10**6, 0)):
        for source in (np.full((2, 3), value), torch.full((2, 3), value)):
            assert (levels(source) == shown).all(), value
    for value in (1.000001, 200.0):  # of floats above 1 nothing is known but that they are bright
        assert (levels(np.full((2, 3), value)) == 255).all() and (levels(torch.full((2, 3), value)) == 255).all()


@pytest.mark.parametrize("packed", [False, True])
def test_negatives_of_every_depth_are_turned(tmp_path: Path, packed: bool) -> None:
    wanted = 255 - GREY.astype(int)
    files = {
        "8": (GREY, "<"),
        "16": (GREY.astype(np.uint16) * 257, "<"),
        "float": (GREY.astype(np.float32) / 255, "<"),
        "float, big-endian": (GREY.astype(np.float32) / 255, ">"),
        "8, big-endian": (GREY, ">"),
    }
    for name, (values, order) in files.items():
        (tmp_path / "a.tif").write_bytes(tiff(values, 0, order, packed=packed))
        with PIL.Image.open(tmp_path / "a.tif") as opened:
            assert off(tmp_path / "a.tif", wanted) <= 1 and off(opened, wanted) <= 1, name
    for values in (GREY, GREY.astype(np.uint16) * 16):
        (tmp_path / "a.tif").write_bytes(tiff(values, 0, packed=packed, turn=6))
        assert off(tmp_path / "a.tif", np.rot90(wanted, -1)) <= 1, "turned as well"
    for mode, bits in (("1", 1), ("L", 4)):
        data = np.packbits(np.array([[1, 0, 1, 0, 0, 0, 0, 1]], np.uint8)).tobytes()
        plain = tiff(np.frombuffer(data, np.uint8)[None], 0)
        made = plain.replace(struct.pack("<HHIHH", 258, 3, 1, 8, 0), struct.pack("<HHIHH", 258, 3, 1, bits, 0))
        made = made.replace(struct.pack("<HHII", 256, 4, 1, 1), struct.pack("<HHII", 256, 4, 1, 8 // bits))
        (tmp_path / "b.tif").write_bytes(made)
        shown = {"1": [0, 255, 0, 255, 255, 255, 255, 0], "L": [255 - 170, 255 - 17]}[mode]
        assert levels(tmp_path / "b.tif")[0, :, 0].tolist() == shown


@pytest.mark.parametrize("order", "<>")
def test_big_endian_counts_and_floats(tmp_path: Path, order: str) -> None:
    for packed in (False, True):
        for values in (GREY.astype(np.int32) * 7000 - 9, GREY.astype(np.float32) * 3e4 - 1):
            wanted = (values.astype(float) - values.min()) / (values.max() - values.min()) * 255
            (tmp_path / "a.tif").write_bytes(tiff(values, 1, order, packed=packed))
            assert off(tmp_path / "a.tif", wanted.round()) <= 1


def test_deep_planes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(COLOURS * np.uint16(16), 2, planes=2))
    for read in (load_photo, lambda path: read_photo(path, 5)):
        with pytest.raises(PhotoError, match=r"a\.tif: .* more than 8 bits that lie in planes apart: store"):
            read(tmp_path / "a.tif")


def test_deep_transparency(tmp_path: Path) -> None:
    """The transparent value, however extreme, shows white and does not count for the range."""
    deep = GREY.astype(np.uint16) * 16
    deep[2, 3] = 65535
    (tmp_path / "grey.png").write_bytes(png16(deep, 0, (65535,)))
    colours = COLOURS.astype(np.uint16) * 16
    colours[2, 3] = (65535, 1, 2)
    (tmp_path / "colour.png").write_bytes(png16(colours, 2, (65535, 1, 2)))
    opaque = np.full((9, 13), 65535, np.uint16)
    opaque[2, 3] = 0
    (tmp_path / "la.png").write_bytes(png16(np.dstack([deep, opaque]), 4))
    (tmp_path / "rgba.png").write_bytes(png16(np.dstack([colours, opaque]), 6))
    (tmp_path / "rgba.tif").write_bytes(tiff(np.dstack([colours, opaque]), 2, packed=True))
    grey, colour = np.dstack([GREY] * 3), COLOURS.copy()
    grey[2, 3] = colour[2, 3] = 255
    for name in ("grey.png", "la.png", "colour.png", "rgba.png", "rgba.tif"):
        assert off(tmp_path / name, grey if name in ("grey.png", "la.png") else colour) <= 1, name
    assert off(np.dstack([colours, opaque]), colour) <= 1
    assert off(np.dstack([colours, opaque // 16]), colour) <= 1, "12 bits of opacity"


def test_an_opened_picture_stays_as_it_was(tmp_path: Path) -> None:
    for name, data in (("a.png", png16(COLOURS * np.uint16(16), 2)), ("a.tif", tiff(COLOURS * np.uint16(16), 2))):
        (tmp_path / name).write_bytes(data)
        with PIL.Image.open(tmp_path / name) as opened:
            assert load_photo(opened).tobytes() == load_photo(opened).tobytes()
            assert np.array_equal(np.asarray(opened), COLOURS // 16)


def test_one_channel_in_every_place() -> None:
    wanted = np.dstack([GREY] * 3)
    for array in (GREY, GREY[..., None], GREY[None]):
        for source in (array, torch.from_numpy(array), array / 255, torch.from_numpy(array / 255)):
            assert np.array_equal(levels(source), wanted), array.shape
            assert read_photo(source, 5).pixels.shape == (3, 5, 5) and read_photo(source, 5).size == (13, 9)
    read_photo(flat := torch.rand(1, 9, 13), (9, 13)).pixels.zero_()
    assert flat.any(), "the result is no view of the source"
    # Sides that may be channels: the last of an array, the first of a tensor.
    assert load_photo(np.zeros((1, 7, 3))).size == (7, 1) and load_photo(torch.zeros(1, 7, 3)).size == (3, 7)
    assert load_photo(np.zeros((3, 7, 3))).size == (7, 3) and load_photo(torch.zeros(3, 7, 3)).size == (3, 7)
    assert load_photo(np.zeros((1, 7, 1))).size == (7, 1) and load_photo(torch.zeros(1, 7, 1)).size == (1, 7)
    assert load_photo(np.zeros((3, 7, 1))).size == (7, 3) and load_photo(torch.zeros(3, 7, 1)).size == (1, 7)
    for shape in ((2, 7, 9), (5, 7, 9)):
        for source in (np.zeros(shape), torch.zeros(shape)):
            with pytest.raises(PhotoError, match=r"must have shape .* got \(., 7, 9\)$"):
                load_photo(source)


def test_file_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    PIL.Image.fromarray(COLOURS).save(path)
    memory = io.BytesIO(path.read_bytes())
    memory.seek(0, io.SEEK_END)
    with path.open("rb") as file:
        for source in (memory, file, memory):
            assert np.array_equal(levels(source), COLOURS) and not source.closed
    photo = read_photo(memory, 5)
    assert photo.size == (13, 9) and photo.source is memory
    with pytest.raises(PhotoError, match=r"a\.png: is closed"):
        load_photo(file)
    with path.open(encoding="latin-1") as text, pytest.raises(PhotoError, match=r"a\.png: .* open it with 'rb'"):
        load_photo(text)
    with (
        (tmp_path / "new.png").open("wb") as new,
        pytest.raises(PhotoError, match=r"new\.png: is not open for reading"),
    ):
        load_photo(new)
    for bad in (io.BytesIO(), io.BytesIO(b"text")):
        with pytest.raises(PhotoError, match="the file object: not a photo"):
            read_photo(bad, 5)
    with pytest.raises(PhotoError, match="the file object: .* open it with 'rb'"):
        load_photo(io.StringIO("text"))
    monkeypatch.setenv("MOLT_MAX_PIXELS", "100")
    with pytest.raises(PhotoError, match="the file object: 13x9 pixels are over"):
        load_photo(memory)


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from molt.data import find_photos, photo_size

    monkeypatch.setenv("HOME", str(tmp_path))
    PIL.Image.fromarray(COLOURS).save(tmp_path / "a.png")

    class Raw:
        def __fspath__(self) -> bytes:
            return b"~/a.png"

    for given in ("~/a.png", Path("~/a.png"), Raw()):
        assert np.array_equal(levels(given), COLOURS) and photo_size(given) == (13, 9)
        assert read_photo(given, 5).source is given
    assert find_photos("~") == find_photos(Path("~")) == ([tmp_path / "a.png"], 0)
    with pytest.raises(PhotoError, match="nobody_of_this_name/a.png: no such file"):
        load_photo("~nobody_of_this_name/a.png")


def test_openers_registered_later_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from molt.data import find_photos, formats, photo_suffixes

    class Odd(PIL.ImageFile.ImageFile):
        format = "ODD"

        def _open(self) -> None:
            self._mode, self._size = "L", (2, 1)
            self.tile = [PIL.ImageFile._Tile("raw", (0, 0, 2, 1), 4, ("L", 0, 1))]

    (tmp_path / "a.odd").write_bytes(b"ODD!\x07\x09")
    with pytest.raises(PhotoError, match="not a photo"):
        load_photo(tmp_path / "a.odd")
    assert find_photos(tmp_path) == ([], 1) and ".odd" not in photo_suffixes()
    for name in ("ID", "OPEN", "EXTENSION"):
        monkeypatch.setattr(PIL.Image, name, getattr(PIL.Image, name).copy())
    PIL.Image.register_open("ODD", Odd, lambda prefix: prefix.startswith(b"ODD!"))
    PIL.Image.register_extension("ODD", ".ODD")
    assert load_photo(tmp_path / "a.odd").getpixel((1, 0)) == (9, 9, 9)
    assert find_photos(tmp_path) == ([tmp_path / "a.odd"], 0) and ".odd" in photo_suffixes()
    # A format that Pillow was built without counts once another package reads it.
    monkeypatch.setattr(formats, "_has", lambda name: name != "webp")
    assert ".webp" not in photo_suffixes()
    PIL.Image.register_open("WEBP", Odd, lambda prefix: False)
    assert ".webp" in photo_suffixes()
    monkeypatch.undo()
    assert ".odd" not in photo_suffixes()
