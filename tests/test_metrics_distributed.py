"""The metrics as torchmetrics uses them: over two processes, in collections, batch by batch, moved and pickled."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import ndimage
from torchmetrics import Metric, MetricCollection

from molt.evaluation import CorLoc, MaxBoxAcc, MeanIoU, PxAP, TopKLoc

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBER = 14


def photos() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    maps = ndimage.gaussian_filter(rng.random((NUMBER, 2, 9, 11)), (0, 0, 1.5, 1.5))
    maps -= maps.min((2, 3), keepdims=True)
    maps = torch.from_numpy(np.round(maps / maps.max((2, 3), keepdims=True) * 6) / 6)
    maps[3, 0, 2, 2] = torch.nan
    corner = torch.from_numpy(rng.integers(0, 5, (NUMBER, 2, 2)))
    boxes = torch.cat([corner, corner + torch.from_numpy(rng.integers(2, 6, (NUMBER, 2, 2)))], 2).double()
    return {
        "maps": maps,
        "boxes": list(boxes),
        "predicted": torch.from_numpy(rng.integers(0, 4, (NUMBER, 2))),
        "labels": torch.from_numpy(rng.integers(0, 4, NUMBER)),
        "masks": torch.from_numpy(rng.choice([0, 1, 255], (NUMBER, 9, 11))),
        "ids": [f"photo {i}" for i in range(NUMBER)],
    }


def metrics() -> dict[str, Metric]:
    return {
        "v1": MaxBoxAcc("v1", 20, bootstrap=40),
        "v2": MaxBoxAcc("v2", 20, bootstrap=40),
        "pixels": PxAP(20, bootstrap=40),
        "top": TopKLoc("best", (1, 2), thresholds=20, iou=0.2, bootstrap=40),
        "fixed": TopKLoc(0.3, (1, 2), iou=0.2, bootstrap=40),
        "cor": CorLoc(0.3, classes=4, bootstrap=40),
        "mean": MeanIoU(bootstrap=40),
    }


def feed(
    name: str, metric: Metric, given: dict[str, Any], part: slice, *, named: bool = True, call: str = "update"
) -> Any:
    cut = {key: values[part] for key, values in given.items()}
    more = {"ids": cut["ids"]} if named else {}
    arguments = {
        "v": (cut["maps"][:, 0], cut["boxes"]),
        "p": (cut["maps"][:, 0], cut["masks"]),
        "t": (cut["maps"], cut["predicted"], cut["labels"], cut["boxes"], cut["maps"][:, 1]),
        "f": (cut["maps"], cut["predicted"], cut["labels"], cut["boxes"], cut["maps"][:, 1]),
        "c": ([box[0].tolist() for box in cut["boxes"]], [box[1:] + 1 for box in cut["boxes"]], cut["labels"]),
        "m": ([box[0].tolist() for box in cut["boxes"]], [box[1:] + 1 for box in cut["boxes"]]),
    }
    return getattr(metric, call)(*arguments[name[0]], **more)


def close(found: Any, expected: Any) -> bool:
    """Equal, floats to the last digits, which the order of a sum decides."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == expected or found == pytest.approx(expected, rel=1e-12, nan_ok=True)


def whole(named: bool = True) -> dict[str, Any]:
    found = {}
    for name, metric in metrics().items():
        feed(name, metric, photos(), slice(None), named=named)
        found[name] = metric.compute()
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    named, unnamed = {}, {}
    for name, metric in metrics().items():
        # Shares of different sizes, one of them in two batches.
        parts = [slice(0, 4), slice(4, 5)] if rank == 0 else [slice(5, None)]
        for part in parts:
            feed(name, metric, photos(), part)
        named[name] = metric.compute()
        assert metric.count == (5 if rank == 0 else 9), "what was gathered must not stay"
        metric.reset()
        feed(name, metric, photos(), slice(0, 7) if rank == 0 else slice(7, None), named=False)
        unnamed[name] = metric.compute()
    torch.save((named, unnamed), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    # This file run as a program: torch.multiprocessing would have to find it by its name as a module.
    workers = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    expected, numbered = whole(), whole(named=False)
    assert all(found["interval"][0] < found["interval"][1] for found in expected.values())
    for rank in range(2):
        named, unnamed = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name in expected:
            assert close(named[name], expected[name]), name
            assert unnamed[name]["score"] == pytest.approx(expected[name]["score"])
            # Photos of the two processes get numbers of their own, so resamples of their own.
            assert unnamed[name]["interval"] != numbered[name]["interval"], name


@pytest.mark.parametrize("name", list(metrics()))
def test_forward_gives_the_batch_and_adds_it(name: str) -> None:
    for named in (True, False):
        metric, other, batch = metrics()[name], metrics()[name], metrics()[name]
        for part in (slice(0, 6), slice(6, None)):
            found = feed(name, metric, photos(), part, named=named, call="forward")
            feed(name, other, photos(), part, named=named)
        feed(name, batch, photos(), slice(6, None))
        assert found["score"] == batch.compute()["score"]
        assert close(metric.compute(), other.compute()) and metric.count == NUMBER


@pytest.mark.parametrize("name", list(metrics()))
def test_copies_pickles_and_devices(name: str) -> None:
    metric = metrics()[name]
    feed(name, metric, photos(), slice(0, 5))
    assert metric.higher_is_better and metric.full_state_update is False
    copies = [pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric).to("cpu").float()]
    for one in (metric, *copies):
        feed(name, one, photos(), slice(5, None))
    assert all(one.compute() == metric.compute() for one in copies)
    assert close(metric.compute(), whole()[name])
    metric.to("meta")
    assert {state.device.type for state in metric.metric_state.values()} == {"meta"}


def test_collection_keeps_protocols_apart() -> None:
    """Torchmetrics merges metrics whose states are equal after the first batch; here none of them hits."""
    given = {"maps": torch.zeros(3, 8, 8), "boxes": [[[1, 1, 6, 6]]] * 3}
    several = MetricCollection(
        {"contour": MaxBoxAcc(thresholds=10), "pixels": MaxBoxAcc(thresholds=10, area="pixels")}, compute_groups=True
    )
    several.update(**given)
    assert len(several.compute_groups) == 2
    values = torch.zeros(1, 8, 8)
    values[0, 0, :] = 1.0
    values[0, 3:5, 3:5] = 1.0
    several.update(maps=values, boxes=[[[0, 0, 8, 1]]])
    found = several.compute()
    assert found["contour_score"] == 0 and found["pixels_score"] == 25
    assert several.clone(prefix="val_").compute()["val_pixels_score"] == 25


def test_collection_hands_each_what_it_asks_for() -> None:
    given = photos()
    several = MetricCollection({"box": MaxBoxAcc(thresholds=20, bootstrap=40), "px": PxAP(20, bootstrap=40)})
    several.update(maps=given["maps"][:, 0], boxes=given["boxes"], masks=given["masks"], ids=given["ids"])
    found, expected = several.compute(), whole()
    assert found["box_score"] == expected["v1"]["score"] and found["px_score"] == expected["pixels"]["score"]
    assert (
        found["box_interval"] == expected["v1"]["interval"] and found["px_interval"] == expected["pixels"]["interval"]
    )
    several.reset()
    assert several["box"].count == 0


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
