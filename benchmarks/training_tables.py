"""Write the tables of training, of the ablation and of methods into README.md and docs/training.md.

    python benchmarks/training_tables.py [--results benchmarks/results/cpu-2-cores] [--check]

From training.json (`benchmarks/training.py`), ablation.json (`molt ablate`), methods.json (`molt benchmark --methods`)
and training_speed.json (`benchmarks/training_speed.py`).
--check changes nothing and fails where a text is not that of the committed results.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molt._files import whole_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"
Row = Mapping[str, Any]


def score(row: Row, key: str = "score", interval: str = "interval") -> str:
    """Return a figure with its interval."""
    low, high = row[interval]
    return f"{row[key]:.1f} ({low:.1f} to {high:.1f})"


def change(row: Row) -> str:
    """Return the difference to the baseline with its interval."""
    if row.get("difference") is None:
        return ""
    low, high = row["difference_interval"]
    return f"{row['difference']:+.1f} ({low:+.1f} to {high:+.1f})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def find(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Return the rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def seeds_of(rows: Sequence[Row]) -> str:
    """Return what heads a table's rows stand for; seeds of a refined row may be its clusterer's."""
    seeds = max(row["seeds"] for row in rows if not row["refined"])
    return "the head of the first seed alone" if seeds == 1 else f"mean of {seeds} seeds"


def of_both(report: Row, heads: str, names: Mapping[str, str], group: str) -> str:
    """Return a table of some rows of training.json on both test splits."""
    lines = []
    for name, shown in names.items():
        own = [find(report["rows"], set=test, group=group, name=name)[0] for test in ("two", "one", "photos")]
        lines.append([shown, *(cell for row in own[:2] for cell in (score(row), change(row))), score(own[2])])
    return table([heads, "two objects", "against the first", "one object", "against the first", "22 photos"], lines)


HEADS = {
    "patches, attention pooling: attention x class map": "MOLT: three scales, attention times class map",
    "patches, attention pooling: class map, 224 px alone": "plain CAM of the same head, 224 px",
    "patches, attention pooling: class map": "plain CAM, three scales",
    "patches, attention pooling: attention": "attention alone, three scales: class-agnostic",
    "patches: attention x class map": "MOLT, head trained with mean pooling (TS-CAM's)",
    "class_token: attention x class map": "MOLT, head on the class token",
}


def readme(report: Row, evaluation: Row) -> str:
    """Return what README says of training."""
    first = find(report["trained"], kind="default")[0]
    seconds = max(run["seconds"] for run in find(report["trained"], kind="default"))
    shown = {name: HEADS[name] for name in list(HEADS)[:4]}
    free = {
        one["set"]: find(one["rows"], method="default")[0]["scores"]["max_box_acc_v2"]["value"]
        for one in evaluation["sets"]
    }
    return (
        f"On composites (cut-outs pasted on photos), three-scale `molt_dinov2_small`, {first['trained_parameters']:,} "
        f"trained parameters, {first['photos']['train']} photos, at most {seconds:.0f} s of training on kept features; "
        "MaxBoxAccV2 of the labelled object, mean of three seeds, %; the ViT has probably seen masks:\n\n"
        + of_both(report, "map", shown, "heads")
        + f"\n\nThe training-free default, whose CNN learnt from a million labelled photos, reaches "
        f"{free['composites-two']:.1f} and {free['composites-one']:.1f} on the same photos."
    )


def heads(report: Row) -> str:
    """Return what docs/training.md says of the training itself."""
    lines = []
    for kind in dict.fromkeys(run["kind"] for run in report["trained"]):
        runs = find(report["trained"], kind=kind)
        loss, right = (", ".join(f"{run['best'][key]:.3f}" for run in runs) for key in ("val_loss", "val_accuracy"))
        lines.append([kind, loss, right, f"{max(run['seconds'] for run in runs):.1f} s"])
    first = report["trained"][0]
    return (
        f"On 2 CPU cores, {first['photos']['train']} photos to learn from and {first['photos']['held_out']} held out, "
        f"three seeds; precision of the features: {report['precision']}.\n\n"
        + table(["head", "held-out loss", "held-out accuracy", "training, at most"], lines)
        + "\n\nMaxBoxAccV2 of the labelled object, %, mean of three seeds (`benchmarks/training.py`):\n\n"
        + of_both(report, "map", HEADS, "heads")
    )


def scales(report: Row) -> str:
    """Return the tables of scales, of training.json's first head."""
    found = [row for row in find(report["rows"], group="scales", set="two") if row["map"] == "attention x class map"]
    text = f"MaxBoxAccV2, %, {seeds_of(found)}:\n\n"
    names = {row["name"]: row["name"].removesuffix(", attention x class map") for row in found}
    names |= {row["name"]: f"{row['name']} by {row['clusterer']}" for row in found if row["refined"]}
    text += of_both(report, "scales", names, "scales")
    facts = {test: report["findings"][test]["scales"]["attention x class map"] for test in ("two", "one")}
    lines = []
    for pair in facts["two"]["correlation"]:
        values = [facts[test]["correlation"][pair] for test in ("two", "one")]
        lines.append([pair.replace(", ", " and "), *(f"{v['mean']:.2f}" for v in values)])
    text += "\n\n" + table(["correlation of the maps of", "two objects", "one object"], lines)
    lines = [
        [
            f"oracle, {title}",
            f"{o['score']:.1f}",
            f"{o['score_best_single']:.1f}",
            f"{o['score_gain']:+.1f} ({o['score_gain_interval'][0]:+.1f} to {o['score_gain_interval'][1]:+.1f})",
        ]
        for title, o in (("two objects", facts["two"]["oracle"]), ("one object", facts["one"]["oracle"]))
    ]
    text += "\n\n" + table(["", "best scale of each photo", "best single scale", "gain"], lines)
    parts = report["findings"]["one"]["scales"]["sizes"]
    fused = [row["name"] for row in parts[0]["rows"] if row["name"].endswith("attention x class map")]
    lines = [[name.split(",")[0], *(score(find(part["rows"], name=name)[0]) for part in parts)] for name in fused]
    heads_of = [
        f"{part['name']}: {100 * part['least']:.0f} to {100 * part['most']:.0f} % of the photo" for part in parts
    ]
    return (
        text
        + f"\n\nOne object, by terciles of the true box's size, {seeds_of(found)}:\n\n"
        + table(["scales", *heads_of], lines)
    )


