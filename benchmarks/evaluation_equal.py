"""Compare molt's evaluation with wsolevaluation's and TS-CAM's own code, figure by figure, on made-up photos.

    git clone https://github.com/clovaai/wsolevaluation
    git clone https://github.com/vasgaowei/TS-CAM
    python benchmarks/evaluation_equal.py wsolevaluation TS-CAM [--photos 60] [--seed 0]

Nothing of theirs is kept: their files are read from the last commit of the two repositories (a bare one will do) and
run as they are, but for the names that NumPy 2 no longer has (np.float, np.int) and TS-CAM's drawing. Maps are smooth
noise of odd sizes, some constant or with plateaus; photos and masks have sides among which are those whose nearest
pixel hangs on one rounding. Prints the largest difference of each figure, and ends with 1 where one is above 1e-9.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.util
import io
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import torch
from rich.console import Console
from rich.table import Table

from molt.data import read_wsol
from molt.evaluation import MaxBoxAcc, PxAP, TopKLoc
from molt.evaluation.masks import read_masks
from molt.evaluation.runs import Settings, evaluate

SIDE, CLASSES = 224, 8
SIDES = (224, 300, 333, 375, 400, 500, 600, 640, 1024)
Rows = list[tuple[str, int, float]]


class Published(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports modules from the last commit of a repository, and gives empty ones for what their figures do not need."""

    def __init__(self, repository: Path, folder: str, empty: Sequence[str]) -> None:
        self.repository, self.folder, self.empty = repository, folder, empty

    def text(self, name: str) -> str | None:
        command = ["git", "-C", str(self.repository), "show", f"HEAD:{self.folder}{name}.py"]
        found = subprocess.run(command, check=False, capture_output=True, text=True)
        return found.stdout if found.returncode == 0 else None

    def find_spec(self, name: str, path: object, target: object = None) -> Any:
        ours = name in self.empty or ("." not in name and self.text(name) is not None)
        return importlib.util.spec_from_loader(name, self) if ours else None

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        if name not in self.empty:
            exec(compile(self.text(name) or "", f"{self.repository}/{self.folder}{name}.py", "exec"), module.__dict__)
        elif name == "munch":
            module.Munch = type("Munch", (dict,), {"__getattr__": dict.get, "__setattr__": dict.__setitem__})  # type: ignore[attr-defined]
        elif name == "utils":
            module.mkdir = None  # type: ignore[attr-defined]
        elif name == "torchvision":
            module.transforms = None  # type: ignore[attr-defined]


@contextlib.contextmanager
def published(repository: Path, folder: str, *empty: str) -> Iterator[None]:
    """Make a repository's modules importable, first of all."""
    finder = Published(repository, folder, empty)
    kept = {name: sys.modules.pop(name, None) for name in empty}
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update({name: module for name, module in kept.items() if module is not None})


