"""Is the C-Abstractor Honeybee's: timm's RegNet stages around an average pooling?"""

import pytest
import timm.layers
import timm.models.regnet
import torch
from torch import nn

from connectors import build_connector
from connectors.cabstractor import RegNetBlock, block_keys
from connectors.checkpoint_keys import from_published, to_published
from connectors.errors import UserError

NUMBERS = {"rtol": 0, "atol": 2e-5}


def stage(depth, in_dim, dim):
    """As Honeybee builds it."""
    return timm.models.regnet.RegStage(
        depth,
        in_dim,
        dim,
        stride=1,
        dilation=1,
        act_layer=nn.SiLU,
        norm_layer=timm.layers.LayerNorm2d,
    )


def randomise(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


def make(width=8, **config):
    torch.manual_seed(0)
    return build_connector({"type": "cabstractor", "depth": 2, **config}, [width], 12)


@pytest.mark.parametrize(("in_dim", "dim"), [(8, 8), (6, 8), (13, 8)])
def test_block_is_timms(in_dim, dim):
    theirs, ours = stage(1, in_dim, dim).b1, RegNetBlock(in_dim, dim)
    randomise(theirs)
    table = block_keys(widens=in_dim != dim)
    ours.load_state_dict({table[key]: value for key, value in theirs.state_dict().items()})
    x, y = (torch.randn(2, in_dim, 5, 4, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    expected, output = theirs(x), ours(y)
    torch.testing.assert_close(output, expected, **NUMBERS)
    cotangent = torch.randn_like(expected)
    (expected * cotangent).sum().backward()
    (output * cotangent).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=0, atol=1e-4)
    for key, parameter in theirs.named_parameters():
        gradient = ours.get_parameter(table[key]).grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)


class Honeybee(nn.Module):
    """The reference's modules under its names; 3 x 3 tokens of 6 x 6 features."""

    def __init__(self):
        super().__init__()
        self.pos_emb = nn.Parameter(torch.randn(1, 36, 8))
        self.net = nn.Sequential(stage(2, 8, 8), nn.AdaptiveAvgPool2d((3, 3)), stage(2, 8, 8))
        self.readout = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 12))

    def forward(self, x):
        x = (x + self.pos_emb).transpose(1, 2).unflatten(2, (6, 6))
        return self.readout(self.net(x).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("side", [None, 3])
def test_the_whole_connector_from_published_keys(side):
    reference, connector = Honeybee(), make(side=side, position_side=6)
    randomise(reference)
    state = {f"abstractor.{key}": value for key, value in reference.state_dict().items()}
    connector.load_state_dict(from_published(connector, state))
    features = torch.randn(2, 6, 6, 8)
    expected = reference(features.flatten(1, 2))
    torch.testing.assert_close(connector([features]), expected, **NUMBERS)
    back = to_published(connector, "honeybee")
    assert set(back) == set(state) and all(torch.equal(back[key], state[key]) for key in state)


def test_sixteen_of_twenty_four():
    connector = make(side=16)
    assert connector([torch.randn(1, 24, 24, 8)]).shape == (1, 256, 12)
    assert connector.num_tokens(24, 24) == 256


def test_positions_are_resized_for_another_grid():
    connector = make(position_side=3)
    table = connector.positions.data
    table.copy_(torch.linspace(0, 1, 3).repeat(3)[:, None].expand(9, 8))  # column / 2
    features = [torch.zeros(1, 3, 9, 8)]
    reached = []
    connector.before.register_forward_pre_hook(lambda _, args: reached.append(args[0]))
    connector(features)
    rising = reached[0][0, 0]
    assert rising.shape == (3, 9)
    assert torch.allclose(rising[0], rising[2]) and (rising.diff(dim=1) > -1e-6).all()
    torch.testing.assert_close(rising[:, 4], torch.full((3,), 0.5))


def test_another_width_has_no_published_checkpoint():
    connector = make(hidden_dim=16, position_side=None)
    assert connector.positions is None and connector([torch.randn(1, 4, 4, 8)]).shape == (1, 4, 12)
    assert not type(connector).key_tables(connector.config)


def test_new_weights_are_honeybees():
    connector = make(width=256)
    for module in connector.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.bias is None or not module.bias.any()
            assert 0.016 < module.weight.std() < 0.024
    assert 0.016 < connector.positions.std() < 0.024


def test_numbers_are_checked():
    with pytest.raises(UserError, match="must be at least 1, not None, None, 0, 2 and 24"):
        make(depth=0)
