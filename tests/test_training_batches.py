"""Views, orders, batches and held-out photos: the same whatever reads them."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from molt.data import PhotoError, Sample, load_photo, read_photo
from molt.training.augment import AUGMENTATIONS, Augmentation, find_augmentation, stable_generator, view
from molt.training.batches import Batch, BatchLoader, Order, Photos, count_batches, share_of
from molt.training.holdout import check_classes, hold_out

pytestmark = pytest.mark.usefixtures("one_thread")
NO_BOXES = np.zeros((0, 4))
EVERY = Augmentation("resized-crop", jitter=0.4)


def ramps(width: int, height: int) -> PIL.Image.Image:
    """Red tells the column, green the row: a view shows where it was cut."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return PIL.Image.fromarray(np.stack([x, y, 0 * x + 90], -1).round().astype(np.uint8))


def batches(photos: Photos, *, epoch: int, start: int = 0, **options: Any) -> Iterator[list[Batch]]:
    return BatchLoader(photos, **options).epoch(epoch, start)


def in_order(samples: list[Sample], **options: Any) -> list[Batch]:
    """Return a set's batches as validation reads them, as of one global batch."""
    loader = BatchLoader(Photos(samples, (12, 16)), batch=max(len(samples), 1), micro=4, shuffle=False, **options)
    return [batch for micros in loader.epoch(0) for batch in micros]


def sample(path: Path, label: int = 0) -> Sample:
    return Sample(path.name, path, label, NO_BOXES)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("photos")
    found = []
    for index in range(11):
        path = folder / f"{index}.{'jpg' if index % 2 else 'png'}"
        noise = np.random.default_rng(index).integers(0, 256, (30 + index, 45, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(path)
        found.append(sample(path, index % 3))
    return found


@pytest.fixture(scope="module")
def with_bad(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Photos 1, 4, 5 and 8 cannot be read: cut short, text, empty, not there."""
    folder = tmp_path_factory.mktemp("bad")
    whole = samples[1].path.read_bytes()
    files = {1: whole[: len(whole) // 2], 4: b"not a photo at all\n" * 9, 5: b""}
    for index, data in files.items():
        (folder / f"bad{index}.jpg").write_bytes(data)
    found = list(samples)
    for index in (*files, 8):
        found[index] = sample(folder / f"bad{index}.jpg", samples[index].label)
    return found


def random_states() -> list[Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), rest]


def look(path: Path, augmentation: Any, *, size: tuple[int, int] = (20, 30), **place: int) -> Tensor:
    return view(path, size, find_augmentation(augmentation), **{"seed": 0, "epoch": 0, "index": 0, **place})


def as_dict(found: list[list[Batch]]) -> dict[int, tuple[int, bytes]]:
    """Pixels and label by index; no index twice."""
    pairs = [
        (int(index), (int(label), pixels.numpy().tobytes()))
        for micros in found
        for batch in micros
        for index, label, pixels in zip(batch.indices, batch.labels, batch.pixels, strict=True)
    ]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("name", [*AUGMENTATIONS, "all"])
def test_views_have_one_form_and_leave_the_global_generators_alone(samples: list[Sample], name: str) -> None:
    augmentation = EVERY if name == "all" else AUGMENTATIONS[name]
    before = random_states()
    for index in range(4):
        pixels = look(samples[index].path, augmentation, index=index)
        assert pixels.shape == (3, 20, 30) and pixels.dtype == torch.float32 and pixels.is_contiguous()
        assert pixels.min() >= 0 and pixels.max() <= 1
    assert random_states() == before


def test_a_view_is_decided_by_seed_epoch_and_index(samples: list[Sample]) -> None:
    path = samples[0].path
    torch.manual_seed(1)
    first = look(path, EVERY, seed=3, epoch=5, index=7)
    torch.manual_seed(2)
    assert torch.equal(first, look(path, EVERY, seed=3, epoch=5, index=7))
    for other in ({"seed": 4}, {"epoch": 6}, {"index": 8}):
        assert not torch.equal(first, look(path, EVERY, **{"seed": 3, "epoch": 5, "index": 7, **other})), other
    # Not the sum of the three, nor their digits in a row.
    assert not torch.equal(look(path, EVERY, seed=1, epoch=12), look(path, EVERY, seed=11, epoch=2))


def test_without_augmentation_it_is_the_photo_as_the_localizer_reads_it(samples: list[Sample]) -> None:
    for one in samples:
        assert torch.equal(look(one.path, "none"), read_photo(one.path, (20, 30)).pixels)
    tensor = torch.rand(3, 17, 23, generator=torch.Generator().manual_seed(0))
    plain = AUGMENTATIONS["none"]
    assert torch.equal(view(tensor, (17, 23), plain, seed=0, epoch=0, index=0), tensor)


def test_flips_come_half_the_time(samples: list[Sample]) -> None:
    plain = look(samples[0].path, "none")
    views = [look(samples[0].path, "flip", index=index) for index in range(60)]
    flipped = [torch.equal(one, plain.flip(2)) for one in views]
    assert all(flip or torch.equal(one, plain) for one, flip in zip(views, flipped, strict=True))
    assert 15 <= sum(flipped) <= 45


def edges(pixels: Tensor) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a view of the ramps, in shares of the photo."""
    columns, rows = pixels[0].mean(0), pixels[1].mean(1)
    return float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1])


def test_resized_crops_keep_to_their_area_and_ratio(tmp_path: Path) -> None:
    path = tmp_path / "ramps.png"
    ramps(300, 200).save(path)
    augmentation = Augmentation("resized-crop", area=(0.3, 0.6), ratio=(0.8, 1.25), flip=0)
    places = set()
    for index in range(40):
        left, top, right, bottom = edges(look(path, augmentation, size=(64, 64), index=index))
        width, height = right - left, bottom - top
        assert width > 0 and 0.27 <= width * height <= 0.62, "the outermost pixels lie a little inside"
        assert 0.76 <= width * 300 / (height * 200) <= 1.32
        places.add((round(left, 1), round(top, 1)))
    assert len(places) > 8


def test_inner_crops_show_all_but_a_margin(tmp_path: Path) -> None:
    path = tmp_path / "ramps.png"
    ramps(300, 200).save(path)
    lefts = set()
    for index in range(30):
        left, top, right, bottom = edges(look(path, Augmentation("inner-crop", flip=0), size=(56, 112), index=index))
        assert right - left == pytest.approx(224 / 256, abs=0.02) and bottom - top == pytest.approx(224 / 256, abs=0.03)
        lefts.add(round(left, 2))
    assert min(lefts) < 0.03 and max(lefts) > 0.09, "both ends are reached"


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (2, 3)])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_oddest_photos(tmp_path: Path, size: tuple[int, int], name: str) -> None:
    path = tmp_path / "tiny.png"
    ramps(*size).save(path)
    for index in range(5):
        assert look(path, name, size=(7, 1), index=index).shape == (3, 7, 1)


