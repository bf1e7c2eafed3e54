"""Does the Q-Former keep its word on float32, text, BERT's start and negatives?"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

from connectors import build_connector
from connectors.checkpoint_keys import from_published, to_published
from connectors.errors import UserError
from connectors.qformer_blocks import QFormer, QFormerSize
from connectors.qformer_keys import start_from_bert
from connectors.qformer_losses import (
    Pairs,
    belong_together,
    contrastive_loss,
    draw_negatives,
    judged_right,
    matching_loss,
    nearest_is_own,
    similarities,
)
from connectors.qformer_stage1 import QFormerStage1, stage1_keys
from connectors.views import TextInput, Views

SIZES = {"hidden_dim": 16, "num_layers": 3, "num_heads": 4, "feed_forward_dim": 24}
SIZES |= {"num_queries": 5, "vocab_size": 30, "max_num_positions": 6, "dropout": 0.0}
TEXT = TextInput(torch.arange(12).reshape(2, 6), torch.arange(6) < torch.tensor([[6], [3]]))


def make(**fields):
    torch.manual_seed(0)
    return build_connector({"type": "qformer", **SIZES, **fields}, [10], 12)


def stage1(**fields):
    torch.manual_seed(0)
    return QFormerStage1(QFormerSize(vision_dim=10, text_output=True, **SIZES), 8, **fields)


def test_weights_stay_in_float32_in_a_half_precision_model():
    connector = make()
    before = connector.qformer.queries.clone()
    connector.to("cpu", torch.bfloat16)
    assert {p.dtype for p in connector.qformer.parameters()} == {torch.float32}
    assert torch.equal(connector.qformer.queries, before)
    assert connector.projection.weight.dtype == torch.bfloat16
    assert {p.dtype for p in make().double().parameters()} == {torch.float64}


def test_text_changes_the_tokens_and_padding_does_not():
    connector = make(instruction=True)
    maps = [torch.randn(2, 3, 3, 10)]
    tokens = connector.project(maps, TEXT)
    changed = TEXT.ids.clone()
    changed[1, 3:] = 29
    torch.testing.assert_close(connector.project(maps, TextInput(changed, TEXT.mask)), tokens)
    changed[:, 1] = 28
    assert (connector.project(maps, TextInput(changed, TEXT.mask)) - tokens).abs().amin(
        0
    ).max() > 1e-4


@pytest.mark.parametrize(("instruction", "text"), [(True, None), (False, TEXT)])
def test_text_where_none_is_read_and_the_reverse(instruction, text):
    with pytest.raises(UserError, match="instruction: true"):
        make(instruction=instruction).project([torch.randn(2, 3, 3, 10)], text)


def test_text_longer_than_the_positions_is_refused():
    ids = torch.zeros(1, 7, dtype=torch.long)
    with pytest.raises(UserError, match="takes texts of 6 tokens, but one has 7"):
        make(instruction=True).project([torch.randn(1, 3, 3, 10)], TextInput(ids, ids == 0))


@pytest.mark.parametrize("instruction", [False, True])
@pytest.mark.parametrize("name", ["lavis_opt_proj", "lavis_t5_proj", "lavis_llm_proj", "hf"])
def test_each_published_format_is_recognised(name, instruction):
    connector = make(instruction=instruction)
    if name == "hf":
        name = "hf_instructblip" if instruction else "hf_blip2"
    state = to_published(connector, name)
    state |= {"Qformer.bert.embeddings.position_ids": torch.arange(3)[None], "lm.q": torch.ones(1)}
    again = from_published(connector, state)
    assert all(torch.equal(again[key], value) for key, value in connector.state_dict().items())


def test_instructblip_s_idle_weights_are_passed_over_and_others_are_not():
    connector = make(instruction=True)
    state = to_published(connector, "hf_instructblip")
    idle = "qformer.encoder.layer.2.intermediate.dense.weight"
    assert idle not in state
    assert from_published(connector, {**state, idle: torch.zeros(24, 16)})
    with pytest.raises(UserError, match="crossattention"):
        from_published(
            connector, {**state, "qformer.encoder.layer.1.crossattention.x": torch.ones(1)}
        )


def bert(**fields):
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=6,
        **{"vocab_size": 29, **fields},
    )
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.mark.parametrize("old", [False, True])
def test_a_text_alone_is_read_as_bert_reads_it(old):
    """Its token types are left out, so that BERT's are set to zero here."""
    model = bert()
    with torch.no_grad():
        model.embeddings.token_type_embeddings.weight.zero_()
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    state = {f"bert.{k}": v for k, v in model.state_dict().items()}
    if old:
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, name in names.items():
            state = {k.replace(new, name): v for k, v in state.items()}
    qformer = QFormer(QFormerSize(vision_dim=10, text_output=True, **SIZES))
    last_word = qformer.word_embeddings.weight[29].clone()
    new = start_from_bert(qformer, state)
    assert {name.split(".")[0] for name in new} == {"queries", "layers"}
    assert all("cross_attention" in name for name in new if name != "queries")
    assert torch.equal(qformer.word_embeddings.weight[29], last_word)
    layer = qformer.layers[1]
    assert torch.equal(layer.query_feed_forward.up.weight, layer.text_feed_forward.up.weight)
    expected = model(TEXT.ids, TEXT.mask.long()).last_hidden_state
    torch.testing.assert_close(qformer(None, TEXT).text, expected, rtol=0, atol=1e-5)


