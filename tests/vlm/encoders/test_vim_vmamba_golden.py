"""Do Vim and VMamba give the references' values and gradients, from the references' weights?"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm.encoders.cross_scan import REVERSE, inverse, join_walks, take_walks, walks
from vlm.encoders.position_resize import resize_positions
from vlm.encoders.vim_blocks import Vim, VimArchitecture
from vlm.encoders.vim_mixer import MambaMixer
from vlm.encoders.vmamba_blocks import SS2D, VMambaArchitecture
from vlm.encoders.vmamba_keys import from_published
from vlm.encoders.vmamba_model import VMamba

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4


class Golden:
    """The tensors of one file by kind, and its settings."""

    def __init__(self, name):
        self.name = name
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.config = json.loads((GOLDEN / f"{name}.json").read_text())["config"]

    def under(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def check(self, actual, key):
        """Compare values, or gradients where the key says so."""
        atol = GRADIENT_TOLERANCE if key.startswith("grad") else VALUE_TOLERANCE
        torch.testing.assert_close(
            actual, self.tensors[key], rtol=0, atol=atol, msg=lambda m: f"{key}: {m}"
        )

    def check_gradients(self, module, to_published=lambda state: state):
        """Compare the gradients of all parameters, by their published names."""
        found = to_published({n: p.grad for n, p in module.named_parameters()})
        wanted = self.under("gradparam.")
        assert set(found) == set(wanted)
        for name, gradient in found.items():
            self.check(gradient, f"gradparam.{name}")


MIXERS = {
    "vim_mixer_v2_div2": {"directions": "v2"},
    "vim_mixer_v1": {"directions": "v1"},
    "vim_mixer_uni_layerscale": {"directions": "none", "layer_scale": 1.0},
    "mamba_block": {"directions": "none"},
}
MODELS = {
    "vim_tiny_cfg": "middle",
    "vim_tiny_cfg_headcls": "head",
    "vim_tiny_cfg_nocls_mean": "none",
    "vim_tiny_cfg_doublecls": "double",
}


def mixer_of(golden, **options):
    mixer = MambaMixer(32, golden.config["d_state"], **options)
    mixer.load_state_dict(golden.under("param."))
    return mixer


@pytest.mark.parametrize("name", MIXERS)
def test_mixer(name):
    golden = Golden(name)
    mixer = mixer_of(golden, **MIXERS[name])
    x = golden.tensors["in.x"].clone().requires_grad_()
    y = mixer(x)
    golden.check(y, "out.y")
    (y * golden.tensors["cot.y"]).sum().backward()
    golden.check(x.grad, "grad.x")
    golden.check_gradients(mixer)


def test_directions_are_added_unless_they_are_averaged():
    golden = Golden("vim_mixer_v2_div2")
    added = mixer_of(golden, directions="v2", divide_out=False)
    half = added(golden.tensors["in.x"]) / 2
    golden.check(half, "out.y")


def test_one_direction_is_causal_and_two_are_not():
    golden = Golden("mamba_block")
    x = golden.tensors["in.x"]
    # What the reference's `step` gave for the first 8 steps, one after the other.
    golden.check(mixer_of(golden, directions="none")(x[:, :8]), "out.step8")
    both = Golden("vim_mixer_v2_div2")
    mixer, x = mixer_of(both), both.tensors["in.x"]
    assert (mixer(x)[:, :8] - mixer(x[:, :8])).abs().max() > 1e-2


def model_of(golden, **options):
    c = golden.config
    architecture = VimArchitecture(
        embed_dim=c["embed_dim"],
        depth=c["depth"],
        stride=c["stride"],
        state_dim=c["d_state"],
        position_grid=tuple(c["grid"]),
        class_token=MODELS[golden.name],
    )
    model = Vim(architecture, **{"layers": (-1,), "normed": True, **options}).eval()
    state = golden.under("param.")
    wanted = set(model.state_dict())
    missing, extra = (
        model.load_state_dict({k: v for k, v in state.items() if k in wanted}),
        set(state) - wanted,
    )
    assert missing.missing_keys == []
    assert {name for name in extra if not name.startswith(("head.", "layers.", "norm_f."))} == set()
    return model


def pooled(tokens, golden):
    index, length = golden.config["cls_index"], tokens.shape[1]
    kind = MODELS[golden.name]
    if kind == "none":
        return tokens.mean(1)
    return (tokens[:, 0] + tokens[:, length - 1]) / 2 if kind == "double" else tokens[:, index]


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    golden = Golden(name)
    model = model_of(golden)
    image = golden.tensors["in.image"].clone().requires_grad_()
    states, grid = model.states(image)
    assert list(grid) == golden.config["grid"]
    for key in golden.under("out.layer"):
        index, _, what = key.partition(".")
        block = model.layers[int(index)]
        hidden = block.mixer(block.norm(states[int(index)]))
        golden.check(hidden if what == "hidden" else states[int(index)], f"out.layer{key}")
    tokens = model.norm_f(states[-1])
    golden.check(tokens, "out.tokens")
    golden.check(pooled(tokens, golden), "out.pooled")
    head = golden.under("param.head.")
    logits = torch.nn.functional.linear(pooled(tokens, golden), head["weight"], head["bias"])
    golden.check(logits, "out.logits")
    (tokens * golden.tensors["cot.tokens"]).sum().backward()
    golden.check(image.grad, "grad.image")


@pytest.mark.parametrize("name", MODELS)
def test_maps_are_the_patch_tokens(name):
    golden = Golden(name)
    (features,) = model_of(golden)(golden.tensors["in.image"])
    places = {"middle": [6], "head": [0], "none": [], "double": [0, 7]}[MODELS[name]]
    tokens = golden.tensors["out.tokens"]
    kept = [i for i in range(tokens.shape[1]) if i not in places]
    expected = tokens[:, kept].unflatten(1, golden.config["grid"])
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)


def test_lower_layers_are_residual_and_hidden_without_the_norm():
    golden = Golden("vim_tiny_cfg")
    model = model_of(golden, layers=(-2, -4), normed=False)
    assert len(model.layers) == 3 and model.norm_f is None
    kept = [i for i in range(13) if i != 6]
    maps = model(golden.tensors["in.image"])
    for features, index in zip(maps, (2, 0), strict=True):
        state = sum(golden.tensors[f"out.layer{index}.{what}"] for what in ("hidden", "residual"))
        expected = state[:, kept].unflatten(1, (3, 4))
        torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)


def test_official_position_resize():
    golden = Golden("vim_pos_embed_interp")
    positions = golden.tensors["in.pos_embed"]
    resized = resize_positions(positions, (4, 4), (7, 7), "middle", "official")
    golden.check(resized, "out.pos_embed")
    head = resize_positions(positions, (4, 4), (7, 7), "head", "middle")
    golden.check(head, "out.pos_embed")  # with the class token first the rules agree
    middle = resize_positions(positions, (4, 4), (7, 7), "middle", "middle")
    assert (middle - golden.tensors["out.pos_embed"]).abs().max() > 0.1


@pytest.mark.parametrize("scans", range(4))
def test_walks(scans):
    golden = Golden("cross_scan_merge")
    mode = list(REVERSE)[scans]
    order = walks(mode, 4, 6)
    back = inverse(order)

    def turned(x):  # the reference's walks from the end are written from the end
        parts = zip(x.unbind(2), REVERSE[mode], strict=True)
        return torch.stack([part.flip(1) if end else part for part, end in parts], dim=2)

    x = golden.tensors[f"in.scan{scans}.x"].clone().requires_grad_()
    taken = turned(take_walks(x.flatten(2).transpose(1, 2), order, back)).permute(0, 2, 3, 1)
    golden.check(taken, f"out.scan{scans}")
    (taken * golden.tensors[f"cot.scan{scans}"]).sum().backward()
    golden.check(x.grad, f"grad.scan{scans}.x")

    y = golden.tensors[f"in.merge{scans}.ys"].clone().requires_grad_()
    joined = join_walks(turned(y.flatten(3).permute(0, 3, 1, 2)), order, back).transpose(1, 2)
    golden.check(joined, f"out.merge{scans}")
    (joined * golden.tensors[f"cot.merge{scans}"]).sum().backward()
    golden.check(y.grad, f"grad.merge{scans}.ys")


@pytest.mark.parametrize("name", ["ss2d_v05_noz_r1", "ss2d_v05_z_chlast", "ss2d_v0"])
def test_ss2d(name):
    golden = Golden(name)
    c = golden.config
    architecture = VMambaArchitecture(
        depths=(1,),
        dims=(24,),
        ssm_ratio=c["ssm_ratio"],
        state_dim=c["d_state"],
        conv_bias="conv2d.bias" in golden.under("param."),
        forward_type=c["forward_type"],
    )
    layer = SS2D(24, architecture)
    layer.load_state_dict(named_as_here(golden.under("param.")))
    x = golden.tensors["in.x"].clone().requires_grad_()
    first = c.get("channel_first", False)
    order = walks("cross", c["H"], c["W"])
    y = layer(x.permute(0, 2, 3, 1) if first else x, order, inverse(order))
    y = y.permute(0, 3, 1, 2) if first else y
    golden.check(y, "out.y")
    (y * golden.tensors["cot.y"]).sum().backward()
    golden.check(x.grad, "grad.x")
    wanted = named_as_here(golden.under("gradparam."))
    golden.tensors |= {f"gradparam.{name}": gradient for name, gradient in wanted.items()}
    for name, parameter in layer.named_parameters():
        golden.check(parameter.grad, f"gradparam.{name}")


def named_as_here(state):
    """Rename the weights of one SS2D."""
    state = from_published({f"op.{name}": tensor for name, tensor in state.items()})
    return {name.removeprefix("op."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("name", ["vmamba_tiny_cfg", "vmamba_tiny_cfg_lnlast", "vmamba_v0_cfg"])
def test_vmamba(name):
    golden = Golden(name)
    c = golden.config
    architecture = VMambaArchitecture(
        depths=tuple(c["depths"]),
        dims=tuple(c["dims"] * 2**i for i in range(4)),
        ssm_ratio=c["ssm_ratio"],
        state_dim=c["ssm_d_state"],
        conv_bias=c["ssm_conv_bias"],
        forward_type=c["forward_type"],
        mlp_ratio=c["mlp_ratio"],
        stem=c["patchembed_version"],
        downsample=c["downsample_version"],
    )
    model = VMamba(architecture, "normed")
    state = from_published(golden.under("param."))
    head = {k: state.pop(f"classifier.head.{k}") for k in ("weight", "bias")}
    model.load_state_dict(state)

    def like(x, key):  # channels-first where the reference was
        return x if x.shape == golden.tensors[key].shape else x.permute(0, 3, 1, 2)

    image = golden.tensors["in.image"].clone().requires_grad_()
    stem = model.patch_embed(image.permute(0, 2, 3, 1))
    golden.check(like(stem, "out.stem"), "out.stem")
    total = 0.0
    for i, output in enumerate(model.stages(image)):
        output = like(output, f"out.stage{i}")
        golden.check(output, f"out.stage{i}")
        total = total + (output * golden.tensors[f"cot.stage{i}"]).sum()
    logits = model(image)[0].mean((1, 2)) @ head["weight"].t() + head["bias"]
    golden.check(logits, "out.logits")
    total.backward()
    golden.check(image.grad, "grad.image")
