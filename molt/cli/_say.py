"""How the commands say what went wrong, a line each, and end."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import typer

from molt._text import readable

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
    stop(f"{len(problems)} problem{'s' * (len(problems) != 1)}{where}{more}")
