"""Is VMamba built, loaded, joined and trained as its users expect?"""

import json
import re

import pytest
import torch

from vlm.encoders import build_vision_encoder, load_vision_encoder
from vlm.encoders.vmamba import ARCHITECTURES, FILE_NAMES
from vlm.encoders.vmamba_blocks import VMambaArchitecture, VSSBlock, make_downsample
from vlm.encoders.vmamba_keys import from_published, rename
from vlm.encoders.vmamba_model import VMamba, map_shapes, repeat_to
from vlm.errors import UserError

TINY = {"depths": (1, 1, 2), "dims": (8, 12, 16), "ssm_ratio": 1.0}
OLDEST = {"forward_type": "v0", "stem": "v1", "downsample": "v1", "mlp_ratio": 0.0}
CONFIG = {"type": "vmamba", "image_size": 64, "architecture": TINY}


def tiny(randomise, **changes):
    return randomise(build_vision_encoder({**CONFIG, **changes}).eval())


def as_training_code(state):
    """What the training code saves: our names, and a head."""
    return {**state, "classifier.head.weight": torch.zeros(10, 16)}


def as_single_file(state):
    """What vmamba.py saves: grouped 1 x 1 weights."""
    grouped = {"x_proj_weight": "x_proj.weight", "dt_projs_weight": "dt_projs.weight"}
    result = {}
    for name, tensor in state.items():
        head, _, tail = name.rpartition(".")
        if tail in grouped:
            name, tensor = f"{head}.{grouped[tail]}", tensor.flatten(0, 1)
        result[name] = tensor
    return result


def as_convolutions(state):
    """Older still: every projection a 1 x 1 convolution."""
    projection = re.compile(r"(in_proj|out_proj|x_proj|dt_projs|fc1|fc2)\.weight$")
    state = as_single_file(state)
    return {k: v[..., None, None] if projection.search(k) else v for k, v in state.items()}


