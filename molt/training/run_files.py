"""What a run leaves in its folder, and how it is taken up again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

import molt
from molt._files import whole_file
from molt.methods.molt import MOLT, backbone_digest
from molt.training.checkpoints import TrainingError, load_optimizer, optimizer_tensors, read_state, write_state
from molt.training.setup import networks

if TYPE_CHECKING:
    from molt.training.run import Run

STATE, BEST, LAST, RUN, FEATURES = "state.safetensors", "best.safetensors", "last.safetensors", "run.json", "features"


def trained_tensors(model: MOLT) -> dict[str, Tensor]:
    """Return what training changes, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def save_model(model: MOLT, path: Path) -> None:
    """Write a model; its backbones only where they are trained or could not be had again."""
    sources = [info.source for info in model.weights[: len(model.transformers)]]
    elsewhere = all(source.startswith(("package ", "hub ")) for source in sources)
    model.save(path, backbones=not elsewhere or any(".backbone." in name for name in trained_tensors(model)))


def identity(run: Run) -> dict[str, Any]:
    """Return what two runs must share for one to go on from the other's state."""
    config = run.model.config
    values = {  # in the order in which differences are told
        "seed": run.seed,
        "classes": list(run.photos.classes),
        "recipe": run.recipe.to_json(),
        "photos": run.photos.digest,
        "features kept": run.kept,
        "model": [config.name, config.backbone, config.sizes, config.head, config.pooling, config.clip],
        "backbones": [backbone_digest(network) for network in networks(run.model)] if run.recipe.freeze else None,
    }
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def save_run(run: Run) -> None:
    """Write the state, and then what follows from it; all processes must call it.

    Where the state cannot be written all files are from before. A run killed after it was written gets the others when
    it is resumed.
    """
    random = _random_states(run)
    if run.world > 1:  # each process knows the photos that it could not read itself
        for bad in gather_object([run.bad]):
            run.bad |= bad
    if not run.accelerator.is_main_process:
        return
    held, about = optimizer_tensors(run.optimizer)
    tensors = {f"model.{name}": value for name, value in trained_tensors(run.model).items()} | held | random
    scaler = getattr(run.accelerator, "scaler", None)
    header = identity(run) | {
        "epoch": run.epoch,
        "step": run.step,
        "sums": run.sums.tolist(),
        "history": run.history,
        "best": run.best,
        "bad": {str(i): text for i, text in run.bad.items()},
        "seconds": run.seconds,
        "feature_seconds": run.feature_seconds,
        "feature_photos": run.feature_photos,
        "optimizer": about,
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    write_state(run.out / STATE, tensors, header)
    save_outcome(run)


def save_outcome(run: Run) -> None:
    """Write what follows from a run's state, in the first process: models where an epoch has just ended, run.json."""
    if not run.accelerator.is_main_process:
        return
    if run.best is not None and run.step == 0:
        if run.best["epoch"] == run.epoch:
            save_model(run.model, run.out / BEST)
        save_model(run.model, run.out / LAST)
    with whole_file(run.out / RUN) as part:
        part.write_text(json.dumps(_summary(run), indent=1) + "\n", encoding="utf-8")


def check_same(run: Run, header: dict[str, Any]) -> None:
    """Hold a state's header to a run.

    Raises:
        TrainingError: it is that of another run, or the best model is gone and the state is of a later moment.
    """
    for key, own in identity(run).items():
        theirs = header.get(key)
        if theirs != own:
            if isinstance(own, dict) and isinstance(theirs, dict):
                key, own = next((k, v) for k, v in own.items() if theirs.get(k) != v)  # noqa: PLW2901
                theirs = theirs.get(key)
            raise TrainingError(
                f"{run.out} holds a run with other {key}: {theirs!r:.100}, now {own!r:.100}; take another folder"
            )
    best, place = header.get("best"), [header.get("epoch"), header.get("step")]
    if not isinstance(best, dict) or best.get("score") is None:  # every epoch is the best so far
        return
    if place != [best.get("epoch"), 0] and not (run.out / BEST).is_file():
        raise TrainingError(
            f"{run.out / BEST} is gone, the model of epoch {best.get('epoch')}, and the state is of a later moment: "
            "put the file back, or begin anew in another folder"
        )


def resume_run(run: Run) -> None:
    """Put a run back where the state in its folder was written.

    Raises:
        TrainingError: a state of another run, or one that does not hold.
    """
    path = run.out / STATE
    tensors, header = read_state(path)
    check_same(run, header)
    with torch.no_grad():
        for name, value in trained_tensors(run.model).items():
            kept = tensors.get(f"model.{name}")
            if kept is None or kept.shape != value.shape:
                raise TrainingError(f"{path} lacks {name} or has it in another shape")
            value.copy_(kept)
    try:
        load_optimizer(run.optimizer, tensors, header["optimizer"])
        run.epoch, run.step, run.history, run.best = (header[key] for key in ("epoch", "step", "history", "best"))
        run.sums, run.seconds = torch.tensor(header["sums"], dtype=torch.float64), header["seconds"]
        run.feature_seconds += header["feature_seconds"]
        run.feature_photos += header["feature_photos"]
        run.bad |= {int(i): text for i, text in header["bad"].items()}
        scaler = getattr(run.accelerator, "scaler", None)
        if scaler is not None and header["scaler"]:
            scaler.load_state_dict(header["scaler"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrainingError(f"{path} does not hold together: {error!r:.200}") from error
    run.model.mark_trained(run.epoch + run.step > 0)
    for i, put in enumerate((torch.set_rng_state, torch.cuda.set_rng_state)):
        kept = tensors.get(f"random.{run.rank}.{i}")
        if kept is not None and (i == 0 or run.device.type == "cuda"):
            put(kept)


def _random_states(run: Run) -> dict[str, Tensor]:
    """Return the state of every process's random numbers, by name."""
    own = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if run.device.type == "cuda" else [])]
    every = gather_object([own]) if run.world > 1 else [own]
    return {f"random.{rank}.{i}": value for rank, states in enumerate(every) for i, value in enumerate(states)}


def _summary(run: Run) -> dict[str, Any]:
    return {
        "molt": molt.__version__,
        "torch": torch.__version__,
        "recipe": run.recipe.to_json(),
        "seed": run.seed,
        "processes": run.world,
        "device": run.device.type,
        "classes": list(run.photos.classes),
        "photos": {"train": len(run.photos.train), "held_out": len(run.photos.held)},
        "weights": [info.to_json() for info in dict.fromkeys(run.model.weights)],
        "trained_parameters": sum(value.numel() for value in trained_tensors(run.model).values()),
        "best": run.best,
        "best_rule": f"{run.recipe.best} on the photos held out" if run.photos.held else "the last epoch",
        "seconds": run.seconds,
        "feature_seconds": run.feature_seconds,
        "feature_photos": run.feature_photos,
        "skipped": run.skipped(),
        "history": run.history,
    }
