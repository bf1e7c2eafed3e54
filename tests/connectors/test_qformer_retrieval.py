"""Do contrast and matching give transformers' Blip2ForImageTextRetrieval's values and gradients?"""

import torch
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from connectors.checkpoint_keys import read_published, translate_back
from connectors.qformer_blocks import QFormerSize
from connectors.qformer_stage1 import QFormerStage1, retrieval_keys
from connectors.views import TextInput

WIDTH, QUERIES, WORDS = 32, 5, 40
SIZE = QFormerSize(
    vision_dim=24,
    num_queries=QUERIES,
    hidden_dim=WIDTH,
    num_layers=3,
    num_heads=4,
    feed_forward_dim=48,
    dropout=0.0,
    vocab_size=WORDS,
    max_num_positions=12,
    text_output=True,
)


def reference():
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    qformer = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4}
    qformer |= {"intermediate_size": 48, "encoder_hidden_size": 24, "vocab_size": WORDS}
    qformer |= {"max_position_embeddings": 12, "use_qformer_text_input": True}
    qformer |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config={"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1},
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
    )
    torch.manual_seed(0)
    model = Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():  # its queries begin as zeros, its biases too
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def both():
    """Return transformers' model and ours with its weights, pictures, texts and their features."""
    theirs = reference()
    ours = QFormerStage1(SIZE, 16).eval()
    table = retrieval_keys(SIZE)
    own = read_published({"hf": table}, theirs.state_dict(), {}, "QFormerStage1")
    report = ours.load_state_dict(own, strict=False)
    assert all(key.startswith(("temperature", "caption_head")) for key in report.missing_keys)
    assert not report.unexpected_keys
    back = translate_back(table, ours.state_dict())
    assert all(torch.equal(theirs.state_dict()[key], value) for key, value in back.items())
    mask = torch.arange(7) < torch.tensor([[7], [4], [6]])
    text = TextInput(torch.randint(1, WORDS, (3, 7)) * mask, mask)
    pixels = torch.randn(3, 3, 28, 28)
    return theirs, ours, text, pixels


def compare(theirs, ours, their_score, our_score, their_features, our_features):
    torch.testing.assert_close(our_score, their_score, rtol=0, atol=2e-5)
    cotangent = torch.randn_like(their_score)
    (their_score * cotangent).sum().backward()
    (our_score * cotangent).sum().backward()
    torch.testing.assert_close(our_features.grad, their_features.grad, rtol=0, atol=1e-4)
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    table, compared = retrieval_keys(SIZE), 0
    for key, name in table.items():
        if isinstance(name, str) and key in grads:
            grad = ours.get_parameter(name).grad
            torch.testing.assert_close(grad, grads[key], rtol=0, atol=1e-4)
            compared += int(grad.abs().max() > 1e-6)
    queries = grads["query_tokens"][0]
    torch.testing.assert_close(ours.qformer.queries.grad, queries, rtol=0, atol=1e-4)
    return compared


def their_features(theirs, pixels):
    """Return the features (3, K, D) of transformers' encoder, and let its heads read them."""
    features = theirs.vision_model(pixels).last_hidden_state.detach().requires_grad_()
    theirs.vision_model.forward = lambda **_: (features,)
    return features


def test_matching():
    theirs, ours, text, pixels = both()
    features = their_features(theirs, pixels)
    expected = theirs(
        pixels, text.ids, text.mask.long(), use_image_text_matching_head=True, return_dict=False
    )[0]
    mine = features.detach().clone().requires_grad_()
    assert compare(theirs, ours, expected, ours.match(mine, text), features, mine) > 40


def test_contrast():
    theirs, ours, text, pixels = both()
    features = their_features(theirs, pixels)
    found = theirs(pixels, text.ids, text.mask.long(), return_dict=False)
    mine = features.detach().clone().requires_grad_()
    encoded = ours.encode(mine, text, WORDS - 1)
    torch.testing.assert_close(encoded.text_features, found[2], rtol=0, atol=2e-5)
    torch.testing.assert_close(encoded.image_features, found[3], rtol=0, atol=2e-5)
    scores = torch.einsum("bqp,ap->baq", encoded.image_features, encoded.text_features).amax(-1)
    assert compare(theirs, ours, found[0], scores, features, mine) > 40
