"""docs/training.md: its commands and examples run in order, on a few small photos; its numbers are the code's."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from molt.training import RECIPES, Recipe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())
SMALL = Recipe(sizes=((28, 28), (42, 42)), epochs=2, batch=4)

pytestmark = pytest.mark.usefixtures("one_thread")


def commands() -> list[str]:
    shell = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    return [line for line in shell.splitlines() if line]


def molt_arguments(command: str) -> list[str]:
    words = shlex.split(command.replace("$(which molt)", "molt"), comments=True)
    return words[words.index("molt") + 1 :]


def go(command: str) -> tuple[int, str]:
    from molt.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit) as stopped:
        main(molt_arguments(command))
    return int(stopped.value.code or 0), out.getvalue()


def photo(path: Path, colour: tuple[int, int, int], rng: np.random.Generator) -> list[int]:
    """Write a photo with a bright square and return its box."""
    pixels = rng.integers(90, 160, (48, 56, 3))
    top, left = (int(v) for v in rng.integers(2, 20, 2))
    pixels[top : top + 22, left : left + 22] = colour
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(path)
    return [left, top, left + 22, top + 22]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in with the page's photos, a few small ones, and a default recipe to match."""
    rng = np.random.default_rng(0)
    pets = {"cat": (230, 40, 30), "dog": (30, 50, 230)}
    for name, colour in pets.items():
        for number in range(1, 5):
            photo(tmp_path / "my_photos" / "train" / name / f"{number}.jpg", colour, rng)
        photo(tmp_path / "my_photos" / "new" / f"{name}.jpg", colour, rng)
    lines: dict[str, list[str]] = {"image_ids": [], "class_labels": [], "image_sizes": [], "localization": []}
    for part, kind in (("train", "one"), ("train", "two"), ("val", "one"), ("val", "two"), ("test", "two")):
        for label, (name, colour) in enumerate(pets.items()):
            for number in range(2):
                file = f"{part}/{kind}/{name}/{number}.jpg"
                box = photo(tmp_path / "composites-data" / "photos" / file, colour, rng)
                if part == "test":
                    for key, more in zip(lines, ([], [label], [56, 48], box), strict=True):
                        lines[key].append(",".join(map(str, [file, *more])))
    folder = tmp_path / "composites-data" / "metadata" / "boxes" / "test-two"
    folder.mkdir(parents=True)
    for key, written in lines.items():
        (folder / f"{key}.txt").write_text("\n".join(written) + "\n")
    (tmp_path / "composites-data" / "classes.txt").write_text("cat\ndog\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "default", SMALL)
    return tmp_path


def test_first_two_walks_run_as_printed_and_in_order(place: Path) -> None:
    walk = [command for command in commands()[:7] if command.startswith("molt ")]
    assert [molt_arguments(command)[0] for command in walk] == [
        "data", "train", "localize", "train", "evaluate", "localize",
    ]  # fmt: skip
    for command in walk:
        code, said = go(command)
        assert code == 0, (command, said)
    table = PAGE.split("## The run's folder")[1].split("\n## ")[0]
    named = re.findall(r"^\| `([\w.]+)/?` \|", table, re.M)
    for run in ("mine", "composites"):
        made = {path.name for path in (place / "runs" / run).iterdir()}
        assert made | {"tensorboard"} == set(named), "the page's list of files"
    scores = json.loads((place / "runs" / "composites-scores" / "run.json").read_text())
    assert scores["method"]["name"] == "molt_dinov2_small"
    assert len(list((place / "runs" / "composites-boxes").rglob("*-boxes.jpg"))) == 4
    about = json.loads((place / "runs" / "composites" / "run.json").read_text())
    assert about["photos"] == {"train": 8, "held_out": 8}


@pytest.mark.parametrize("photos", ["there", "not there"])
def test_the_python_example_runs_as_printed_and_alone(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, photos: str
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    if photos == "not there":
        (place / "empty").mkdir()
        monkeypatch.chdir(place / "empty")
    values: dict[str, object] = {}
    exec(block, values)
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.endswith("[]") and second.startswith("['cat']")
    assert values["recipe"] == SMALL.change(lr=2e-3)
    assert len(list(Path("my_photos/train").rglob("*.jpg"))) == (8 if photos == "there" else 6), "left as they are"


def test_other_commands_have_right_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipes = ("--show-recipe", "my-recipe.json")  # run below
    others = [c for c in commands()[7:] if " convert " not in c and not any(word in c for word in recipes)]
    assert len(others) == 7 and sum("torchrun" in o or "accelerate launch" in o for o in others) == 2
    for command in others:
        code, said = go(command)
        assert code == 2 and "no such file" in said.lower(), (command, said)
    converts = [command for command in commands() if command.startswith("molt convert ")]
    assert len(converts) == 3
    for name in {molt_arguments(command)[1] for command in converts}:
        (tmp_path / name).write_bytes(b"no checkpoint")
    (tmp_path / "cub_names.txt").write_text("a\nb\n")
    for command in converts:
        code, said = go(command)
        assert code == 1 and molt_arguments(command)[1] in said, (command, said)
    (composites,) = [command for command in commands() if "composites.py" in command]
    (tmp_path / "composites-data").mkdir()
    (tmp_path / "composites-data" / "composites.json").touch()  # a finished set, so that nothing is fetched
    script = [sys.executable, ROOT / "benchmarks" / "composites.py", *shlex.split(composites)[2:]]
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1 and "composites-data" in done.stderr, "right options, but a folder that is taken"


def test_a_recipe_is_printed_changed_and_run(place: Path) -> None:
    show, run = (command for command in commands() if "my-recipe.json" in command)
    show, file = show.split(" > ")
    code, said = go(show)
    assert code == 0, said
    values = json.loads(said)
    assert values == SMALL.change(epochs=20).to_json() | {"sizes": [[28, 28], [42, 42]], "milestones": []}
    (place / file).write_text(json.dumps(values | {"label_smoothing": 0.1}))
    code, said = go(run)
    assert code == 0, said
    used = json.loads((place / "runs" / "own" / "run.json").read_text())["recipe"]
    assert (used["epochs"], used["label_smoothing"]) == (20, 0.1)
    without = re.findall(r"`(\w+)`", TEXT.split("Some numbers have no option: ")[1].split(". ")[0])
    assert set(without) == fields_without_option()


def fields_without_option() -> set[str]:
    """Fields of a recipe that `molt train` has no option of the same name for."""
    import inspect

    from molt.cli.train import train

    return set(Recipe().to_json()) - {"name"} - set(inspect.signature(train).parameters)


def test_recipes_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| ([^|]+) \| (\d+), (\d+) \| ([^|]+) \| [^|]+ \|$", PAGE, re.M)
    assert [row[0] for row in rows] == list(RECIPES)
    for name, trained, epochs, batch, rate in rows:
        recipe = RECIPES[name]
        assert (recipe.epochs, recipe.batch) == (int(epochs), int(batch)), name
        assert recipe.freeze == (trained == "the heads"), name
        rates = [float(value) for value in re.findall(r"[\d.]+e-\d", rate)]
        wanted = {recipe.lr} | ({recipe.backbone_lr} if recipe.backbone_lr else set())
        assert wanted == {value for value in rates if value > 1e-6}, name
        assert all(str(step) in rate for step in recipe.milestones), name
    assert RECIPES["fine-tune"].backbone_lr == pytest.approx(RECIPES["fine-tune"].lr / 50)
    assert {recipe.weight_decay for recipe in RECIPES.values()} == {0.05}


def test_sizes_of_features_are_what_is_said() -> None:
    one = (2 * 9 * 384 + 384) * 4
    default = RECIPES["default"]
    kept, whole = re.findall(r"That is (\d+) kB for a ViT-S, and (\d+) kB a photo", TEXT)[0]
    assert int(kept) == round(one / 1000)
    assert int(whole) == round(one * len(default.sizes) * default.views / 1000)


def test_links_exist_and_places_for_numbers_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE):
        if not target.startswith("http"):
            assert (ROOT / "docs" / target).exists(), target
    for marker in ("training", "ablation"):
        assert len(re.findall(rf"<!-- {marker}:begin -->\n(?:.*\n)*?<!-- {marker}:end -->", PAGE)) == 1
