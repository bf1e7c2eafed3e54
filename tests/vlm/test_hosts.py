"""Are the layers of every family where HOSTS says, and do connectors act there?"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vlm.errors import UserError
from vlm.hosts import HOSTS, host_shape
from vlm.loading import assemble

CONNECTOR = [
    {"type": "mlp"},
    {"type": "partial_lora", "rank": 2, "dropout": 0.0},
    {"type": "deepstack"},
    {"type": "high_resolution_cross_attention", "inner_dim": 8, "position_side": 4},
]
SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = list(HOSTS)


def language_model(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))


@pytest.fixture
def make(make_tokenizer, make_vision_encoder):
    def build(kind, connector):
        torch.manual_seed(2)
        tokenizer = make_tokenizer()
        model, processor = assemble(
            make_vision_encoder(),
            connector,
            language_model(kind),
            tokenizer=tokenizer,
            chat_template="chatml",
        )
        return model.eval(), processor

    return build


@pytest.mark.parametrize("kind", FAMILIES)
def test_connectors_act_in_every_family(kind, make, rows) -> None:
    model, processor = make(kind, CONNECTOR)
    for name, parameter in model.model.connector.named_parameters():
        if name.endswith("up.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    batch = processor.collate(rows(processor), "right")
    # The last layer's q, o, gate, up and down of image tokens are read by nobody.
    unread = model.model.connector.parts[1].layers[1]
    unread = {f"parts.1.layers.1.{n}" for n, _ in unread.named_parameters() if "k" not in n}
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            model.activation_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in model.model.connector.named_parameters():
            assert parameter.grad.abs().sum() > 0 or name in unread, name
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    model.eval()
    asked = processor.collate(rows(processor, supervise=False), "left")
    options = {"max_new_tokens": 4, "do_sample": False}
    cached = model.generate(**asked, **options)
    assert torch.equal(cached, model.generate(**asked, **options, use_cache=False))


@pytest.mark.parametrize("kind", FAMILIES)
def test_between_attention_and_feed_forward(kind, make) -> None:
    # What a block adds there is what the feed-forward part's norm sees: residual plus branch.
    model, _ = make(kind, CONNECTOR[:1] + CONNECTOR[3:])
    chain = model.model.connector
    layer = model.model.language_model.layers[1]
    pre = "pre_feedforward_layernorm" if "gemma" in kind and kind != "gemma" else None
    norm = layer.get_submodule(pre or "post_attention_layernorm")
    given, seen = [], []
    block = chain.parts[1].blocks[1]
    block.register_forward_hook(lambda _, args, output: given.append(output))
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=torch.arange(3, 9)[None])
    torch.testing.assert_close(seen[0], given[0])


@pytest.mark.parametrize("kind", FAMILIES)
def test_shape_is_that_of_the_config(kind) -> None:
    shape = host_shape(language_model(kind).base_model)
    assert shape.num_layers == 2 and shape.hidden_dim == 32
    assert (shape.num_heads, shape.num_key_heads, shape.head_dim) == (4, 2, 8)
    joined = kind == "phi3"
    assert [len(layer) for layer in shape.layers] == [4 if joined else 7] * 2


def test_unknown_families_are_refused_with_what_to_add(make_model) -> None:
    with pytest.raises(UserError, match=r"'gpt_neox'.*add a HostFamily.*HOSTS in vlm/hosts.py"):
        make_model(kind="gpt_neox", connector=CONNECTOR)


@pytest.mark.parametrize(
    "connector, words",
    [
        ([{"type": "partial_lora"}], r"exactly one that projects.*put \{type: mlp\} before"),
        ([{"type": "mlp"}, {"type": "linear"}], r"has 2 \(\['mlp', 'linear'\]\)"),
        (
            [{"type": "mlp"}, {"type": "deepstack", "factor": 2}],
            "2 x 2 tokens of a view, but 4 x 4",
        ),
        ([{"type": "mlp"}, {"type": "deepstack", "features": [1]}], "gives 1 feature maps"),
        ([{"type": "mlp"}, {"type": "gated_cross_attention"}], "has 2; set a smaller every"),
        ([{"type": "mlp"}, {"type": "partial_lora", "rnk": 2}], r"did you mean 'rank'"),
    ],
)
def test_lists_that_cannot_work_are_refused(connector, words, make_model) -> None:
    with pytest.raises(UserError, match=words):
        make_model(connector=connector)