def test_a_crop_of_a_jpeg_is_as_sharp_as_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (800, 800), dtype=np.uint8)
    PIL.Image.fromarray(noise).convert("RGB").save(path, quality=95)
    # A fifth of each side, 160 pixels, for a view of 160: the pixels of the file.
    augmentation = Augmentation("resized-crop", area=(0.04, 0.04), ratio=(1, 1), flip=0)
    pixels = look(path, augmentation, size=(160, 160))
    full = torch.from_numpy(np.array(load_photo(path))).permute(2, 0, 1).float() / 255
    rows = (full[0].unfold(1, 160, 1) == pixels[0, 0]).all(-1).nonzero().tolist()
    assert any(torch.equal(full[:, y : y + 160, x : x + 160], pixels) for y, x in rows), "one of the file's own windows"


def test_a_crop_that_shrinks_may_be_decoded_smaller_but_not_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.jpg"
    ramps(1600, 1600).save(path)
    sizes: list[tuple[int, int]] = []
    from molt.training import augment

    def spy(*arguments: Any) -> Any:
        found = augment_reader(*arguments)
        sizes.append(found[0].size)
        return found

    augment_reader = augment._from_file
    monkeypatch.setattr(augment, "_from_file", spy)
    look(path, "crop", size=(64, 64))
    look(path, Augmentation("resized-crop", area=(0.08, 1)), size=(64, 64))
    look(path, Augmentation("resized-crop", ratio=(0.1, 0.11)), size=(64, 64))
    assert [width for width, _ in sizes] == [200, 1600, 800]


