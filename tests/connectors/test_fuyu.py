"""Is the connector Fuyu's linear layer, under its published keys?"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from connectors import build_connector
from connectors.checkpoint_keys import from_published, to_published

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


def test_reference_values():
    tensors = load_file(GOLDEN / "fuyu_patch.safetensors")
    state = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    connector = build_connector({"type": "fuyu"}, [36], 16)
    language_model = {"language_model.embed_tokens.weight": torch.zeros(2)}
    connector.load_state_dict(from_published(connector, {**state, **language_model}))
    patches = tensors["patches"].reshape(1, 2, 2, 36) / 100
    tokens = connector([patches])
    torch.testing.assert_close(tokens[0], tensors["output"], rtol=0, atol=2e-5)
    back = to_published(connector, "fuyu")
    assert set(back) == set(state) and all(torch.equal(back[key], state[key]) for key in state)
