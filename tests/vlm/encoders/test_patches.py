"""Are patches cut as Fuyu's processor cuts them, and is an encoder without weights an encoder?"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from connectors.config import config_from_mapping
from vlm.encoders import VISION_ENCODERS, load_vision_encoder
from vlm.encoders.patches import PatchesEncoder, PatchesEncoderConfig
from vlm.errors import UserError

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"


def make(**values):
    config = config_from_mapping(PatchesEncoderConfig, values, "patches")
    return PatchesEncoder(PatchesEncoder.resolve(config))


def test_the_reference_cuts_the_same():
    # Its patches are 3 x 4 and ours square: every fourth column is left out of both.
    tensors = load_file(GOLDEN / "fuyu_patch.safetensors")
    image, patches = tensors["image"], tensors["patches"]
    square = image.unflatten(3, (2, 4))[..., :3]
    encoder = make(patch_size=3, image_size=6)
    (found,) = encoder(square.flatten(3))
    expected = patches.reshape(2, 2, 3, 4, 3)[..., :3, :].flatten(2)
    assert torch.equal(found[0], expected)


def test_shapes_and_order():
    encoder = make(patch_size=4, image_size=8)
    assert (encoder.grids, encoder.dims, encoder.image_size) == (((2, 2),), (48,), 8)
    pictures = torch.randn(2, 3, 8, 8)
    (patches,) = encoder(pictures)
    assert patches.shape == (2, 2, 2, 48)
    value = patches[1, 1, 0].reshape(4, 4, 3)[2, 3, 1]  # row 2, column 3, green
    assert value == pictures[1, 1, 4 + 2, 3]
    assert encoder(torch.zeros(0, 3, 8, 8))[0].shape == (0, 2, 2, 48)


def test_it_is_rebuilt_from_its_config_and_its_folder(tmp_path):
    encoder = make(patch_size=4, image_size=8, image_mean=[0.1, 0.2, 0.3])
    config = json.loads(json.dumps(encoder.config))
    assert config.pop("type") == "patches"
    assert make(**config).config == encoder.config
    encoder.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "vision_encoder.json").read_text())
    assert saved == encoder.config
    assert [path.name for path in tmp_path.iterdir()] == ["vision_encoder.json"]
    assert PatchesEncoder.load(encoder_config(saved), torch.bfloat16).config == encoder.config


def encoder_config(values):
    fields = {key: value for key, value in values.items() if key != "type"}
    return config_from_mapping(PatchesEncoderConfig, fields, "patches")


def test_it_is_loaded_without_a_source(monkeypatch):
    monkeypatch.setitem(VISION_ENCODERS, "patches", PatchesEncoder)
    encoder = load_vision_encoder({"type": "patches", "patch_size": 4, "image_size": 8})
    assert encoder.dims == (48,)
    assert encoder(torch.randn(1, 3, 8, 8).bfloat16())[0].dtype == torch.float32


def test_defaults_are_fuyus():
    encoder = make()
    assert (encoder.patch_size, encoder.dims) == (30, (2700,))
    assert encoder.image_mean == encoder.image_std == (0.5, 0.5, 0.5)
    assert not list(encoder.parameters()) and not encoder.state_dict()


BAD = [
    ({"patch_size": 0}, "patch_size must be positive, not 0"),
    ({"patch_size": 7}, "patch_size 7 does not divide image_size 480"),
    ({"layer": -1}, "has no layers"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=str)
def test_wrong_numbers_are_named(values, message):
    with pytest.raises(UserError, match=message):
        make(**values)
