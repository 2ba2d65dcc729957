"""What a localization figure was measured with: the knobs that differ between papers, and their presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # clovaai/wsolevaluation, evaluation.py. It has no Top-k Loc: its authors advise "and the class is right".
        "wsolevaluation": {
            "threshold": "best",
            "gt_map": "label",
            "topk_box": "own",
            "strict_topk": False,
            "strict_gt": False,
            "clip": True,
            "empty": (0, 0, 0, 0),
        },
        # vasgaowei/TS-CAM, lib/cams_deit.py.
        "ts-cam": {
            "gt_map": "label",
            "topk_box": "own",
            "strict_topk": True,
            "strict_gt": False,
            "clip": False,
            "empty": (0, 0, 1, 1),
        },
        # 164140757/SCM, tools_cam/test_cam.py: the best of 100 thresholds on the evaluated set.
        "scm": {"threshold": "best", "thresholds": 100, "gt_map": "top1"},
        # CATR, engine.py.
        "catr": {"gt_map": "top1", "topk_box": "top1"},
        # SAT: one map for all classes, cut at a level of its own scale, largest component by pixels.
        "sat": {"gt_map": "agnostic", "topk_box": "top1", "area": "pixels", "relative": False},
    }
)


@dataclass(frozen=True)
class Protocol:
    """How a figure was measured; ``str()`` is one line to print beside it.

    Attributes:
        metric: the metric's name, such as ``"MaxBoxAccV2"``.
        name: a preset's name, or ``"custom"``.
        settings: arguments of the metric by name, in the order in which they are printed.
        notes: what else a reader must know, such as that the threshold was chosen on the evaluated set.
    """

    metric: str
    name: str = "custom"
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @staticmethod
    def names() -> list[str]:
        """Return the presets' names."""
        return list(PRESETS)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Protocol:
        """Return a paper's settings for :class:`molt.evaluation.TopKLoc`, with ``changes`` over them.

        A preset holds what is known of the paper's code and nothing else: what it leaves out stays at the metric's
        default. ``"ts-cam"``, ``"catr"`` and ``"sat"`` use a fixed threshold that differs between data sets, so they
        hold none: give ``threshold=``.

        Raises:
            ValueError: an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"name: got {name!r}, expected one of {', '.join(PRESETS)}")
        changed = [key for key, value in changes.items() if key in PRESETS[name] and PRESETS[name][key] != value]
        notes = (f"changed from the preset: {', '.join(changed)}",) if changed else ()
        return cls("TopKLoc", name, {**PRESETS[name], **changes}, notes)

    def __str__(self) -> str:
        title = self.metric if self.name == "custom" else f"{self.metric} [{self.name}]"
        settings = ", ".join(f"{key}={_plain(value)}" for key, value in self.settings.items())
        return f"{title}: " + "; ".join([settings, *self.notes])


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(_plain(item) for item in value) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)
