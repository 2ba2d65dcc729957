"""Training on a GPU: the CPU's steps, mixed precision, resuming, kept features. Run with `pytest -m gpu`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

import molt
from molt.data import read_set
from molt.training import Recipe, train
from molt.training.augment import AUGMENTATIONS
from molt.training.checkpoints import read_state
from molt.training.features import FeatureStore

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LR = 1e-3
TINY = Recipe(
    name="tiny",
    model="molt_deit_tiny",
    sizes=((32, 32), (48, 64)),
    freeze=False,
    epochs=1,
    batch=12,
    lr=LR,
    schedule="constant",
    augment="flip",
)
FROZEN = TINY.change(freeze=True, batch=5, epochs=3)


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Matrix products are float32 by default, convolutions are not."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photos of two classes, told apart by their colour."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(12):
        name, colour = (("blue", (20, 30, 220)), ("red", (220, 30, 20)))[number % 2]
        pixels = rng.integers(90, 160, (50, 70, 3))
        pixels[number : number + 24, 2 * number : 2 * number + 24] = colour
        (root / name).mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:02d}.png")
    return root


def go(folder: Path, out: Path, recipe: Recipe, device: str = DEVICE, **options: Any) -> Any:
    found = train(read_set(folder), out, recipe=recipe, device=device, pretrained=False, val_share=0.0, **options)
    assert json.loads((out / "run.json").read_text())["device"] == device
    return found


def gradients(out: Path) -> dict[str, torch.Tensor]:
    """AdamW's means after one step: a tenth of the gradients."""
    tensors, _ = read_state(out / "state.safetensors")
    return {name: value for name, value in tensors.items() if name.endswith(".exp_avg")}


def weights(path: Path) -> torch.Tensor:
    tensors = load_file(path)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize(
    "recipe",
    [TINY, TINY.change(head="spatial", pooling="mean"), TINY.change(clip_grad=0.1, loss_on="fused"), FROZEN],
    ids=["fine-tuned", "spatial", "clipped", "frozen"],
)
def test_a_step_is_that_of_the_cpu(folder: Path, tmp_path: Path, recipe: Recipe) -> None:
    recipe = recipe.change(epochs=1, batch=12)
    on_gpu, on_cpu = (go(folder, tmp_path / device, recipe, device) for device in (DEVICE, "cpu"))
    assert on_gpu.history[0]["loss"] == pytest.approx(on_cpu.history[0]["loss"], rel=1e-4)
    found, expected = gradients(tmp_path / DEVICE), gradients(tmp_path / "cpu")
    assert found.keys() == expected.keys() and len(found) >= 4
    whole = torch.cat([value.flatten() for value in expected.values()]).norm()
    assert whole > 0
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-3 * value.norm() + 1e-5 * whole, name
    # A first step of AdamW is lr times the gradient's sign, which rounding turns where there is next to no gradient.
    differ = (weights(on_gpu.last) - weights(on_cpu.last)).abs()
    assert differ.max() <= 2.1 * LR and (differ > 0.1 * LR).double().mean() < 0.02


