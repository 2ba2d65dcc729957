"""What a method reaches: the scores of `molt evaluate`, and how often it names the photo's class among the set's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molt._files import whole_file
from molt.benchmark.method_rows import Entry
from molt.classes import OBJECT
from molt.data.annotations import Sample
from molt.data.images import PhotoError, read_photo
from molt.evaluation._spool import RunError
from molt.evaluation.maps import MapError
from molt.evaluation.runs import Map, Run, evaluate
from molt.evaluation.scores import interval, redraw

if TYPE_CHECKING:
    from molt.benchmark.method_table import Groups, Work

AT_ONCE = {"cpu": 4, "cuda": 16}


class _Seen:
    """Maps of a row for the evaluation; keeps what class each photo was given, and on disk for a later call."""

    def __init__(self, work: Work, entry: Entry, groups: Groups | None, path: Path) -> None:
        self.work, self.entry, self.groups, self.path = work, entry, groups, path
        self.labels = {} if work.restart else _read_labels(path)
        with whole_file(path) as part:  # what is appended later must begin a line
            part.write_text("".join(json.dumps([*key, label]) + "\n" for key, label in self.labels.items()), "utf-8")

    def __call__(self, samples: Sequence[Sample]) -> Iterator[Map]:
        """Yield a map, or why there is none, of each sample."""
        found: list[Map | None] = []
        pixels, wanted = [], []
        for sample in samples:
            try:
                if self._by_label and sample.label not in (self.groups or {}):
                    raise MapError(f"the method has no class for label {sample.label}", "one of its classes")
                pixels.append(read_photo(sample.path, self.entry.size).pixels)
                wanted.append(sample)
                found.append(None)
            except (PhotoError, OSError, MapError) as error:
                found.append(error)
        maps = iter(self._maps(torch.stack(pixels), wanted) if pixels else ())
        for entry in found:
            yield next(maps) if entry is None else entry

    def complete(self, run: Run, at_once: int) -> None:
        """Look again at scored photos whose class was not kept, as after a loss of the file.

        Raises:
            RunError: one that had a map gives no class now.
        """
        lost = [sample for sample in self.work.data.samples if (sample.name, sample.label) not in self.labels]
        for start in range(0, len(lost), at_once):
            for _ in self(lost[start : start + at_once]):
                pass
        for row in run.rows:
            if not row["problem"] and (str(row["name"]), int(row["label"])) not in self.labels:
                text = f"{self.path}: has no class of {row['name']}, which was scored, and it can no longer be seen"
                raise RunError(f"{text}; --restart throws the run away")

    @property
    def _by_label(self) -> bool:
        return self.work.gt_map == "label" and self.entry.class_names is not None

    def _maps(self, pixels: Tensor, samples: Sequence[Sample]) -> list[NDArray[np.float32]]:
        pick = partial(self._pick, samples)
        maps, logits = self.entry.see(pixels.to(self.work.device), pick)
        if logits is not None and self.groups:
            self._keep(samples, logits)
        return [values.numpy() for values in maps[:, 0].detach().float().cpu()]

    def _pick(self, samples: Sequence[Sample], logits: Tensor) -> Tensor:
        """Return (B, 1) the class whose map counts, of several of one label the likeliest."""
        if self.work.gt_map == "top1":
            return logits.argmax(-1, keepdim=True)
        if not self._by_label:
            return torch.full((len(logits), 1), OBJECT, device=logits.device)
        assert self.groups is not None
        chosen = []
        for sample, scores in zip(samples, logits.float().cpu(), strict=True):
            group = list(self.groups[sample.label])
            chosen.append(group[int(scores[group].argmax())] if len(group) > 1 else group[0])
        return torch.tensor(chosen, device=logits.device)[:, None]

    def _keep(self, samples: Sequence[Sample], logits: Tensor) -> None:
        """Note which of the set's classes each photo is taken for."""
        assert self.groups is not None
        labels = sorted(label for label, group in self.groups.items() if OBJECT not in group)
        if not labels:
            return
        scores = torch.stack([logits[:, list(self.groups[label])].amax(-1) for label in labels], -1)
        lines = []
        for sample, place in zip(samples, scores.argmax(-1).tolist(), strict=True):
            self.labels[sample.name, sample.label] = labels[place]
            lines.append(json.dumps([sample.name, sample.label, labels[place]]) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def _read_labels(path: Path) -> dict[tuple[str, int], int]:
    """Return the label given to each photo, by name and true label; a line that was cut off is left out."""
    found: dict[tuple[str, int], int] = {}
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        try:
            name, label, given = json.loads(line)
            found[str(name), int(label)] = int(given)
        except (ValueError, TypeError):
            continue
    return found


def score(work: Work, name: str, entry: Entry, groups: Groups | None, method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns on quality of a row."""
    folder = work.folder(name)
    seen = _Seen(work, entry, groups, folder.with_name(folder.name + ".classes.jsonl"))
    at_once = AT_ONCE[work.device]
    run = evaluate(
        work.data, seen, work.settings, method=method, out=folder, restart=work.restart, batch=at_once, sizes="trust"
    )
    found: dict[str, Any] = {"scores": run.info["scores"], "problems": run.info["problems"]["count"]}
    found["thresholds"] = [{key: e[key] for key in ("kind", "iou", "threshold")} for e in run.info["by_iou"]]
    if (main := run.info["scores"].get("max_box_acc_v2")) is not None:
        found |= {"score": main["value"], "interval": main["interval"]}
    return found | _accuracy(run, entry, groups, seen, at_once)


def _accuracy(run: Run, entry: Entry, groups: Groups | None, seen: _Seen, at_once: int) -> dict[str, Any]:
    """Return the share of photos taken for their own class among the set's; photos without a map count as wrong."""
    note = None
    if entry.class_names is None:
        note = "knows no classes"
    elif groups is None:
        note = "its classes are not the set's"
    elif any(OBJECT in group for group in groups.values()):
        note = "some of the set's classes are 'object' to it"
    if note is not None:
        return {"accuracy": None, "accuracy_note": note}
    seen.complete(run, at_once)
    right = np.array(
        [seen.labels.get((str(row["name"]), int(row["label"]))) == row["label"] for row in run.rows], np.float64
    )
    settings = run.settings
    drawn = np.concatenate([w @ right / len(right) for w in redraw(len(right), settings.draws, settings.seed)])
    low, high = interval(100 * drawn)
    return {"accuracy": {"value": 100 * float(right.mean()), "interval": [low, high], "photos": len(right)}}
