"""Training: what is learnt, resumed, shared between processes, refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

import molt
from molt.data import read_set
from molt.training import RECIPES, Recipe, TrainingError, run, run_files, train
from molt.training.checkpoints import read_state
from molt.training.setup import gather_photos, take_over

TINY = Recipe(
    name="tiny",
    model="molt_deit_tiny",
    sizes=((32, 32), (48, 48)),
    shared=True,
    epochs=3,
    batch=5,
    lr=3e-3,
    views=1,
    augment="none",
)
COLOURS = {"blue": (20, 30, 220), "red": (220, 30, 20)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen photos of two classes, told apart by their colour."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(13):
        name = ("blue", "red")[number % 2]
        pixels = rng.integers(90, 160, (40, 44, 3))
        top, left = rng.integers(0, 16, 2)
        pixels[top : top + 20, left : left + 20] = COLOURS[name]
        (root / name).mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:02d}.png")
    return root


def go(folder: Path, out: Path, recipe: Recipe = TINY, **options: Any) -> Any:
    own = {"pretrained": False, "val_share": 0.2, "device": "cpu", "cache": f"{out}/features"}
    options = own | options
    return train(read_set(folder), out, recipe=recipe, **options)


def tensors(path: Path, part: str = "") -> dict[str, torch.Tensor]:
    return {key: value for key, value in load_file(path).items() if part in key}


def same(a: Path, b: Path) -> None:
    """Both hold the same bits, and the same metadata."""
    assert a.read_bytes() == b.read_bytes()


def near(a: Path, b: Path, atol: float) -> None:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.allclose(value, second[key], rtol=0, atol=atol), key


def test_a_head_learns_and_its_file_is_a_localizer(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    found = go(
        folder, tmp_path / "run", TINY.change(epochs=40), on_event=lambda kind, values: seen.append((kind, values))
    )
    first, last = found.history[0], found.history[-1]
    assert last["loss"] < 0.5 * first["loss"] and last["accuracy"] == 1.0
    assert len(found.history) == 40 and found.skipped == []
    assert found.best_epoch == 1 + int(np.argmin([entry["val_loss"] for entry in found.history]))
    model = molt.load_model(found.best)
    assert model.trained and model.class_names == ("blue", "red")
    assert (model.config.pooling, model.config.clip, model.config.shared) == ("attention", True, True)
    result = molt.Localizer("molt_deit_tiny", checkpoint=found.last)(folder / "red" / "01.png")
    assert result.names[0] == "red"
    features = [values for kind, values in seen if kind == "features"]
    assert features[0]["done"] == 0 and features[-1]["done"] == features[-1]["total"] == 13
    steps = [values for kind, values in seen if kind == "step"]
    assert len(steps) == 40 * 2 and steps[-1]["step"] == steps[-1]["steps"] == 2
    about = json.loads((found.folder / run_files.RUN).read_text())
    assert about["photos"] == {"train": 10, "held_out": 3} and about["best"]["epoch"] == found.best_epoch
    assert about["trained_parameters"] == 2 * 192 * 9 + 2


def test_kept_features_and_live_photos_teach_the_same(folder: Path, tmp_path: Path) -> None:
    for pooling in ("attention", "mean"):
        recipe = TINY.change(pooling=pooling, shared=False)
        kept = go(folder, tmp_path / f"kept-{pooling}", recipe)
        live = go(folder, tmp_path / f"live-{pooling}", recipe, cache=None)
        near(kept.last, live.last, 1e-4)
        assert kept.history[-1]["val_loss"] == pytest.approx(live.history[-1]["val_loss"], abs=1e-4)


def test_frozen_backbones_stay_and_others_learn(folder: Path, tmp_path: Path) -> None:
    frozen = go(folder, tmp_path / "frozen", TINY.change(epochs=1))
    fine = go(folder, tmp_path / "fine", TINY.change(epochs=1, freeze=False, drop_path=0.5, augment="crop"))
    start = go(folder, tmp_path / "start", TINY.change(epochs=1, lr=1e-12))
    before, after, still = (tensors(one.last, ".backbone.") for one in (start, fine, frozen))
    assert all(torch.equal(before[key], still[key]) for key in before)
    assert all(not torch.equal(before[key], after[key]) for key in before if "qkv.weight" in key)


def test_a_small_file_where_backbones_can_be_had_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = molt.create_model("molt_deit_tiny", 2, (32,), pretrained=False, class_names=["blue", "red"])
    found = go(folder, tmp_path / "run", TINY.change(epochs=1), model=model)
    assert tensors(found.last, ".backbone."), "random backbones are kept"
    monkeypatch.setattr(model, "weights", (molt.structures.WeightsInfo("x", "package x", "no", True),))
    found = go(folder, tmp_path / "again", TINY.change(epochs=1), model=model)
    assert not tensors(found.last, ".backbone.") and tensors(found.last, "head")


def test_frozen_backbones_of_a_file_stay_in_the_file(folder: Path, tmp_path: Path) -> None:
    first = go(folder, tmp_path / "first", TINY.change(epochs=1, freeze=False))
    found = go(folder, tmp_path / "run", TINY.change(epochs=2), model=molt.load_model(first.best))
    before, after = tensors(first.best, ".backbone."), tensors(found.best, ".backbone.")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert molt.load_model(found.last).trained


def own(**changes: Any) -> molt.MOLT:
    torch.manual_seed(0)
    return molt.create_model("molt_deit_tiny", 2, (32,), pretrained=False, pooling="attention", **changes)


def test_a_model_without_names_takes_those_of_the_photos(folder: Path, tmp_path: Path) -> None:
    recipe = TINY.change(epochs=1)
    found = go(folder, tmp_path / "run", recipe, model=own())
    assert molt.load_model(found.best).config.class_names == ("blue", "red")
    localizer = molt.Localizer("molt_deit_tiny", checkpoint=found.best)
    assert localizer(folder / "red" / "01.png", classes="red").names == ["red"]
    named = own(class_names=["blue", "red"])
    same(go(folder, tmp_path / "named", recipe, model=named).best, found.best)
    for number, model in enumerate((own(), named, molt.load_model(found.last))):  # the same run as that of no names
        shutil.copytree(tmp_path / "run", tmp_path / f"again-{number}")
        assert len(go(folder, tmp_path / f"again-{number}", recipe, model=model, resume=True).history) == 1


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_any_precision_are_trained_in_float32(
    folder: Path, tmp_path: Path, dtype: torch.dtype, freeze: bool
) -> None:
    recipe = TINY.change(epochs=2, freeze=freeze)
    given = own().to(dtype)
    found = go(folder, tmp_path / "run", recipe, model=given)
    assert np.isfinite(found.history[-1]["loss"])
    model = molt.load_model(found.best)
    assert {value.dtype for value in model.parameters()} == {torch.float32} and model.trained
    plain = go(folder, tmp_path / "plain", recipe, model=own().to(dtype).float())
    same(plain.best, found.best)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    assert len(go(folder, tmp_path / "again", recipe, model=own().to(dtype), resume=True).history) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_rounded_backbones_are_kept_in_the_file(
    folder: Path, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own().to(dtype)
    monkeypatch.setattr(model, "weights", (molt.structures.WeightsInfo("x", "package x", "no", True),))
    found = go(folder, tmp_path / "run", TINY.change(epochs=1), model=model)
    assert bool(tensors(found.best, ".backbone.")) == (dtype == torch.float16), "they could not be had again"
    weights = json.loads((found.folder / run_files.RUN).read_text())["weights"]
    assert [used["source"] for used in weights] == ["float16 of package x" if dtype == torch.float16 else "package x"]


def test_taking_a_model_over_is_no_training() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert not take_over(own().to(dtype), ("blue", "red")).trained


def test_accumulation_of_the_environment_is_not_heeded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = TINY.change(epochs=1)
    plain = go(folder, tmp_path / "plain", recipe)
    seen = []
    backward = run.Accelerator.backward

    def note(self: Any, loss: torch.Tensor, **named: Any) -> None:
        seen.append(self.gradient_accumulation_steps)
        backward(self, loss, **named)

    monkeypatch.setattr(run.Accelerator, "backward", note)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    same(go(folder, tmp_path / "run", recipe).last, plain.last)
    assert set(seen) == {1}


def test_views_of_flips_double_the_features(folder: Path, tmp_path: Path) -> None:
    found = go(folder, tmp_path / "run", TINY.change(augment="flip", views=2), cache=tmp_path / "cache")
    plain = go(folder, tmp_path / "plain", TINY, cache=tmp_path / "cache")
    assert found.history[-1]["loss"] != plain.history[-1]["loss"]
    seen: list[Any] = []
    go(
        folder,
        tmp_path / "third",
        TINY.change(augment="flip", views=2, epochs=1),
        model=molt.load_model(found.last),
        cache=tmp_path / "cache",
        seed=7,
        on_event=lambda kind, values: seen.append((kind, values)),
    )
    filled = [values["total"] for kind, values in seen if kind == "features"]
    before, now = (set(gather_photos(read_set(folder), None, 0.2, seed).held) for seed in (0, 7))
    assert before - now and set(filled) == {len(before - now)}, "all but photos that were held out before are there"


def double() -> molt.MOLT:
    """In float64: Adam divides by a gradient's size, which makes much of float32's rounding where that is near 0."""
    torch.manual_seed(0)
    names = ["blue", "red"]
    model = molt.create_model("molt_deit_tiny", 2, (32, 48), pretrained=False, pooling="attention", class_names=names)
    for transformer, size in zip(model.transformers, model.config.sizes, strict=True):
        transformer.backbone.model.blocks = transformer.backbone.model.blocks[:2]
        transformer.backbone.model.set_input_size(size)  # timm resamples position embeddings in float32
    model.float = lambda: model  # which training would bring it to
    return model.double()


def test_sums_over_small_passes_are_one_step(folder: Path, tmp_path: Path) -> None:
    for freeze in (True, False):
        recipe = TINY.change(freeze=freeze, epochs=1, lr=1e-3)
        whole = go(folder, tmp_path / f"whole-{freeze}", recipe, cache=None, model=double())
        parts = go(folder, tmp_path / f"parts-{freeze}", recipe, cache=None, micro=2, model=double())
        near(whole.last, parts.last, 1e-9)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def untimed(value: Any) -> Any:
    """Drop all that was measured in seconds."""
    if isinstance(value, dict):
        return {key: untimed(one) for key, one in value.items() if "second" not in key}
    return [untimed(one) for one in value] if isinstance(value, list) else value


FINE = TINY.change(
    freeze=False, drop_path=0.3, augment="crop", sizes=((32, 32),), epochs=2, backbone_lr=1e-4, warmup=1.0
)


@pytest.mark.parametrize("recipe", [TINY, FINE], ids=["heads", "fine-tuning"])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(
    folder: Path, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(folder, tmp_path / "whole", recipe)
    out = tmp_path / "stopped"
    places = {"step": 3, "best": 1, "last": 2, "state": 4, f"run {recipe.epochs}": 1}

    def stop_at(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            target = {"model": lambda: Path(arguments[1]).stem, "run": lambda: f"run {arguments[0].epoch}"}.get(
                name, lambda: name
            )()
            places[target] = places.get(target, 0) - 1
            if places[target] == 0:
                raise Killed
            return original(*arguments, **named)

        return wrapped

    monkeypatch.setattr(run.Run, "_one_step", stop_at("step", run.Run._one_step))
    monkeypatch.setattr(run_files, "save_model", stop_at("model", run_files.save_model))
    monkeypatch.setattr(run_files, "_summary", stop_at("run", run_files._summary))  # after the state
    monkeypatch.setattr(run_files, "write_state", stop_at("state", run_files.write_state))
    stops = 0
    for _ in range(10):
        try:
            found = go(folder, out, recipe, resume=True, save_minutes=0)
            break
        except Killed:
            stops += 1
    assert stops == 5 and max(places.values()) <= 0
    same(whole.last, found.last)
    same(whole.best, found.best)
    assert untimed(whole.history) == untimed(found.history)
    about, other = (json.loads((one.folder / run_files.RUN).read_text()) for one in (whole, found))
    assert untimed(about) == untimed(other)


SCRIPT = """
import atexit, os, signal, sys
import torch
from pathlib import Path
from molt.data import read_set
from molt.training import Recipe, train
import json
sys.path.insert(0, os.path.join(os.getcwd(), "tests"))
from test_training import double
recipe = Recipe.from_json(json.loads(sys.argv[1]))
kill = int(sys.argv[4])
count = 0
def event(kind, values):
    global count
    count += kind == "step"
    if kill and count == kill:
        os.kill(os.getpid(), signal.SIGKILL)