def maps_of(number: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return maps of odd sizes, of any range."""
    found = []
    for i in range(number):
        height, width = rng.integers(5, 40, 2)
        cells = rng.random(tuple(rng.integers(2, 9, 2)))
        one = cv2.resize(cells, (int(width), int(height)), interpolation=cv2.INTER_CUBIC) * rng.uniform(0.1, 9)
        found.append(np.round(one, 1) if i % 7 == 3 else np.full_like(one, 0.5) if i % 23 == 11 else one)
    return found


def finished(values: np.ndarray, normalize: Any) -> np.ndarray:
    """Return a map as wsolevaluation's inference makes it."""
    return np.asarray(normalize(cv2.resize(values, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)))


def wsol_boxes(folder: Path, number: int, rng: np.random.Generator, raw: list[np.ndarray]) -> Rows:
    """MaxBoxAcc and MaxBoxAccV2 of the metrics on the same maps, and of a whole run on the raw ones."""
    from evaluation import BoxEvaluator, configure_metadata  # type: ignore[import-not-found]
    from inference import normalize_scoremap  # type: ignore[import-not-found]

    names = [f"{i}.jpg" for i in range(number)]
    sizes = rng.choice(SIDES, (number, 2))
    boxes = []
    for size in sizes:
        low = (size * rng.uniform(0, 0.6, (rng.integers(1, 4), 2))).astype(int)
        boxes.append(
            np.concatenate([low, np.minimum(low + (size * rng.uniform(0.1, 0.6, low.shape)).astype(int), size)], 1)
        )
    folder.mkdir()
    lines = {
        "image_ids": names,
        "class_labels": [f"{name},{i % 3}" for i, name in enumerate(names)],
        "image_sizes": [f"{name},{w},{h}" for name, (w, h) in zip(names, sizes, strict=True)],
        "localization": [
            f"{name},{','.join(map(str, box))}" for name, own in zip(names, boxes, strict=True) for box in own
        ],
    }
    for name, text in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(text) + "\n")
    ready = [finished(values.copy(), normalize_scoremap) for values in raw]
    rows = []
    data = read_wsol(folder, folder / "photos")
    run = evaluate(data, iter(raw), Settings(draws=2))
    for version, several in (("v1", False), ("v2", True)):
        theirs = BoxEvaluator(
            metadata=configure_metadata(str(folder)),
            dataset_name="CUB",
            split="test",
            cam_threshold_list=list(np.arange(0, 1, 0.001)),
            iou_threshold_list=[30, 50, 70],
            mask_root="",
            multi_contour_eval=several,
        )
        for values, name in zip(ready, names, strict=True):
            theirs.accumulate(values, name)
        metric = MaxBoxAcc(version, iou=(0.3, 0.5, 0.7), bootstrap=0)
        metric.update(np.stack(ready), [theirs.gt_bboxes[name] for name in names])
        found = metric.compute()
        each = [
            max(abs(np.array(found["curves"][iou]) - theirs.num_correct[round(100 * iou)] * 100 / number))
            for iou in metric.iou
        ]
        rows.append((f"MaxBoxAcc {version}, IoU 0.3, 0.5, 0.7, each of 1000 thresholds", number, float(max(each))))
        whole = np.mean(theirs.compute()) if several else theirs.compute()[1]
        mine = run.info["scores"]["max_box_acc_v2" if several else "max_box_acc"]["value"]
        rows.append(
            (f"the same of a whole run, from raw maps of odd sizes: {version}", number, abs(float(whole) - mine))
        )
    return rows


def wsol_masks(folder: Path, number: int, rng: np.random.Generator, raw: list[np.ndarray]) -> Rows:
    """Masks at 224 x 224, and PxAP."""
    from evaluation import MaskEvaluator, configure_metadata, get_mask
    from inference import normalize_scoremap

    folder.mkdir()
    lines = []
    for i in range(number):
        height, width = rng.choice(SIDES, 2)
        for kind in ("0", "1", "ignore"):
            y, x = np.mgrid[:height, :width]
            centre, radius = rng.uniform(0.2, 0.8, 2), rng.uniform(0.05, 0.4)
            inside = ((y / height - centre[0]) ** 2 + (x / width - centre[1]) ** 2) < radius**2
            grey = (inside ^ (rng.random(inside.shape) < 0.02)).astype(np.uint8) * int(rng.choice([1, 255]))
            PIL.Image.fromarray(grey).save(folder / f"{i}-{kind}.png")
        lines += [f"{i}.jpg,{i}-0.png,{i}-ignore.png", f"{i}.jpg,{i}-1.png,"]
    names = [f"{i}.jpg" for i in range(number)]
    (folder / "image_ids.txt").write_text("\n".join(names) + "\n")
    (folder / "class_labels.txt").write_text("\n".join(f"{name},{i % 3}" for i, name in enumerate(names)) + "\n")
    (folder / "image_sizes.txt").write_text("\n".join(f"{name},10,10" for name in names) + "\n")
    (folder / "localization.txt").write_text("\n".join(lines) + "\n")
    theirs = MaskEvaluator(
        metadata=configure_metadata(str(folder)),
        dataset_name="OpenImages",
        split="test",
        cam_threshold_list=list(np.arange(0, 1, 0.001)),
        iou_threshold_list=[30, 50, 70],
        mask_root=str(folder),
        multi_contour_eval=False,
    )
    data = read_wsol(folder, folder, masks=folder)
    ready = [finished(values.copy(), normalize_scoremap) for values in raw]
    off = 0.0
    masks = []
    for values, sample in zip(ready, data.samples, strict=True):
        own = get_mask(str(folder), theirs.mask_paths[sample.name], theirs.ignore_paths[sample.name])
        masks.append(read_masks(sample, SIDE))
        off = max(off, float((own != masks[-1]).mean()))
        theirs.accumulate(values, sample.name)
    metric = PxAP(bootstrap=0)
    metric.update(np.stack(ready), np.stack(masks))
    with contextlib.redirect_stdout(io.StringIO()):
        whole = float(theirs.compute())
    counted = np.stack([theirs.gt_true_score_hist, theirs.gt_false_score_hist])
    bins = float(np.abs(metric.histograms[0].numpy() - counted).max())
    run = evaluate(data, iter(raw), Settings(draws=2), sizes="trust")
    return [
        ("masks resized to 224 x 224, share of pixels", number, off),
        ("PxAP: pixels in each of 1002 bins", number, bins),
        ("PxAP", number, abs(metric.compute()["score"] - whole)),
        ("PxAP of a whole run, from raw maps of odd sizes", number, abs(run.info["scores"]["pxap"]["value"] - whole)),
    ]


