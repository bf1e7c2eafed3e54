"""Is Vim built, loaded, resized and trained as its users expect?"""

import argparse
import json

import pytest
import torch

from vlm.encoders import build_vision_encoder, load_vision_encoder
from vlm.encoders.drop_path import drop_path, drop_rates
from vlm.encoders.position_resize import class_token_places, resize_positions
from vlm.encoders.ssd_mixer import Mamba2Mixer
from vlm.encoders.vim import ARCHITECTURES
from vlm.encoders.vim_blocks import Block, patch_grid, remove_tokens
from vlm.encoders.vim_mixer import MambaMixer, look_ahead, look_back
from vlm.errors import UserError

TINY = {"embed_dim": 16, "depth": 3, "patch_size": 8, "state_dim": 4}
CONFIG = {"type": "vim", "image_size": 32, "architecture": TINY}


def published(folder, randomise, grid=(4, 4), **changes):
    """Write a checkpoint as Vim's training script does; return its path and the encoder in it."""
    architecture = {**TINY, "position_grid": grid, **changes}
    encoder = randomise(build_vision_encoder({**CONFIG, "architecture": architecture}).eval())
    head = {"head.weight": torch.randn(10, 16), "head.bias": torch.randn(10)}
    state = {"model": {**encoder.model.state_dict(), **head}, "epoch": 299}
    state |= {"optimizer": {"state": {0: {"step": 1}}}, "args": argparse.Namespace(lr=1e-3)}
    torch.save(state, folder / "vim.pth")
    return folder / "vim.pth", encoder


# What is published


@pytest.mark.parametrize(
    ("name", "millions", "grid"),
    [
        ("vim_tiny", 7.148, 14),
        ("vim_small", 25.797, 14),
        ("vim_base", 97.598, 14),
        ("vim_tiny_stride8", 7.250, 27),
        ("vim_small_stride8", 26.001, 27),
    ],
)
def test_published_architectures(name, millions, grid):
    with torch.device("meta"):
        encoder = build_vision_encoder({"type": "vim", "architecture": name})
    dim = ARCHITECTURES[name]["embed_dim"]
    head = 1000 * dim + 1000
    count = sum(p.numel() for p in encoder.parameters()) + head
    assert round(count / 1e6, 3) == millions
    assert (encoder.grids, encoder.dims) == (((grid, grid),), (dim,))
    assert encoder.image_size == 224 and encoder.image_mean == (0.485, 0.456, 0.406)
    assert len(encoder.model.state_dict()) + 2 == 415


def test_names_of_weights():
    with torch.device("meta"):
        model = build_vision_encoder({"type": "vim", "architecture": "vim_small"}).model
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    outside = {k: v for k, v in shapes.items() if not k.startswith("layers.")}
    assert outside == {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 197, 384),
        "patch_embed.proj.weight": (384, 3, 16, 16),
        "patch_embed.proj.bias": (384,),
        "norm_f.weight": (384,),
    }
    last = "layers.23."
    one = {k.removeprefix(last): v for k, v in shapes.items() if k.startswith(last)}
    direction = {
        "A{}_log": (768, 16),
        "D{}": (768,),
        "conv1d{}.weight": (768, 1, 4),
        "conv1d{}.bias": (768,),
        "x_proj{}.weight": (56, 768),
        "dt_proj{}.weight": (768, 24),
        "dt_proj{}.bias": (768,),
    }
    both = {f"mixer.{k.format(b)}": v for k, v in direction.items() for b in ("", "_b")}
    shared = {
        "norm.weight": (384,),
        "mixer.in_proj.weight": (1536, 384),
        "mixer.out_proj.weight": (384, 768),
    }
    assert one == {**both, **shared}


def test_published_file_loads(tmp_path, randomise, pictures):
    file, encoder = published(tmp_path, randomise)
    for source in (file, tmp_path):
        loaded = load_vision_encoder({**CONFIG, "source": str(source)}).eval()
        images = pictures(encoder)
        assert torch.equal(loaded(images)[0], encoder(images)[0])


