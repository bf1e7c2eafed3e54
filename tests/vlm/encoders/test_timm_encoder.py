"""Does the timm adapter give the library's own features, and load from every source?"""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from vlm.encoders import build_vision_encoder, load_vision_encoder
from vlm.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = ["timm_vit", "timm_vit_avg", "timm_eva_registers", "timm_convnext", "timm_mambaout"]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def reference(name, tiny, randomise):
    """timm's whole model, with a classifier."""
    return whole_model(tiny[name], randomise)


def whole_model(config, randomise):
    arguments = dict(config["model_args"])
    if config["source"].startswith("vit"):
        arguments["img_size"] = config["image_size"]
    return randomise(timm.create_model(config["source"], num_classes=5, **arguments).eval())


def load(folder, **config):
    return load_vision_encoder({"type": "timm", "source": str(folder), **config}).eval()


def channels_last(features):
    return features.permute(0, 2, 3, 1)


def last_normed(model, name, images):
    """The model's final norm at every position of its last features, by the model's own parts."""
    features = model.forward_features(images)
    if name == "timm_mambaout":
        return model.head.norm(features)  # already channels last
    if name == "timm_convnext":
        return channels_last(model.head.norm(features))
    side = int((features.shape[1] - model.num_prefix_tokens) ** 0.5)
    # `forward_features` ends with `norm`; where that is empty, `fc_norm` stands behind the pool.
    return model.fc_norm(features)[:, model.num_prefix_tokens :].unflatten(1, (side, side))


@pytest.mark.parametrize("layer", ["last", -1, -2, [-1, -3]], ids=str)
def test_equal_to_the_library(name, reference, tiny, layer, tmp_path):
    size = tiny[name]["image_size"]
    timm.models.save_for_hf(reference, tmp_path, safe_serialization=True)
    encoder = load(tmp_path, layer=layer, image_size=size)
    theirs = torch.randn(2, 3, size, size, requires_grad=True)
    ours = theirs.detach().clone().requires_grad_()
    if layer == "last":
        wanted = [last_normed(reference, name, theirs)]
    else:
        indices = layer if isinstance(layer, list) else [layer]
        wanted = [
            channels_last(
                reference.forward_intermediates(theirs, indices=[i], intermediates_only=True)[0]
            )
            for i in indices
        ]
    maps = encoder(ours)
    for m, w in zip(maps, wanted, strict=True):
        torch.testing.assert_close(m, w, rtol=1e-5, atol=2e-5)
    sum(w.pow(2).mean() for w in wanted).backward()
    sum(m.pow(2).mean() for m in maps).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["last", -1, -2])
def test_layers_above_are_not_computed(name, tiny, build, pictures, layer):
    encoder = build(name, layer=layer)
    parts = dict(encoder.model.named_children())
    layers = parts["blocks"] if "blocks" in parts else parts["stages"]
    total = 3 if "blocks" in parts else 4
    assert len(layers) == (total - 1 if layer == -2 else total)
    ran = []
    for module in encoder.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(lambda module, *_: ran.append(module))
    encoder(pictures(encoder))
    own = {p for module in ran for p in module.parameters()}
    # What holds parameters has run, or is a parameter read by its parent (tokens, positions).
    idle = [n for n, p in encoder.named_parameters() if p not in own]
    assert not [n for n in idle if n.count(".") > 1], idle


def test_mambaout_last_is_normed_at_every_position(build, pictures):
    # The library's `forward_features` is un-normed and its `norm` argument does nothing.
    normed, plain = build("timm_mambaout"), build("timm_mambaout", layer=-1)
    plain.load_state_dict({k: v for k, v in normed.state_dict().items() if "head" not in k})
    images = pictures(normed)
    wanted = normed.model.head.norm(plain(images)[0])
    assert torch.equal(normed(images)[0], wanted)
    assert not torch.allclose(plain(images)[0], wanted)


def test_another_image_size_resamples_the_positions(tiny, randomise, tmp_path):
    reference = whole_model(tiny["timm_vit"], randomise)
    timm.models.save_for_hf(reference, tmp_path, safe_serialization=True)
    encoder = load(tmp_path, image_size=48)
    assert encoder.grids == ((6, 6),)
    reference.set_input_size(img_size=48)
    images = torch.randn(1, 3, 48, 48)
    wanted = reference.forward_features(images)[:, 1:].unflatten(1, (6, 6))
    torch.testing.assert_close(encoder(images)[0], wanted, rtol=1e-5, atol=2e-5)


def test_size_mean_and_std_come_from_the_records():
    names = {
        "convnext_atto": (224, IMAGENET_MEAN, IMAGENET_STD),
        "vit_tiny_patch16_224.augreg_in21k": (224, (0.5,) * 3, (0.5,) * 3),
        "mambaout_femto.in1k": (224, IMAGENET_MEAN, IMAGENET_STD),
    }
    for source, (size, mean, std) in names.items():
        with torch.device("meta"):
            encoder = build_vision_encoder({"type": "timm", "source": source})
        assert (encoder.image_size, encoder.image_mean, encoder.image_std) == (size, mean, std)
        assert encoder.config["architecture"] == source.partition(".")[0]


def test_convnext_of_stride_8_at_64_pixels():
    config = {"type": "timm", "source": "convnext_atto", "image_size": 64, "layer": "last"}
    arguments = {"depths": [1, 1, 1, 1], "dims": [16, 32, 48, 64], "output_stride": 8}
    encoder = build_vision_encoder({**config, "model_args": arguments})
    assert (encoder.grids, encoder.dims) == (((8, 8),), (64,))


def test_saved_folder_holds_timms_names(build, tmp_path):
    encoder = build("timm_convnext")
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    missing, unexpected = model.load_state_dict(
        load_file(tmp_path / "model.safetensors"), strict=False
    )
    assert not missing and not unexpected


def test_saved_at_a_lower_layer_cannot_give_a_higher_one(build, tmp_path):
    build("timm_vit", layer=-2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks the weights blocks\.2\."):
        load(tmp_path, layer=-1)


def test_saved_at_another_size_is_refused_with_both_shapes(build, tmp_path):
    build("timm_vit").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'pos_embed' has shape \(1, 17, 16\).*\(1, 37, 16\)"):
        load(tmp_path, image_size=48)


BAD = [
    ({"source": "convnext_ato"}, "no model 'convnext_ato'; the nearest are convnext_atto"),
    ({"source": "convnext_atto.nonsense"}, "cannot load 'convnext_atto.nonsense'.*tag"),
    ({"source": "runs/nowhere/at/all"}, "'runs/nowhere/at/all' is no folder"),
    ({"source": "convnext_atto", "model_args": {"dept": 3}}, "model_args of convnext_atto.*dept"),
    ({"source": "convnext_atto", "model_args": {"dims": [8]}}, "model_args of convnext_atto"),
    ({"source": "convnext_atto", "layer": -9}, "layer -9 of 'convnext_atto'.*out of range"),
    ({}, "needs a 'source' or an 'architecture'"),
]


@pytest.mark.parametrize(("config", "message"), BAD, ids=[str(config) for config, _ in BAD])
def test_mistakes_are_named(config, message):
    with pytest.raises(UserError, match=message):
        build_vision_encoder({"type": "timm", **config})


def test_folder_that_is_not_timms(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"config\.json does not name a timm 'architecture'"):
        load(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_broken_weights(build, tmp_path, content):
    build("timm_vit").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.unlink() if content is None else weights.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the weights .*model\.safetensors"):
        load(tmp_path)