@atexit.register  # called after what the training leaves for the exit
def parted():
    if torch.distributed.is_initialized():
        os._exit(3)
for _ in range(2):  # the second finds a finished run: processes stay together between two trainings
    train(read_set(sys.argv[2]), sys.argv[3], recipe=recipe, pretrained=False, val_share=0.2, device="cpu",
          resume=True, save_minutes=0, on_event=event, model=double() if recipe.name == "double" else None)
"""


def start(arguments: list[str], recipe: Recipe, folder: Path, out: Path, kill: int = 0) -> subprocess.CompletedProcess:
    given = arguments or ["-c", SCRIPT]
    command = [sys.executable, *given, json.dumps(recipe.to_json()), str(folder), str(out), str(kill)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path.cwd())}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_killed_process_is_resumed_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    first = start([], FINE, folder, tmp_path / "killed", kill=3)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert read_state(tmp_path / "killed" / run_files.STATE)[1]["step"] in (0, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have
    try:
        whole = go(folder, tmp_path / "whole", FINE)
        resumed = go(folder, tmp_path / "killed", FINE, resume=True)
    finally:
        torch.set_num_threads(threads)
    same(whole.last, resumed.last)
    same(whole.best, resumed.best)


@pytest.mark.parametrize("kind", ["heads", "double"])
def test_two_processes_are_one(folder: Path, tmp_path: Path, kind: str) -> None:
    """Batches of 9 and a last one of 1, so that shares differ and one is empty."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    recipe = TINY.change(batch=9, epochs=4)
    if kind == "double":
        recipe = FINE.change(name="double", drop_path=0.0, batch=9, lr=1e-3, clip_grad=1.0)
    two = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    done = start(two, recipe, folder, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    model = double() if kind == "double" else None
    began = {} if model is None else {key: value.clone() for key, value in model.state_dict().items()}
    one = go(folder, tmp_path / "one", recipe, model=model)
    about = json.loads((tmp_path / "two" / run_files.RUN).read_text())
    assert about["processes"] == 2
    tolerance = 1e-5 if kind == "heads" else 1e-9
    near(one.last, tmp_path / "two" / run_files.LAST, tolerance)
    near(one.best, tmp_path / "two" / run_files.BEST, tolerance)
    for entry, other in zip(one.history, about["history"], strict=True):
        assert other["val_loss"] == pytest.approx(entry["val_loss"], abs=1e-5)
        assert other["accuracy"] == entry["accuracy"]
    for key, value in load_file(one.last).items():
        assert not began or "weight" not in key or (value - began[key]).abs().max() > 1e-5, "it was trained"


def test_precision_compile_and_tensorboard(folder: Path, tmp_path: Path) -> None:
    plain = go(folder, tmp_path / "plain")
    low = go(folder, tmp_path / "low", TINY.change(precision="bf16"))
    assert low.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], rel=0.05)
    assert low.history[-1]["loss"] != plain.history[-1]["loss"]
    compiled = go(folder, tmp_path / "compiled", compile=True, tensorboard=True)
    near(plain.last, compiled.last, 1e-5)
    assert len(list((tmp_path / "compiled" / "tensorboard").glob("events*"))) == 1


