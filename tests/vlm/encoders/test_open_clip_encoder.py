"""Does the open_clip adapter give the library's own features, and load from every source?"""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from vlm.encoders import build_vision_encoder, load_vision_encoder
from vlm.errors import UserError

open_clip = pytest.importorskip("open_clip")

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}


@pytest.fixture
def folder(request, tiny, randomise, tmp_path):
    """A folder as open_clip publishes them, and its model."""

    def make(name):
        architecture = tiny[name]["architecture"]
        preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
        config = {"model_cfg": {**architecture, "text_cfg": TEXT}, "preprocess_cfg": preprocess}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        empty = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False)
        model = randomise(empty.eval())
        save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
        return tmp_path, model

    return make


def load(source, **config):
    return load_vision_encoder({"type": "open_clip", "source": str(source), **config}).eval()


@pytest.mark.parametrize("layer", ["last", -1, -2, [-1, -3]], ids=str)
def test_equal_to_the_library(folder, layer):
    path, model = folder("open_clip_vit")
    encoder = load(path, layer=layer)
    assert encoder.image_mean == (0.1, 0.2, 0.3) and encoder.image_std == (0.4, 0.5, 0.6)
    theirs = torch.randn(2, 3, 32, 32, requires_grad=True)
    ours = theirs.detach().clone().requires_grad_()
    indices = [-1] if layer == "last" else layer if isinstance(layer, list) else [layer]
    wanted = [
        model.visual.forward_intermediates(
            theirs, indices=[i], normalize_intermediates=layer == "last", intermediates_only=True
        )["image_intermediates"][0].permute(0, 2, 3, 1)
        for i in indices
    ]
    maps = encoder(ours)
    for m, w in zip(maps, wanted, strict=True):
        torch.testing.assert_close(m, w, rtol=0, atol=2e-5)
    sum(w.pow(2).sum() for w in wanted).backward()
    sum(m.pow(2).sum() for m in maps).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["last", -2])
def test_timm_tower(folder, layer):
    path, model = folder("open_clip_timm")
    encoder = load(path, layer=layer)
    images = torch.randn(2, 3, 64, 64)
    trunk = model.visual.trunk
    index = -1 if layer == "last" else layer
    wanted = trunk.forward_intermediates(images, indices=[index], intermediates_only=True)[0]
    if layer == "last":
        assert not isinstance(trunk.head.norm, torch.nn.Identity)
        wanted = trunk.head.norm(wanted)
    torch.testing.assert_close(encoder(images)[0], wanted.permute(0, 2, 3, 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("layer", "count"), [("last", 3), (-1, 3), (-2, 2), ([-3, -2], 2)])
def test_layers_above_are_not_built(build, layer, count):
    encoder = build("open_clip_vit", layer=layer)
    assert len(encoder.model.transformer.resblocks) == count
    names = set(encoder.state_dict())
    assert ("model.ln_post.weight" in names) == (layer == "last")
    assert "model.proj" not in names


def test_another_image_size_resamples_the_positions(folder):
    path, _ = folder("open_clip_vit")
    encoder = load(path, image_size=48)
    assert encoder.grids == ((6, 6),)
    model = open_clip.create_model(f"local-dir:{path}", force_image_size=48).eval()
    images = torch.randn(1, 3, 48, 48)
    wanted = model.visual.forward_intermediates(
        images, indices=[-1], normalize_intermediates=True, intermediates_only=True
    )["image_intermediates"][0]
    torch.testing.assert_close(encoder(images)[0], wanted.permute(0, 2, 3, 1), rtol=0, atol=2e-5)


def test_named_model_with_a_file(folder, tmp_path):
    path, _ = folder("open_clip_vit")
    config = {**json.loads((path / "open_clip_config.json").read_text())["model_cfg"]}
    named = tmp_path / "configs"
    named.mkdir()
    (named / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(named)
    weights = str(path / "open_clip_model.safetensors")
    encoder = load("tiny-test", pretrained=weights)
    assert encoder.image_mean == pytest.approx(OPENAI_MEAN)
    images = torch.randn(1, 3, 32, 32)
    wanted = load(path)(images)[0]
    assert torch.equal(encoder(images)[0], wanted)
    again = build_vision_encoder(encoder.config)
    assert set(again.state_dict()) == set(encoder.state_dict())


def test_the_tag_decides_on_quick_gelu():
    assert quick_gelu("ViT-B-32", "openai") and not quick_gelu("ViT-B-32", "laion2b_s34b_b79k")
    assert quick_gelu("ViT-B-32-quickgelu", None)


def quick_gelu(source, tag):
    with torch.device("meta"):
        encoder = build_vision_encoder(
            {"type": "open_clip", "source": source, "pretrained": tag, "layer": -12}
        )
    return encoder.config["architecture"]["quick_gelu"]


def test_siglip_has_its_own_mean():
    with torch.device("meta"):
        encoder = build_vision_encoder(
            {"type": "open_clip", "source": "ViT-B-16-SigLIP", "pretrained": "webli", "layer": -12}
        )
    assert encoder.image_mean == (0.5, 0.5, 0.5) and encoder.grids == ((14, 14),)


BAD = [
    ({"source": "ViT-Z-99"}, "cannot load 'ViT-Z-99': it is no model"),
    ({"source": "ViT-B-32"}, "ViT-B-32 needs 'pretrained', one of openai"),
    ({"source": "ViT-B-32", "pretrained": "nonsense"}, "cannot load 'ViT-B-32' with 'nonsense'"),
    ({"source": "ViT-B-32", "preтrained": "openai"}, "has no field"),
]


@pytest.mark.parametrize(("config", "message"), BAD, ids=[str(config) for config, _ in BAD])
def test_mistakes_are_named(config, message):
    with pytest.raises(UserError, match=message):
        load_vision_encoder({"type": "open_clip", **config})


def test_folder_without_a_config(tmp_path):
    with pytest.raises(UserError, match=r"cannot load .*open_clip_config\.json"):
        load(tmp_path)


def test_layer_out_of_range(tiny):
    with pytest.raises(UserError, match=r"layer -4 of the architecture.*out of range"):
        build_vision_encoder({**tiny["open_clip_vit"], "layer": -4})


def test_missing_library_names_the_extra(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match="make extras EXTRAS=open_clip"):
        build_vision_encoder(tiny["open_clip_vit"])
