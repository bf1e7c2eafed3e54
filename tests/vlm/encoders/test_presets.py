"""Is every preset what its row says, and is it built without a network?"""

import json
import socket
from typing import Any

import pytest
import timm
import torch
import transformers
from transformers import CLIPVisionModel

from vlm.encoders import VisionEncoder, build_vision_encoder, load_vision_encoder
from vlm.encoders.presets import (
    ENCODERS,
    HALF,
    IMAGENET,
    OPENAI,
    PRESETS,
    SEVERAL,
    SHORT,
    expand_preset,
)
from vlm.errors import UserError

# From the encoders' papers and published configs: width, patch or stride, size, mean and std.
KNOWN = {
    "clip-l-336": (1024, 14, 336, OPENAI),
    "openclip-bigg": (1664, 14, 224, OPENAI),
    "siglip-so400m-384": (1152, 14, 384, HALF),
    "siglip2-so400m-378": (1152, 14, 378, HALF),
    "siglip2-so400m-384": (1152, 16, 384, HALF),
    "siglip2-so400m-512": (1152, 16, 512, HALF),
    "eva02-clip-l-336": (1024, 14, 336, OPENAI),
    "eva02-clip-e": (1792, 14, 224, OPENAI),
    "eva-clip-g": (1408, 14, 224, OPENAI),
    "aimv2-l-336": (1024, 14, 336, OPENAI),
    "convnext-l-768": (1536, 32, 768, OPENAI),
    "convnext-xxl-1024": (3072, 32, 1024, OPENAI),
    "internvit-300m-448": (1024, 14, 448, IMAGENET),
    "internvit-6b-448": (3200, 14, 448, IMAGENET),
    "pe-spatial-l-448": (1024, 14, 448, HALF),
    "dinov2-l": (1024, 14, 518, IMAGENET),
    "dinov2-l-reg4": (1024, 14, 518, IMAGENET),
    "dinov2-g-378": (1536, 14, 378, IMAGENET),
    "dinov3-l": (1024, 16, 256, IMAGENET),
    "mambaout-tiny": (576, 32, 224, IMAGENET),
    "mambaout-small": (576, 32, 224, IMAGENET),
    "mambaout-base": (768, 32, 224, IMAGENET),
    "mambaout-base-plus-384": (768, 32, 384, IMAGENET),
    "vil2-tiny": (192, 16, 224, IMAGENET),
    "vil2-small": (384, 16, 224, IMAGENET),
    "vil2-base": (768, 16, 224, IMAGENET),
}
# Vim and VMamba: millions of parameters of the published classifiers, whose head is left out here
# and, of VMamba, a norm added: width of the last stage, of the norm, patch and stride.
CLASSIFIERS = {
    "vim-tiny": (7.148, 192, 0, 16, 16),
    "vim-small": (25.797, 384, 0, 16, 16),
    "vim-base": (97.598, 768, 0, 16, 16),
    "vim-tiny-stride8": (7.250, 192, 0, 16, 8),
    "vim-small-stride8": (26.001, 384, 0, 16, 8),
    "vmamba-tiny-s1l8": (30.249, 768, 384, 16, 16),
    "vmamba-tiny-s2l5": (30.706, 768, 384, 16, 16),
    "vmamba-small-s2l15": (50.148, 768, 384, 16, 16),
    "vmamba-small-s1l20": (49.013, 768, 384, 16, 16),
    "vmamba-base-s2l15": (88.558, 1024, 512, 16, 16),
    "vmamba-base-s1l20": (86.615, 1024, 512, 16, 16),
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No network."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a preset asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def empty(config: Any) -> VisionEncoder:
    """Build on the meta device: shapes without weights."""
    with torch.device("meta"):
        return build_vision_encoder(expand_preset(config))


def count(encoder: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in encoder.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_built_as_the_row_says(name):
    row = ENCODERS[name]
    encoder = empty({"preset": name})
    assert (encoder.grids, encoder.dims) == (((row.grid, row.grid),), (row.width,))
    assert count(encoder) == row.parameters
    assert encoder.image_size == row.image_size
    assert (encoder.image_mean, encoder.image_std) == row.pixels
    assert encoder.config["layer"] == row.layer


@pytest.mark.parametrize("name", KNOWN)
def test_row_agrees_with_what_is_published(name):
    width, stride, size, pixels = KNOWN[name]
    row = ENCODERS[name]
    assert (row.width, row.grid) == (width, size // stride)
    assert (row.image_size, row.pixels) == (size, pixels)


def test_every_row_has_been_compared():
    assert set(KNOWN) | set(CLASSIFIERS) == set(ENCODERS)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_without_their_heads(name):
    millions, head, norm, patch, stride = CLASSIFIERS[name]
    row = ENCODERS[name]
    whole = row.parameters - 2 * norm + (head + 1) * 1000
    assert round(whole / 1e6, 3) == millions
    assert (row.width, row.grid) == (head + norm, (224 - patch) // stride + 1)
    assert row.source is None and row.published


@pytest.mark.parametrize("name", [n for n, row in ENCODERS.items() if row.type == "timm"])
def test_pixels_are_what_timm_has_on_record(name):
    # They stand in the config, so the record would not be asked.
    row = ENCODERS[name]
    assert row.source is not None
    record = timm.get_pretrained_cfg(row.source)
    assert record is not None and (tuple(record.mean), tuple(record.std)) == row.pixels
    assert record.hf_hub_id  # there are weights to load
    if not name.startswith("convnext"):  # trained at 256 and 320, used at more
        assert record.input_size[-1] == row.image_size


def test_transformers_numbers_are_those_of_the_class():
    # Misspelt fields would be kept as extra ones without a word.
    for row in ENCODERS.values():
        if row.type == "transformers":
            values = dict(row.fields["architecture"])
            config = transformers.AutoConfig.for_model(values.pop("model_type"))
            assert set(values) <= set(config.to_dict())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # by hand: layers x (attention, MLP, norms) + patches + positions
        (
            "clip-l-336",
            23 * (4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024)
            + (3 * 14 * 14 * 1024 + 1024 + 577 * 1024 + 2 * 1024),
        ),
        (
            "siglip-so400m-384",
            26 * (4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152)
            + (3 * 14 * 14 * 1152 + 1152 + 729 * 1152),
        ),
        (  # no bias before the attention's last layer; RMS norms, of queries and keys too; 2 scales
            "internvit-6b-448",
            45 * (4 * 3200**2 + 3200 + 2 * 3200 * 12800 + 12800 + 3200 + 6 * 3200)
            + (3 * 14 * 14 * 3200 + 3200 + 1025 * 3200 + 3200),
        ),
    ],
)
def test_parameters_by_hand(name, parameters):
    assert ENCODERS[name].parameters == parameters


def test_clip_is_llavas():
    encoder: Any = empty({"preset": "clip-l-336"})
    layers = encoder.model.encoder.layers
    assert len(layers) == 23  # hidden_states[-2] of 24
    assert type(layers[0].mlp.activation_fn).__name__ == "QuickGELUActivation"


@pytest.mark.parametrize("name", SEVERAL)
def test_several_are_built_as_the_row_says(name):
    row = SEVERAL[name]
    encoder = empty({"preset": name})
    tiles = row.fields.get("tiles", (1,) * len(row.encoders))
    sides = [(side, n) for (_, _, side), n in zip(row.encoders, tiles, strict=True)]
    expected = [(times * side,) * 2 for side, n in sides for times in sorted({1, n})]
    assert encoder.grids == tuple(expected)
    assert encoder.dims == row.widths
    assert count(encoder) == row.parameters
    assert encoder.image_size == max(part["image_size"] for part in encoder.config["encoders"])
    assert row.published


def test_fields_go_over_the_presets():
    config = {"preset": "clip-l-336", "layer": -1, "image_size": 448}
    assert expand_preset(config) == {
        **ENCODERS["clip-l-336"].config(),
        "layer": -1,
        "image_size": 448,
    }
    assert config == {"preset": "clip-l-336", "layer": -1, "image_size": 448}
    encoder = empty(config)
    assert encoder.grids == ((32, 32),)
    assert count(encoder) - ENCODERS["clip-l-336"].parameters == 12_596_224  # one layer


@pytest.mark.parametrize("config", [{"type": "timm", "source": "x"}, {}, "clip-l-336", None])
def test_without_a_preset_nothing_changes(config):
    assert expand_preset(config) is config


def test_resolved_config_has_no_preset_and_rebuilds():
    encoder = empty({"preset": "mambaout-tiny", "layer": [-2, -1]})
    assert encoder.config["type"] == "timm" and "preset" not in encoder.config
    again = empty(json.loads(json.dumps(encoder.config)))
    assert again.config == encoder.config
    assert again.dims == (384, 576) and again.grids == ((14, 14), (7, 7))


def test_weights_are_asked_for_by_the_rows_numbers(monkeypatch):
    asked = []

    def fail(source: str, config: Any, **_: Any) -> None:
        asked.append((source, config.num_hidden_layers, config.image_size))
        raise OSError("no network")

    monkeypatch.setattr(CLIPVisionModel, "from_pretrained", fail)
    with pytest.raises(UserError, match="cannot load 'openai/clip-vit-large-patch14-336'"):
        load_vision_encoder(expand_preset({"preset": "clip-l-336"}))
    assert asked == [("openai/clip-vit-large-patch14-336", 23, 336)]


BAD = [
    ({"preset": "clip-l"}, r"unknown vision encoder preset 'clip-l' \(did you mean 'clip-l-336'"),
    ({"preset": "vim-smal"}, "choose from aimv2-l-336, "),
    ({"preset": 3}, "vision_encoder.preset must be a name such as clip-l-336, not 3"),
    ({"preset": "dinov2-l", "type": "timm"}, "has the preset 'dinov2-l', of type timm, and a type"),
]


@pytest.mark.parametrize(("config", "message"), BAD, ids=[str(config) for config, _ in BAD])
def test_mistakes_are_named(config, message):
    with pytest.raises(UserError, match=message):
        expand_preset(config)


def test_every_name_is_unique():
    assert len(PRESETS) == len(ENCODERS) + len(SEVERAL) + len(SHORT)


@pytest.mark.parametrize(("short", "width", "blocks"), [("vim-s", 384, 24), ("vmamba-b", 1536, 21)])
def test_short_names(short, width, blocks):
    encoder = empty({"preset": short})
    assert encoder.dims == (width,)
    assert sum(type(m).__name__ in ("Block", "VSSBlock") for m in encoder.modules()) == blocks


@pytest.mark.parametrize(("name", "row"), [(n, r) for n, r in ENCODERS.items() if not r.source])
def test_who_lacks_weights_is_told_where_they_are(name, row):
    with pytest.raises(UserError, match="the weights of this preset are at") as caught:
        load_vision_encoder({"preset": name})
    assert str(caught.value).endswith(row.published)
