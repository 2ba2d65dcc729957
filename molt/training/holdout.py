"""Photos kept from training to choose by, and classes that cannot be trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from molt._arguments import LARGEST_SEED, check_int, check_number
from molt.training.augment import stable_generator

_NAMED = 5  # classes named in a message


def hold_out(
    labels: Sequence[int] | Tensor, share: float, seed: int = 0, *, photos: Sequence[Hashable] | None = None
) -> tuple[list[int], list[int]]:
    """Return the indices to train on and those to hold out, both ascending.

    Each class gives its share, rounded so that the whole comes as near to ``share`` as it can: the places left after
    rounding down go to the classes that lost most by it. Every class keeps at least one photo in training, so that a
    class of one photo gives none. The choice depends on labels, share and seed alone.

    Args:
        labels: (n,) integers from 0.
        share: of all samples, in [0, 1).
        seed: from 0.
        photos: what tells a sample's photo from others, such as its name; a photo that is there more than once, with
            several labels, stays in training, so that no photo is on both sides.

    Raises:
        TypeError: an argument of another type.
        ValueError: share or seed out of range, or photos of another length than labels.
    """
    share = check_number("share", share)
    if share >= 1:
        raise ValueError(f"share must be in [0, 1), got {share:g}")
    check_int("seed", seed, 0, LARGEST_SEED)
    found = _labels(labels)
    if photos is not None and len(photos) != len(found):
        raise ValueError(f"photos must be as many as labels, {len(found)}, got {len(photos)}")
    times = Counter(photos) if photos is not None else {}
    members: dict[int, list[int]] = {}  # of each class, those that may be held out
    for index, label in enumerate(found):
        free = photos is None or times[photos[index]] == 1
        members.setdefault(label, []).extend([index] * free)
    sizes = Counter(found)
    most = {label: min(len(members[label]), sizes[label] - 1) for label in members}
    taken = {label: min(int(share * sizes[label]), most[label]) for label in members}
    left = round(share * len(found)) - sum(taken.values())
    order = torch.randperm(len(members), generator=stable_generator("held classes", seed)).tolist()
    chance = dict(zip(sorted(members), order, strict=True))  # decides between equals
    by_loss = sorted(members, key=lambda label: (taken[label] - share * sizes[label], chance[label]))
    for label in by_loss:
        if left > 0 and taken[label] < most[label]:
            taken[label] += 1
            left -= 1
    held = []
    for label, indices in members.items():
        order = torch.randperm(len(indices), generator=stable_generator("held photos", seed, label)).tolist()
        held += [indices[place] for place in order[: taken[label]]]
    out = set(held)
    return [index for index in range(len(found)) if index not in out], sorted(held)


def check_classes(labels: Sequence[int] | Tensor, classes: Sequence[str], name: str = "the training set") -> None:
    """Check that labels make a set that can be trained on: two classes or more, each with a photo.

    Args:
        labels: (n,) integers in 0..len(classes)-1.
        classes: class names by label.
        name: of the set, for the message.

    Raises:
        TypeError: labels that are no integers.
        ValueError: fewer than two classes, a label out of range, one photo in all or none, or classes without a photo.
    """
    found = _labels(labels)
    if len(classes) < 2:
        what = f"the one class {classes[0]!r}" if classes else "no class"
        raise ValueError(f"{name} has {what}: training needs at least two")
    if found and max(found) >= len(classes):
        raise ValueError(f"{name} has label {max(found)}, expected 0..{len(classes) - 1}")
    if len(found) < 2:
        what = f"one photo in all, of class {classes[found[0]]!r}" if found else "no photo"
        raise ValueError(f"{name} has {what}: training needs at least one of each class")
    there = set(found)
    if empty := [repr(title) for label, title in enumerate(classes) if label not in there]:
        more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        which = "class" if len(empty) == 1 else "classes"
        raise ValueError(f"{name} has no photo of the {which} {', '.join(empty[:_NAMED])}{more}")


def _labels(labels: Sequence[int] | Tensor) -> list[int]:
    if isinstance(labels, Tensor):
        labels = labels.tolist()
    return [check_int(f"labels[{place}]", label, 0) for place, label in enumerate(labels)]


__all__ = ["check_classes", "hold_out"]