def ts_cam(number: int, rng: np.random.Generator, threshold: float) -> Rows:
    """Top-1, Top-5 and GT-known Loc, classification, and the split of errors, from one pass of their evaluation."""
    import cams_deit  # type: ignore[import-not-found]

    cams_deit.blend_cam, cams_deit.draw_bbox = (lambda *_: (None, None)), (lambda *_: None)
    cams = torch.from_numpy(
        np.stack([cv2.resize(rng.random((5, 5, CLASSES)), (14, 14)) for _ in range(number)])
    ).permute(0, 3, 1, 2)
    logits = torch.from_numpy(rng.random((number, CLASSES)))
    labels = torch.from_numpy(rng.integers(0, CLASSES, number))
    low = rng.integers(0, 120, (number, 3, 2))
    boxes = np.concatenate([low, low + rng.integers(30, 104, low.shape)], 2)
    counts = rng.integers(1, 4, number)
    listed = [own[:count].tolist() for own, count in zip(boxes, counts, strict=True)]
    said = [" ".join(str(v) for box in own for v in box) for own in listed]
    config = types.SimpleNamespace(
        MODEL=types.SimpleNamespace(TOP_K=1, CAM_THR=threshold),
        DATA=types.SimpleNamespace(IMAGE_MEAN=[0.5] * 3, IMAGE_STD=[0.2] * 3, CROP_SIZE=SIDE),
        TEST=types.SimpleNamespace(SAVE_BOXED_IMAGE=False),
        BASIC=types.SimpleNamespace(SAVE_DIR=""),
    )
    pictures = torch.zeros(number, 3, SIDE, SIDE)
    theirs = cams_deit.evaluate_cls_loc(pictures, labels, said, logits, cams, [""] * number, config, 0)
    ranked = logits.topk(5, 1, True, True).indices
    big = np.stack([[cams_deit.resize_cam(cams[b, c].numpy(), (SIDE, SIDE)) for c in ranked[b]] for b in range(number)])
    known = np.stack([cams_deit.resize_cam(cams[b, labels[b]].numpy(), (SIDE, SIDE)) for b in range(number)])
    metric = TopKLoc.from_protocol("ts-cam", threshold=threshold, bootstrap=0)
    for start in range(0, number, 16):
        part = slice(start, start + 16)
        metric.update(big[part], ranked[part], labels[part], listed[part], known[part])
    found = metric.compute()
    mine = [found[name] for name in ("top1_cls", "top5_cls", "top1_loc", "top5_loc", "gt_known_loc")]
    mine += [found["errors"][name] for name in ("right", "class", "multi_instance", "part", "more", "wrong")]
    off = max(abs(a - 100 * float(np.mean(b))) for a, b in zip(mine, theirs, strict=True))
    return [(f"TopKLoc and its error split at {threshold:g}", number, off)]


def main() -> None:
    """Run all and print the largest differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wsolevaluation", type=Path, help="repository of clovaai/wsolevaluation")
    parser.add_argument("ts_cam", type=Path, help="repository of vasgaowei/TS-CAM")
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name, kind in (("float", float), ("int", int)):
        setattr(np, name, kind)
    rng = np.random.default_rng(given.seed)
    raw = maps_of(given.photos, rng)
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        with published(given.wsolevaluation, "", "munch", "torchvision"):
            rows += wsol_boxes(Path(folder, "boxes"), given.photos, rng, raw)
            rows += wsol_masks(Path(folder, "masks"), given.photos, rng, raw)
        with published(given.ts_cam, "lib/", "utils"):
            for threshold in (0.1, 0.35, 0.6):
                rows += ts_cam(given.photos, rng, threshold)
    table = Table("figure", "photos", "largest difference")
    for name, number, off in rows:
        table.add_row(name, str(number), f"{off:.3g}")
    Console(width=110).print(table)
    raise SystemExit(int(max(off for _, _, off in rows) > 1e-9))


if __name__ == "__main__":
    main()
