"""Does an encoder with tiles see the whole view and its pieces, each at its own size?"""

import json

import pytest
import torch
from torch.nn.functional import interpolate

from vlm.encoders import build_vision_encoder
from vlm.encoders.several import join_layers
from vlm.errors import UserError


@pytest.fixture
def make(tiny, randomise):
    """(**fields) -> a ViT, 4 x 4 at 32 pixels, and a ConvNeXt's last stages at 64 pixels."""

    def build(**fields):
        parts = [{**tiny["timm_vit"], "layer": -2}, {**tiny["timm_convnext"], "layer": [-2, -1]}]
        torch.manual_seed(0)
        config = {"type": "several", "encoders": parts, "resize_to": [2, 8], **fields}
        return randomise(build_vision_encoder(config).eval())

    return build


def views_for(encoder):
    size = encoder.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_it_gives_the_whole_view_and_its_pieces_side_by_side(make):
    encoder = make(tiles=[2, 1], downscale="bilinear")
    assert encoder.image_size == 64 and encoder.dims == (16, 16, 36)
    assert encoder.grids == ((2, 2), (4, 4), (8, 8))
    views = views_for(encoder)
    whole, tiles, fine = encoder(views)
    vit = encoder.encoders[0]
    # Mini-Gemini's scripts: tiles of the picture, and all of it made smaller.
    small = interpolate(views, (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(whole, join_layers(vit(small), 2))
    for row in range(2):
        for column in range(2):
            y, x = slice(32 * row, 32 * row + 32), slice(32 * column, 32 * column + 32)
            alone = join_layers(vit(views[:, :, y, x]), 2)
            y, x = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
            torch.testing.assert_close(tiles[:, y, x], alone)
    assert torch.equal(fine, make(downscale="bilinear")(views)[1])


def test_views_are_as_large_as_the_tiles_need(make):
    encoder = make(tiles=[3, 1], resize_to=[None, 8])
    assert encoder.image_size == 96 and encoder.grids == ((4, 4), (12, 12), (8, 8))
    shapes = [tuple(m.shape[1:3]) for m in encoder(views_for(encoder))]
    assert shapes == list(encoder.grids)
    again = build_vision_encoder(json.loads(json.dumps(encoder.config)))
    assert again.config == encoder.config and again.pieces == (3, 1)


@pytest.mark.parametrize("tiles", [[2], [2, 0], [1, 1, 1]])
def test_they_are_one_number_for_each(tiles, make):
    with pytest.raises(UserError, match="for 2 encoders; give one number each"):
        make(tiles=tiles)