def test_stored_positions_are_counted_and_resized(tmp_path, randomise, pictures):
    file, encoder = published(tmp_path, randomise, grid=(4, 4))
    config = {**CONFIG, "source": str(file), "image_size": 56}
    loaded = load_vision_encoder(config).eval()
    assert loaded.grids == ((7, 7),)
    assert loaded.config["architecture"]["position_grid"] == [4, 4]
    images = pictures(loaded)
    official = load_vision_encoder({**config, "position_resize": "official"}).eval()
    assert not torch.allclose(loaded(images)[0], official(images)[0], atol=1e-2)
    # The same as an encoder whose positions were resized before.
    positions = encoder.model.pos_embed.detach()
    for rule, found in (("middle", loaded), ("official", official)):
        other = {**TINY, "position_grid": (7, 7)}
        wanted = build_vision_encoder({**CONFIG, "image_size": 56, "architecture": other}).eval()
        resized = resize_positions(positions, (4, 4), (7, 7), "middle", rule)
        wanted.model.load_state_dict({**encoder.model.state_dict(), "pos_embed": resized})
        torch.testing.assert_close(found(images)[0], wanted(images)[0])


def test_positions_of_a_rectangle_need_the_grid(tmp_path, randomise):
    file, _ = published(tmp_path, randomise, grid=(2, 7))
    with pytest.raises(UserError, match="positions for 14 patches, which is no square"):
        load_vision_encoder({**CONFIG, "source": str(file)})
    architecture = {**TINY, "position_grid": [2, 7]}
    encoder = load_vision_encoder({**CONFIG, "source": str(file), "architecture": architecture})
    assert encoder.grids == ((4, 4),)


# Sizes


@pytest.mark.parametrize(
    ("size", "patch", "stride", "grid"),
    [
        ((224, 224), 16, 16, (14, 14)),
        ((224, 320), 16, 8, (27, 39)),
        ((64, 64), 8, 8, (8, 8)),
        ((1248, 1248), 16, 16, (78, 78)),
    ],
)
def test_patch_grid(size, patch, stride, grid):
    assert patch_grid(size, patch, stride) == grid


