"""Do Q-Former and Idefics2's perceiver agree with transformers' modules, at other sizes?

Both run in float64, so that nothing but the formula is compared; Idefics2's norms alone are in
float32 on both sides.
"""

import pytest
import torch
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from connectors import build_connector
from connectors.checkpoint_keys import from_published, translate
from connectors.views import TextInput, Views

LIBRARY = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3}
LIBRARY |= {"intermediate_size": 40, "encoder_hidden_size": 10, "vocab_size": 33}
LIBRARY |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LIBRARY |= {"max_position_embeddings": 16}
OURS = {"hidden_dim": 24, "num_layers": 5, "num_heads": 3, "feed_forward_dim": 40}
OURS |= {"vocab_size": 33, "max_num_positions": 16, "num_queries": 7, "dropout": 0.0}


def shaken(module):
    """All weights random: new norms and biases would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.double()


def compare(ours, theirs, x, bound=1e-9):
    """Compare values and the gradient at the features."""
    results = []
    for run in (ours, theirs):
        given = x.clone().requires_grad_()
        output = run(given)
        output.pow(3).sum().backward()
        results += [output, given.grad]
    torch.testing.assert_close(results[0], results[2], rtol=bound, atol=bound)
    torch.testing.assert_close(results[1], results[3], rtol=bound, atol=bound)
    assert results[1].abs().max() > 1e-3


def whole(qformer, queries):
    """A checkpoint: the library's Q-Former, its queries and a projection that changes nothing."""
    state = {f"qformer.{k}": v for k, v in qformer.state_dict().items()}
    state |= {"query_tokens": queries, "language_projection.weight": torch.eye(24)}
    return state | {"language_projection.bias": torch.zeros(24)}


@pytest.mark.parametrize("frequency", [1, 2, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_blip2(frequency, attention):
    config = Blip2QFormerConfig(**LIBRARY, cross_attention_frequency=frequency)
    config._attn_implementation = attention
    library = shaken(Blip2QFormerModel(config))
    queries = torch.randn(1, 7, 24).double()
    given = {"type": "qformer", "vision_norm": False, "cross_attention_every": frequency, **OURS}
    connector = build_connector(given, [10], 24)
    connector.load_state_dict(from_published(connector, whole(library, queries)))

    def theirs(x):
        return library(queries.expand(3, -1, -1), encoder_hidden_states=x).last_hidden_state

    x = torch.randn(3, 8, 10).double()
    compare(lambda x: connector.double()([x.unflatten(1, (2, 4))]), theirs, x)


def test_instructblip():
    config = InstructBlipQFormerConfig(**LIBRARY)
    library = shaken(InstructBlipQFormerModel(config))
    queries = torch.randn(1, 7, 24).double()
    given = {"type": "qformer", "vision_norm": False, "instruction": True, **OURS}
    connector = build_connector(given, [10], 24)
    connector.load_state_dict(from_published(connector, whole(library, queries)))
    ids = torch.randint(33, (3, 6))
    mask = torch.arange(6) < torch.tensor([[6], [1], [4]])

    def theirs(x):
        return library(
            ids,
            torch.cat([torch.ones(3, 7).bool(), mask], 1),
            query_embeds=queries.expand(3, -1, -1),
            encoder_hidden_states=x,
        ).last_hidden_state[:, :7]

    x = torch.randn(3, 8, 10).double()
    views = Views(text=TextInput(ids, mask))
    compare(lambda x: connector.double()([x.unflatten(1, (2, 4))], views), theirs, x)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_idefics2(attention):
    config = Idefics2PerceiverConfig(
        hidden_size=24,
        resampler_n_latents=5,
        resampler_depth=2,
        resampler_n_heads=6,
        resampler_head_dim=10,
        num_key_value_heads=3,
    )
    config._attn_implementation = attention
    library = shaken(Idefics2PerceiverResampler(config))
    given = {"type": "idefics2_perceiver", "num_queries": 5, "num_layers": 2, "num_heads": 6}
    connector = build_connector({**given, "num_key_heads": 3, "head_dim": 10}, [24], 24)
    connector.double()
    table = type(connector).key_tables(connector.config)["idefics2"]
    prefix = "connector.perceiver_resampler."
    state = {prefix + k: v for k, v in library.state_dict().items()}
    own = translate(table, state)
    left = connector.load_state_dict(own, strict=False)
    assert all(".projection." in key for key in left.missing_keys) and not left.unexpected_keys
    connector.resampler.projection = torch.nn.Identity()
    real = torch.arange(9) < torch.tensor([[9], [4]])
    x = torch.randn(2, 9, 24).double()
    compare(lambda x: connector.resampler(x, real), lambda x: library(x, real), x, 1e-6)