def test_micro_batches_add_up(folder: Path, tmp_path: Path) -> None:
    go(folder, tmp_path / "whole", TINY)
    go(folder, tmp_path / "parts", TINY, micro=5, workers=2)
    found, expected = gradients(tmp_path / "parts"), gradients(tmp_path / "whole")
    whole = torch.cat([value.flatten() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-3 * value.norm() + 1e-5 * whole, name


class Stopped(Exception):
    pass


def stop(kind: str, values: dict[str, Any]) -> None:
    if kind == "epoch" and values["epoch"] == 2:
        raise Stopped


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("frozen", [False, True], ids=["fine-tuned", "frozen"])
def test_a_stopped_run_goes_on(folder: Path, tmp_path: Path, precision: str, frozen: bool) -> None:
    """Not to the bit, as on the CPU: kernels may add in another order."""
    recipe = (FROZEN if frozen else TINY).change(precision=precision, batch=5, epochs=4, lr=LR / 10)
    whole = go(folder, tmp_path / "whole", recipe)
    with pytest.raises(Stopped):
        go(folder, tmp_path / "parts", recipe, on_event=stop)
    tensors, header = read_state(tmp_path / "parts" / "state.safetensors")
    assert header["epoch"] == 2 and any(name.startswith("random.0.1") for name in tensors), "the device's random state"
    parts = go(folder, tmp_path / "parts", recipe, resume=True)
    assert [entry["epoch"] for entry in parts.history] == [1, 2, 3, 4]
    for found, expected in zip(parts.history, whole.history, strict=True):
        assert np.isfinite(found["loss"]) and found["loss"] == pytest.approx(expected["loss"], rel=0.02, abs=1e-3)
    last, end = (read_state(tmp_path / name / "state.safetensors") for name in ("parts", "whole"))
    steps = [{int(v) for k, v in held.items() if k.endswith(".step")} for held, _ in (last, end)]
    assert steps[0] == steps[1] and len(steps[0]) == 1
    # Six steps after the stop, each of about lr: a lost state would be seen in most weights.
    differ = (weights(parts.last) - weights(whole.last)).abs()
    assert differ.max() <= 12 * recipe.lr and differ.mean() < 0.1 * recipe.lr
    assert all(value.dtype == torch.float32 for name, value in last[0].items() if name.startswith("model."))
    if precision == "fp16":
        assert last[1]["scaler"] == end[1]["scaler"] and last[1]["scaler"]["scale"] > 0
        assert last[1]["scaler"]["_growth_tracker"] > 0, "steps since an overflow are counted over the stop"
    else:
        assert last[1]["scaler"] is None
    assert molt.load_model(parts.last).trained


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_kept_features_are_those_of_the_cpu(folder: Path, tmp_path: Path, precision: str) -> None:
    samples = read_set(folder).samples
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no photo")
    samples = (*samples[:7], type(samples[0])("broken.jpg", broken, 0, samples[0].boxes), *samples[7:])
    torch.manual_seed(0)
    model = molt.create_model("molt_deit_tiny", 2, (32, (48, 64)), pretrained=False).eval()
    model.freeze_backbones()
    kept = []
    for device in ("cpu", DEVICE):
        model.to(device)
        done: list[int] = []
        store = FeatureStore(model, tmp_path / device, samples, 2, AUGMENTATIONS["flip"], precision)
        store.fill(store.missing(range(13)), batch=4, device=torch.device(device), step=done.append)
        store.look(range(13))
        assert list(store.bad) == [7] and done == [4, 8, 12, 16, 20, 24, 26]
        rows = [row for row in range(26) if row // 2 != 7]
        kept.append([cache.read(rows) for cache in store.caches])
    for expected, found in zip(*kept, strict=True):
        for name, value in expected.items():
            off = (found[name] - value).norm(dim=1) / value.norm(dim=1)
            assert off.max() < (1e-3 if precision == "no" else 0.05), name


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_spatial_token_learns(folder: Path, tmp_path: Path, precision: str) -> None:
    recipe = TINY.change(head="spatial", pooling="mean", precision=precision, epochs=3, batch=6, lr=LR / 10)
    found = go(folder, tmp_path / "run", recipe)
    assert len(found.history) == 3 and all(np.isfinite(entry["loss"]) for entry in found.history)
    still = go(folder, tmp_path / "still", recipe.change(epochs=1, lr=1e-12))
    before, after = load_file(still.last), load_file(found.last)
    tokens = [name for name in before if name.endswith("spatial_token")]
    assert len(tokens) == 2 and all(not torch.allclose(before[name], after[name], atol=1e-6) for name in tokens)
    (result,) = molt.Localizer("molt_deit_tiny", checkpoint=found.last, device=DEVICE)(
        torch.rand(1, 3, 48, 64, device=DEVICE)
    )
    assert result.heat.shape == (1, 48, 64) and bool(result.heat.isfinite().all())
