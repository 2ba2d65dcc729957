"""Class names: found by any of their forms, refused with near ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from molt.classes import class_name, find_class, imagenet_names


def test_names_are_those_of_imagenet() -> None:
    names = imagenet_names()
    assert len(names) == 1000 and names[0].startswith("tench") and names[285] == "Egyptian cat"


INDICES = [285, np.int64(285), np.uint16(285), np.array(285), torch.tensor(285), torch.tensor(285, dtype=torch.int32)]


@pytest.mark.parametrize("name", ["Egyptian cat", "egyptian CAT", " Egyptian cat ", "285", *INDICES])
def test_one_class_many_spellings(name: Any) -> None:
    assert find_class(name) == 285


@pytest.mark.parametrize("name", [285.0, True, None, torch.tensor(285.0), np.array([285, 286]), ["tabby"]])
def test_what_is_no_class_is_refused(name: Any) -> None:
    with pytest.raises(TypeError, match="a class must be a name or an index, got "):
        find_class(name)


def test_every_description_finds_its_own_index() -> None:
    names = imagenet_names()
    twice = {name for name in names if names.count(name) > 1}
    for index, name in enumerate(names):
        if name not in twice:
            assert find_class(name) == index


def test_part_of_a_description_is_enough() -> None:
    assert class_name(find_class("tabby")) == "tabby, tabby cat"


def test_object_is_the_class_agnostic_mode() -> None:
    assert find_class("object") == find_class("Object") == find_class(-1) == -1 and class_name(-1) == "object"


def test_ambiguous_names_list_their_indices() -> None:
    with pytest.raises(ValueError, match="not unique: give the index .*134.*517"):
        find_class("crane")


@pytest.mark.parametrize(
    ("name", "near"), [("tabbby", "tabby"), ("retriever", "golden retriever"), ("egyptian", "egyptian cat")]
)
def test_unknown_names_show_near_ones(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"class '{name}' is unknown.*{near}"):
        find_class(name)


@pytest.mark.parametrize("index", [1000, -2, "4711"])
def test_indices_are_checked(index: int | str) -> None:
    with pytest.raises(ValueError, match=r"out of range: expected 0\.\.999"):
        find_class(index)


def test_empty_name_is_unknown() -> None:
    with pytest.raises(ValueError, match="unknown"):
        find_class("")


def test_own_names() -> None:
    assert find_class("b", ("a", "b")) == 1 and class_name(1, ("a", "b")) == "b"


def test_a_whole_name_comes_before_an_index_and_before_object() -> None:
    names = ("7", "object", "cat, kitten")
    assert find_class("7", names) == 0 and find_class("object", names) == 1 and find_class(-1, names) == -1
    assert find_class(2, names) == find_class("2", names) == find_class("kitten", names) == 2
