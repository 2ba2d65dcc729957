"""The `molt` command. Modules of its sub-commands import torch inside their functions, so that help is quick."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from molt import __version__
from molt.cli.demo import demo
from molt.cli.info import info
from molt.cli.localize import localize

app = typer.Typer(
    name="molt",
    help="From image labels to boxes: weakly-supervised object localization.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(localize)
app.command()(demo)
app.command()(info)


def _show_version(value: bool) -> None:
    if value:
        print(f"molt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; what the user can mend is said in one line, without a traceback."""
    try:
        app()
    except BrokenPipeError:
        # The reader of our output left (`| head`): no more to say, and nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (FileNotFoundError, PermissionError, RuntimeError) as error:
        print(f"molt: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        raise SystemExit(1) from None
