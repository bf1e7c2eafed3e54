"""Does the Q-Former give the references' values and gradients, in both of its stages?"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from connectors import build_connector
from connectors.checkpoint_keys import (
    from_published,
    read_published,
    to_published,
    translate_back,
)
from connectors.qformer_blocks import QFormerSize, TextInput, visible
from connectors.qformer_losses import (
    Pairs,
    belong_together,
    caption_loss,
    contrastive_loss,
    matching_loss,
    similarities,
)
from connectors.qformer_stage1 import QFormerStage1, stage1_keys, start_with

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
SIZES = {"num_queries": 5, "hidden_dim": 32, "num_layers": 4, "num_heads": 4}
SIZES |= {"feed_forward_dim": 48, "dropout": 0.0}
BOS = 59


def close(ours, theirs, bound=2e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


def golden(name):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    state = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    return tensors, state


def test_blip2_second_stage():
    tensors, state = golden("blip2_qformer")
    connector = build_connector({"type": "qformer", "vision_norm": False, **SIZES}, [20], 28)
    connector.load_state_dict(from_published(connector, state))
    back = to_published(connector, "hf_blip2")
    assert set(back) == set(state) and all(torch.equal(back[k], v) for k, v in state.items())
    given = tensors["image_embeds"].clone().requires_grad_()
    mask = tensors["image_attention_mask"].bool()
    close(connector.qformer(given, feature_mask=mask).queries, tensors["query_output"])
    output = connector.read(given, mask=mask)
    close(output, tensors["output"])
    (output * tensors["cotangent"]).sum().backward()
    close(given.grad, tensors["grad.image_embeds"], 1e-4)


def stage1():
    """Return the golden tensors and our model with the reference's weights."""
    tensors, state = golden("lavis_qformer_stage1")
    size = QFormerSize(
        vision_dim=20, vocab_size=60, max_num_positions=20, text_output=True, **SIZES
    )
    model = QFormerStage1(size, 16, tie_words=False)
    table = stage1_keys(size)
    own = read_published({"lavis": table}, state, model.state_dict(), "QFormerStage1")
    model.load_state_dict(own)
    back = translate_back(table, model.state_dict())
    assert set(back) == set(state) and all(torch.equal(back[k], v) for k, v in state.items())
    text = TextInput(tensors["input_ids"], tensors["text_attention_mask"].bool())
    return tensors, model, text


def all_different(num):
    numbers = torch.arange(num)
    return Pairs(numbers, numbers, torch.rand(num, 2).double(), numbers >= 0)


def test_first_stage_values():
    tensors, model, text = stage1()
    features = tensors["image_embeds"]
    encoded = model.encode(features, text, BOS)
    close(encoded.queries, tensors["query_output"])
    close(encoded.text, tensors["text_cls"])
    close(encoded.image_features, tensors["image_feats"])
    close(encoded.text_features, tensors["text_feat"])
    close(encoded.caption_logits, tensors["lm_logits"])
    image, words = encoded.image_features, encoded.text_features
    scores = similarities(image, words, model.temperature, image, words)
    close(scores.image_to_text, tensors["sim_i2t"])
    pairs = all_different(len(image))
    positives = belong_together(pairs, pairs.picture, pairs.caption)
    close(contrastive_loss(scores, positives).mean(), tensors["loss_itc"])
    losses, words = caption_loss(encoded.caption_logits, start_with(text, BOS))
    close(losses.sum() / words.sum(), tensors["loss_lm"])


def test_first_stage_losses_and_gradients():
    tensors, model, text = stage1()
    features = tensors["image_embeds"].clone().requires_grad_()
    negatives = (tensors["neg_image_idx"], tensors["neg_text_idx"])
    found = model(features, text, BOS, all_different(3), negatives=negatives)
    losses = (
        found.contrastive.mean(),
        found.matching.mean(),
        found.caption.sum() / found.words.sum(),
    )
    for loss, name in zip(losses, ("loss_itc", "loss_itm", "loss_lm"), strict=True):
        close(loss, tensors[name])
    close(sum(losses), tensors["loss"])
    sum(losses).backward()
    close(features.grad, tensors["grad.image_embeds"], 1e-4)
    close(model.qformer.queries.grad, tensors["grad.query_tokens"][0], 1e-4)


def test_a_cached_pass_would_give_the_same_queries():
    """Queries beside a causal text are those without a text: the reference's first pass."""
    tensors, model, _ = stage1()
    alone = model.qformer(tensors["image_embeds"]).queries
    close(alone, tensors["query_output"])


def test_masks():
    tensors, _, text = stage1()
    both = visible(5, text.mask, causal=False)
    assert torch.equal(both, tensors["mask_itm_additive"][:, 0, 0] > -1)
    causal = visible(5, text.mask, causal=True)
    assert torch.equal(causal[:, 5:], tensors["mask_lm_cached_additive"][:, 0] > -1)
    assert torch.equal(causal, tensors["mask_lm_unilm_additive"][:, 0] > -1)


def test_matching_loss_is_of_both_kinds():
    logits, targets = torch.randn(6, 2), torch.tensor([1, 1, 0, 0, 0, 0])
    expected = F.cross_entropy(logits, targets)
    close(matching_loss(logits, targets).mean(), expected)


def test_contrast_is_smoothed_cross_entropy_where_all_differ():
    scores = similarities(
        *(torch.randn(shape) for shape in ((4, 3, 5), (4, 5), (), (7, 3, 5), (7, 5)))
    )
    positives = torch.eye(7, dtype=torch.bool)[2:6]
    expected = [F.cross_entropy(s, torch.arange(2, 6), label_smoothing=0.1) for s in scores]
    close(contrastive_loss(scores, positives).mean(), sum(expected) / 2)