def test_heads(folder: Path, tmp_path: Path) -> None:
    token = go(folder, tmp_path / "token", TINY.change(head="class_token", epochs=30))
    assert token.history[-1]["accuracy"] > 0.8
    recipe = TINY.change(head="spatial", epochs=2, lr=1e-2)
    spatial, without = (
        go(folder, tmp_path / f"spatial-{weight}", recipe.change(spatial_weight=weight)) for weight in (1.0, 0.0)
    )
    start = go(folder, tmp_path / "start", recipe.change(lr=1e-12))
    token = "transformers.0.spatial_token"
    trained, plain, fresh = (load_file(one.last)[token] for one in (spatial, without, start))
    assert (trained - fresh).abs().max() > 1e-3 and (trained - plain).abs().max() > 1e-4
    assert spatial.history[0]["loss"] > without.history[0]["loss"], "the terms on its masks add to the loss"
    assert not (spatial.folder / run_files.FEATURES).exists()


def test_validation_photos_of_their_own(folder: Path, tmp_path: Path) -> None:
    data = read_set(folder)
    with pytest.raises(ValueError, match="val: 13 photos are in data too"):
        train(data, tmp_path / "run", recipe=TINY, val=data, pretrained=False, device="cpu")
    shutil.copytree(folder, tmp_path / "others")
    others = read_set(tmp_path / "others")
    found = train(data, tmp_path / "run", recipe=TINY, val=[others, others], pretrained=False, device="cpu")
    about = json.loads((found.folder / run_files.RUN).read_text())
    assert about["photos"] == {"train": 13, "held_out": 26}
    none = train(data, tmp_path / "none", recipe=TINY, val_share=0, pretrained=False, device="cpu")
    assert none.best_epoch == 3 and none.history[-1]["val_loss"] is None
    same(none.best, none.last)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    for path in folder.rglob("*.png"):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / path.name).write_bytes(path.read_bytes())
    (copy / "red" / "03.png").write_bytes(b"no photo")
    (copy / "blue" / "04.png").write_bytes((copy / "blue" / "04.png").read_bytes()[:200])
    return copy


