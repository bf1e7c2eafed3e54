"""Do the parts inside the language model start right, cost what they serve, and run anywhere?"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from connectors.cross_attention import attend_media
from connectors.errors import UserError
from connectors.fusion import FusionContext
from connectors.gated_cross_attention_blocks import GatedCrossAttentionBlock
from connectors.high_resolution_blocks import HighResolutionBlock, LearnedPositions
from connectors.key_table import GroupedHeads, Repeated
from connectors.token_routed_linear import (
    LowRank,
    TokenRoutedLinear,
    other_rows,
    partial_lora_keys,
)
from connectors.visual_expert_blocks import copy_linear, visual_expert_keys

NONE = torch.empty(0, dtype=torch.long)


def routed(replaces=False):
    torch.manual_seed(0)
    expert = nn.Linear(6, 10) if replaces else LowRank(6, 10, 3, 6)
    for parameter in expert.parameters():
        nn.init.normal_(parameter)
    return TokenRoutedLinear(nn.Linear(6, 10), expert, replaces=replaces)


def flamingo():
    torch.manual_seed(0)
    block = GatedCrossAttentionBlock(12, 8, 2, 4)
    nn.init.constant_(block.attention_gate, 0.7)
    nn.init.constant_(block.feed_forward_gate, -0.4)
    return block


def cogagent():
    torch.manual_seed(0)
    return HighResolutionBlock(12, 8, 8, 2)


BLOCKS = [flamingo, cogagent]


def inputs(seed=1):
    """Hidden states (2, 5, 12), media (2, 7, 8), and a mask by which some positions see nothing."""
    generator = torch.Generator().manual_seed(seed)
    x, media = (torch.randn(*s, generator=generator) for s in [(2, 5, 12), (2, 7, 8)])
    mask = torch.rand(2, 5, 7, generator=generator) > 0.5
    mask[0, :2] = mask[1, 3] = False
    return x, media, mask


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_routing_is_what_a_mask_over_everything_gives(replaces, share):
    layer = routed(replaces)
    x = torch.randn(2, 9, 6)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(3)) < share
    out = layer(x, mask.flatten().nonzero()[:, 0])
    base, own = layer.base(x), layer.expert(x)
    expected = torch.where(mask[..., None], own if replaces else base + own, base)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_batch_without_images_gives_every_parameter_a_gradient(replaces):
    layer = routed(replaces)
    x = torch.randn(2, 9, 6)
    x[0, 0, 0] = torch.inf  # 0 * inf would be no number
    layer(x, NONE).sum().backward()
    for name, parameter in layer.expert.named_parameters():
        assert parameter.grad is not None and parameter.grad.eq(0).all(), name
    with torch.no_grad():
        out = layer(x, NONE)
    assert torch.equal(out, layer.base(x))


@pytest.mark.parametrize("replaces", [False, True])
def test_cost_grows_with_the_chosen_tokens(replaces):
    layer, x = routed(replaces), torch.randn(8, 32, 6)

    def flops(module, *args):
        with FlopCounterMode(display=False) as counter:
            module(*args)
        return counter.get_total_flops()

    one = flops(layer.expert, x[0, :1])
    base = flops(layer.base, x[0, :1])
    assert one > 0
    for count in (0, 1, 100, 256):
        seen_by_base = 256 - count if replaces else 256
        assert flops(layer, x, torch.arange(count)) == count * one + seen_by_base * base


def test_partial_lora_begins_as_nothing():
    low_rank = LowRank(64, 10, 3, 6)
    assert low_rank.up.weight.eq(0).all() and low_rank.scale == 2
    bound = 64**-0.5  # kaiming_uniform with a = sqrt(5)
    assert bound * 0.9 < low_rank.down.weight.abs().max() <= bound


def test_dropout_drops_only_what_is_added():
    layer = TokenRoutedLinear(nn.Linear(6, 10), LowRank(6, 10, 3, 6, dropout=0.5))
    nn.init.normal_(layer.expert.up.weight)
    x, rows = torch.randn(4, 6), torch.tensor([1, 3])
    first, second = layer(x, rows), layer(x, rows)
    assert torch.equal(first[[0, 2]], second[[0, 2]]) and not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x, rows), layer(x, rows))


def test_other_rows():
    assert other_rows(torch.tensor([1, 4]), 6).tolist() == [0, 2, 3, 5]
    assert other_rows(NONE, 3).tolist() == [0, 1, 2]


def test_an_expert_begins_as_the_language_models_own_layer():
    expert, base = nn.Linear(6, 10), nn.Linear(6, 10, bias=False)
    copy_linear(expert, base)
    x = torch.randn(3, 6)
    torch.testing.assert_close(expert(x), base(x))
    assert expert.weight is not base.weight
    with_bias = nn.Linear(6, 10)
    copy_linear(expert, with_bias)
    torch.testing.assert_close(expert(x), with_bias(x))


def test_positions_are_shared_image_by_image_and_begin_anew_in_each_document():
    images = torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1, -1, 2, 2, 2, 2, 2]])
    nothing = torch.zeros_like(images)
    one = FusionContext(images, nothing, nothing, nothing, {}, False)
    assert one.saved_positions.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 3, 3]]
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]])
    several = FusionContext(images, nothing, documents, nothing, {}, False)
    assert several.saved_positions.tolist() == [[0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 2, 2]]


@pytest.mark.parametrize("make", BLOCKS)
def test_what_may_not_be_seen_changes_nothing(make):
    block, (x, media, mask) = make(), inputs()
    x, media = x.requires_grad_(), media.requires_grad_()
    out = block(x, media, mask)
    (out[0, 3]).pow(2).sum().backward()
    seen = media.grad.abs().sum(-1) > 0
    assert torch.equal(seen[0], mask[0, 3]) and not seen[1].any()
    alone = block(x, media[:, :0], None)
    torch.testing.assert_close(out[0, :2], alone[0, :2])
    assert (out - alone)[mask.any(-1)].abs().amax(-1).min() > 1e-5


@pytest.mark.parametrize("make", BLOCKS)
@pytest.mark.parametrize("count", [0, 7])
def test_positions_that_see_nothing_have_finite_gradients(make, count):
    block, (x, media, mask) = make(), inputs()
    out = block(x, media[:, :count], mask[..., :count] & False)
    out.pow(2).sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("make", BLOCKS)
def test_kept_keys_and_values_are_those_of_the_whole_pass(make):
    block, (x, media, mask) = make(), inputs()
    whole = block(x, media, mask)
    kept = block.attention.read_media(media)
    step = block(x[:, 4:], media[:, :0], mask[:, 4:], kept)
    torch.testing.assert_close(step, whole[:, 4:])


@pytest.mark.parametrize("make", [*BLOCKS, routed, lambda: routed(True)])
def test_checkpointing_gives_the_same_gradients(make):
    def run(wrap):
        module = make()
        x, media, mask = inputs()
        args = (x, media, mask)
        if isinstance(module, TokenRoutedLinear):
            args = (x.reshape(2, 10, 6), torch.tensor([0, 3, 12]))
        args[0].requires_grad_()
        wrap(module, *args).pow(2).sum().backward()
        return [args[0].grad, *(p.grad for p in module.parameters())]

    plain = run(lambda module, *args: module(*args))
    again = run(lambda module, *args: checkpoint(module, *args, use_reentrant=False))
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", [*BLOCKS, routed, lambda: routed(True)])
def test_bfloat16(make):
    module, (x, media, mask) = make(), inputs()
    args = (x, media, mask)
    if isinstance(module, TokenRoutedLinear):
        args = (x.reshape(2, 10, 6), torch.tensor([0, 3, 12]))
    exact = module(*args)
    rough = module.bfloat16()(*(a.bfloat16() if a.is_floating_point() else a for a in args))
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.1)


def test_new_blocks():
    block = GatedCrossAttentionBlock(12, 8, 2, 4)
    x, media, mask = inputs()
    assert torch.equal(block(x, media, mask), x)
    weight = HighResolutionBlock(256, 64, 64, 2).attention.query.weight
    assert abs(weight.std().item() - 0.02) < 1e-3


def test_uniform_is_the_mean_of_all_values():
    query, key, value = torch.randn(3, 1, 4, 6).unbind()
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    found = attend_media(query, key, value, 2, mask, "uniform")
    torch.testing.assert_close(found, value.mean(1, keepdim=True).expand_as(found))


def test_no_softmax_goes_over_nothing(monkeypatch):
    def attention(query, key, value, mask, *args, **kwargs):
        assert key.shape[2] and mask.any(-1).all()
        return torch.zeros_like(query)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    x, media, mask = inputs()
    assert not mask.any(-1).all()
    for make in BLOCKS:
        make()(x, media, mask)
        make()(x, media[:, :0], mask[..., :0])


@pytest.mark.parametrize("unseen", ["zero", "uniform"])
def test_without_any_media_nothing_is_found(unseen):
    query, media = torch.randn(1, 4, 6, requires_grad=True), torch.randn(2, 1, 0, 6)
    media.requires_grad_()
    mask = torch.zeros(1, 4, 0, dtype=torch.bool)
    found = attend_media(query, *media, 2, mask, unseen)
    assert torch.equal(found, torch.zeros(1, 4, 6))
    found.sum().backward()
    assert query.grad.eq(0).all() and media.grad is not None


def test_positions_begin_as_zeros_and_take_any_grid():
    positions = LearnedPositions(4, 3)
    features = torch.randn(2, 3, 5, 3)
    assert torch.equal(positions(features), features.flatten(1, 2))
    nn.init.ones_(positions.table)
    torch.testing.assert_close(positions(features), features.flatten(1, 2) + 1)
    columns = torch.arange(4.0).expand(4, 4).reshape(16, 1)
    positions.load_state_dict({"table": columns.expand(16, 3)})
    added = (positions(features) - features.flatten(1, 2)).reshape(2, 3, 5, 3)
    torch.testing.assert_close(added[:, :1].expand_as(added), added)  # rows do not differ
    assert (added[0, 0, 1:, 0] > added[0, 0, :-1, 0]).all()


def test_heads_in_groups():
    layout = GroupedHeads("q", "k", "v", num_key_heads=2, head_dim=3)
    # Two groups of two query heads, a key head and a value head, of three rows each.
    names = [f"{n}{i}" for n in ("q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1") for i in range(3)]
    rows = {name: float(i) for i, name in enumerate(names)}
    theirs = torch.tensor(list(rows.values()))[:, None].expand(-1, 5)
    ours = layout.split(theirs)
    for tensor, kind, heads in zip(ours, "qkv", (4, 2, 2), strict=True):
        expected = [rows[f"{kind}{head}{i}"] for head in range(heads) for i in range(3)]
        assert tensor[:, 0].tolist() == expected
    assert torch.equal(layout.join(ours), theirs)


def test_a_shared_matrix_is_written_only_while_it_is_one():
    layout = Repeated("q.down", "k.down")
    ours = layout.split(torch.ones(2, 3))
    assert torch.equal(layout.join(ours), torch.ones(2, 3))
    ours[1][0, 0] = 2
    with pytest.raises(UserError, match=r"k\.down differs from q\.down"):
        layout.join(ours)


SPLIT = {role: f"layers.0.{role}." for role in ("q", "k", "v", "o", "gate", "up", "down")}


def test_keys_of_hosts_with_split_and_joined_layers():
    (table,) = partial_lora_keys([SPLIT], 2, 3).values()
    assert len(table) == 10 and len(table.roots) == 10
    assert table["model.layers.0.feed_forward.w2.Plora_B.weight"] == "layers.0.down.up.weight"
    assert table["model.layers.0.attention.wqkv.Plora_B.weight"].names[1] == "layers.0.k.up.weight"
    (table,) = visual_expert_keys([{"gate": "g.", "up": "u."}], [4, 2, 2], qkv_bias=True).values()
    assert sorted(table.values()) == ["g.weight", "u.weight"]
    joined = {**SPLIT, "up": SPLIT["gate"]}
    assert partial_lora_keys([joined], 2, 3) == {}
    assert visual_expert_keys([joined], [4, 2, 2], qkv_bias=True) == {}


def test_keys_where_queries_keys_and_values_are_one_layer_or_not_all_served():
    one = dict.fromkeys("qkv", "layers.0.qkv.")
    assert partial_lora_keys([one], 2, 3) == {}  # its rows stand otherwise than the published ones
    (table,) = visual_expert_keys([one], [4, 2, 2], qkv_bias=False).values()
    assert list(table.values()) == ["layers.0.qkv.weight"]
    some = {"q": "layers.0.q.", "v": "layers.0.v."}
    assert partial_lora_keys([some], 2, 3) == {}
    assert visual_expert_keys([some], [4, 2, 2], qkv_bias=False) == {}
