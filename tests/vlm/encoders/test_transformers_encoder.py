"""Does the transformers adapter give the library's hidden states, and load from every source?"""

import json
import warnings

import huggingface_hub
import pytest
import timm
import torch
import transformers
from transformers import AutoImageProcessor
from transformers.models.clip import modeling_clip

from vlm.encoders import build_vision_encoder, load_vision_encoder
from vlm.errors import UserError

CLASSES = {
    "clip": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_registers": "Dinov2WithRegistersModel",
    "internvl": "InternVLVisionModel",
    "internvl_normed": "InternVLVisionModel",
}
NUM_PREFIX_TOKENS = {"siglip": 0, "dinov2_registers": 5}  # the others have a class token
LAYERS = ["last", -1, -2, [-1, -3]]


@pytest.fixture(params=CLASSES)
def name(request):
    return request.param


@pytest.fixture
def reference(name, tiny, randomise):
    """The library's whole model."""
    config = build_vision_encoder(tiny[name]).model.config
    model_class = getattr(transformers, CLASSES[name])
    return randomise(model_class(config).eval())


def own_hidden_states(model, name, layer, pixel_values, **options):
    """Return the maps the library gives by its own outputs."""
    output = model(pixel_values, output_hidden_states=True, **options)
    if layer == "last":
        states = [output.last_hidden_state]
        if name == "clip":
            states = [model.post_layernorm(states[0])]
    else:
        states = [output.hidden_states[k] for k in (layer if isinstance(layer, list) else [layer])]
    states = [s[:, NUM_PREFIX_TOKENS.get(name, 1) :] for s in states]
    side = int(states[0].shape[1] ** 0.5)
    return [s.reshape(len(s), side, side, -1) for s in states]


def load(folder, **config):
    return load_vision_encoder({"type": "transformers", "source": str(folder), **config}).eval()


def save(model, folder, **processor):
    model.save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1], **processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_equal_to_the_library(name, reference, layer, tmp_path):
    save(reference, tmp_path)
    encoder = load(tmp_path, layer=layer)
    assert encoder.image_mean == (0.5, 0.4, 0.3) and encoder.image_std == (0.3, 0.2, 0.1)
    theirs = torch.randn(2, 3, 32, 32, requires_grad=True)
    ours = theirs.detach().clone().requires_grad_()
    wanted = own_hidden_states(reference, name, layer, theirs)
    maps = encoder(ours)
    for m, w in zip(maps, wanted, strict=True):
        torch.testing.assert_close(m, w, rtol=0, atol=2e-5)
    sum(w.pow(2).sum() for w in wanted).backward()
    sum(m.pow(2).sum() for m in maps).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-4)
    gradients = {n: p.grad for n, p in reference.named_parameters()}
    for parameter_name, parameter in encoder.model.named_parameters():
        wanted_gradient = gradients[parameter_name]
        torch.testing.assert_close(parameter.grad, wanted_gradient, rtol=1e-4, atol=1e-4)


def test_another_image_size_resamples_the_positions(name, reference, tmp_path):
    save(reference, tmp_path)
    encoder = load(tmp_path, layer=-2, image_size=48)
    assert encoder.grids == ((6, 6),)
    images = torch.randn(1, 3, 48, 48)
    options = {"interpolate_pos_encoding": True} if name in ("clip", "siglip") else {}
    wanted = own_hidden_states(reference, name, -2, images, **options)
    torch.testing.assert_close(encoder(images)[0], wanted[0], rtol=0, atol=2e-5)


def test_pixels_that_fill_no_patch_are_left_out(name, reference, tmp_path):
    save(reference, tmp_path)
    assert load(tmp_path, image_size=47).grids == ((5, 5),)  # SigLIP-384: 27 patches of 14, 6 over


def test_layers_above_are_not_computed(tiny, build, pictures, monkeypatch):
    calls = []
    forward = modeling_clip.CLIPEncoderLayer.forward
    monkeypatch.setattr(
        modeling_clip.CLIPEncoderLayer,
        "forward",
        lambda self, *args, **kwargs: calls.append(self) or forward(self, *args, **kwargs),
    )
    sizes = {}
    for layer, count in (("last", 3), (-1, 3), (-2, 2), (-3, 1), ([-3, -2], 2)):
        encoder = build("clip", layer=layer)
        calls.clear()
        encoder(pictures(encoder))
        assert len(calls) == count, layer
        sizes[str(layer)] = sum(p.numel() for p in encoder.parameters())
    per_layer = sizes["-1"] - sizes["-2"]
    assert per_layer > 0 and sizes["-2"] - sizes["-3"] == per_layer
    assert sizes["last"] - sizes["-1"] == 2 * 16  # the final norm


def test_last_layers_weights_are_not_read(name, reference, tmp_path):
    # The folder may lack them: what is not asked for is not needed.
    config = reference.config
    config.num_hidden_layers = 2
    shorter = type(reference)(config)
    config.num_hidden_layers = 3
    save(shorter, tmp_path)
    (tmp_path / "config.json").write_text(config.to_json_string())
    load(tmp_path, layer=-2)
    with pytest.raises(UserError, match=r"lacks the weights encoder\.layer.*and 1?[0-9] more"):
        load(tmp_path, layer=-1)