def test_photos_that_cannot_be_read_are_skipped_and_listed(damaged: Path, tmp_path: Path) -> None:
    for cache in ("auto", None):
        found = go(damaged, tmp_path / f"run-{cache}", cache=cache)
        assert [name for name, _ in found.skipped] == ["blue/04.png", "red/03.png"]
        assert "red/03.png" in found.skipped[1][1]
        assert json.loads((found.folder / run_files.RUN).read_text())["skipped"][1][0] == "red/03.png"
    for path in damaged.rglob("*.png"):
        path.write_bytes(b"nothing")
    for cache in ("auto", None):
        with pytest.raises(TrainingError, match="none of 10 photos can be read"):
            go(damaged, tmp_path / f"none-{cache}", cache=cache)


def test_a_loss_that_is_not_finite_stops_and_says_where(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = run.classification_loss, [0]

    def losses(*arguments: Any, **named: Any) -> torch.Tensor:
        calls[0] += torch.is_grad_enabled()
        found = original(*arguments, **named)
        return found * float("nan") if calls[0] == 4 else found

    monkeypatch.setattr(run, "classification_loss", losses)
    with pytest.raises(TrainingError, match=r"the loss is nan in epoch 2, batch 2 of 2 \(.*png") as caught:
        go(folder, tmp_path / "run")
    assert str(tmp_path / "run" / run_files.STATE) in str(caught.value)
    state, header = read_state(tmp_path / "run" / run_files.STATE)
    assert header["epoch"] == 1 and all(value.isfinite().all() for value in state.values() if value.is_floating_point())
    monkeypatch.setattr(run, "classification_loss", original)
    resumed, whole = go(folder, tmp_path / "run", resume=True), go(folder, tmp_path / "whole")
    same(resumed.last, whole.last)


def test_a_rate_that_explodes_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="epoch 1, batch 2"):
        go(folder, tmp_path / "run", TINY.change(lr=1e37, schedule="constant"))
    assert not (tmp_path / "run" / run_files.STATE).exists()


