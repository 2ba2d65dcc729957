"""The `molt` command. Modules of its sub-commands import torch inside their functions, so that help is quick."""

from __future__ import annotations

import io
import os
import re
import sys
from typing import Annotated, Any, NoReturn

import typer

from molt import __version__
from molt.cli._say import FAILED, INTERRUPTED, USAGE, say
from molt.cli.ablate import ablate
from molt.cli.benchmark import benchmark
from molt.cli.convert import convert
from molt.cli.data import data
from molt.cli.demo import demo
from molt.cli.evaluate import evaluate
from molt.cli.fit_clusters import fit_clusters
from molt.cli.info import info
from molt.cli.localize import localize
from molt.cli.train import train

# typer brings its own click since 0.26 and exports no base class of its usage errors.
USAGE_ERROR: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="molt",
    help="From image labels to boxes: weakly-supervised object localization.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(localize)
app.command()(demo)
app.command()(info)
app.command()(benchmark)
app.command()(evaluate)
app.command()(train)
app.command()(ablate)
app.command("fit-clusters")(fit_clusters)
app.command()(convert)
app.add_typer(data)


def _show_version(value: bool) -> None:
    if value:
        print(f"molt {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; what the user can mend is said in one line, without a traceback.

    Exit codes: 0; 1 for a failed input or missing weights; 2 for usage; 130 when interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal of another encoding lacks is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        given = sys.argv[1:] if arguments is None else arguments
        code = app(args=[_at_home(text) for text in given], standalone_mode=False)
    except USAGE_ERROR as error:
        _fail(f"{error.format_message()} (molt --help lists commands, molt COMMAND --help their options)", 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output left (`| head`): no more to say, and nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except NotADirectoryError as error:  # an option that names a file where a folder is wanted
        _fail(str(error), USAGE)
    except (OSError, RuntimeError) as error:
        _fail(str(error), FAILED)
    if code == INTERRUPTED:  # typer's own answer to Ctrl-C, given without a word
        _fail("interrupted", code)
    raise SystemExit(code or 0)


def _at_home(argument: str) -> str:
    """Replace a ~ at the start of an argument or of an option's value, where a shell leaves it."""
    return re.sub(r"(^|=)(~[^/=]*)(?=/|$)", lambda found: found[1] + os.path.expanduser(found[2]), argument, count=1)  # noqa: PTH111


def _fail(text: str, code: int) -> NoReturn:
    say(text)
    raise SystemExit(code) from None
