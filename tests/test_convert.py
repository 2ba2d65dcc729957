"""Checkpoints of TS-CAM, DeiT and DINOv2 as MOLTs: formulas, round trips, files that do not fit, hostile files."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

import molt
from molt.backbones.preprocess import normalize
from molt.backbones.weight_files import CheckpointError, read_tensors
from molt.cli import main
from molt.clustering import TokenKMeans
from molt.data import read_set
from molt.training import Recipe, train
from molt.training.convert import KNOWN, Outline, _outline, _timm_names, convert_checkpoint

State = dict[str, torch.Tensor]
TINY = "deit_tiny_patch16_224.fb_in1k"
SMALL = "test_vit.r160_in1k"  # 0.4 M weights, width 64, 6 blocks


def random_state(name: str, seed: int = 0, **options: Any) -> State:
    """Random weights in timm's names, attention sharpened, as it is nearly even at random."""
    torch.manual_seed(seed)
    state = timm.create_model(name, **options).state_dict()
    return {k: v * 8 if "qkv.weight" in k else v + 0.01 * torch.randn_like(v) for k, v in state.items()}


@pytest.fixture(autouse=True)
def small_is_known(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small network counts among those that are recognised, to keep files small."""
    monkeypatch.setitem(KNOWN, SMALL, ("molt_deit_tiny", Outline(64, 6, (16, 16), 160)))


def with_head(state: State, *shape: int) -> State:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(*shape, generator=generator) / math.prod(shape[1:]) ** 0.5
    return state | {"head.weight": weight, "head.bias": torch.randn(shape[0], generator=generator)}


@pytest.fixture(scope="module")
def bare() -> State:
    return random_state(SMALL, num_classes=0)


@pytest.fixture(scope="module")
def tscam(bare: State) -> State:
    return with_head(bare, 7, 64, 3, 3)


@pytest.fixture(scope="module")
def tiny() -> State:
    return random_state(TINY, num_classes=0)


def written(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5))


def ts_cam(state: State, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, C) and maps (B, C, h, w) of TS-CAM, from its tensors alone; x at the trained size."""

    def norm(name: str, tokens: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(name: str, tokens: torch.Tensor) -> torch.Tensor:
        return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    cells = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    batch, width, height, across = cells.shape
    tokens = torch.cat([state["cls_token"].expand(batch, -1, -1), cells.flatten(2).transpose(1, 2)], 1)
    tokens = tokens + state["pos_embed"]
    attention = torch.zeros(batch, height * across)
    for i in range(12):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", tokens))
        query, key, value = (part.unflatten(2, (-1, 64)).transpose(1, 2) for part in qkv.chunk(3, 2))
        weights = (query @ key.transpose(2, 3) / math.sqrt(64)).softmax(3)
        attention += weights.mean(1)[:, 0, 1:]
        tokens = tokens + linear(f"blocks.{i}.attn.proj", (weights @ value).transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", tokens)))
        tokens = tokens + linear(f"blocks.{i}.mlp.fc2", hidden)
    patches = norm("norm", tokens)[:, 1:].transpose(1, 2).reshape(batch, width, height, across)
    semantic = F.conv2d(patches, state["head.weight"], state["head.bias"], padding=1)
    return semantic.mean((2, 3)), attention.view(batch, 1, height, across) * semantic


def test_ts_cam_gives_its_logits_and_maps(tiny: State, tmp_path: Path) -> None:
    state = with_head(tiny, 7, 192, 3, 3)
    around = {"epoch": 3, "state_dict": OrderedDict((f"module.{k}", v) for k, v in state.items()), "best_map": 0.8}
    result = convert_checkpoint(written(around, tmp_path / "in.pth"), tmp_path / "out" / "m")
    assert (result.model, result.backbone, result.head, result.num_classes) == ("molt_deit_tiny", TINY, "patches", 7)
    assert result.sizes == ((224, 224),) and result.trained and result.saw_masks == "unknown"
    assert result.left_out == ("epoch", "best_map")
    model = molt.load_model(result.path)
    assert model.trained and model.weights[0].saw_masks == "unknown" and model.class_names[6] == "class 6"
    x = pixels(2, 3, 224, 224)
    with torch.no_grad():
        logits, maps = ts_cam(state, normalize(x, model.transformer(0).backbone.model))
        ours = model.cams(model.see(x), torch.arange(7).expand(2, -1))[0]
        assert torch.allclose(model(x), logits, atol=1e-4)
        fused = model.localize(x, [4])[0, 0]
        large = F.interpolate(maps[:1, 4:5], (224, 224), mode="bilinear", align_corners=False)[0, 0]
    assert maps.std() > 0.1 * maps.abs().mean() and torch.allclose(ours, maps, atol=1e-4, rtol=1e-4)
    assert torch.allclose(fused, (large - large.min()) / (large.max() - large.min()), atol=1e-3)


def holds(result: Any, state: State) -> bool:
    """Tell whether a converted file has the very tensors of a state dict."""
    transformer = molt.load_model(result.path).transformers[0]
    got = transformer.backbone.model.state_dict() | {f"head.{k}": v for k, v in transformer.head.state_dict().items()}
    return got.keys() == state.keys() and all(torch.equal(got[k], state[k]) for k in state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": {f"_orig_mod.module.{k}": torch.nn.Parameter(v) for k, v in s.items()}},
        lambda s: {"model": {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}}},
        lambda s: {"model_state_dict": {k: v.mT.contiguous().mT if v.ndim > 1 else v for k, v in s.items()}},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_wrappers_and_prefixes_are_taken_off(
    tscam: State, tmp_path: Path, wrap: Callable[[State], Any], zipped: bool
) -> None:
    torch.save(wrap(tscam), tmp_path / "in", _use_new_zipfile_serialization=zipped)
    assert holds(convert_checkpoint(tmp_path / "in", tmp_path / "out"), tscam)


def test_safetensors_are_read(tscam: State, tmp_path: Path) -> None:
    save_file(tscam, tmp_path / "in.pth", metadata={"format": "pt"})
    result = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out")
    assert holds(result, tscam) and result.left_out == () and result.backbone == SMALL


def test_what_lay_beside_the_weights_is_told(tscam: State, tmp_path: Path) -> None:
    """Options of a run and NumPy's numbers are read past without running anything of theirs."""
    around = {
        "model": tscam,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "args": argparse.Namespace(lr=0.1, out=[1]),
        "metric": np.float64(3.5),
        "best_acc1": torch.tensor(3.0),
        "epoch": 12,
    }
    result = convert_checkpoint(written(around, tmp_path / "in"), tmp_path / "out")
    assert set(result.left_out) == {"optimizer", "args", "metric", "best_acc1", "epoch"}


def test_the_bias_of_an_ilsvrc_head_is_kept(bare: State, tmp_path: Path) -> None:
    bias = torch.arange(1000.0)
    state = bare | {"head.weight": torch.zeros(1000, 64, 3, 3), "head.bias": bias}
    result = convert_checkpoint(written(state, tmp_path / "in"), tmp_path / "out")
    assert any("starts from the bias of DeiT's classifier" in note for note in result.notes)
    model = molt.load_model(result.path)
    assert result.saw_masks == "unknown" and model.class_names[281] == "tabby, tabby cat"
    with torch.no_grad():
        assert torch.allclose(model(pixels(1, 3, 160, 160))[0], bias)


def test_deit_classifies_as_timm_and_localizes(tiny: State, tmp_path: Path, photo: torch.Tensor) -> None:
    deit = with_head(tiny, 1000, 192)
    source = written({"model": deit}, tmp_path / "in")
    result = convert_checkpoint(source, tmp_path / "out", sizes=(224, (64, 96)))
    assert (result.head, result.trained, result.num_classes) == ("class_token", True, 1000)
    assert any("trained on the class token alone" in note for note in result.notes)
    model = molt.load_model(result.path)
    assert model.config.shared and len(model.transformers) == 1 and model.weights[0].saw_masks == "no"
    theirs = timm.create_model(TINY).eval()
    theirs.load_state_dict(deit)
    x = pixels(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(normalize(x, theirs))
        assert torch.allclose(model.scale_logits(x)[0], expected, atol=1e-4) and expected.std() > 0.1
        transformer, seen = model.transformer(0), model.see(x)[0]
        wanted = torch.tensor([[3, 999], [0, 3]])
        responses = seen.patches @ deit["head.weight"].T + deit["head.bias"]
        picked = responses.gather(2, wanted[:, None].expand(-1, 196, -1)).transpose(1, 2).view(2, 2, 14, 14)
        assert torch.allclose(transformer.class_maps(seen, wanted), picked, atol=1e-4)
    found = molt.Localizer("molt_deit_tiny", checkpoint=result.path, device="cpu", clusterer=TokenKMeans())(
        photo, "tabby"
    )
    assert found.names == ["tabby, tabby cat"] and found.heat.shape == (1, 224, 224) and len(found.boxes) == 1
    assert found.heat.isfinite().all() and found.heat.std() > 0.01


def test_only_a_deit_with_its_own_classes_saw_no_masks(tiny: State, bare: State, tmp_path: Path) -> None:
    for state in (with_head(tiny, 999, 192), with_head(bare, 1000, 64)):
        result = convert_checkpoint(written(state, tmp_path / "in"), tmp_path / "out", sizes=(64,), force=True)
        assert result.head == "class_token" and result.saw_masks == "unknown"


def test_a_backbone_gets_a_random_head_that_is_told(bare: State, tmp_path: Path) -> None:
    source = written(bare, tmp_path / "in")
    before = torch.random.get_rng_state()
    result = convert_checkpoint(source, tmp_path / "a", class_names=["cat", "dog"], sizes=(64,))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not result.trained and result.saw_masks == "unknown" and result.head == "patches"
    assert any("the head is random" in note for note in result.notes)
    assert any("trained at 160x160: position embeddings are resampled" in note for note in result.notes)
    model = molt.load_model(result.path)
    assert not model.trained and model.class_names == ("cat", "dog")
    convert_checkpoint(source, tmp_path / "b", class_names=["cat", "dog"], sizes=(64,))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    convert_checkpoint(source, tmp_path / "b", class_names=["cat", "dog"], sizes=(64,), seed=1, force=True)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_a_head_can_be_left_out_for_a_new_one(bare: State, tmp_path: Path) -> None:
    source = written(with_head(bare, 1000, 64), tmp_path / "in")
    with pytest.raises(ValueError, match=r"num_classes says 5, the head in .* has 1000 classes; new_head"):
        convert_checkpoint(source, tmp_path / "out", num_classes=5)
    result = convert_checkpoint(source, tmp_path / "out", num_classes=5, new_head=True)
    assert result.left_out == ("head.weight (1000, 64)", "head.bias (1000,)") and not result.trained
    assert result.head == "patches" and molt.load_model(result.path).config.num_classes == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_new_head_is_trained_and_takes_the_names_of_the_photos(
    bare: State, tmp_path: Path, dtype: torch.dtype
) -> None:
    for place, name in enumerate(["blue", "red"] * 4):
        pixels = np.full((40, 40, 3), 90 + place, np.uint8)
        pixels[8:30, 8:30] = (220, 30, 20) if name == "red" else (20, 30, 220)
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{place}.png")
    state = {key: value.to(dtype) for key, value in with_head(bare, 1000, 64).items()}
    source = written(state, tmp_path / "in")
    result = convert_checkpoint(source, tmp_path / "out", num_classes=2, new_head=True, sizes=(64,))
    recipe = Recipe(epochs=2, batch=4)
    given = molt.load_model(result.path)
    found = train(read_set(tmp_path / "photos"), tmp_path / "run", recipe=recipe, model=given, device="cpu")
    model = molt.load_model(found.best)
    assert model.class_names == ("blue", "red") and next(model.parameters()).dtype == torch.float32
    for key, value in state.items():
        if not key.startswith("head."):
            assert torch.equal(model.transformers[0].backbone.model.state_dict()[key], value.float()), key
    localizer = molt.Localizer(model)
    assert localizer(tmp_path / "photos" / "red" / "1.png", classes="red").names == ["red"]


def test_dinov2_with_registers_in_its_own_names(tmp_path: Path) -> None:
    """Compared with timm's own reading of the original file."""
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    network = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    state = network.state_dict()
    generator = torch.Generator().manual_seed(3)
    original = {k: v.clone() for k, v in state.items() if k not in ("reg_token", "pos_embed")}
    original |= {
        "register_tokens": torch.randn(1, 4, 384, generator=generator),
        "pos_embed": torch.randn(1, 1370, 384, generator=generator),
        "mask_token": torch.zeros(1, 384),
    }
    network.load_state_dict(checkpoint_filter_fn(dict(original), network))
    result = convert_checkpoint(written(original, tmp_path / "in"), tmp_path / "out", num_classes=3)
    assert (result.model, result.backbone) == ("molt_dinov2_small", name) and result.left_out == ("mask_token",)
    assert result.sizes == ((518, 518),) and not result.trained and result.saw_masks == "unknown"
    model = molt.load_model(result.path)
    ours, theirs = model.transformers[0].backbone.model.state_dict(), network.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    x = pixels(1, 3, 28, 42)
    with torch.no_grad():
        seen = model.transformer(0).see(x)
        assert torch.allclose(seen.patches, network.forward_features(x)[:, 5:], atol=1e-5)


def test_swiglu_names_of_dinov2_are_timms() -> None:
    given = {f"blocks.0.mlp.{k}.{p}": torch.rand(2) for k in ("w12", "w3") for p in ("weight", "bias")}
    given |= {"mask_token": torch.zeros(1), "norm.weight": torch.rand(3)}
    renamed, left_out = _timm_names(given, Path("x"))
    expected = checkpoint_filter_fn(dict(given), timm.create_model(TINY, num_classes=0))
    assert left_out == ["mask_token"] and renamed.keys() == expected.keys()
    assert all(torch.equal(renamed[k], expected[k]) for k in expected)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_known_networks_have_the_outlines_noted(name: str) -> None:
    with torch.device("meta"):
        network = molt.create_model(KNOWN[name][0], 2, (224,), pretrained=False, backbone=name)
    assert _outline(network.transformers[0].backbone.model.state_dict(), Path("x")) == KNOWN[name][1]
    outlines = [outline for _, outline in KNOWN.values()]
    assert outlines.count(KNOWN[name][1]) == 1, "another network looks the same"
    assert isinstance(KNOWN[name][1], Outline)


def test_another_vit_is_taken_by_its_timm_name(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_384.augreg_in21k_ft_in1k"
    state = random_state(name)
    source = written(state, tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"trained at 384x384, .*nearest deit_tiny_patch16_224.*--backbone"):
        convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(ValueError, match="needs model"):
        convert_checkpoint(source, tmp_path / "out", backbone=name)
    result = convert_checkpoint(source, tmp_path / "out", model="molt_deit_tiny", backbone=name, sizes=(64,))
    assert result.backbone == name and result.saw_masks == "unknown" and result.trained
    assert any("mean 0.5/0.5/0.5" in note for note in result.notes)


def test_dtypes_are_kept_and_mixed_ones_widened(tscam: State, tmp_path: Path) -> None:
    half = {k: v.bfloat16() for k, v in tscam.items()}
    kept = convert_checkpoint(written(half, tmp_path / "in"), tmp_path / "out", sizes=(64,))
    assert next(molt.load_model(kept.path).parameters()).dtype == torch.bfloat16
    half["head.bias"] = tscam["head.bias"]
    mixed = convert_checkpoint(written(half, tmp_path / "in"), tmp_path / "out", sizes=(64,), force=True)
    model = molt.load_model(mixed.path)
    assert torch.equal(model.transformers[0].head.bias, tscam["head.bias"])
    assert any("several dtypes became float32" in note for note in mixed.notes)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda s: s | {"norm.weight": torch.zeros(5)}, r"fit test_vit.*shapes: norm.weight \(5,\), expected \(64,\)"),
        (lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, "missing: norm.bias"),
        (lambda s: {k: v for k, v in s.items() if k != "head.bias"}, "missing: head.bias"),
        (lambda s: {k: v for k, v in s.items() if k != "head.weight"}, r"head.bias \(7,\) without head.weight"),
        (lambda s: s | {"extra.\x1b[31m": torch.zeros(5)}, r"left over: 'extra.\\x1b\[31m \(5,\)'"),
        (lambda s: s | {"head.bias": torch.zeros(8)}, r"shapes: head.bias \(8,\), expected \(7,\)"),
        (lambda s: s | {"head.weight": torch.zeros(7, 64, 1, 1)}, r"head.weight \(7, 64, 1, 1\), expected TS-CAM's"),
        (lambda s: s | {"head.weight": torch.zeros(7, 63)}, r"head.weight \(7, 63\), expected TS-CAM's"),
        (lambda s: s | {"head.weight": torch.zeros(0, 64), "head.bias": torch.zeros(0)}, "num_classes must be"),
        (lambda s: s | {"dist_token": torch.zeros(1, 1, 64)}, "is a distilled DeiT"),
        (lambda s: s | {"head_dist.bias": torch.zeros(9)}, "is a distilled DeiT"),
        (lambda s: s | {"blocks.99.norm1.bias": torch.zeros(64)}, "depth 7.*nearest test_vit"),
        (lambda s: s | {"pos_embed": torch.zeros(1, 145, 64)}, "trained at 192x192.*nearest test_vit"),
        (lambda s: s | {"pos_embed": torch.zeros(1, 200, 64)}, "position embedding of 200 entries"),
        (lambda s: s | {"pos_embed": torch.zeros(1, 0, 64)}, "position embedding of 0 entries"),
        (lambda s: s | {"pos_embed": torch.zeros(3)}, r"of no network known here: it holds cls_token \(1, 1, 64\)"),
        (lambda s: s | {"reg_token": torch.zeros(1, 4, 64)}, "4 register tokens"),
        (lambda s: s | {"register_tokens": torch.ones(1, 4, 64), "cls_token": torch.ones(1, 2, 64)}, "which differ"),
        (lambda s: s | {"blocks.0.ls1.gamma": torch.zeros(64)}, "with LayerScale"),
        (lambda s: s | {"blocks.0.mlp.w12.weight": torch.zeros(256, 64)}, "both names, w12 and fc1"),
        (lambda s: {"layer1.0.conv1.weight": torch.zeros(4, 4, 3, 3)}, r"holds layer1.0.conv1.weight \(4, 4, 3, 3\);"),
        (lambda s: s | {"norm.bias": torch.full((64,), math.nan)}, "NaN or infinity in norm.bias"),
        (lambda s: s | {"norm.bias": torch.full((64,), -math.inf)}, "NaN or infinity in norm.bias"),
        (lambda s: s | {"norm.bias": torch.zeros(64, dtype=torch.int64)}, "norm.bias as int64"),
        (lambda s: s | {"norm.bias": torch.eye(64).to_sparse()}, "norm.bias as float32, torch.sparse_coo"),
        (lambda s: s | {"norm.bias": torch.zeros(64, device="meta")}, "norm.bias as float32, torch.strided, meta"),
        (lambda s: s | {"norm.bias": torch.zeros(1).expand(10**12)}, "claims 4,000,0.* bytes of tensors"),
        (lambda s: s | {"note": "hello"}, r"no tensors: note \(str\)"),
        (lambda s: {"state_dict": s, "model": s}, "several state dicts: state_dict, model"),
        (lambda s: {"state_dict": s, "decoder": {"a": torch.zeros(3)}}, "more than 'state_dict'.*: decoder"),
        (lambda s: {"state_dict": {}}, "holds nothing, expected a state dict"),
        (lambda s: {"state_dict": {3: torch.zeros(2)}}, "names entries by int"),
        (lambda s: torch.zeros(3), "holds Tensor, expected a state dict"),
        (lambda s: [s], "holds list, expected a state dict"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_files_that_do_not_fit_are_told(tscam: State, tmp_path: Path, spoil: Callable[[State], Any], text: str) -> None:
    source = written(spoil(tscam), tmp_path / "in.pth")
    with pytest.raises(ValueError, match=text) as caught:
        convert_checkpoint(source, tmp_path / "out")
    assert str(caught.value).isprintable() and [p.name for p in tmp_path.iterdir()] == ["in.pth"]


def test_a_model_that_was_asked_for_is_checked(tscam: State, tmp_path: Path) -> None:
    source = written(tscam, tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"has width 64.*expected the network of molt_deit_small.*width 384"):
        convert_checkpoint(source, tmp_path / "out", model="molt_deit_small")
    with pytest.raises(CheckpointError, match=r"does not fit deit_small_patch16_224: shapes: "):
        convert_checkpoint(source, tmp_path / "out", model="molt_deit_small", backbone="deit_small_patch16_224")
    assert convert_checkpoint(source, tmp_path / "out", model="molt_deit_tiny").model == "molt_deit_tiny"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"model": "resnet"}, ValueError, "model must be one of molt_deit_base"),
        ({"sizes": (100,)}, ValueError, "sizes must be multiples of the patch size"),
        ({"sizes": 224}, TypeError, "sizes must be a sequence"),
        ({"class_names": "abcdefg"}, TypeError, "class_names must be a sequence"),
        ({"class_names": ["a"]}, ValueError, "class_names says 1, the head in .* has 7"),
        ({"new_head": True}, ValueError, "num_classes or class_names is needed, as the head in .* is left out"),
        ({"new_head": True, "num_classes": 0}, ValueError, "num_classes must be"),
        ({"new_head": True, "num_classes": 3, "class_names": ["a"]}, ValueError, "class_names must hold 3"),
        ({"new_head": True, "num_classes": 3, "seed": -1}, ValueError, "seed must be in"),
    ],
)
def test_wrong_arguments_are_told(
    tscam: State, tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    source = written(tscam, tmp_path / "in")
    with pytest.raises(error, match=text) as caught:
        convert_checkpoint(source, tmp_path / "out", **options)
    assert not isinstance(caught.value, CheckpointError) and not (tmp_path / "out").exists()


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.made = call, arguments

    def __reduce__(self) -> Any:
        return self.made


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize(("call", "named"), [(os.mkdir, r"posix|nt"), (eval, "eval"), (np.save, "numpy")])
def test_nothing_in_a_file_is_run(tscam: State, tmp_path: Path, kind: str, call: Any, named: str) -> None:
    mark = tmp_path / "mark"
    arguments = {os.mkdir: (str(mark),), eval: (f"__import__('os').mkdir({str(mark)!r})",), np.save: (str(mark), 1)}
    content = {"state_dict": tscam, "args": Evil(call, *arguments[call])}
    source = tmp_path / "in"
    if kind == "pickle":
        source.write_bytes(pickle.dumps(content["args"], protocol=2))
    else:
        torch.save(content, source, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match="cannot be read safely") as caught:
        convert_checkpoint(source, tmp_path / "out")
    assert "weights_only" not in str(caught.value), "torch's advice to load it unsafely"
    if kind == "zip":
        assert caught.match(named)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_broken_and_other_files_are_told(tscam: State, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="not a file"):
        read_tensors(tmp_path)
    whole = written(tscam, tmp_path / "whole").read_bytes()
    for name, data in {"empty": b"", "text": b"hello, world", "short": whole[:-3000], "none": whole[:4]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{name} cannot be read safely"):
            read_tensors(tmp_path / name)
    save_file(tscam, tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="broken safetensors"):
        read_tensors(tmp_path / "cut")
    with (
        zipfile.ZipFile(tmp_path / "whole") as old,
        zipfile.ZipFile(tmp_path / "zip", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(CheckpointError, match="compressed archive"):
        read_tensors(tmp_path / "zip")
    monkeypatch.setattr("molt.backbones.weight_files.LARGEST_FILE", 1000)
    with pytest.raises(CheckpointError, match="bytes, expected at most 1,000"):
        read_tensors(tmp_path / "whole")


def test_the_output_is_whole_and_nothing_is_replaced_unasked(
    tscam: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tscam, tmp_path / "in")
    before = source.read_bytes()
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        convert_checkpoint(source, tmp_path / "out")
    for place in (source, tmp_path):
        with pytest.raises(FileExistsError, match="out must be another file"):
            convert_checkpoint(source, place, force=True)

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="disk full"):
            convert_checkpoint(source, tmp_path / "out", force=True)
    assert (tmp_path / "out").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
    convert_checkpoint(source, tmp_path / "out", force=True)
    assert source.read_bytes() == before
    with pytest.raises(CheckpointError, match="is a MOLT already"):
        convert_checkpoint(tmp_path / "out", tmp_path / "again")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["convert", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_command(tscam: State, bare: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, names = written({"state_dict": tscam, "epoch": 3}, tmp_path / "in"), tmp_path / "names.txt"
    names.write_text("\n".join("abcdefg") + "\n")
    code, out, err = run(capsys, source, tmp_path / "m", "--classes", names, "--sizes", "64,64x96")
    assert code == 0 and not err
    assert "molt_deit_tiny on test_vit.r160_in1k, 7 classes, patches head, trained, at 64x64, 64x96" in out
    assert "left out: epoch" in out and "masks seen in training: unknown" in out
    model = molt.load_model(tmp_path / "m")
    assert model.class_names == tuple("abcdefg") and model.config.shared

    code, out, err = run(capsys, written(bare, tmp_path / "bare"), tmp_path / "n", "--num-classes", 3, "--json")
    record = json.loads(out)
    assert code == 0 and record["trained"] is False and record["path"] == str(tmp_path / "n")
    assert any("the head is random" in note for note in record["notes"])
    assert "NOT TRAINED" in run(capsys, tmp_path / "bare", tmp_path / "n", "--num-classes", 3, "--force")[1]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("nowhere", "out"), 1, "does not exist"),
        (("in", "in"), 1, "out must be another file"),
        (("in", "out", "--model", "molt_deit_base"), 1, "expected the network of molt_deit_base"),
        (("in", "out", "--model", "x"), 2, "model must be one of"),
        (("in", "out", "--sizes", "64,x"), 2, "--sizes must be sides"),
        (("in", "out", "--sizes", "65"), 2, "multiples of the patch size"),
        (("in", "out", "--new-head"), 2, "num_classes or class_names is needed"),
        (("in", "out", "--classes", "nowhere"), 1, "class names"),
        (("in", "out", "--classes", "gap"), 2, "line 2 is empty"),
        (("in", "out", "--classes", "bytes"), 2, "UTF-8"),
    ],
)
def test_command_says_what_is_wrong(
    tscam: State, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Any, code: int, text: str
) -> None:
    written(tscam, tmp_path / "in")
    (tmp_path / "gap").write_text("a\n\nb\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    places = [tmp_path / a if i < 2 or a in ("nowhere", "gap", "bytes") else a for i, a in enumerate(arguments)]
    found, out, err = run(capsys, *places)
    assert found == code and text in " ".join(err.split()) and not out and "Traceback" not in err
    assert not (tmp_path / "out").exists()