@pytest.mark.parametrize("steps", [{"epochs": 1}, {"batch": 50}])
def test_weights_that_are_not_finite_are_never_kept(folder: Path, tmp_path: Path, steps: dict[str, Any]) -> None:
    """The loss of a step that goes wrong is still finite: its weights are looked at."""
    recipe = TINY.change(lr=1e37, schedule="constant", **({"batch": 50} | steps))
    with pytest.raises(TrainingError, match="not finite after epoch 1, batch 1 of 1"):
        go(folder, tmp_path / "run", recipe)
    assert not [path for path in (tmp_path / "run").glob("*") if path.is_file()]


def test_the_last_good_state_outlives_weights_that_are_not_finite(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = run.Run._one_step

    def step(self: run.Run, inputs: Any) -> None:
        original(self, inputs)
        if (self.epoch, self.step) == (1, 1):
            next(self.source.net.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(run.Run, "_one_step", step)
    with pytest.raises(TrainingError, match="weight is not finite after epoch 2"):
        go(folder, tmp_path / "run")
    monkeypatch.setattr(run.Run, "_one_step", original)
    resumed, whole = go(folder, tmp_path / "run", resume=True), go(folder, tmp_path / "whole")
    same(resumed.last, whole.last)
    same(resumed.best, whole.best)


def test_what_is_not_heeded_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="augment 'crop' does nothing to kept features of one view"):
        go(folder, tmp_path / "run", TINY.change(augment="crop"))
    with pytest.raises(ValueError, match="views apply to kept features alone"):
        go(folder, tmp_path / "run", TINY.change(views=2), cache=None)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_old_files(folder: Path, tmp_path: Path) -> None:
    found = go(folder, tmp_path / "run", TINY.change(epochs=1))
    before = {path.name: path.read_bytes() for path in found.folder.iterdir() if path.is_file()}
    header = read_state(found.folder / run_files.STATE)[1]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError, match=r"safetensors"):
            run_files.write_state(found.folder / run_files.STATE, {"x": torch.zeros(10_000)}, header)
        with pytest.raises(OSError, match=r"safetensors"):
            molt.load_model(found.last).save(found.last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name: path.read_bytes() for path in found.folder.iterdir() if path.is_file()} == before


