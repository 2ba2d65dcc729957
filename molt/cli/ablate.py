"""`molt ablate`: what each part of the MOLT paper is worth, on a data set of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molt._words import count
from molt.cli._progress import Progress
from molt.cli._say import FAILED, say, say_left_out, stop, stop_at, take_out
from molt.cli._sets import read

if TYPE_CHECKING:
    from molt.data.annotations import LocalizationSet

OUT = Path("molt-ablation")
HEADS = ("patches", "class_token")  # that --train trains
WIDTH = 150  # of tables that no terminal limits


def ablate(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="DATA", help="The data set's folder or file.")],
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Trained molt_* model; repeatable: the first one's maps are refined, others are seeds of heads.",
        ),
    ] = None,
    checkpoint_class_token: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="The same with a head on the class token, for heads; repeatable."),
    ] = None,
    train: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DATA",
            help="Photos with labels: heads of both kinds are trained on them first. Read with --kind, --photos and "
            "--classes as DATA is, the last two where --kind auto finds a layout that takes them; not with --split.",
        ),
    ] = None,
    val: Annotated[
        list[Path] | None,
        typer.Option(metavar="DATA", help="Photos that pick their best epochs, by labels; read as those of --train."),
    ] = None,
    train_seeds: Annotated[int, typer.Option(min=1, help="Heads of each kind to train.")] = 3,
    precision: Annotated[str, typer.Option(help="Of that training: no, bf16 or fp16.")] = "no",
    groups: Annotated[
        str | None, typer.Option(metavar="A,B", help="scales, heads, clusters, clusterers, backbones; all by default.")
    ] = None,
    backbones: Annotated[
        str | None, typer.Option(metavar="A,B", help="timm names for backbones, in place of the usual ones.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Of each clusterer with a random start.")] = 5,
    kind: Annotated[str, typer.Option(help="Layout: auto, folder, wsol, voc, coco, yolo, cub or csv.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Split of DATA; --train and --val name their own.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of the photos, where the set does not say.")] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names, one a line, of a set that does not name them.")
    ] = None,
    gt_map: Annotated[
        str, typer.Option(help="Whose map counts: label (the photo's class) or top1 (each network's likeliest).")
    ] = "label",
    class_map: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="Of networks that do not know the set's classes. Lines: class name, network class, index or range.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only N photos, drawn by --seed.")] = None,
    seed: Annotated[int, typer.Option(help="Of --limit and of the intervals.")] = 0,
    draws: Annotated[int, typer.Option(help="Bootstrap draws of the intervals.")] = 1000,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1...")] = None,
    source: Annotated[str, typer.Option(help="Where weights come from: auto, package or hub.")] = "auto",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run.")] = OUT,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Throw away what an earlier run left in --out, and the heads that it trained."),
    ] = False,
    plots: Annotated[bool, typer.Option(help="Draw what was found as SVG.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON in place of tables.")] = False,
) -> None:
    """Measure what scales, heads, clusters, clusterers and backbones are worth, each against its baseline.

    Writes ablation.json and plots to --out. A run that was killed goes on with the same command, and groups or
    backbones may be added later. What cannot be run is listed with the reason. Exit code 0; 1 if a photo could not be
    used (its maps count as zeros); 2 for a wrong option.

    With --train one command does all: heads on the patch sequence and on the class token are trained in OUT-heads, on
    features as `molt train` keeps them, and take the place of --checkpoint and --checkpoint-class-token.
    """
    import torch

    from molt.benchmark import ablation
    from molt.benchmark.ablation_plots import draw, need_matplotlib
    from molt.data.annotations import DataError
    from molt.data.checking import check_sizes
    from molt.data.images import PhotoError
    from molt.evaluation.runs import Settings
    from molt.training import TrainingError

    try:
        if plots:
            need_matplotlib()
        options: dict[str, Any] = {}
        if groups is not None:
            wanted = _names("--groups", groups)
            options["groups"] = tuple(name for name in ablation.GROUPS if name in wanted) + tuple(
                name for name in wanted if name not in ablation.GROUPS
            )
        if backbones is not None:
            options["backbones"] = _names("--backbones", backbones)
        if class_map is not None and gt_map != "label":
            raise ValueError(f"--class-map: goes with --gt-map label only, got {gt_map}")
        if val and not train:
            raise ValueError(f"--val {val[0]}: goes with --train")
        if train and (checkpoint or checkpoint_class_token):
            raise ValueError("--train: takes the place of --checkpoint and --checkpoint-class-token")
        data = read(path, kind, split=split, photos=photos, classes=classes, limit=limit, seed=seed)
        say_left_out(data.left_out, data.name)
        for remark in check_sizes(data):
            say(str(remark))
        take_out(context, out)
        plan = ablation.Plan(
            checkpoints=tuple(checkpoint or ()),
            class_token=tuple(checkpoint_class_token or ()),
            gt_map=gt_map,
            seeds=seeds,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            source=source,
            settings=Settings(draws=draws, seed=seed),
            **options,
        )
        if train:
            sets = [_labelled(one, kind, photos, classes) for one in train]
            held = [_labelled(one, kind, photos, classes) for one in val or []]
            folder = Path(f"{out}-heads")
            if restart:
                _forget_heads(folder)
            heads = _train_heads(sets, held, folder, train_seeds, precision, source, device)
            plan = replace(plan, checkpoints=tuple(heads["patches"]), class_token=tuple(heads["class_token"]))
        report = _run(data, plan, _Classes(data, class_map), out, restart=restart)
        if plots:
            drawn = [file.name for file in draw(report, out)]
    except DataError as error:
        stop_at(error.problems, f" with {path}")
    except (ValueError, FileNotFoundError, ImportError, PhotoError, TrainingError) as error:
        stop(str(error))
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)
        print(f"written to {out / 'ablation.json'}" + (f", plots: {', '.join(drawn)}" if plots and drawn else ""))
    if report["problems"]:
        raise typer.Exit(FAILED)


class _Classes:
    """Matches the set's classes with a network's, as `molt evaluate` does; those it knows by name need no file."""

    def __init__(self, data: LocalizationSet, class_map: Path | None) -> None:
        self.data, self.class_map = data, class_map
        used = {sample.label for sample in data.samples}
        self.names = {data.classes[label] for label in used if 0 <= label < len(data.classes)}

    @property
    def stamp(self) -> str | None:
        """What the file says, as a run with another one is another run."""
        if self.class_map is None:
            return None
        try:
            return self.class_map.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--class-map {self.class_map}: cannot be read ({error})") from error

    def __call__(self, known: tuple[str, ...]) -> Mapping[int, tuple[int, ...]]:
        from molt.cli._network_classes import network_classes

        return network_classes(self.data, known, None if self.names <= set(known) else self.class_map)[0]


def _labelled(path: Path, kind: str, photos: Path | None, classes: Path | None) -> LocalizationSet:
    """Read photos to train on as DATA is read; where the layout is found by itself, with the options that it takes."""
    from molt.data.reading import recognise

    if kind == "auto":
        found = recognise(path)
        photos = photos if found in ("wsol", "coco", "csv") else None
        classes = classes if found in ("wsol", "voc", "csv") else None
    return read(path, kind, photos=photos, classes=classes)


def _forget_heads(out: Path) -> None:
    """Remove the runs of heads that an earlier call trained, and nothing else; kept features stay."""
    from molt.training.run_files import BEST, LAST, RUN, STATE

    for head in HEADS:
        for folder in out.glob(f"{head}-*"):
            if folder.name.removeprefix(f"{head}-").isdecimal() and any((folder / n).is_file() for n in (STATE, RUN)):
                for name in (RUN, BEST, LAST, STATE):  # a state without the rest is a run that goes on
                    (folder / name).unlink(missing_ok=True)


def _train_heads(
    sets: list[LocalizationSet],
    held: list[LocalizationSet],
    out: Path,
    seeds: int,
    precision: str,
    source: str,
    device: str | None,
) -> dict[str, list[Path]]:
    """Train heads of both kinds on kept features, those that an earlier call finished as they are."""
    from molt.cli.train import Display
    from molt.training import find_recipe
    from molt.training import train as run_training

    found: dict[str, list[Path]] = {head: [] for head in HEADS}
    for head, files in found.items():
        for seed in range(seeds):
            with Display(quiet=False) as display:
                run = run_training(
                    sets,
                    out / f"{head}-{seed}",
                    recipe=find_recipe("default").change(head=head, precision=precision),
                    val=held or None,
                    seed=seed,
                    resume=True,
                    source=source,
                    device=None if device is None else device.split(":")[0],
                    on_event=display,
                )
            files.append(run.best)
    return found


def _run(data: LocalizationSet, plan: Any, find: _Classes, out: Path, *, restart: bool) -> dict[str, Any]:
    """Measure, with a progress bar where there is a terminal, and a line a part where there is none."""
    from molt.benchmark import ablation

    with Progress() as progress:
        console = progress.console
        progress.show("loading the networks")
        doing: tuple[str, int, int] = "", 0, 0

        def start(title: str, total: int, done: int) -> None:
            nonlocal doing
            doing = title, done, total
            progress.show(*doing)
            if progress.lines:
                console.print(f"{title}: {total - done} of {total} to do", markup=False)

        def step() -> None:
            nonlocal doing
            title, done, total = doing
            doing = title, done + 1, total
            progress.show(*doing)

        try:
            return ablation.run(data, plan, find, out, restart=restart, start=start, step=step)
        except KeyboardInterrupt:
            console.print(f"molt: what was measured is in {out}: the same command goes on", markup=False)
            raise


def _show(report: Mapping[str, Any]) -> None:
    """Print a table a group, what the scales share, and what was not run."""
    from molt.cli._score_tables import _console, _printer, _table

    console = _console()
    if not console.is_terminal:
        console.width = WIDTH
    plain = _printer(console)
    for group in dict.fromkeys(row["group"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["group"] == group]
        ran = [row for row in rows if row["status"] == "ran"]
        heads = ["row", "V2 %", "95 %", "V1 %", "mean IoU %", "difference", "95 %", "seeds", "clusters", "ms"]
        if ran:
            cells = [_cells(row) for row in ran]
            title = f"{group}, {count(ran[0]['photos'], 'photo')} of {report['data']['name']}"
            console.print(_table(title, heads, cells))
        for row in rows:
            if row["status"] == "not_run":
                plain(f"not run: {row['name']}: {row['reason']}")
    for kind in ("attention x class map", "class map"):
        found = report["findings"].get("scales", {}).get(kind)
        if found:
            oracle = found["oracle"]
            plain(
                f"scales, {kind}: best single {oracle['score_best_single']:.1f}, oracle {oracle['score']:.1f}, gain "
                f"{oracle['score_gain']:+.1f} ({_range(oracle['score_gain_interval'], '+')})"
            )
            pairs = [f"{pair} px {_number(told['mean'], '.2f')}" for pair, told in found["correlation"].items()]
            plain(f"  correlation of scales: {'; '.join(pairs)}")
    for head in report["findings"].get("heads", []):
        plain(f"head {head['head']}: classification {_number(head['accuracy'], '.1f')} %")
    if report["problems"]:
        plain(f"{count(len(report['problems']), 'problem')}, the first: {report['problems'][0]}")


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["name"],
        f"{row['score']:.1f}",
        _range(row["interval"]),
        f"{row['max_box_acc']:.1f}",
        f"{row['mean_iou']:.1f}",
        _number(row["difference"], "+.1f"),
        "" if row["difference_interval"] is None else _range(row["difference_interval"], "+"),
        str(row["seeds"]),
        _number(row["clusters"], ".1f"),
        _number(row["ms"], ".0f"),
    ]


def _range(bounds: Any, sign: str = "") -> str:
    low, high = (round(bound, 1) + 0.0 for bound in bounds)  # no -0.0
    return f"{low:{sign}.1f} to {high:{sign}.1f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{round(value, 2) + 0.0:{form}}"


def _names(option: str, text: str) -> tuple[str, ...]:
    """Return the names in a list parted by commas, each once.

    Raises:
        ValueError: an empty list or name.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(names):
        raise ValueError(f"{option} {text!r}: expected names parted by commas")
    return names
