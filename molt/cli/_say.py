"""How the commands say what went wrong, a line each, and end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer

from molt._files import alone_in, check_writable
from molt._text import readable
from molt._words import count

FAILED, USAGE, INTERRUPTED = 1, 2, 130  # exit codes
SHOWN = 10  # problems that are printed


def later_process() -> str:
    """Return the number of this process among several (torchrun's RANK), or nothing in the first one or an only one."""
    rank = os.environ.get("RANK", "").strip()
    return rank if rank.isascii() and rank.isdecimal() and int(rank) else ""


def say(text: str, console: Any = None) -> None:
    """Write one line to stderr, above the progress bar where a console shows one; processes but the first say which."""
    which = f"process {rank}: " if (rank := later_process()) else ""
    text = readable(f"molt: {which}{' '.join(line.strip() for line in text.splitlines())}")
    if console is not None:
        console.print(text, markup=False, soft_wrap=True)
    else:
        print(text, file=sys.stderr)


def say_left_out(left_out: Mapping[str, int], where: object) -> None:
    """Say in one line what was found and left out, files and folders of systems, say."""
    if left_out:
        say(f"{where}: left out, {', '.join(f'{what}: {count:,}' for what, count in left_out.items())}")


def stop(text: str, code: int = USAGE) -> NoReturn:
    """Say why, and end the command."""
    say(text)
    raise typer.Exit(code)


def stop_at(problems: Sequence[object], where: str = "") -> NoReturn:
    """Say what is wrong with a data set, and end the command."""
    for problem in problems[:SHOWN]:
        say(str(problem))
    more = f", {SHOWN} of them above" if len(problems) > SHOWN else ""
    stop(f"{count(len(problems), 'problem')}{where}{more}")


def check_out(option: str, path: Path | None, *, folder: bool = True) -> None:
    """Tell before anything that takes long that an output cannot be written, by an OSError which names the option."""
    if path is not None:
        with _named(option):
            check_writable(path, folder=folder)


def take_out(context: typer.Context, path: Path | None, *, folder: bool = True) -> None:
    """Have --out to this command alone until it ends; OSError where it cannot be written or another run is at it."""
    check_out("--out", path, folder=folder)
    with _named("--out"):
        context.with_resource(alone_in(path, folder=folder))


@contextmanager
def _named(option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(f"{option} {error}") from None