def test_another_run_is_never_mixed_in(folder: Path, tmp_path: Path) -> None:
    go(folder, tmp_path / "run", TINY.change(epochs=1))
    with pytest.raises(TrainingError, match="holds a run: resume it"):
        go(folder, tmp_path / "run", TINY.change(epochs=1))
    for change, named in (({"lr": 1e-4}, "other lr: 0.003, now 0.0001"), ({"batch": 4}, "other batch")):
        with pytest.raises(TrainingError, match=named):
            go(folder, tmp_path / "run", TINY.change(epochs=1, **change), resume=True)
    with pytest.raises(TrainingError, match="other seed: 0, now 1"):
        go(folder, tmp_path / "run", TINY.change(epochs=1), resume=True, seed=1)
    names = {"class_names": ["blue", "red"], "pooling": "attention", "clip": True}
    model = molt.create_model("molt_deit_tiny", 2, (32, 48), True, pretrained=False, **names)
    with pytest.raises(TrainingError, match="other backbones"):
        go(folder, tmp_path / "run", TINY.change(epochs=1), resume=True, model=model)
    state = tmp_path / "run" / run_files.STATE
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(TrainingError, match="no state of a training run"):
        go(folder, tmp_path / "run", TINY.change(epochs=1), resume=True)
    state.unlink()
    with pytest.raises(TrainingError, match="its state is lost"):
        go(folder, tmp_path / "run", TINY.change(epochs=1), resume=True)


def other(**changes: Any) -> molt.MOLT:
    return molt.create_model("molt_deit_tiny", pretrained=False, sizes=(32,), **changes)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"recipe": "best"}, ValueError, "recipe must be one of default, fine-tune, ts-cam"),
    (
        {"model": other(num_classes=3)},
        ValueError,
        r"model has 3 classes, the photos have 2 \(blue, red\): a model is trained",
    ),
    ({"model": other(num_classes=2, class_names=["blue", "green"])}, ValueError, "class 1 is 'green', .* 'red'"),
    ({"val_share": 1.0}, ValueError, r"val_share must be in \[0, 1\)"),
    ({"micro": 0}, ValueError, "micro must be at least 1"),
    ({"workers": -1}, ValueError, "workers must be in 0"),
    ({"device": "tpu"}, ValueError, "device must be"),
    ({"seed": -1}, ValueError, "seed must be in 0"),
    ({"model": "molt_deit_tiny"}, TypeError, "model must be a MOLT .* or None, got 'molt_deit_tiny'"),
    ({"cache": 5}, TypeError, "cache must be 'auto', the path of a folder or None, got int"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_named(folder: Path, tmp_path: Path, case: int) -> None:
    options, kind, text = BAD[case]
    with pytest.raises(kind, match=text):
        go(folder, tmp_path / "run", **({"recipe": TINY} | options))
    assert not (tmp_path / "run").exists()


def test_out_must_be_a_path(folder: Path) -> None:
    with pytest.raises(TypeError, match="out must be the path of a folder, got NoneType"):
        go(folder, None)  # type: ignore[arg-type]


def test_sets_that_cannot_be_learnt_are_told(folder: Path, tmp_path: Path) -> None:
    def cut(name: str, keep: Callable[[Path], bool], more: str | None = None) -> Path:
        for path in filter(keep, sorted(folder.rglob("*.png"))):
            (tmp_path / name / path.parent.name).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path.parent.name / path.name).write_bytes(path.read_bytes())
        if more:
            (tmp_path / name / more).mkdir()
        return tmp_path / name

    with pytest.raises(ValueError, match="no photo of the class 'green'"):
        go(cut("empty", lambda path: True, "green"), tmp_path / "run")
    with pytest.raises(ValueError, match="one class 'red'"):
        go(cut("alone", lambda path: path.parent.name == "red"), tmp_path / "run")
    with pytest.raises(ValueError, match="one photo in all"):
        go(cut("single", lambda path: path.name == "01.png", "blue"), tmp_path / "run")
    three = read_set(cut("three", lambda path: True, "green"))
    with pytest.raises(ValueError, match="must have the same classes: green is in three alone"):
        train([read_set(folder), three], tmp_path / "run", recipe=TINY, pretrained=False)
    assert not (tmp_path / "run").exists()