def as_oldest(state):
    """The first version's names, after Swin."""
    renames = (
        (r"^patch_embed\.0", "patch_embed.proj"),
        (r"^patch_embed\.2", "patch_embed.norm"),
        (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
        (r"(blocks\.\d+)\.op\.", r"\1.self_attention."),
        (r"downsample\.1\.", "downsample.norm."),
        (r"downsample\.2\.", "downsample.reduction."),
        (r"^classifier\.norm", "norm"),
    )
    for new, old in renames:
        state = {re.sub(new, old, name): tensor for name, tensor in state.items()}
    return {**state, "head.weight": torch.zeros(10, 16)}


def as_detector(state):
    """A backbone of the detection code: a norm for each stage, no classifier."""
    result = {k.replace("classifier.norm", "outnorm2"): v for k, v in state.items()}
    return {**result, "outnorm0.weight": torch.ones(8), "outnorm0.bias": torch.zeros(8)}


LAYOUTS = [
    (as_training_code, {}),
    (as_single_file, {}),
    (as_convolutions, {}),
    (as_oldest, OLDEST),
    (as_detector, {}),
]


@pytest.mark.parametrize(("layout", "changes"), LAYOUTS, ids=lambda v: getattr(v, "__name__", ""))
def test_published_file_loads(layout, changes, tmp_path, randomise, pictures):
    architecture = {**TINY, "dims": (8, 16, 16) if changes else (8, 12, 16), **changes}
    encoder = tiny(randomise, architecture=architecture)
    state = encoder.model.state_dict()
    if layout is not as_detector:  # files of classifiers have no such norm
        encoder.model.outnorm1.reset_parameters()
        state = {k: v for k, v in state.items() if not k.startswith("outnorm1")}
    file = tmp_path / "vssm.pth"
    torch.save({"model": layout(state), "epoch": 264, "max_accuracy": 82.6}, file)
    config = {**CONFIG, "architecture": architecture, "source": str(file)}
    loaded = load_vision_encoder(config).eval()
    images = pictures(encoder)
    assert torch.equal(loaded(images)[0], encoder(images)[0])


RENAMED = [
    ("patch_embed.proj.weight", "patch_embed.0.weight"),
    ("patch_embed.norm.bias", "patch_embed.2.bias"),
    ("patch_embed.5.weight", "patch_embed.5.weight"),
    ("layers.0.blocks.12.ln_1.weight", "layers.0.blocks.12.norm.weight"),
    ("layers.0.blocks.1.norm2.weight", "layers.0.blocks.1.norm2.weight"),
    ("layers.1.blocks.0.self_attention.A_logs", "layers.1.blocks.0.op.A_logs"),
    ("layers.1.blocks.0.op.out_norm.weight", "layers.1.blocks.0.op.out_norm.weight"),
    ("layers.2.downsample.norm.weight", "layers.2.downsample.1.weight"),
    ("layers.2.downsample.reduction.weight", "layers.2.downsample.2.weight"),
    ("layers.2.downsample.3.weight", "layers.2.downsample.3.weight"),
    ("norm.weight", "classifier.norm.weight"),
    ("head.bias", "classifier.head.bias"),
]


@pytest.mark.parametrize(("old", "new"), RENAMED)
def test_rename(old, new):
    assert rename(old) == new


def test_both_layouts_are_one():
    grouped = {"a.op.x_proj.weight": torch.arange(24.0).view(12, 2)}
    grouped["a.op.dt_projs.weight"] = torch.arange(8.0).view(8, 1)
    state = from_published(grouped)
    assert torch.equal(state["a.op.x_proj_weight"], torch.arange(24.0).view(4, 3, 2))
    assert torch.equal(state["a.op.dt_projs_weight"], torch.arange(8.0).view(4, 2, 1))


# What is published


@pytest.mark.parametrize(
    ("name", "file", "millions"),
    [
        ("vmamba_tiny_s1l8", "vssm1_tiny_0230s", 30.249),
        ("vmamba_tiny_s2l5", "vssm_tiny_0230", 30.706),
        ("vmamba_small_s2l15", "vssm_small_0229", 50.148),
        ("vmamba_small_s1l20", "vssm1_small_0229s", 49.013),
        ("vmamba_base_s2l15", "vssm_base_0229", 88.558),
        ("vmamba_base_s1l20", "vssm1_base_0229s", 86.615),
    ],
)
def test_published_architectures(name, file, millions):
    assert FILE_NAMES[file] == name
    with torch.device("meta"):
        encoder = build_vision_encoder({"type": "vmamba", "architecture": file})
    dims = ARCHITECTURES[name]["dims"]
    fresh = 2 * dims[2]  # the norm that no file has
    head = 1000 * dims[3] + 1000
    count = sum(p.numel() for p in encoder.parameters()) - fresh + head
    assert round(count / 1e6, 3) == millions
    assert (encoder.grids, encoder.dims) == (((14, 14),), (dims[2] + dims[3],))
    assert encoder.architecture == VMambaArchitecture(**ARCHITECTURES[name])


def test_names_of_weights():
    with torch.device("meta"):
        model = build_vision_encoder({"type": "vmamba", "architecture": "vmamba_tiny_s2l5"}).model
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    block = "layers.2.blocks.4."
    assert {k.removeprefix(block): v for k, v in shapes.items() if k.startswith(block)} == {
        "norm.weight": (384,),
        "norm.bias": (384,),
        "op.x_proj_weight": (4, 26, 768),
        "op.dt_projs_weight": (4, 768, 24),
        "op.dt_projs_bias": (4, 768),
        "op.A_logs": (3072, 1),
        "op.Ds": (3072,),
        "op.in_proj.weight": (768, 384),
        "op.conv2d.weight": (768, 1, 3, 3),
        "op.out_norm.weight": (768,),
        "op.out_norm.bias": (768,),
        "op.out_proj.weight": (384, 768),
        "norm2.weight": (384,),
        "norm2.bias": (384,),
        "mlp.fc1.weight": (1536, 384),
        "mlp.fc1.bias": (1536,),
        "mlp.fc2.weight": (384, 1536),
        "mlp.fc2.bias": (384,),
    }
    outside = {k for k in shapes if ".blocks." not in k and k.endswith("weight")}
    stem = {f"patch_embed.{i}.weight" for i in (0, 2, 5, 7)}
    down = {f"layers.{i}.downsample.{j}.weight" for i in range(3) for j in (1, 3)}
    assert outside == stem | down | {"classifier.norm.weight", "outnorm2.weight"}


# Sizes and maps


@pytest.mark.parametrize("output", ["joined", "normed", (-3, -1)], ids=str)
@pytest.mark.parametrize("kind", [{}, OLDEST, {"downsample": "v2"}], ids=["v3", "v1", "v2"])
@pytest.mark.parametrize("size", [(64, 64), (40, 72), (36, 52), (20, 44)], ids=str)
def test_shapes_are_what_arithmetic_says(size, kind, output):
    architecture = VMambaArchitecture(**{**TINY, "depths": (1, 1, 1), **kind})
    maps = VMamba(architecture, output)(torch.randn(1, 3, *size))
    assert [tuple(m.shape[1:]) for m in maps] == map_shapes(architecture, output, size)


def test_sizes_of_the_spec_at_odd_grids():
    stages = tuple(range(-4, 0))
    architecture = VMambaArchitecture(depths=(2, 2, 8, 2), dims=(96, 192, 384, 768))
    shapes = map_shapes(architecture, stages, (40, 72))
    assert [shape[:2] for shape in shapes] == [(10, 18), (5, 9), (3, 5), (2, 3)]


def test_joined_map_is_both_stages_normed(randomise, pictures):
    encoder = tiny(randomise)
    images = pictures(encoder)
    (joined,) = encoder(images)
    assert encoder.dims == (28,) and joined.shape == (2, 8, 8, 28)
    before, last = encoder.model.stages(images)[-2:]
    norms = encoder.model.outnorm1, encoder.model.classifier["norm"]
    torch.testing.assert_close(joined[..., :12], norms[0](before))
    for row, column in ((0, 0), (1, 2), (7, 6)):
        place = norms[1](last)[:, row // 2, column // 2]
        torch.testing.assert_close(joined[:, row, column, 12:], place)
    apart = tiny(randomise, layer=[-2, -1])
    apart.model.load_state_dict(encoder.model.state_dict(), strict=False)
    for first, second in zip(apart(images), (before, last), strict=True):
        torch.testing.assert_close(first, second)
    alone = tiny(randomise, join_stages=False)
    alone.model.load_state_dict(encoder.model.state_dict(), strict=False)
    torch.testing.assert_close(alone(images)[0], norms[1](last))


def test_repeat_to():
    x = torch.arange(6.0).view(1, 2, 3, 1)
    grown = repeat_to(x, (3, 5))[0, :, :, 0].tolist()
    assert grown == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    # Two rows of three were made of five by dropping one: the last one serves the dropped row.
    assert repeat_to(x, (5, 6))[0, :, 0, 0].tolist() == [0, 0, 3, 3, 3]


def test_oldest_downsampling_fills_odd_sides_at_the_end(randomise):
    down = randomise(make_downsample(3, 6, "v1"))
    x = torch.randn(1, 3, 5, 3)
    padded = torch.zeros(1, 4, 6, 3)
    padded[:, :3, :5] = x
    torch.testing.assert_close(down(x), down(padded))


def test_stages_above_are_not_built():
    model = build_vision_encoder({**CONFIG, "layer": [-3, -2]}).model
    assert len(model.layers) == 2
    assert not [name for name in model.state_dict() if "norm" in name.split(".")[0]]


# New weights and training


def test_new_weights_begin_as_the_reference_says():
    torch.manual_seed(0)
    architecture = {"depths": (1, 1), "dims": (96, 192), "state_dim": 4}
    model = build_vision_encoder({**CONFIG, "architecture": architecture}).model
    op = model.layers[1].blocks[0].op
    steps = torch.nn.functional.softplus(op.dt_projs_bias)
    assert 9e-4 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.101
    assert torch.allclose(op.A_logs.exp(), torch.arange(1.0, 5.0).expand(4 * 384, 4))
    assert bool((op.Ds == 1).all())
    uniform = 3**-0.5
    for weight, deviation in (
        (op.in_proj.weight, 0.02),
        (model.layers[1].blocks[0].mlp.fc1.weight, 0.02),
        (op.dt_projs_weight, 12**-0.5 * uniform),
        (op.x_proj_weight, 384**-0.5 * uniform),
        (op.conv2d.weight, uniform / 3),
    ):
        assert abs(weight.std().item() / deviation - 1) < 0.05


def test_drop_path_grows_over_all_stages(randomise):
    encoder = randomise(build_vision_encoder({**CONFIG, "drop_path": 0.6}))
    blocks = [module for module in encoder.modules() if isinstance(module, VSSBlock)]
    assert [block.drop_rate for block in blocks] == pytest.approx([0.0, 0.2, 0.4, 0.6])
    images = torch.randn(8, 3, 64, 64)
    assert not torch.equal(encoder(images)[0], encoder(images)[0])
    encoder.eval()
    assert torch.equal(encoder(images)[0], encoder(images)[0])


# Configs


def test_a_name_becomes_numbers():
    with torch.device("meta"):
        encoder = build_vision_encoder({"type": "vmamba", "architecture": "vanilla_vmamba_base"})
    numbers = json.loads(json.dumps(encoder.config))["architecture"]
    assert numbers["depths"] == [2, 2, 27, 2] and numbers["dims"] == [128, 256, 512, 1024]
    assert numbers["forward_type"] == "v0" and numbers["state_dim"] == 16


BAD = [
    ({"architecture": None}, "needs an 'architecture': one of vmamba_tiny_s1l8"),
    ({"architecture": "vmamba_tiny"}, "unknown VMamba architecture 'vmamba_tiny'"),
    ({"architecture": {"dims": [8]}}, "architecture needs the field 'depths'"),
    ({"architecture": {**TINY, "dims": [8, 16]}}, "as many depths as dims"),
    ({"architecture": {**TINY, "patch_size": 2}}, "stem 'v2' needs an even patch_size of 4"),
    ({"architecture": {**TINY, "step_rank": 0}}, "all positive"),
    ({"architecture": {**TINY, "ssm_ratio": 0.01}}, "ssm_ratio 0.01 and mlp_ratio .* the width 8"),
    ({"architecture": {**TINY, "mlp_ratio": -1.0}}, "mlp_ratio 0 means no MLP"),
    ({"architecture": {**TINY, "scan_mode": "spiral"}}, "field 'scan_mode' must be one of"),
    ({"architecture": {"depths": [1], "dims": [8]}}, "one stage cannot be joined"),
    ({"layer": -4}, "layer -4 of the architecture does not exist; it has 3 stages"),
    ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), not -0.1"),
    ({"image_size": 2, "architecture": {**TINY, **OLDEST}}, "image_size 2 is too small for 3"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        build_vision_encoder({**CONFIG, **changes})


def test_file_of_another_architecture(tmp_path, randomise):
    encoder = tiny(randomise)
    torch.save({"model": encoder.model.state_dict()}, tmp_path / "vssm.pth")
    wide = {**TINY, "ssm_ratio": 2.0}
    config = {**CONFIG, "architecture": wide, "source": str(tmp_path / "vssm.pth")}
    with pytest.raises(UserError, match="check image_size and architecture"):
        load_vision_encoder(config)


def test_half_a_norm_is_a_broken_file(tmp_path, randomise):
    state = tiny(randomise).model.state_dict()
    (bias,) = (name for name in state if name.startswith("outnorm") and name.endswith("bias"))
    del state[bias]
    torch.save({"model": state}, tmp_path / "vssm.pth")
    with pytest.raises(UserError, match=f"lacks the weights {bias}"):
        load_vision_encoder({**CONFIG, "source": str(tmp_path / "vssm.pth")})
