"""`molt train`: a localizer from photos and their classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molt._words import count
from molt.cli._progress import Progress
from molt.cli._say import (
    FAILED,
    INTERRUPTED,
    SHOWN,
    check_out,
    later_process,
    say,
    say_left_out,
    stop,
    stop_at,
)
from molt.cli._sets import read

if TYPE_CHECKING:
    from molt.training import Recipe, Trained

FEW_HELD, FEW_STEPS = 20, 50


def train(
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="DATA...",
            help="Class folders, or any data set `molt data check` knows; several of one kind are joined.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run: best.safetensors, last.safetensors, run.json.")] = Path(
        "molt-train"
    ),
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="default, fine-tune, ts-cam, ts-cam-ilsvrc or sat; or a JSON file, of --show-recipe or a run.json.",
        ),
    ] = "default",
    show_recipe: Annotated[
        bool, typer.Option("--show-recipe", help="Print the recipe with all options in it as JSON, and train nothing.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="molt_dinov2_small, molt_deit_tiny, molt_deit_small, molt_deit_base.")
    ] = None,
    init: Annotated[Path | None, typer.Option(metavar="FILE", help="A trained MOLT to go on with.")] = None,
    sizes: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Side of each scale, px; default 224,336,448.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="patches, class_token or spatial.")] = None,
    pooling: Annotated[str | None, typer.Option(help="Of the patch head: mean (TS-CAM's) or attention.")] = None,
    shared: Annotated[
        bool | None, typer.Option("--shared/--separate", help="One network for all scales, or one each.")
    ] = None,
    freeze: Annotated[
        bool | None, typer.Option("--freeze/--fine-tune", help="Train the heads alone, or the backbones too.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the photos; default 10.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Photos of an optimizer step, all processes together; default 64.")
    ] = None,
    micro: Annotated[
        int | None, typer.Option(help="Photos a forward pass; less takes less memory, gradients add up.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of the heads; default 1e-3.")] = None,
    backbone_lr: Annotated[float | None, typer.Option(help="Peak learning rate of backbones that are trained.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    clip_grad: Annotated[
        float | None, typer.Option(help="Largest norm of the gradient, 1 say, where the loss becomes NaN.")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, constant or steps.")] = None,
    milestones: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Epochs, and multiples of them, where --schedule steps lowers the rate to a tenth."
        ),
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Epochs in which the rate rises.")] = None,
    augment: Annotated[str | None, typer.Option(help="none, flip, crop or ts-cam.")] = None,
    views: Annotated[int | None, typer.Option(help="Of each photo in the feature cache.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of the networks: no (float32, the default), bf16 or fp16.")
    ] = None,
    best: Annotated[
        str | None, typer.Option(help="loss or accuracy on the photos held out picks the best epoch.")
    ] = None,
    val: Annotated[
        list[Path] | None, typer.Option(metavar="DATA", help="Photos for that, as DATA; else a share of DATA.")
    ] = None,
    val_split: Annotated[str | None, typer.Option(help="Part of each --val: val...")] = None,
    val_share: Annotated[float, typer.Option(help="That share, 0 to 1.")] = 0.1,
    kind: Annotated[str, typer.Option(help="Of DATA: auto, folder, wsol, voc, coco, yolo, cub or csv.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Part of DATA: train...")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of the photos, for wsol, coco and csv.")] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names of wsol, voc or csv, one a line.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of frozen backbones' features; one for all your runs if not given."),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute them anew in each epoch.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    seed: Annotated[int, typer.Option(help="Of heads, order, augmentation and the photos held out.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that read photos.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Run the network through torch.compile.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write OUT/tensorboard.")] = False,
    save_minutes: Annotated[float, typer.Option(help="The state is kept this often within an epoch.")] = 10,
    source: Annotated[str, typer.Option(help="Where backbone weights come from: auto, package or hub.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Train a MOLT on photos and one class each; boxes are never looked at.

    With --recipe default the heads of a frozen three-scale ViT: what it sees is computed once a photo and kept for all
    runs, and training then takes seconds. Runs unchanged under torchrun and accelerate launch. Exit code 0; 1 where
    training stopped; 2 for a wrong option. Photos that cannot be read are skipped and named.
    """
    from molt.data.annotations import DataError
    from molt.data.images import PhotoError
    from molt.methods.registry import load_model
    from molt.training import TrainingError
    from molt.training import train as run_training

    quiet = bool(later_process())  # of progress and results; what went wrong is said by every process
    try:
        if not data and not show_recipe:
            raise ValueError("DATA is missing: folders of photos, or another data set")
        if cache is not None and no_cache:
            raise ValueError("--cache and --no-cache exclude each other")
        given: dict[str, Any] = {
            "model": model,
            "sizes": None if sizes is None else tuple((side, side) for side in _numbers("--sizes", sizes)),
            "head": head,
            "pooling": pooling,
            "shared": shared,
            "freeze": freeze,
            "epochs": epochs,
            "batch": batch,
            "lr": lr,
            "backbone_lr": backbone_lr,
            "weight_decay": weight_decay,
            "clip_grad": clip_grad,
            "schedule": schedule,
            "warmup": warmup,
            "augment": augment,
            "views": views,
            "precision": precision,
            "best": best,
        }
        if schedule not in (None, "steps"):
            given["milestones"] = ()
        if milestones is not None:
            given["milestones"] = _numbers("--milestones", milestones)
        fixed = {"model": model, "sizes": sizes, "head": head, "pooling": pooling, "shared": shared}
        if init is not None and (named := [f"--{name}" for name, value in fixed.items() if value is not None]):
            raise ValueError(f"{', '.join(named)}: --init {init} says it already")
        if init is not None and show_recipe:
            raise ValueError("--show-recipe and --init exclude each other: with any recipe, --init keeps its network")
        if val_split is not None and not val:
            raise ValueError(f"--val-split {val_split} goes with --val")
        base = _recipe(recipe)
        if freeze and backbone_lr is None:
            base = base.change(backbone_lr=None, freeze=True)
        chosen = base.change(**{key: value for key, value in given.items() if value is not None})
        if show_recipe:
            if not quiet:
                print(json.dumps(chosen.to_json(), indent=1))
            return
        sets = [read(path, kind, split=split, photos=photos, classes=classes) for path in data or ()]
        held = [read(path, kind, split=val_split, photos=photos, classes=classes) for path in val or ()]
        if not quiet:
            for one in (*sets, *held):
                say_left_out(one.left_out, one.name)
            check_out("--out", out)
        display = Display(quiet=quiet or as_json)
        with display:
            found = run_training(
                sets,
                out,
                recipe=chosen,
                model=None if init is None else load_model(init, source=source),
                val=held or None,
                val_share=val_share,
                cache=None if no_cache else "auto" if cache is None else cache,
                micro=micro,
                workers=workers,
                device=device,
                seed=seed,
                resume=resume,
                compile=compile,
                tensorboard=tensorboard,
                save_minutes=save_minutes,
                source=source,
                on_event=display,
            )
    except DataError as error:
        stop_at(error.problems, " with the data")
    except (TrainingError, PhotoError) as error:
        stop(str(error), FAILED)
    except (ValueError, TypeError, ImportError) as error:
        stop(str(error))
    except KeyboardInterrupt:
        if not quiet:
            say(f"interrupted; the same command with --resume goes on from {out}")
        raise SystemExit(INTERRUPTED) from None
    if quiet:
        return
    for name, message in found.skipped[:SHOWN]:
        say(f"skipped: {message or name}")
    if as_json:
        print(json.dumps(_record(found)))
    else:
        _show(found, chosen.best, trained=display.epochs > 0)