def test_several_sets_are_joined(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "others")
    data = [read_set(folder), read_set(tmp_path / "others")]
    found = train(data, tmp_path / "run", recipe=TINY, val_share=0, pretrained=False, device="cpu")
    assert json.loads((found.folder / run_files.RUN).read_text())["photos"]["train"] == 26


@pytest.mark.parametrize("way", ["same", "link", "dots", "linked photos"])
def test_a_photo_is_the_same_by_any_path(folder: Path, tmp_path: Path, way: str) -> None:
    if way == "same":
        again = folder
    elif way == "dots":
        again = folder / "red" / ".." / ".." / folder.name
    elif way == "link":
        again = tmp_path / "link"
        again.symlink_to(folder, target_is_directory=True)
    else:
        again = tmp_path / "linked"
        for path in folder.rglob("*.png"):
            (again / path.parent.name).mkdir(parents=True, exist_ok=True)
            (again / path.parent.name / f"a-{path.name}").symlink_to(path)
    sets = read_set(folder), read_set(again)
    with pytest.raises(ValueError, match="val: 13 photos are in data too"):
        gather_photos(sets[0], sets[1], 0.1, 0)
    with pytest.raises(ValueError, match=r"data: 13 photos are in two of its sets, such as .*00\.png: take each once"):
        gather_photos(sets, None, 0.1, 0)


def test_a_photo_of_two_classes_stays_in_training(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "both")
    for path in sorted((tmp_path / "both" / "blue").glob("*.png"))[:6]:
        (tmp_path / "both" / "red" / f"x-{path.name}").symlink_to(path)
    for seed in range(4):
        found = gather_photos(read_set(tmp_path / "both"), None, 0.4, seed)
        held = {os.path.realpath(found.samples[i].path) for i in found.held}
        assert len(held) == 6 and not held & {os.path.realpath(found.samples[i].path) for i in found.train}


def test_recipes_hold_and_are_plain_values() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.name == name and Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    # TS-CAM's code counts epochs from 1: a tenth at 30 and 60 of 60, and at 10, 12 and 20 of 20.
    rates = [RECIPES["ts-cam"].rate(epoch - 1, epoch - 1) for epoch in range(1, 61)]
    assert np.allclose(rates, [1.0] * 29 + [0.1] * 30 + [0.01])
    rates = [RECIPES["ts-cam-ilsvrc"].rate(epoch - 1, epoch - 1) for epoch in range(1, 21)]
    assert np.allclose(rates, [1.0] * 9 + [0.1] * 2 + [0.01] * 8 + [0.001])
    warm = Recipe(epochs=10, warmup=2.0, final_lr=0.1)
    assert [warm.rate(p, int(p)) for p in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.5, 1, 0.55, 0.1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epochs": 0}, "epochs must be in 1"),
        ({"lr": 0}, "lr must be finite and above 0"),
        ({"drop_path": 2}, "drop_path must be in"),
        ({"head": "mlp"}, "head must be one of"),
        ({"warmup": 99.0}, "warmup must be at most epochs"),
        ({"milestones": (0,), "schedule": "steps"}, "milestones must be at least 1"),
        ({"milestones": (3,)}, "milestones go with schedule 'steps'"),
        ({"schedule": "steps"}, "milestones go with schedule 'steps'"),
        ({"backbone_lr": 0.1}, "backbone_lr does not apply to frozen backbones"),
        ({"clip": 1}, "clip must be True or False"),
        ({"speed": 1}, "a recipe has no speed"),
    ],
)
def test_bad_recipes_are_told(change: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        Recipe.from_json(Recipe().to_json() | change)