def test_second_stage_takes_bert_s_feed_forward_for_the_queries():
    connector, state = make(), bert().state_dict()
    start_from_bert(connector.qformer, state)
    found = connector.qformer.layers[2].query_feed_forward.down.weight
    assert torch.equal(found, state["encoder.layer.2.output.dense.weight"])


def test_another_bert_is_refused():
    with pytest.raises(UserError, match="no BERT of 3 layers"):
        start_from_bert(make().qformer, {"bert.embeddings.LayerNorm.weight": torch.ones(16)})
    with pytest.raises(UserError, match="choose the BERT of its width"):
        start_from_bert(make(hidden_dim=8).qformer, bert().state_dict())


def pairs_of(pictures, captions=None, real=None):
    pictures = torch.tensor(pictures)
    captions = 100 + torch.arange(len(pictures)) if captions is None else torch.tensor(captions)
    real = torch.ones(len(pictures), dtype=torch.bool) if real is None else torch.tensor(real)
    draws = torch.rand(len(pictures), 2, generator=torch.Generator().manual_seed(5)).double()
    return Pairs(pictures, captions, draws, real)


def test_negatives_are_others_and_the_nearest_come_most():
    generator = torch.Generator().manual_seed(0)
    scores, own = torch.zeros(2, 4), torch.eye(4, dtype=torch.bool)[1:3]
    scores[0, 3] = 3.0
    draws = torch.rand(500, 2, generator=generator, dtype=torch.float64)
    drawn = torch.stack([draw_negatives(scores, own, draw) for draw in draws])
    assert set(drawn[:, 0].tolist()) == {0, 2, 3} and set(drawn[:, 1].tolist()) == {0, 1, 3}
    expected = torch.tensor([1.0, 0.0, 1.0, 20.0855]) / 22.0855
    counts = torch.bincount(drawn[:, 0], minlength=4) / 500
    assert (counts - expected).abs().max() < 0.04


@pytest.mark.parametrize("draw", [0.0, 0.999999, 1 - 2**-53])
def test_no_draw_meets_what_is_forbidden(draw):
    forbidden = torch.tensor([[True, False, False, True], [True, True, False, True]])
    draws = torch.full((2,), draw, dtype=torch.float64)
    for scores in (torch.zeros(2, 4), torch.randn(2, 4) * 30):
        drawn = draw_negatives(scores, forbidden, draws)
        assert not forbidden.gather(1, drawn[:, None]).any()


def test_pairs_of_one_picture_or_caption_belong_together():
    pairs = pairs_of([1, 1, 2, 3], [7, 8, 9, 9])
    positives = belong_together(pairs, pairs.picture, pairs.caption)
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert positives.int().tolist() == expected
    # LAVIS's soft targets for pairs with an image_id
    scores = similarities(*(torch.randn(s) for s in ((4, 3, 5), (4, 5), (), (4, 3, 5), (4, 5))))
    share = torch.tensor(expected) / torch.tensor(expected).sum(1, keepdim=True)
    targets = 0.9 * share + 0.1 * torch.ones(4, 4) / 4
    both = [-(s.log_softmax(1) * targets).sum(1).mean() for s in scores]
    torch.testing.assert_close(contrastive_loss(scores, positives).mean(), sum(both) / 2)
    assert nearest_is_own(torch.eye(4)[[1, 3, 3, 0]], positives).tolist() == [1, 0, 1, 0]


