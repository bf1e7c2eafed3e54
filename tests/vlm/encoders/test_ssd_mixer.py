"""Is the Mamba-2 mixer transformers' own, forwards and backwards, values and gradients?"""

import pytest
import torch
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMixer

from vlm.encoders.ssd_mixer import Mamba2Mixer
from vlm.errors import UserError

VALUES, GRADIENTS = 2e-5, 1e-4
DIM = 12
SHARED = ("in_proj.weight", "out_proj.weight")
TWINS = {
    "conv1d.weight": "conv1d_b.weight",
    "conv1d.bias": "conv1d_b.bias",
    "dt_bias": "dt_bias_b",
    "A_log": "A_b_log",
    "D": "D_b",
    "norm.weight": "norm_b.weight",
}


def ours(**changes):
    arguments = {"state_dim": 5, "head_dim": 4, "groups": 2, "norm_eps": 1e-5, **changes}
    torch.manual_seed(0)
    mixer = Mamba2Mixer(DIM, **arguments)
    for parameter in mixer.parameters():  # fresh ones hide swapped and unused weights
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def theirs(chunk_size=8):
    config = Mamba2Config(
        hidden_size=DIM,
        num_heads=6,
        head_dim=4,
        state_size=5,
        n_groups=2,
        expand=2,
        chunk_size=chunk_size,
        num_hidden_layers=1,
        use_bias=False,
    )
    return TheirMixer(config, layer_idx=0).eval()


def tokens(length=21):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, length, DIM, generator=generator).requires_grad_()
    return x, torch.randn(2, length, DIM, generator=generator)


def backward_weights(mixer):
    """The weights of the second direction and the shared projections, under transformers' names."""
    state = mixer.state_dict()
    return {name: state[TWINS.get(name, name)] for name in (*TWINS, *SHARED)}


def forward_weights(mixer):
    """The weights of the first direction and the shared projections."""
    return {name: mixer.state_dict()[name] for name in (*TWINS, *SHARED)}


@pytest.mark.parametrize("length", [1, 3, 21])
def test_one_direction_is_the_library_layer(length):
    mixer, library = ours(directions="none"), theirs()
    assert not library.load_state_dict(mixer.state_dict(), strict=True).missing_keys
    x, cotangent = tokens(length)
    y = mixer(x)
    wanted = library(x)
    torch.testing.assert_close(y, wanted, rtol=0, atol=VALUES)
    got = torch.autograd.grad((y * cotangent).sum(), [x, *mixer.parameters()])
    names = dict(library.named_parameters())
    inputs = [x, *(names[name] for name, _ in mixer.named_parameters())]
    for g, w in zip(got, torch.autograd.grad((wanted * cotangent).sum(), inputs), strict=True):
        torch.testing.assert_close(g, w, rtol=GRADIENTS, atol=GRADIENTS)


def test_both_directions_are_the_mean_of_the_library_layer_on_the_sequence_and_its_reverse():
    mixer, there, back = ours(), theirs(), theirs()
    there.load_state_dict(forward_weights(mixer))
    back.load_state_dict(backward_weights(mixer))
    x, cotangent = tokens()
    y = mixer(x)
    wanted = (there(x) + back(x.flip(1)).flip(1)) / 2
    torch.testing.assert_close(y, wanted, rtol=0, atol=VALUES)
    (got,) = torch.autograd.grad((y * cotangent).sum(), x)
    (gradient,) = torch.autograd.grad((wanted * cotangent).sum(), x)
    torch.testing.assert_close(got, gradient, rtol=GRADIENTS, atol=GRADIENTS)


def test_every_step_sees_both_ends_only_with_two_directions():
    x, _ = tokens()
    for directions, reach in (("none", [False, True]), ("v2", [True, True])):
        y = ours(directions=directions)(x)
        (gradient,) = torch.autograd.grad(y[:, 10].sum(), x)
        assert [bool(gradient[:, 20].any()), bool(gradient[:, 0].any())] == reach


def test_gradient_reaches_every_weight():
    mixer = ours()
    x, cotangent = tokens()
    (mixer(x) * cotangent).sum().backward()
    assert [n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_new_weights_begin_as_mamba2_does():
    mixer = Mamba2Mixer(64, head_dim=2)
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.9e-3 < steps.min() and steps.max() < 0.11
    assert 0 <= mixer.A_log.min() and mixer.A_log.max() < torch.tensor(16.0).log()
    assert mixer(torch.randn(1, 9, 64)).isfinite().all()


def test_bfloat16():
    mixer = ours()
    x, _ = tokens()
    wanted = mixer(x)
    got = mixer.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("changes", [{"head_dim": 5}, {"groups": 4}, {"head_dim": 0}])
def test_channels_that_do_not_divide_are_refused(changes):
    with pytest.raises(UserError, match="do not divide 24 inner channels"):
        ours(**changes)