def group(report: Row, name: str, more: Mapping[str, str]) -> str:
    """Return the table of one group of ablation.json, and what was not run."""
    # The rest is in the file: alpha 0.5 beside auto, and what hurts.
    ran = [row for row in find(report["rows"], group=name, status="ran") if row.get("alpha") in (None, 0, "auto")]
    lines = [
        [row["name"], *(f"{row[key]:.3g}" if row.get(key) is not None else "" for key in more), score(row), change(row)]
        for row in ran
    ]
    text = table([name, *more.values(), "MaxBoxAccV2, %", "against its baseline"], lines)
    lost = [f"{row['name']} ({row['reason']})" for row in find(report["rows"], group=name, status="not_run")]
    return text + ("\n\nNot run: " + "; ".join(lost) + "." if lost else "")


def ablation(report: Row) -> str:
    """Return the tables of the groups that training.json has not."""
    data = report["data"]
    said = f"{data['name']}, two objects; {report['seeds']} seeds of each clusterer"
    trained = find(report["checkpoints"], head=report["checkpoints"][0]["head"])
    parts = [f"{said}; MOLT's maps are those of one head, the first of {len(trained)} seeds."]
    parts += [group(report, "clusters", {"clusters": "clusters a photo"})]
    parts += [group(report, "clusterers", {"mean_alpha": "mean alpha"})]
    parts += [group(report, "backbones", {"mean_alpha": "mean alpha"})]
    return "\n\n".join(parts)


REFINERS = ("k-means, tokens", "k-means, colour", "SLIC", "deep clustering")


def refiners(reports: Mapping[str, Row]) -> str:
    """Return the table of what refines the trained MOLT's maps, on several sets."""
    lines = []
    for name in ("MOLT, alpha 0", *(f"MOLT + {refiner}, alpha auto" for refiner in REFINERS)):
        found = [find(report["rows"], group="clusterers", name=name)[0] for report in reports.values()]
        times = [f"{row['ms']:.0f}" if row["ms"] is not None else "" for row in found]
        title = name.removeprefix("MOLT + ").removesuffix(", alpha auto").replace("MOLT, alpha 0", "not refined")
        lines.append([title, *(cell for row in found for cell in (score(row), change(row))), times[0]])
    heads = [cell for title in reports for cell in (title, "against unrefined")]
    return table(["clusters", *heads, "ms a photo, one thread"], lines)