def test_what_stands_where_no_pair_is_changes_nothing():
    model, features = stage1().eval(), torch.randn(4, 4, 10)
    text = TextInput(*(part.repeat(2, 1) for part in TEXT))
    text.ids[2:, 1] += 13
    whole = model(features, text, 29, pairs_of([0, 1, 2, 3]))
    blank = TextInput(*(torch.cat([part, part[:1] * 0]) for part in text))
    pairs = pairs_of([0, 1, 2, 3, 0], real=[True, True, True, True, False])
    more = model(torch.cat([features, torch.zeros(1, 4, 10)]), blank, 29, pairs)
    for with_blank, alone in zip(more, whole, strict=True):
        torch.testing.assert_close(with_blank[:4], alone)
        assert torch.isfinite(with_blank).all()
    nothing = model(features, text, 29, pairs_of([0] * 4, real=[False] * 4))
    assert all(torch.isfinite(part).all() for part in nothing)


def test_a_pair_without_negatives_is_labelled_as_what_it_draws():
    model, features = stage1().eval(), torch.randn(2, 4, 10)
    found = model(features, TEXT, 29, pairs_of([4, 4]))
    logits = model.match(features, TEXT)
    own = model(features[:1], TextInput(*(part[:1] for part in TEXT)), 29, pairs_of([4]))
    expected = matching_loss(logits[:1].repeat(3, 1), torch.ones(3))
    torch.testing.assert_close(own.matching, expected)
    assert found.chance.tolist() == [1.0, 1.0] and own.contrastive.abs().item() < 1e-6


def test_judgements_are_counted_apart():
    logits = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [1, 0], [1, 0]]).float()
    accepted, refused = judged_right(logits, torch.tensor([1, 1, 0, 0, 0, 0]).bool())
    assert accepted.tolist() == [1, 0] and refused.tolist() == [0.5, 1.0]


def test_first_stage_trains_every_weight_and_ties_words():
    model = stage1()
    assert model.caption_head.decoder.weight is model.qformer.word_embeddings.weight
    found = model(torch.randn(2, 4, 10), TEXT, 29, pairs_of([0, 1]))
    (found.contrastive + found.matching + found.caption).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert set(stage1_keys(model.qformer.size)) > {"temp", "Qformer.cls.predictions.bias"}


def test_gradient_checkpointing_gives_the_same_gradients():
    connector, maps = make(instruction=True), torch.randn(2, 3, 3, 10)
    gradients = []
    for run in (connector, lambda *inputs: checkpoint(connector, *inputs, use_reentrant=False)):
        connector.zero_grad()
        run([maps], Views(text=TEXT)).pow(2).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in connector.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_dropout_is_in_training_alone():
    connector, maps = make(dropout=0.5), [torch.randn(2, 3, 3, 10)]
    assert not torch.equal(connector(maps), connector(maps))
    connector.eval()
    assert torch.equal(connector(maps), connector(maps))


def test_new_weights_are_bert_s_at_bert_s_width_and_larger_in_narrower_ones():
    for width, expected in ((768, 0.02), (192, 0.04)):
        size = {"hidden_dim": width, "num_layers": 1, "num_heads": 2, "feed_forward_dim": width}
        qformer = QFormer(QFormerSize(vision_dim=10, vocab_size=30, **size))
        found = qformer.layers[0].attention.to_q.weight.std().item()
        assert found == pytest.approx(expected, rel=0.05)
        assert qformer.word_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_published_size():
    with torch.device("meta"):
        connector = build_connector({"type": "qformer"}, [1408], 2560)
    # transformers' count of its `qformer`; queries and the features' norm lie outside it.
    count = sum(p.numel() for p in connector.qformer.parameters()) - 2 * 1408 - 32 * 768
    assert count == 105_137_664 and connector.num_tokens(16, 16) == 32