def test_any_rectangle_of_whole_patches(randomise):
    model = randomise(build_vision_encoder(CONFIG).eval()).model
    for height, width in ((8, 8), (24, 72), (80, 16)):
        (features,) = model(torch.randn(2, 3, height, width))
        assert features.shape == (2, height // 8, width // 8, 16)


def test_layers_above_are_not_built():
    encoder = build_vision_encoder({**CONFIG, "layer": -2})
    assert len(encoder.model.layers) == 2 and encoder.model.norm_f is None


@pytest.mark.parametrize(
    ("kind", "patches", "places"),
    [("middle", 12, [6]), ("middle", 9, [4]), ("head", 9, [0]), ("double", 9, [0, 10])],
)
def test_class_token_places(kind, patches, places):
    assert class_token_places(kind, patches) == places


@pytest.mark.parametrize(
    ("places", "kept"), [([], [0, 1, 2, 3]), ([0], [1, 2, 3]), ([2], [0, 1, 3]), ([0, 3], [1, 2])]
)
def test_remove_tokens(places, kept):
    x = torch.arange(4.0).view(1, 4, 1)
    assert remove_tokens(x, places).flatten().tolist() == kept


def test_middle_rule_keeps_the_class_row_and_follows_the_grid():
    # Rows hold their own column's number, so a resized grid must rise from left to right.
    ramp = torch.arange(4.0).repeat(2).view(1, 8, 1)
    rows = torch.cat([ramp[:, :4], torch.full((1, 1, 1), 99.0), ramp[:, 4:]], dim=1)
    wide = resize_positions(rows, (2, 4), (3, 6), "middle", "middle")
    assert wide.shape == (1, 19, 1) and wide[0, 9].item() == 99.0
    grid = torch.cat([wide[:, :9], wide[:, 10:]], dim=1).view(3, 6)
    assert (grid.diff(dim=1) > 0.3).all() and torch.allclose(grid[0], grid[2], atol=1e-5)
    assert resize_positions(rows, (2, 4), (2, 4), "middle", "official") is rows


# The mixer


def test_look_ahead_is_look_back_on_the_flipped_sequence():
    conv = torch.nn.Conv1d(6, 6, 4, groups=6)
    x = torch.randn(2, 9, 6)
    flipped = look_back(x.flip(1), conv).flip(1)
    torch.testing.assert_close(look_ahead(x, conv), flipped)
    expected = torch.nn.functional.conv1d(
        torch.nn.functional.pad(x.transpose(1, 2), (3, 0)), conv.weight, conv.bias, groups=6
    )
    torch.testing.assert_close(look_back(x, conv), expected.transpose(1, 2))


def test_backward_direction_is_the_forward_one_on_the_flipped_sequence(randomise):
    mixer = randomise(MambaMixer(16, 4))
    twin = MambaMixer(16, 4)
    other = {"A_log": "A_b_log", "A_b_log": "A_log", "D": "D_b", "D_b": "D"}
    state = mixer.state_dict()
    for name in list(state):
        head, _, tail = name.partition(".")
        swapped = head.removesuffix("_b") if head.endswith("_b") else head + "_b"
        shared = head in ("in_proj", "out_proj")
        source = name if shared else other.get(head, f"{swapped}.{tail}")
        twin.get_parameter(name).data = state[source].clone()
    x = torch.randn(2, 11, 16)
    torch.testing.assert_close(twin(x.flip(1)).flip(1), mixer(x), atol=1e-4, rtol=1e-4)


def test_mamba2_in_the_place_of_the_mixer(randomise, pictures):
    architecture = {**TINY, "mixer": "mamba2", "head_dim": 8, "groups": 2}
    encoder = randomise(build_vision_encoder({**CONFIG, "architecture": architecture}))
    assert {type(block.mixer) for block in encoder.model.layers} == {Mamba2Mixer}
    images = pictures(encoder).requires_grad_()
    (features,) = encoder(images)
    assert features.shape == (2, 4, 4, 16)
    features.pow(3).sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    again = build_vision_encoder(encoder.config)
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(again(images)[0], features)


def test_weights_in_bf16_keep_the_residual_in_float32(randomise):
    model = randomise(build_vision_encoder(CONFIG).eval()).model
    images = torch.randn(1, 3, 32, 32)
    expected = model(images)[0]
    model.to(torch.bfloat16)
    states, _ = model.states(images.bfloat16())
    assert {state.dtype for state in states} == {torch.float32}
    features = model(images.bfloat16())[0]
    assert features.dtype == torch.bfloat16
    assert (features.float() - expected).abs().max() < 0.1 * expected.abs().max()


# New weights


def test_new_weights_begin_as_the_reference_says():
    torch.manual_seed(0)
    architecture = {**TINY, "embed_dim": 192, "depth": 16, "state_dim": 16, "layer_scale": 0.1}
    model = build_vision_encoder({**CONFIG, "architecture": architecture}).model
    mixer = model.layers[0].mixer
    steps = torch.nn.functional.softplus(torch.cat([mixer.dt_proj.bias, mixer.dt_proj_b.bias]))
    assert 9e-4 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.101
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(384, 16))
    assert torch.equal(mixer.A_log, mixer.A_b_log) and bool((mixer.D == 1).all())
    assert mixer.dt_proj.weight.abs().max() <= 12**-0.5
    assert bool((mixer.gamma == 0.1).all())
    uniform = 3**-0.5  # deviation of a uniform distribution with bound 1
    for weight, bound in (
        (mixer.in_proj.weight, 192**-0.5),
        (mixer.out_proj.weight, 384**-0.5 / 16**0.5),
        (mixer.conv1d.weight, 0.5),
    ):
        assert weight.abs().max() <= bound
        assert abs(weight.std().item() / (bound * uniform) - 1) < 0.05
    kernel = model.patch_embed.proj.weight
    assert abs(kernel.std().item() * 192**0.5 - 1) < 0.02 and not model.patch_embed.proj.bias.any()
    assert 0.015 < model.pos_embed.std() < 0.025 and model.cls_token.any()


# Training


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    dropped = drop_path(x, 0.25, training=True)
    values = dropped.flatten(1).unique(dim=1).flatten().tolist()  # of whole samples
    assert sorted(set(values)) == pytest.approx([0.0, 1 / 0.75])
    assert abs(dropped.mean().item() - 1) < 0.03
    assert drop_path(x, 0.25, training=False) is x and drop_path(x, 0.0, training=True) is x


