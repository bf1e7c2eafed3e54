"""Does every vision encoder keep the contract, at every kind of layer?"""

import json

import pytest
import torch

from vlm.encoders import VISION_ENCODERS, build_vision_encoder, load_vision_encoder

NAMES = [
    "clip",
    "siglip",
    "dinov2",
    "dinov2_registers",
    "internvl",
    "internvl_normed",
    "timm_vit",
    "timm_vit_avg",
    "timm_eva_registers",
    "timm_swin",
    "timm_convnext",
    "timm_mambaout",
    "vim",
    "vim_mamba2",
    "vim_head",
    "vim_double_overlap",
    "vim_plain",
    "vmamba",
    "vmamba_v0",
    "vil",
    "vil_v1",
    "open_clip_vit",
    "open_clip_timm",
]
LAYERS = ["last", -1, -2, [-1, -2]]


@pytest.fixture(params=LAYERS, ids=str)
def layer(request):
    return request.param


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_every_adapter_and_every_tiny_encoder_is_tested(tiny):
    assert set(NAMES) == set(tiny)
    # Those two take no `layer`; test_several.py and test_patches.py hold them to the rest.
    without_layers = {"several", "patches"}
    assert {config["type"] for config in tiny.values()} == set(VISION_ENCODERS) - without_layers


def test_shapes_are_what_was_announced(build, pictures, name, layer):
    encoder = build(name, layer=layer)
    maps = encoder(pictures(encoder, views=3))
    assert len(maps) == (2 if isinstance(layer, list) else 1)
    assert [tuple(m.shape) for m in maps] == [
        (3, *grid, dim) for grid, dim in zip(encoder.grids, encoder.dims, strict=True)
    ]
    assert len(encoder.image_mean) == len(encoder.image_std) == 3


def test_gradient_reaches_every_parameter_and_every_pixel(build, pictures, name, layer):
    encoder = build(name, layer=layer).train()
    images = pictures(encoder).requires_grad_()
    sum(m.pow(3).sum() for m in encoder(images)).backward()
    unused = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in unused if "k_proj.bias" not in n] == []  # softmax cancels a key's bias
    assert (images.grad != 0).float().mean() > 0.99


def test_resolved_config_rebuilds_the_encoder(build, pictures, name):
    encoder = build(name, layer=[-1, -2])
    config = json.loads(json.dumps(encoder.config))
    again = build_vision_encoder(config).eval()
    assert again.config == encoder.config
    again.load_state_dict(encoder.state_dict())
    images = pictures(encoder)
    for first, second in zip(encoder(images), again(images), strict=True):
        assert torch.equal(first, second)


def test_saved_folder_loads_the_same_encoder(build, pictures, name, layer, tmp_path):
    encoder = build(name, layer=layer, image_mean=[0.1, 0.2, 0.3])
    encoder.save_pretrained(tmp_path)
    again = load_vision_encoder({"type": encoder.config["type"], "source": str(tmp_path)}).eval()
    assert again.config == {**encoder.config, "source": str(tmp_path)}
    assert again.image_mean == (0.1, 0.2, 0.3)
    images = pictures(encoder)
    for first, second in zip(encoder(images), again(images), strict=True):
        assert torch.equal(first, second)


def test_measured_sizes_do_not_depend_on_the_device(build, name):
    encoder = build(name)
    with torch.device("meta"):
        empty = build_vision_encoder({**encoder.config, "grids": None, "dims": None})
    assert (empty.grids, empty.dims) == (encoder.grids, encoder.dims)


def test_pictures_are_cast_to_the_weights_type(build, pictures, name):
    encoder = build(name).to(torch.bfloat16)
    assert encoder(pictures(encoder))[0].dtype == torch.bfloat16


def test_no_views_give_empty_maps(build, pictures, name):
    encoder = build(name)
    shapes = [tuple(m.shape) for m in encoder(pictures(encoder)[:0])]
    assert shapes == [
        (0, *grid, dim) for grid, dim in zip(encoder.grids, encoder.dims, strict=True)
    ]


def test_views_do_not_see_each_other(build, pictures, name):
    encoder = build(name)
    images = pictures(encoder)
    torch.testing.assert_close(encoder(images)[0][1:], encoder(images[1:])[0], atol=1e-5, rtol=1e-4)


def test_lit_corner_moves_the_feature_of_its_corner_most(build, pictures, name):
    # Channels-first and transposed maps have the right shapes; this sees them.
    encoder = build(name, seed=1, layer=-1)
    grid = encoder.grids[0]
    side = encoder.image_size // grid[1]
    dark = pictures(encoder, views=1)
    lit = dark.clone()
    lit[:, :, :side, -side:] += 2.0  # top right
    change = (encoder(lit)[0] - encoder(dark)[0])[0].norm(dim=-1)
    assert divmod(change.argmax().item(), grid[1]) == (0, grid[1] - 1)
