"""Which classes of a network a data set's classes are."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from molt._text import plain_name
from molt._words import count
from molt.classes import OBJECT, find_class, imagenet_names
from molt.data.annotations import LocalizationSet, Problem

Groups = dict[int, tuple[int, ...]]


def network_classes(
    data: LocalizationSet, known: tuple[str, ...], class_map: Path | None
) -> tuple[Groups, list[Problem]]:
    """Return the network's class indices, -1 for 'object', by label of the set, and labels that have none.

    Without a file a class is found by name, by WordNet id where the network knows ImageNet's classes, or by its number
    where the set has as many classes as the network. A class in the file that the network lacks is a problem, and its
    photos count as missed.

    Raises:
        ValueError: classes that are not the network's, or a file that does not hold.
    """
    used = Counter(sample.label for sample in data.samples)
    said = {} if class_map is None else _read_class_map(class_map)
    numbers = len(data.classes) == len(known)
    ids = _wordnet_ids(known)
    found: Groups = {}
    wrong: list[tuple[int, str]] = []
    for label in sorted(used):
        name = data.classes[label] if 0 <= label < len(data.classes) else str(label)
        try:
            if class_map is not None:
                if name not in said:
                    raise ValueError(f"class {name!r} is not in {class_map}")
                found[label] = _group(said[name], known)
            elif name in ids:
                found[label] = (ids[name],)
            elif not numbers and name.removeprefix("-").isdecimal():
                raise ValueError(f"class {name!r} is a number, and the set has {count(len(data.classes), 'class')}")
            else:
                found[label] = (find_class(name, known),)
        except ValueError as error:
            wrong.append((label, f"{name}: {error}"))
    if wrong and (class_map is None or any("is not in" in text for _, text in wrong)):
        listed = "; ".join(text for _, text in wrong[:3]) + ("; ..." if len(wrong) > 3 else "")
        photos = sum(used[label] for label, _ in wrong)
        mend = "Say with --class-map FILE" if class_map is None else f"Say in {class_map}"
        raise ValueError(
            f"{len(wrong)} of the set's {count(len(used), 'class')} ({count(photos, 'photo')}) "
            f"{'is' if len(wrong) == 1 else 'are'} not among the network's {len(known)}: {listed}. {mend} "
            "which are meant (lines: class name, network class name or index, or object), or take --gt-map top1 or "
            "agnostic"
        )
    expected = f"a class of the network, 0 to {len(known) - 1}; its photos count as missed"
    return found, [
        Problem(class_map or Path(data.name), None, f"{text} ({count(used[label], 'photo')})", expected)
        for label, text in wrong
    ]


def _group(texts: Sequence[str], known: tuple[str, ...]) -> tuple[int, ...]:
    """Return the network's classes behind names, indices and ranges such as 80-100, each once.

    Raises:
        ValueError: one that the network lacks, or 'object' among others.
    """
    found: list[int] = []
    for text in texts:
        if span := re.fullmatch(r"(\d{1,9})-(\d{1,9})", text):
            first, last = int(span[1]), int(span[2])
            if not first <= last < len(known):
                raise ValueError(f"{text!r} is no range of classes 0 to {len(known) - 1}")
            found += range(first, last + 1)
        else:
            found.append(find_class(text, known))
    if OBJECT in found and len(set(found)) > 1:
        raise ValueError("'object' is no class among others")
    return tuple(dict.fromkeys(found))


def _read_class_map(path: Path) -> dict[str, list[str]]:
    """Return the network classes, as written, by class name.

    Raises:
        ValueError: a line that has not two columns, or a file that cannot be read.
    """
    found: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if not row:
                    continue
                # A network class may hold commas itself: tabby, tabby cat.
                name, text = plain_name(row[0]), ", ".join(part.strip() for part in row[1:] if part.strip())
                if not name or not text:
                    raise ValueError(f"--class-map {path}:{number}: got {row!r}, expected name,network class")
                found.setdefault(name, []).append(text)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--class-map {path}: cannot be read ({error})") from error
    return found


def _wordnet_ids(known: tuple[str, ...]) -> dict[str, int]:
    """Return ImageNet's WordNet ids by number where these are the network's classes."""
    from timm.data.imagenet_info import ImageNetInfo

    return {} if known != imagenet_names() else {name: i for i, name in enumerate(ImageNetInfo().label_names())}
