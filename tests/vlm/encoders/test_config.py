"""Is every mistake in a vision encoder's config named, whichever library it is for?"""

import json

import pytest

from vlm.encoders import build_vision_encoder, load_vision_encoder
from vlm.errors import UserError

BAD = [
    ("clip", "vision_encoder must be a mapping with a 'preset'"),
    ({"source": "x"}, "vision_encoder must be a mapping with a 'preset'"),
    ({"type": "tim", "source": "x"}, r"unknown vision encoder 'tim' \(did you mean 'timm'\?\)"),
    ({"type": "timm", "sorce": "x"}, r"'timm' has no field 'sorce' \(did you mean 'source'\?\)"),
    ({"type": "timm", "source": 3}, "field 'source' must be str or None, not 3"),
    ({"type": "timm", "source": "x", "layer": "first"}, "field 'layer' must be"),
    ({"type": "timm", "source": "x", "layer": 0}, "layer must be 'last' or count from the end"),
    ({"type": "timm", "source": "x", "layer": []}, "layer must be 'last' or count from the end"),
    ({"type": "timm", "source": "x", "layer": [-1, 2]}, "layer must be 'last' or count"),
    ({"type": "timm", "source": "x", "image_size": 0}, "image_size must be positive, not 0"),
    ({"type": "timm", "source": "x", "image_mean": [0.5]}, "field 'image_mean' must be"),
    ({"type": "timm", "source": "x", "image_std": [0.5, 0.0, 1]}, "image_std must be positive"),
    ({"type": "transformers"}, "needs a 'source' or an 'architecture'"),
]


@pytest.mark.parametrize(("config", "message"), BAD, ids=[str(config) for config, _ in BAD])
def test_mistakes_are_named(config, message):
    with pytest.raises(UserError, match=message):
        build_vision_encoder(config)


def test_loading_needs_a_source(tiny):
    with pytest.raises(UserError, match="'transformers' needs a 'source' to load from"):
        load_vision_encoder(tiny["clip"])


def test_layer_out_of_range(tiny):
    with pytest.raises(UserError, match="layer -4 of the architecture does not exist; it has 3"):
        build_vision_encoder({**tiny["clip"], "layer": -4})


def test_bad_architecture(tiny):
    architecture = {**tiny["clip"]["architecture"], "hidden_size": "wide"}
    with pytest.raises(UserError, match=r"bad architecture: .*hidden_size"):
        build_vision_encoder({**tiny["clip"], "architecture": architecture})


def test_folder_of_another_type(build, tmp_path):
    build("clip").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"type 'transformers'; set vision_encoder\.type to transf"):
        load_vision_encoder({"type": "timm", "source": str(tmp_path)})


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_broken_saved_config(build, tmp_path, text):
    build("clip").save_pretrained(tmp_path)
    (tmp_path / "vision_encoder.json").write_text(text)
    with pytest.raises(UserError, match="is not a vision encoder's config"):
        load_vision_encoder({"type": "transformers", "source": str(tmp_path)})


def test_measured_sizes_of_another_layer_are_not_believed(build, tmp_path):
    build("timm_convnext", layer=-1).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "vision_encoder.json").read_text())
    assert saved["dims"] == [20]
    encoder = load_vision_encoder({"type": "timm", "source": str(tmp_path), "layer": -2})
    assert encoder.dims == (16,) and encoder.grids == ((4, 4),)
