"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out on a GPU what the interpreter covers; tests/triton_variants.py counts what is compiled."""
    out = [one for one in items if one.get_closest_marker("gpu") and one.get_closest_marker("interpreted")]
    config.hook.pytest_deselected(items=out)
    items[:] = [one for one in items if one not in out]


@pytest.fixture(scope="session", autouse=True)
def weights_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted weights go to a folder of this run, never to the user's cache."""
    folder = tmp_path_factory.mktemp("molt-cache")
    os.environ["MOLT_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def no_features_of_others(weights_cache: Path) -> None:
    """Every test computes the features of its photos itself."""
    shutil.rmtree(weights_cache / "features", ignore_errors=True)


@pytest.fixture
def own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in a folder of the test's own: runs without --out share one beside them, which only one may write to."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On tiny tensors threads that wait for one another take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def photo() -> torch.Tensor:
    """A bright disc, off centre, on a dark textured ground: (3, 120, 160) in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.arange(120.0), torch.arange(160.0), indexing="ij")
    disc = ((y - 50) ** 2 + (x - 100) ** 2 < 30**2).float()
    ground = 0.2 + 0.1 * torch.rand(3, 120, 160, generator=generator)
    return ground * (1 - disc) + disc * torch.tensor([0.9, 0.6, 0.2]).view(3, 1, 1)


@pytest.fixture
def our_superpixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The papers' loops get molt's superpixels, to compare step by step: scikit-image cuts a little otherwise."""
    from molt.benchmark import published
    from molt.clustering.slic import segment

    def superpixels(image: Any, num_segments: int, compactness: float) -> Any:
        return segment(torch.from_numpy(image).permute(2, 0, 1)[None], num_segments, compactness)[0].numpy()

    monkeypatch.setattr(published, "superpixels", superpixels)
