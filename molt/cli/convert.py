"""`molt convert`: a checkpoint of another program becomes one of molt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from molt._words import count
from molt.cli._progress import Progress
from molt.cli._say import FAILED, USAGE, check_out, say

LARGEST_LIST = 16 * 2**20  # bytes of class names


def convert(
    file: Annotated[Path, typer.Argument(help="Checkpoint of TS-CAM, DeiT or DINOv2: .pth or .safetensors.")],
    out: Annotated[Path, typer.Argument(help="File to write; --checkpoint of molt localize reads it.")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="molt_* model it must be; told from the tensors if not given.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="NAME", help="timm name of another ViT in timm's key names; with --model.")
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(metavar="S,S...", help="Scales in pixels, S or HxW, which share the network; its own alone."),
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of a new head, for a file without one.")] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names, one a line, in the order of the head.")
    ] = None,
    new_head: Annotated[
        bool, typer.Option("--new-head", help="Leave the file's head out for a new one, to be trained.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of a new head's random weights.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Turn a checkpoint of TS-CAM, DeiT or DINOv2 into one that molt reads.

    The network is told from the tensors, and every one of them must fit; nothing in the file is run. A classifier in
    the file becomes the model's head; a network without one gets a random head, which must be trained. Exit code 0; 1
    for a file that cannot be read, converted or written; 2 for a wrong option.
    """
    check_out("OUT", out, folder=False)
    from molt.backbones.weight_files import CheckpointError
    from molt.training.convert import convert_checkpoint

    progress = Progress()
    errors = progress.console
    try:
        with progress:
            progress.show("converting")
            result = convert_checkpoint(
                file,
                out,
                model=model,
                backbone=backbone,
                sizes=None if sizes is None else [_size(text) for text in sizes.split(",")],
                num_classes=num_classes,
                class_names=None if classes is None else _names(classes),
                new_head=new_head,
                seed=seed,
                force=force,
            )
    except (OSError, ValueError) as error:
        say(str(error), errors)
        raise typer.Exit(FAILED if isinstance(error, OSError | CheckpointError) else USAGE) from None
    if as_json:
        print(json.dumps(result.to_json()))
        return
    scales = ", ".join(f"{height}x{width}" for height, width in result.sizes)
    head = f"{result.head} head, {'trained' if result.trained else 'NOT TRAINED'}"
    print(f"{out}: {result.model} on {result.backbone}, {count(result.num_classes, 'class')}, {head}, at {scales}")
    print(f"masks seen in training: {result.saw_masks}")
    if result.left_out:
        print(f"left out: {', '.join(result.left_out)}")
    for note in result.notes:
        print(f"note: {note}")


def _size(text: str) -> int | tuple[int, int]:
    sides = text.strip().split("x")
    if not all(side.isascii() and side.isdecimal() and len(side) < 10 for side in sides) or len(sides) > 2:
        raise ValueError(f"--sizes must be sides in pixels, such as 224 or 224,336x448, got {text!r}")
    return (int(sides[0]), int(sides[1])) if len(sides) == 2 else int(sides[0])


def _names(path: Path) -> list[str]:
    """Read names, one a line; the number of a line is the class, so that none may be empty."""
    from molt._text import plain_name

    if not path.is_file():
        raise FileNotFoundError(f"class names {path} do not exist or are no file")
    if path.stat().st_size > LARGEST_LIST:
        raise ValueError(f"class names {path} must have at most {LARGEST_LIST:,} bytes")
    try:
        names = [plain_name(line) for line in path.read_text("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"class names {path} must be UTF-8 text: {error}") from None
    if names and not names[-1]:
        names.pop()
    for number, name in enumerate(names, 1):
        if not name:
            raise ValueError(f"class names {path}: line {number} is empty, expected a name")
    return names
