"""Run by the Python that has molt installed, outside the source tree: every operator's compiled form against its twin.

It wants torch, NumPy and SciPy and nothing else; an operator without its compiled form fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import molt
from molt import ops

GENERATOR = torch.Generator().manual_seed(0)
MAPS = torch.rand(3, 2, 90, 91, generator=GENERATOR)
SMALL = torch.rand(3, 2, 7, 9, generator=GENERATOR)
SMALLER = torch.rand(3, 2, 5, 4, generator=GENERATOR)
LABELS = torch.randint(7, (3, 90, 91), generator=GENERATOR)
SEGMENTS = torch.arange(90 * 91).view(90, 91).div(91 * 9, rounding_mode="floor").expand(3, -1, -1).contiguous()
# Three directions far apart, so that no rounding decides a label.
POINTS = torch.eye(5)[torch.arange(40) % 3] + 0.05 * torch.rand(2, 40, 5, generator=GENERATOR)

CHECKS: dict[str, Callable[[str], Any]] = {
    "upsample_normalize": lambda backend: ops.upsample_normalize(SMALL, (90, 91), backend=backend),
    "fuse_maps": lambda backend: ops.fuse_maps([SMALL, SMALLER], (90, 91), [0.25, 0.75], backend=backend),
    "cluster_mean": lambda backend: ops.cluster_mean(MAPS, LABELS, 8, backend=backend),
    "cluster_refine": lambda backend: ops.cluster_refine(MAPS, LABELS, 0.5, 7, backend=backend),
    "fuse_and_refine": lambda backend: ops.fuse_and_refine([SMALL, SMALLER], LABELS, 0.5, 7, backend=backend),
    "cluster_vote": lambda backend: ops.cluster_vote(LABELS, SEGMENTS, 7, 10, backend=backend),
    "component_boxes": lambda backend: ops.component_boxes(MAPS, 0.75, backend=backend),
    "largest_box": lambda backend: ops.largest_box(MAPS, 0.75, backend=backend),
    "kmeans": lambda backend: ops.kmeans(POINTS, 3, restarts=4, seed=1, backend=backend),
    "slic": lambda backend: ops.slic(MAPS.expand(-1, 2, -1, -1), 20, 0.5, lab=False, backend=backend),
}


def tensors(result: Any) -> list[torch.Tensor]:
    """Return an operator's outputs, be it a tensor, a tuple or Components."""
    if isinstance(result, torch.Tensor):
        return [result]
    return list(result if isinstance(result, tuple) else vars(result).values())


def check_twins() -> None:
    """Both backends agree, integers exactly, and what they return is not empty."""
    for name, call in CHECKS.items():
        native, reference = tensors(call("native")), tensors(call("reference"))
        assert native, name
        assert len(native) == len(reference), name
        for ours, theirs in zip(native, reference, strict=True):
            assert ours.numel() > 0, name
            torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def check_cluster_refine() -> None:
    """Gradient, torch.compile, the error for a label out of range, and torch's own checks of an operator."""
    maps = MAPS.clone().requires_grad_()
    out = ops.cluster_refine(maps, LABELS, 0.5, 7, backend="native")
    (grad,) = torch.autograd.grad(out.sum(), maps)
    torch.testing.assert_close(grad, torch.ones_like(grad))
    compiled = torch.compile(lambda m, x, k: ops.cluster_refine(m, x, 0.5, k), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(maps, LABELS, 7), out)
    assert torch.equal(compiled(maps[:2], LABELS[:2], 8), out[:2])
    with molt.backend("reference"):
        assert compiled(maps, LABELS, 7).grad_fn is not None
        torch.testing.assert_close(compiled(maps, LABELS, 7), out)
    message = "nothing: a label out of range went through"
    try:
        ops.cluster_refine(maps, LABELS, 0.5, 3)
    except ValueError as error:
        message = str(error)
    assert "expected values in [0, 3)" in message, message
    torch.library.opcheck(torch.ops.molt.cluster_refine.default, (maps, LABELS, 0.5, 7, None))


if __name__ == "__main__":
    config = molt.config()
    assert config["native"], config["native_missing"]
    # A CUDA half loads where torch has the same major version of CUDA, with or without a GPU.
    build = config["native_build"]
    built_for = build["torch"].partition("+cu")[2][:2]
    if build["cuda_archs"] and (torch.version.cuda or "").split(".")[0] == built_for:
        assert config["cuda"], config["cuda_missing"]
    check_cluster_refine()
    check_twins()
    print("ok: torch", torch.__version__, "runs what", build["torch"], "built:", *CHECKS)
    print("CUDA half:", "loaded" if config["cuda"] else config["cuda_missing"])