def test_colours_change_and_stay_in_range(samples: list[Sample]) -> None:
    plain = look(samples[0].path, "none")
    changed = [look(samples[0].path, Augmentation(flip=0, jitter=1), index=index) for index in range(10)]
    assert all((one - plain).abs().mean() > 0.01 and one.min() >= 0 and one.max() <= 1 for one in changed)
    assert (look(samples[0].path, Augmentation(flip=0, jitter=1e-4)) - plain).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        ({"geometry": "zoom"}, ValueError, "geometry must be one of squash, resized-crop, inner-crop, got 'zoom'"),
        ({"area": 0.5}, TypeError, "area must be (least, greatest), got 0.5"),
        ({"area": (0, 1)}, ValueError, "area must be finite and above 0, got 0"),
        ({"area": (0.5, 1.5)}, ValueError, "area must be (least, greatest) in [0, 1], got (0.5, 1.5)"),
        ({"area": (0.9, 0.5)}, ValueError, "got (0.9, 0.5)"),
        ({"area": (0.5, float("nan"))}, ValueError, "area must be finite"),
        ({"area": "ab"}, TypeError, "got 'ab'"),
        ({"ratio": (0.01, 1)}, ValueError, "ratio must be (least, greatest) in [0.1, 10]"),
        ({"margin": 0.9}, ValueError, "margin must be in [1, 4], got 0.9"),
        ({"flip": 1.1}, ValueError, "flip must be in [0, 1], got 1.1"),
        ({"flip": True}, TypeError, "flip must be a number, got True"),
        ({"jitter": "0.4"}, TypeError, "jitter must be a number, got '0.4'"),
        ({"jitter": -0.1}, ValueError, "jitter must be finite and not negative"),
    ],
)
def test_wrong_augmentations(wrong: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as raised:
        Augmentation(**wrong)
    assert said in str(raised.value)


def test_augmentations_survive_json() -> None:
    for augmentation in (*AUGMENTATIONS.values(), EVERY):
        assert find_augmentation(json.loads(json.dumps(augmentation.settings()))) == augmentation
        assert find_augmentation(augmentation) is augmentation
    assert [AUGMENTATIONS[name].random for name in ("none", "flip", "crop", "ts-cam")] == [False, True, True, True]
    with pytest.raises(ValueError, match="one of none, flip, crop, ts-cam, got 'randaugment'"):
        find_augmentation("randaugment")
    with pytest.raises(ValueError, match="has the fields geometry, .* got zoom"):
        find_augmentation({"zoom": 2})
    with pytest.raises(TypeError, match="got int"):
        find_augmentation(3)


def test_orders_are_permutations_of_seed_and_epoch_alone() -> None:
    before = random_states()
    order = Order(100, 5)
    one = order.epoch(0)
    assert one.dtype == torch.int64 and sorted(one.tolist()) == list(range(100))
    assert torch.equal(one, Order(100, 5).epoch(0)) and random_states() == before
    assert not torch.equal(one, order.epoch(1)) and not torch.equal(one, Order(100, 6).epoch(0))
    assert torch.equal(Order(7, None).epoch(3), torch.arange(7)) and len(Order(0).epoch(0)) == 0
    # Written down, as an order that differs between two runs would break a training that goes on.
    assert stable_generator("order", 5, 0).initial_seed() == 5337027179902131107


def test_shares_are_contiguous_and_differ_by_one() -> None:
    whole = torch.arange(7)
    for world in (1, 2, 3, 7, 9):
        parts = [share_of(whole, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat(parts), whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("name", ["none", "crop"])
def test_union_over_processes_does_not_depend_on_their_number(samples: list[Sample], name: str) -> None:
    photos = Photos(samples, (12, 16), name, seed=2)
    whole = [as_dict([micros]) for micros in batches(photos, epoch=1, batch=4, micro=4)]
    assert [len(batch) for batch in whole] == [4, 4, 3] and len({*whole[0], *whole[1], *whole[2]}) == 11
    order = photos.order.epoch(1).tolist()
    assert [list(batch) for batch in whole] == [order[:4], order[4:8], order[8:]]
    for world in (2, 3, 5):
        ranks = [list(batches(photos, epoch=1, batch=4, micro=1, rank=rank, world=world)) for rank in range(world)]
        assert {len(found) for found in ranks} == {3}, "as many global batches in every process"
        for number, expected in enumerate(whole):
            assert as_dict([found[number] for found in ranks]) == expected
        if world == 5:
            assert ranks[0][0] == [] and ranks[0][2] == [], "fewer photos than processes"


def test_micro_batches_and_labels(samples: list[Sample]) -> None:
    found = list(batches(Photos(samples, (12, 16), "flip"), epoch=0, batch=8, micro=3))
    assert [[len(batch) for batch in micros] for micros in found] == [[3, 3, 2], [3]]
    for batch in (batch for micros in found for batch in micros):
        assert batch.pixels.dtype == torch.float32 and batch.pixels.shape == (len(batch), 3, 12, 16)
        assert batch.labels.dtype == batch.indices.dtype == torch.int64 and batch.bad == ()
        assert batch.labels.tolist() == [samples[index].label for index in batch.indices.tolist()]


def test_workers_change_nothing(with_bad: list[Sample]) -> None:
    photos = Photos(with_bad, (12, 16), EVERY, seed=9)
    before = random_states()

    def alone(epoch: int) -> list[list[Batch]]:
        return list(batches(photos, epoch=epoch, batch=5, micro=2))

    with BatchLoader(photos, batch=5, micro=2, workers=2) as loader:
        for epoch in (0, 1):
            # One loader is used again, the other one is new.
            here, there = alone(epoch), list(loader.epoch(epoch))
            assert as_dict(here) == as_dict(there) and len(as_dict(there)) == 7
            assert [[one.bad for one in micros] for micros in here] == [[one.bad for one in micros] for micros in there]
        # Left in the middle, and begun anew with the same workers.
        left = loader.epoch(2)
        next(left)
        assert as_dict(list(loader.epoch(3))) == as_dict(alone(3))
        with pytest.raises(RuntimeError, match="another epoch of this loader was begun"):
            list(left)
    assert random_states() == before


def test_photos_can_be_sent_to_workers_that_are_no_forks(samples: list[Sample]) -> None:
    photos = Photos(samples, (12, 16), EVERY, seed=9)
    sent = pickle.loads(pickle.dumps(photos))
    assert torch.equal(sent.read([3, 1], 2).pixels, photos.read([3, 1], 2).pixels)


def test_an_epoch_is_taken_up_at_any_batch(samples: list[Sample]) -> None:
    photos = Photos(samples, (12, 16), "crop")
    whole = list(batches(photos, epoch=4, batch=3, micro=2))
    assert count_batches(len(samples), 3) == len(whole) == 4
    for start in range(5):
        rest = list(batches(photos, epoch=4, batch=3, micro=2, start=start))
        assert [as_dict([micros]) for micros in rest] == [as_dict([micros]) for micros in whole[start:]]
    with pytest.raises(ValueError, match=r"start must be in 0\.\.4, got 5"):
        batches(photos, epoch=4, batch=3, micro=2, start=5)


def test_bad_photos_are_left_out_and_listed(with_bad: list[Sample]) -> None:
    found = list(batches(Photos(with_bad, (12, 16), "ts-cam"), epoch=0, batch=4, micro=1))
    bad = dict(entry for micros in found for batch in micros for entry in batch.bad)
    assert sorted(bad) == [1, 4, 5, 8] and sorted(as_dict(found)) == [0, 2, 3, 6, 7, 9, 10]
    reasons = {1: "cannot be decoded", 4: "not a photo", 5: "the file is empty", 8: "no such file"}
    assert all(reason in bad[index] and f"bad{index}.jpg" in bad[index] for index, reason in reasons.items())
    empty = [batch for micros in found for batch in micros if len(batch) == 0]
    assert len(empty) == 4
    for batch in empty:
        assert batch.pixels.shape == (0, 3, 12, 16) and batch.labels.dtype == batch.indices.dtype == torch.int64
    with pytest.raises(PhotoError):
        look(with_bad[4].path, "crop")


class Deadly:
    """A sample whose reading kills its process."""

    label = 0

    @property
    def path(self) -> Path:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="this class is not there in other workers")
def test_a_worker_that_dies_is_told(samples: list[Sample]) -> None:
    dying: list[Any] = [*samples[:2], Deadly()]
    loader = BatchLoader(Photos(dying, (12, 16)), batch=3, micro=3, workers=1)
    with pytest.raises(RuntimeError, match="a process that reads photos died"):
        list(loader.epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_mistakes_are_no_bad_photos(samples: list[Sample], workers: int) -> None:
    wrong: list[Any] = [*samples[:2], Sample("no path", None, 0, NO_BOXES)]  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a photo must be a path"):
        list(batches(Photos(wrong, (12, 16)), epoch=0, batch=3, micro=3, workers=workers))


def test_evaluation_reads_the_set_in_its_order(with_bad: list[Sample]) -> None:
    alone = in_order(with_bad)
    assert [batch.indices.tolist() for batch in alone] == [[0, 2, 3], [6, 7], [9, 10]]
    assert [index for batch in alone for index, _ in batch.bad] == [1, 4, 5, 8]
    assert torch.equal(alone[0].pixels[1], read_photo(with_bad[2].path, (12, 16)).pixels)
    parts = [in_order(with_bad, rank=rank, world=3) for rank in range(3)]
    assert as_dict(parts) == as_dict([alone])
    assert [index for part in parts for batch in part for index in batch.indices.tolist()] == [0, 2, 3, 6, 7, 9, 10]
    assert in_order([]) == []
    assert list(batches(Photos([], (12, 16)), epoch=0, batch=2, micro=2)) == []


def test_wrong_arguments_of_batches(samples: list[Sample]) -> None:
    photos = Photos(samples, (12, 16))
    for wrong, said in (
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"micro": 0}, "micro must be at least 1"),
        ({"rank": 2, "world": 2}, r"rank must be in 0..1, got 2"),
        ({"workers": -1}, "workers must be at least 0"),
    ):
        with pytest.raises(ValueError, match=said):
            BatchLoader(photos, **{"batch": 2, "micro": 2, **wrong})
    with pytest.raises(TypeError, match="photos must be Photos, got list"):
        BatchLoader(samples, batch=2, micro=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one of none"):
        Photos(samples, (12, 16), "zoom")
    with pytest.raises(ValueError, match="seed must be at least 0|seed must be in"):
        Photos(samples, (12, 16), seed=-1)


def test_held_out_photos_are_a_share_of_each_class() -> None:
    labels = [0] * 50 + [1] * 30 + [2] * 20
    kept, held = hold_out(labels, 0.1, seed=4)
    assert sorted(kept + held) == list(range(100)) and kept == sorted(kept) and held == sorted(held)
    assert Counter(labels[index] for index in held) == {0: 5, 1: 3, 2: 2}
    assert hold_out(torch.tensor(labels), 0.1, seed=4) == (kept, held) != hold_out(labels, 0.1, seed=5)


def test_tiny_classes_keep_a_photo_in_training() -> None:
    labels = [0, 1, 1, 2, 2, 2] + [3] * 10
    kept, held = hold_out(labels, 0.99)
    assert Counter(labels[index] for index in kept) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert len(held) == 12 and 0 not in held
    # No class alone makes up one photo of ten, all together do.
    labels = list(range(8)) * 4
    assert len(hold_out(labels, 0.1)[1]) == 3
    assert len({tuple(hold_out(labels, 0.1, seed)[1]) for seed in range(6)}) > 3
    assert hold_out(labels, 0) == (list(range(32)), []) and hold_out([], 0.5) == ([], [])


def test_a_photo_is_never_on_both_sides() -> None:
    labels = [0, 0, 0, 1, 1, 1]
    photos = ["a", "b", "c", "a", "d", "b"]
    for seed in range(8):
        kept, held = hold_out(labels, 0.6, seed, photos=photos)
        assert set(held) == {2, 4} and not {photos[i] for i in kept} & {photos[i] for i in held}
    with pytest.raises(ValueError, match="as many as labels, 6, got 1"):
        hold_out(labels, 0.5, photos=["a"])


@pytest.mark.parametrize("share", [1, 1.5, -0.1, float("nan")])
def test_shares_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match="share must be"):
        hold_out([0, 1], share)


def test_sets_that_cannot_be_trained_on() -> None:
    check_classes([0, 1, 1], ["cat", "dog"])
    names = [f"class {i}" for i in range(9)]
    for labels, classes, said in (
        ([0, 0], ["cat"], "has the one class 'cat': training needs at least two"),
        ([], [], "has no class"),
        ([], ["cat", "dog"], "has no photo: training"),
        ([1], ["cat", "dog"], "one photo in all, of class 'dog'"),
        ([0, 0], ["cat", "dog"], "no photo of the class 'dog'"),
        ([0, 8], names, "classes 'class 1', 'class 2', 'class 3', 'class 4', 'class 5' and 2 more"),
        ([0, 2], ["cat", "dog"], r"label 2, expected 0\.\.1"),
    ):
        with pytest.raises(ValueError, match=said):
            check_classes(labels, classes)
    with pytest.raises(TypeError, match=r"labels\[1\] must be an integer"):
        check_classes([0, 1.5], ["cat", "dog"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="my photos has"):
        check_classes([], [], "my photos")
