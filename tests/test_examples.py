"""Drop-in: what pytorch-grad-cam and torch-cam return goes into molt.refine as it is, at three lines a script."""

from __future__ import annotations

import difflib
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import molt

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PAIRS = {"grad_cam": ("grad-cam.jpg", "grad-cam-refined.jpg"), "torch_cam": ("layer-cam.jpg", "layer-cam-refined.jpg")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run a script once, in a folder of its own; return its variables and the folder."""
    done: dict[str, tuple[dict[str, Any], Path]] = {}

    def run(name: str) -> tuple[dict[str, Any], Path]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
                done[name] = runpy.run_path(str(EXAMPLES / f"{name}.py")), folder
            sys.modules.pop("photo_and_network", None)
        return done[name]

    return run


@pytest.mark.parametrize("pair", PAIRS)
def test_molt_takes_three_lines(pair: str) -> None:
    plain, refined = ((EXAMPLES / f"{kind}_{pair}.py").read_text().splitlines() for kind in ("plain", "with"))
    changes = [line for line in difflib.ndiff(plain, refined) if line[0] != " "]
    assert [line[:2] for line in changes] == ["+ "] * 3
    assert changes[0] == "+ import molt"
    assert [line.count("molt.refine(") for line in changes] == [0, 1, 0]
    assert not [line for line in plain if "molt" in line]


@pytest.mark.parametrize("pair", PAIRS)
def test_scripts_write_their_pictures(pair: str, ran: Any) -> None:
    before, after = PAIRS[pair]
    _, plain = ran(f"plain_{pair}")
    _, folder = ran(f"with_{pair}")
    assert [p.name for p in plain.iterdir()] == [before]
    assert sorted(p.name for p in folder.iterdir()) == sorted([before, after])
    assert (plain / before).read_bytes() == (folder / before).read_bytes()
    pictures = [np.asarray(PIL.Image.open(folder / name), dtype=float) for name in (before, after)]
    assert pictures[0].shape == pictures[1].shape == (300, 451, 3)
    assert np.abs(pictures[0] - pictures[1]).mean() > 5


def test_grad_cam_goes_in_and_comes_out(ran: Any) -> None:
    values, _ = ran("with_grad_cam")
    given, refined = values["grayscale_cam"], values["refined_cam"]
    assert isinstance(given, np.ndarray) and isinstance(refined, np.ndarray)
    assert given.shape == refined.shape == (1, 300, 451)
    assert given.dtype == refined.dtype == np.float32
    assert refined.min() == 0 and refined.max() == 1
    assert np.abs(refined - given).mean() > 0.02
    assert int(values["cam"].outputs.argmax()) == 285


def test_torch_cam_goes_in_and_comes_out(ran: Any) -> None:
    values, _ = ran("with_torch_cam")
    cams, fused, refined = (values[name] for name in ("cams", "fused", "refined"))
    assert isinstance(cams, list) and [cam.shape[0] for cam in cams] == [1, 1]
    assert cams[0].shape != cams[1].shape
    assert refined.shape == (1, 300, 451) and refined.dtype == fused.dtype == torch.float32
    # torch-cam scales LayerCAM's maps before it fuses them, so their maximum is not 1.
    assert refined.amin() == 0 and torch.isclose(refined.amax(), fused.amax())
    stretched = torch.nn.functional.interpolate(fused[None], (300, 451), mode="bilinear")[0]
    assert (refined - stretched).abs().mean() > 0.02


def test_torch_cam_forms(ran: Any) -> None:
    """A list, one of its maps, the fused map: all are taken, and come back in kind."""
    values, _ = ran("with_torch_cam")
    cams, fused, img = (values[name] for name in ("cams", "fused", "img"))
    out = molt.refine(cams, img)
    assert isinstance(out, list) and [m.shape for m in out] == [(1, 300, 451)] * 2
    for refined, cam in zip(out, cams, strict=True):
        assert torch.equal(refined, molt.refine(cam, img))
    assert molt.refine(fused, img).shape == (1, 300, 451)
    assert torch.equal(molt.refine(fused.squeeze(0), img), molt.refine(fused, img)[0])


def test_grad_cam_of_a_batch(ran: Any) -> None:
    """The batch that a CAM object returns for a batch of inputs goes in with the photos stacked as they are."""
    from pytorch_grad_cam import GradCAM

    values, _ = ran("with_grad_cam")
    photos = np.stack([values["rgb_img"], values["rgb_img"][:, ::-1]])
    with GradCAM(model=values["model"], target_layers=[values["model"].blocks[-1]]) as cam:
        maps = cam(input_tensor=torch.from_numpy(photos).permute(0, 3, 1, 2) * 2 - 1, targets=None)
    out = molt.refine(maps, photos)
    assert out.shape == maps.shape == (2, 300, 451) and out.dtype == maps.dtype == np.float32
    assert not np.allclose(out[0], out[1])