def whole_models():
    """Vision-language models of the library with the tiny vision configs inside."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    clip_text = {k: v for k, v in text.items() if k != "num_key_value_heads"}
    return {
        "clip": lambda v: transformers.CLIPModel(
            transformers.CLIPConfig(text_config=clip_text, vision_config=v, projection_dim=8)
        ),
        "siglip": lambda v: transformers.SiglipModel(
            transformers.SiglipConfig(text_config=clip_text, vision_config=v)
        ),
        "llava": lambda v: transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config={"model_type": "llama", **text}, vision_config=v, image_token_index=3
            )
        ),
        "internvl": lambda v: transformers.InternVLForConditionalGeneration(
            transformers.InternVLConfig(
                text_config={"model_type": "qwen2", **text}, vision_config=v, image_token_id=3
            )
        ),
    }


def vision_part(model):
    parts = dict(model.named_modules())
    for path in ("model.vision_tower", "vision_model"):
        if path in parts:
            return parts[path]
    raise AssertionError(list(parts))


@pytest.mark.parametrize("original", [True, False], ids=["hub_names", "own_names"])
@pytest.mark.parametrize("whole", ["clip", "siglip", "llava", "internvl"])
def test_vision_part_of_a_whole_model(whole, original, tiny, randomise, tmp_path):
    name = {"llava": "clip"}.get(whole, whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = whole_models()[whole](dict(tiny[name]["architecture"]))
    randomise(model.eval())
    model.save_pretrained(tmp_path, save_original_format=original)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    )
    encoder = load(tmp_path, layer=-2)
    images = torch.randn(2, 3, 32, 32)
    wanted = own_hidden_states(vision_part(model), name, -2, images)
    torch.testing.assert_close(encoder(images)[0], wanted[0], rtol=0, atol=2e-5)


def test_clip_equals_timm_on_the_same_weights(tiny, randomise, tmp_path):
    config = build_vision_encoder(tiny["clip"]).model.config
    theirs = randomise(transformers.CLIPVisionModel(config).eval())
    theirs.save_pretrained(tmp_path)
    vit = timm.create_model(
        "vit_base_patch32_clip_quickgelu_224",
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=3,
        num_heads=2,
        mlp_ratio=2,
        num_classes=0,
    ).eval()
    vit.load_state_dict(clip_to_timm(theirs.state_dict(), depth=3))
    images = torch.randn(2, 3, 32, 32)
    means = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    for layer, normed, index in (("last", True, -1), (-1, False, -1), (-2, False, -2)):
        wanted = vit.forward_intermediates(
            images, indices=[index], norm=normed, intermediates_only=True
        )[0]
        encoder = load(tmp_path, layer=layer, **means)
        torch.testing.assert_close(
            encoder(images)[0], wanted.permute(0, 2, 3, 1), atol=2e-5, rtol=0
        )


def clip_to_timm(state, depth):
    """Rename transformers' CLIP weights to timm's."""
    found = {
        "cls_token": state["embeddings.class_embedding"].reshape(1, 1, -1),
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
        "pos_embed": state["embeddings.position_embedding.weight"][None],
    }
    for ours, theirs in (("norm_pre", "pre_layrnorm"), ("norm", "post_layernorm")):
        found |= {f"{ours}.{p}": state[f"{theirs}.{p}"] for p in ("weight", "bias")}
    pairs = {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "attn.proj": "self_attn.out_proj",
    }
    for i in range(depth):
        layer = f"encoder.layers.{i}"
        for p in ("weight", "bias"):
            for ours, theirs in pairs.items():
                found[f"blocks.{i}.{ours}.{p}"] = state[f"{layer}.{theirs}.{p}"]
            parts = [state[f"{layer}.self_attn.{k}_proj.{p}"] for k in "qkv"]
            found[f"blocks.{i}.attn.qkv.{p}"] = torch.cat(parts)
    return found


def test_saved_folder_is_one_of_transformers(build, pictures, tmp_path):
    encoder = build("siglip")
    encoder.save_pretrained(tmp_path)
    model = transformers.SiglipVisionModel.from_pretrained(tmp_path).eval()
    images = pictures(encoder)
    wanted = model(images).last_hidden_state.unflatten(1, (4, 4))
    torch.testing.assert_close(encoder(images)[0], wanted)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert list(processor.image_mean) == list(encoder.image_mean)
    assert dict(processor.size) == {"height": 32, "width": 32}


def test_saved_at_a_lower_layer_cannot_give_a_higher_one(build, tmp_path):
    build("clip", layer=-2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks the weights .*leave out vision_encoder\.layer"):
        load(tmp_path, layer="last")


def test_dtype(build, tmp_path):
    build("clip").save_pretrained(tmp_path)
    config = {"type": "transformers", "source": str(tmp_path)}
    assert load_vision_encoder(config).dtype == torch.float32
    assert load_vision_encoder(config, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_no_mean_is_said(tiny, build, tmp_path):
    build("clip").model.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"does not say its image_mean; set vision_encoder.image_me"
    ):
        load(tmp_path)
    assert load(tmp_path, image_mean=[0, 0, 0], image_std=[1, 1, 1]).image_mean == (0, 0, 0)


@pytest.mark.parametrize("source", ["no/such/folder/at/all", "./nowhere", "no-one/no-such-model"])
def test_missing_source(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"cannot load '{source}': it is neither a folder"):
        load(source)


def test_folder_without_weights(build, tmp_path):
    build("clip").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load"):
        load(tmp_path)


def test_model_of_another_kind(tmp_path):
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="is of model type 'llama', which has no adapter; known are"
    ):
        load(tmp_path)


def test_a_picture_smaller_than_a_patch_is_refused(encoder_folder):
    with pytest.raises(UserError, match="image_size 7 is smaller than a patch of 8 pixels"):
        load_vision_encoder(
            {"type": "transformers", "source": str(encoder_folder), "image_size": 7}
        )