def test_drop_rates_grow_with_depth():
    assert drop_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_rates(0.3, 1) == [0.0]


def test_drop_path_is_a_number_of_the_config(randomise):
    encoder = randomise(build_vision_encoder({**CONFIG, "drop_path": 0.9}))
    blocks = [block for block in encoder.modules() if isinstance(block, Block)]
    assert [block.drop_rate for block in blocks] == pytest.approx([0.0, 0.45, 0.9])
    images = torch.randn(8, 3, 32, 32)
    assert not torch.equal(encoder(images)[0], encoder(images)[0])
    encoder.eval()
    assert torch.equal(encoder(images)[0], encoder(images)[0])
    assert encoder.config["drop_path"] == 0.9


# Configs


def test_a_name_becomes_numbers():
    with torch.device("meta"):
        encoder = build_vision_encoder({"type": "vim", "architecture": "vim_small_stride8"})
    numbers = encoder.config["architecture"]
    assert numbers["embed_dim"] == 384 and numbers["stride"] == 8 and numbers["step_rank"] == 24
    assert numbers["position_grid"] == [27, 27]
    json.dumps(encoder.config)


def test_saved_folder_at_another_size(tmp_path, randomise):
    encoder = randomise(build_vision_encoder(CONFIG).eval())
    encoder.save_pretrained(tmp_path)
    source = {"type": "vim", "source": str(tmp_path)}
    larger = load_vision_encoder({**source, "image_size": 64, "layer": -1}).eval()
    assert larger.grids == ((8, 8),) and larger.image_size == 64
    images = torch.randn(1, 3, 32, 32)
    states, _ = encoder.model.states(images)
    same = remove_tokens(states[-1], [8]).unflatten(1, (4, 4))
    torch.testing.assert_close(larger.model(images)[0], same)


BAD = [
    ({"architecture": None}, "needs an 'architecture': one of vim_tiny"),
    ({"architecture": "vim_smal"}, r"unknown Vim architecture 'vim_smal' \(did you mean"),
    ({"architecture": {"depth": 2}}, "architecture needs the field 'embed_dim'"),
    ({"architecture": {**TINY, "class_token": "tail"}}, "field 'class_token' must be one of"),
    ({"architecture": {**TINY, "depth": 0}}, "numbers must be positive"),
    ({"architecture": {**TINY, "step_rank": 0}}, "numbers must be positive"),
    ({"architecture": {**TINY, "position_grid": [-2, -8]}}, "numbers must be positive"),
    ({"architecture": {**TINY, "norm_eps": -1e-5}}, "numbers must be positive"),
    ({"architecture": {**TINY, "mixer": "mamba2", "directions": "v1"}}, "mixer 'mamba2' has dir"),
    ({"architecture": {**TINY, "mixer": "mamba2", "head_dim": 24}}, "do not divide 32 inner"),
    ({"image_size": 36}, "do not fill image_size 36; 32 and 40 would do"),
    ({"image_size": 4}, "do not fill image_size 4; 8 and 16 would do"),
    ({"layer": -4}, "layer -4 of the architecture does not exist; it has 3 layers"),
    ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), not 1.0"),
    ({"position_resize": "bicubic"}, "field 'position_resize' must be one of"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        build_vision_encoder({**CONFIG, **changes})


def test_file_of_another_model(tmp_path, randomise):
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no weights of Vim: it has no 'pos_embed'"):
        load_vision_encoder({**CONFIG, "source": str(tmp_path / "other.pth")})
    file, _ = published(tmp_path, randomise)
    wide = {**TINY, "embed_dim": 32}
    with pytest.raises(UserError, match=r"has shape \(1, 17, 16\), but .* needs \(1, 17, 32\)"):
        load_vision_encoder({**CONFIG, "architecture": wide, "source": str(file)})
    deep = {**TINY, "depth": 4}
    with pytest.raises(UserError, match=r"lacks the weights layers\.3\."):
        load_vision_encoder({**CONFIG, "architecture": deep, "source": str(file)})
