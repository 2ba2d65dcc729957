"""`molt fit-clusters`: one clustering network from a folder of photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from molt._words import count
from molt.cli._progress import Progress
from molt.cli._say import FAILED, USAGE, say, say_left_out, take_out


def fit_clusters(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder of photos, searched recursively. No labels are needed.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write, a safetensors file.")] = Path("clusters.safetensors"),
    steps: Annotated[int, typer.Option(help="Gradient steps.")] = 400,
    batch_size: Annotated[int, typer.Option("--batch", help="Photos a step.")] = 8,
    channels: Annotated[int | None, typer.Option(help="Width of the network; 32 if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of the initial network and of the order of photos.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1...; a GPU where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Train one clustering network on a folder, for fast clusters of any photo: DeepClustering(preset="amortised").

    The file is written at the end. Exit code 0; 1 where nothing could be trained or written; 2 for a wrong option.
    Photos that cannot be read are skipped and named.
    """
    from molt.clustering import fit
    from molt.data.images import PhotoError, walk_photos

    progress = Progress()
    errors = progress.console
    try:
        take_out(context, out, folder=False)
        with progress:
            progress.show("reading the first photos")
            photos: list[Path] = []
            if folder.is_dir():
                walked = walk_photos(folder)
                say_left_out(walked.left_out, folder)
                photos = walked.photos
            result = fit(
                photos or folder,
                out,
                steps=steps,
                batch_size=batch_size,
                channels=channels,
                seed=seed,
                device=device,
                on_step=lambda i, loss: progress.show("fitting", i + 1, steps, "steps", f"loss {loss:.3f}"),
            )
    except (OSError, ValueError) as error:
        say(str(error), errors)
        # PhotoError: the options were right, but no photo could be read.
        raise typer.Exit(FAILED if isinstance(error, OSError | PhotoError) else USAGE) from None
    for problem in result.errors:
        say(str(problem), errors)
    if as_json:
        record = {"checkpoint": str(out), "photos": result.photos, "skipped": len(result.errors)}
        print(json.dumps(record | {"steps": result.steps, "loss": result.loss}))
    else:
        skipped = f", {len(result.errors)} skipped" if result.errors else ""
        work = f"{count(result.steps, 'step')} on {count(result.photos, 'photo')}"
        print(f"{out}: {work}{skipped}, loss {result.loss:.3f}")
