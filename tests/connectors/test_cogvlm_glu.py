"""Does the gated MLP compute CogVLM's formula, from weights under its published names?"""

import pytest
import torch
from torch.nn import functional as F

from connectors import build_connector, connector_token_grid
from connectors.checkpoint_keys import from_published, to_published
from connectors.errors import UserError


def make(merge=False):
    torch.manual_seed(0)
    connector = build_connector({"type": "cogvlm_glu", "inner_dim": 9, "merge": merge}, [5], 6)
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter)
    return connector


def published(features, state, merge):
    """GLU and EVA2CLIPModel of visual.py, written plainly; features (T, H, W, D)."""
    w = {k.removeprefix("vision."): v for k, v in state.items()}
    x = features
    if merge:
        x = F.conv2d(x.permute(0, 3, 1, 2), w["conv.weight"], w["conv.bias"], stride=2)
        x = x.flatten(2).transpose(1, 2)
    x = x.reshape(len(x), -1, x.shape[-1]) @ w["linear_proj.linear_proj.weight"].T
    x = F.layer_norm(x, (6,), w["linear_proj.norm1.weight"], w["linear_proj.norm1.bias"])
    x = F.gelu(x)
    gate = x @ w["linear_proj.gate_proj.weight"].T
    x = gate * gate.sigmoid() * (x @ w["linear_proj.dense_h_to_4h.weight"].T)
    x = x @ w["linear_proj.dense_4h_to_h.weight"].T
    return torch.cat([w["boi"].repeat(len(x), 1, 1), x, w["eoi"].repeat(len(x), 1, 1)], dim=1)


@pytest.mark.parametrize("merge", [False, True])
def test_formula_and_keys(merge):
    connector, name = make(merge), "cogvlm2" if merge else "cogvlm"
    features = torch.randn(2, 4, 6, 5)
    state = to_published(connector, name)
    assert state["vision.boi"].shape == (1, 1, 6)
    tokens = connector([features])
    torch.testing.assert_close(tokens, published(features, state, merge))
    assert tokens.shape[1] == connector.num_tokens(4, 6) == (6 if merge else 24) + 2
    others = {"vision.transformer.layers.0.mlp.fc1.weight": torch.ones(1)}
    whole = {f"model.{k}": v for k, v in (state | others).items()}
    again = from_published(connector, whole)
    assert all(torch.equal(again[k], v) for k, v in connector.state_dict().items())


def test_an_odd_grid_is_not_merged():
    with pytest.raises(UserError, match="factor 2 does not divide"):
        connector_token_grid({"type": "cogvlm_glu", "merge": True}, 4, 5)
    with pytest.raises(UserError, match="factor 2 does not divide"):
        make(True)([torch.randn(1, 5, 4, 5)])
    for inner_dim in (0, -1):
        with pytest.raises(UserError, match="inner_dim must be at least 1"):
            build_connector({"type": "cogvlm_glu", "inner_dim": inner_dim}, [5], 6)


def test_published_sizes():
    with torch.device("meta"):
        first = build_connector({"type": "cogvlm_glu", "inner_dim": 11008}, [1792], 4096)
        second = build_connector({"type": "cogvlm_glu", "merge": True}, [1792], 4096)
    assert second.down.in_features == 14336
    count = sum(p.numel() for p in first.parameters())
    assert count == 1792 * 4096 + 2 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    assert first.num_tokens(35, 35) == 1227 and second.num_tokens(96, 96) == 2306