def methods(report: Row) -> str:
    """Return the table of methods.json."""
    lines, lost = [], []
    for row in report["rows"]:
        if row["status"] == "not_run":
            lost.append(f"{row['name']} ({row['reason']})")
            continue
        million = None if row["parameters"] is None else row["parameters"] / 1e6
        costs = [million, *(row[key] for key in ("gmacs", "ms", "peak_mib"))]
        lines.append(
            [
                row["name"],
                *("" if value is None else f"{value:.3g}" for value in costs),
                score(row),
                score(row["accuracy"], "value") if row["accuracy"] is not None else "",
                str(row["saw_masks"]),
            ]
        )
    names = ["method", "parameters, M", "GMACs", "ms a photo", "peak, MiB", "MaxBoxAccV2, %"]
    text = f"{report['of']['data']['name']}"
    if all(row["seeds"] == 1 for row in report["rows"]):
        text += "; of each trained head one run, the first seed's where there are several"
    text += ":\n\n" + table([*names, "names the photo's class, %", "saw masks?"], lines)
    return text + ("\n\nNot run: " + "; ".join(lost) + "." if lost else "")


def speed(report: Row) -> str:
    """Return the tables of training_speed.json."""
    seen, heads, loop = report["features"], report["heads"], report["loop"]
    lines = []
    for row in seen:
        kind = "float32" if row["precision"] == "no" else row["precision"]
        spread = f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
        lines.append([kind, *(f"{1000 * row[key]:.0f}" for key in ("molt_s", "bare_s")), spread])
    how = f"`{seen[0]['model']}`, {'/'.join(map(str, seen[0]['sizes']))} px, {seen[0]['photos']} photos"
    made = [f"From photos to features on disk, {how}, the median of {len(seen[0]['ratios'])} turns:"]
    made += [table(["features", "molt, ms a photo", "bare forward passes, ms", "ratio, lowest to highest turn"], lines)]
    lines = [[row["provider"], f"{row['loop_s']:.2f}", f"{row['ratio']:.2f}"] for row in heads]
    made += [f"Heads on {heads[0]['photos']} photos' kept features, {heads[0]['epochs']} epochs:"]
    made += [table(["heads", "seconds", "x the bare loop's speed"], lines)]
    lines = [[row["provider"], f"{row['photos_per_s']:.1f}", f"{row['ratio']:.2f}"] for row in loop]
    how = f"`{loop[0]['model']}` at {loop[0]['sizes'][0]} px, {loop[0]['photos']} photos"
    made += [f"Fine-tuning {how}, without what is saved after an epoch:"]
    return "\n\n".join([*made, table(["fine-tuning", "photos/s", "x the bare loop's speed"], lines)])


def fill(text: str, marker: str, body: str) -> str:
    """Return a text with what is between its markers replaced."""
    pattern = re.compile(rf"(<!-- {marker}:begin -->\n).*?(<!-- {marker}:end -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise SystemExit(f"expected the markers of {marker} once")
    return pattern.sub(lambda found: f"{found[1]}{body}\n{found[2]}", text)


def main() -> None:
    """Fill, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a text is another")
    chosen = parser.parse_args()

    def read(name: str) -> Any:
        return json.loads((chosen.results / name).read_text(encoding="utf-8"))

    trained, ablated, table_of = read("training.json"), read("ablation.json"), read("methods.json")
    one, animals = read("ablation-one.json"), read("ablation-animals.json")
    wanted = {
        "README.md": {"training": readme(trained, read("evaluation.json"))},
        "docs/training.md": {
            "training": heads(trained),
            "scales": scales(trained),
            "ablation": ablation(ablated),
            "methods": methods(table_of),
            "refiners": refiners(
                {
                    f"two objects, {ablated['data']['photos']}": ablated,
                    f"one object, {one['data']['photos']}": one,
                    f"animals, {animals['data']['photos']}": animals,
                }
            ),
            "speed": speed(read("training_speed.json")),
        },
    }
    changed = {}
    for name, parts in wanted.items():
        before = text = (ROOT / name).read_text(encoding="utf-8")
        for marker, body in parts.items():
            text = fill(text, marker, body)
        if text != before:
            changed[name] = text
    if chosen.check:
        if changed:
            text = f"{' and '.join(changed)}: not that of the committed results"
            raise SystemExit(f"{text}: run benchmarks/training_tables.py")
        return
    for name, text in changed.items():
        with whole_file(ROOT / name) as part:
            part.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