class Display:
    """Progress of a run: a bar where there is a terminal, else lines, one at least an epoch."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.progress = Progress(quiet=quiet)
        self.console = self.progress.console
        self.epochs = 0

    def __enter__(self) -> Display:
        self.progress.__enter__()
        self.progress.show("loading the networks")
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.close()

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        """Show what happened."""
        if kind == "begin":
            self._begin(values)
        elif kind == "features":
            self.progress.show("features", values["done"], values["total"], "photos and views", ends=True)
        elif kind == "step":
            done, total = (values["epoch"] - 1) * values["steps"] + values["step"], values["epochs"] * values["steps"]
            said = f"epoch {values['epoch']}/{values['epochs']}, "
            said += f"loss {values['loss']:.3f}, accuracy {values['accuracy']:.2f}"
            self.progress.show("training", done, total, "steps", said)
        elif kind == "epoch":
            self.epochs += 1
            held = ""
            if values["val_loss"] is not None:
                held = f"; held out: loss {values['val_loss']:.3f}, accuracy {values['val_accuracy']:.3f}"
            speed = f"{values['photos_per_second']:.1f} photos/s, {values['seconds_left']:.0f} s left"
            self._print(
                f"epoch {values['epoch']}: loss {values['loss']:.3f}, accuracy {values['accuracy']:.3f}{held}; {speed}"
            )

    def _begin(self, values: dict[str, Any]) -> None:
        sizes = ", ".join(str(h) if h == w else f"{h}x{w}" for h, w in values["sizes"])
        what = "all of it"
        if values["frozen"]:
            what = "its heads and spatial token alone" if values["head"] == "spatial" else "its heads alone"
            what += f", on features that are {'kept' if values['kept'] else 'computed anew in each epoch'}"
        held = f"{values['held'] or 'none'} held out"
        held += " to pick the best epoch" if values["held"] else ": the last epoch will be the best"
        lines = [
            f"{values['model']} at {sizes} px, recipe {values['recipe']}: trains {what}; on {values['device']}",
            f"{count(values['classes'], 'class')}, {count(values['train'], 'photo')} to learn from, {held}; "
            f"{count(values['epochs'], 'epoch')} of {count(values['steps'], 'step')}",
        ]
        if values.get("folder"):
            lines.append(f"features are kept in {values['folder']}")
        if values["held"] and values["held"] < FEW_HELD:
            few = "photo is" if values["held"] == 1 else "photos are"
            lines.append(f"only {values['held']} {few} held out: which epoch is best is then mostly chance")
        if values["epochs"] * values["steps"] < FEW_STEPS:
            lines.append("few steps in all: a smaller --batch or more --epochs may do better")
        if not self.quiet:
            for line in lines:
                self.console.print(line, markup=False)

    def _print(self, text: str) -> None:
        if self.progress.lines:
            self.console.print(text, markup=False)


def _recipe(given: str) -> Recipe:
    """Return the recipe of a name, or that of a file."""
    from molt.training import RECIPES
    from molt.training.recipe import read_recipe

    if given in RECIPES:
        return RECIPES[given]
    if not Path(given).is_file():
        raise ValueError(
            f"--recipe {given}: no recipe of that name and no such file; "
            f"expected {', '.join(RECIPES)} or the path of a JSON file (--show-recipe writes one)"
        )
    return read_recipe(given)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text}: expected whole numbers parted by commas") from None


def _record(found: Trained) -> dict[str, Any]:
    return {
        "best": str(found.best),
        "last": str(found.last),
        "best_epoch": found.best_epoch,
        "epochs": len(found.history),
        "best_entry": found.history[found.best_epoch - 1],
        "skipped": [list(pair) for pair in found.skipped],
        "feature_seconds": found.feature_seconds,
        "seconds": found.seconds,
    }


def _show(found: Trained, rule: str, *, trained: bool) -> None:
    entry = found.history[found.best_epoch - 1]
    skipped = f", {count(len(found.skipped), 'photo')} skipped" if found.skipped else ""
    if not trained:
        print("finished already, nothing was left to train")
    epochs = count(len(found.history), "epoch")
    print(f"{epochs} in {found.seconds:.1f} s, features in {found.feature_seconds:.1f} s{skipped}")
    if entry["val_loss"] is None:
        print(f"no photos were held out: the last epoch is the best; training accuracy {entry['accuracy']:.3f}")
    else:
        print(
            f"best by held-out {rule}: epoch {found.best_epoch}, held-out loss {entry['val_loss']:.3f}, "
            f"accuracy {entry['val_accuracy']:.3f}"
        )
    print(f"next: molt localize PHOTOS --checkpoint {found.best}")
    print(found.best)
