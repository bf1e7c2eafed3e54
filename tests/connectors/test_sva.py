"""Does SVA give Cambrian's numbers, and does each query see its own windows and nothing else?"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from connectors import build_connector, connector_token_grid
from connectors.checkpoint_keys import from_published, to_published
from connectors.errors import UserError
from connectors.fusion import FusionContext, LayerSite
from connectors.sva_blocks import Sampler, SamplerLayer, cut_masks, cut_windows
from connectors.sva_in_llm import SVAInLLMConfig, SVAInLLMConnector
from connectors.sva_keys import sampler_keys
from connectors.views import Views

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
VALUES, GRADIENTS = {"rtol": 0, "atol": 2e-5}, {"rtol": 0, "atol": 1e-4}


def shown(side, *heights):
    """(T, side, side): each view shows its image on so many rows in the middle."""
    rows = torch.arange(side) - side / 2 + 0.5
    return torch.stack([(rows.abs() < height / 2)[:, None].expand(-1, side) for height in heights])


def golden(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def under(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def small(**config):
    torch.manual_seed(0)
    values = {"windows": [1, 2], "hidden_dim": 16, "num_heads": 4, "depth": 1, **config}
    return build_connector({"type": "sva", **values}, [5, 7], 12)


@pytest.mark.parametrize(("name", "kind"), [("sva", "joint"), ("sva_sep", "separate")])
def test_samplers_give_the_references_numbers(name, kind):
    tensors = golden(name)
    sampler = Sampler(32, 32, (1, 2), 2, 16, kind)
    table = sampler_keys("", "", (1, 2), 2, kind)
    state = under(tensors, "param.")
    sampler.load_state_dict({table[key]: value for key, value in state.items()})
    names = ("queries", "context_feature", "vision_latents_0", "vision_latents_1")
    inputs = [tensors[n].clone().requires_grad_() for n in names]
    masks = [tensors["attention_mask_0"], tensors["attention_mask_1"]]
    assert not masks[1].all()
    output = sampler(inputs[0], inputs[1], inputs[2:], masks)
    torch.testing.assert_close(output, tensors["output"], **VALUES)
    (output * tensors["cotangent"]).sum().backward()
    for n, x in zip(names, inputs, strict=True):
        torch.testing.assert_close(x.grad, tensors[f"grad.{n}"], **GRADIENTS)
    parameters = dict(sampler.named_parameters())
    for n, gradient in under(tensors, "gradp.").items():
        torch.testing.assert_close(parameters[table[n]].grad, gradient, **GRADIENTS)


def cambrian():
    """The connector of `sva_connector_e2e` and its tensors."""
    tensors = golden("sva_connector_e2e")
    config = {"windows": [1, 2], "query_strides": [1, 2], "depth": 1, "hidden_dim": 32}
    connector = build_connector({"type": "sva", **config}, [12, 20], 48)
    connector.load_state_dict(from_published(connector, under(tensors, "param.")))
    maps = [tensors["tower_features_0"].unflatten(1, (4, 4))]
    maps += [tensors["tower_features_1"].unflatten(1, (8, 8))]
    valid = [shown(4, 2, 4), shown(8, 4, 8)]  # images of 100 x 50 and 60 x 60 pixels
    return connector, tensors, maps, valid


def sequence(tokens, tensors, image):
    """Rows with padding alone are left out, a newline ends each row; (where, embeddings)."""
    rows = tokens[image].unflatten(0, (4, 4))[slice(1, 3) if image == 0 else slice(None)]
    assert list(rows.shape[:2]) == tensors["final_size"][image].tolist()
    newline = tensors["param.model.image_newline"].expand(len(rows), 1, -1)
    start = tensors["input_ids"][image].tolist().index(-200)
    embeddings = torch.cat([rows, newline], dim=1).flatten(0, 1)
    return slice(start, start + len(embeddings)), embeddings


def test_the_connector_gives_cambrians_numbers():
    connector, tensors, maps, valid = cambrian()
    maps = [m.clone().requires_grad_() for m in maps]
    tokens = connector.project(maps, valid)
    loss = torch.zeros(())
    for image in range(2):
        where, embeddings = sequence(tokens, tensors, image)
        torch.testing.assert_close(embeddings, tensors["inputs_embeds"][image, where], **VALUES)
        loss = loss + (embeddings * tensors["cotangent"][image, where]).sum()
    loss.backward()
    for i, m in enumerate(maps):
        gradient = tensors[f"grad.tower_features_{i}"]
        torch.testing.assert_close(m.grad.flatten(1, 2), gradient, **GRADIENTS)


def test_the_checkpoint_comes_back_the_same():
    connector, tensors, _, _ = cambrian()
    theirs = under(tensors, "param.model.")
    elsewhere = {"image_newline", "embed_tokens.weight"}
    back = to_published(connector, "cambrian")
    assert set(back) == set(theirs) - elsewhere
    assert all(torch.equal(back[key], theirs[key]) for key in back)


def test_what_the_language_models_samplers_see():
    connector, tensors, maps, valid = cambrian()
    seen = connector.look(connector.project_maps(maps), valid)
    kept = torch.cat([torch.arange(4, 12), torch.arange(16, 32)])  # rows 1 and 2, then all
    torch.testing.assert_close(seen.context[kept], tensors["global_context_final"], **VALUES)
    for i in range(2):
        torch.testing.assert_close(seen.windows[i][kept], tensors[f"llm_layer_kv_{i}"], **VALUES)
        assert torch.equal(seen.masks[i][kept], tensors[f"llm_layer_mask_{i}"])
        raw = cut_windows(maps[i], (1, 2)[i])
        assert torch.equal(raw, tensors[f"windows_train_{i}"])


def test_a_layer_for_the_language_model_has_its_width_outside():
    torch.manual_seed(0)
    layer = SamplerLayer(40, 16, (1, 3), 4)
    windows = [torch.randn(6, 1, 16), torch.randn(6, 9, 16)]
    hidden = torch.randn(6, 1, 40)
    output = layer(hidden, torch.randn(6, 1, 16), windows)
    assert output.shape == hidden.shape
    layer.project_out.linear_2.weight.data.zero_()
    assert torch.equal(layer(hidden, torch.randn(6, 1, 16), windows), hidden)  # a residual


def test_a_window_of_padding_alone_is_seen_whole():
    valid = torch.zeros(1, 4, 4, dtype=torch.bool)
    valid[0, 0, :3] = True
    masks = cut_masks(valid, 2)
    assert (
        masks.tolist()
        == [[True, True, False, False], [True, False, False, False]] + [[True] * 4] * 2
    )


def test_padding_moves_no_token_but_through_the_context():
    connector = small(windows=[1, 4])
    maps = [torch.randn(1, 2, 2, 5), torch.randn(1, 8, 8, 7)]
    valid = [shown(2, 2), shown(8, 4)]
    assert not valid[1][0, 0].any() and valid[0].all()
    noisy = [maps[0], torch.where(valid[1][..., None], maps[1], torch.randn(1, 8, 8, 7))]
    assert torch.equal(connector.project(maps, valid), connector.project(noisy, valid))
    assert not torch.allclose(connector(maps), connector(noisy))


def test_in_a_chain_each_part_has_the_padding_of_its_own_maps():
    part = {"type": "sva", "windows": [4], "hidden_dim": 16, "num_heads": 4, "features": [1]}
    torch.manual_seed(0)
    chain = build_connector([part], [5, 7], 12)
    maps = [torch.randn(1, 2, 2, 5), torch.randn(1, 8, 8, 7)]
    valid = [shown(2, 2), shown(8, 4)]
    expected = chain.parts[0].project(maps[1:], valid[1:])
    assert chain.reads == {"padding"}
    assert torch.equal(chain(maps, Views(shown=valid)).tokens, expected)
    assert not torch.allclose(chain(maps).tokens, expected)


def test_inside_the_language_model_padding_is_not_seen_either(monkeypatch):
    config = {"windows": [1, 4], "hidden_dim": 16, "num_heads": 4, "depth": 1, "num_samplers": 1}
    connector = SVAInLLMConnector(SVAInLLMConfig(**config), [5, 7], 12)
    maps = [torch.randn(1, 2, 2, 5), torch.randn(1, 8, 8, 7)]
    valid = [shown(2, 2), shown(8, 4)]
    noisy = [maps[0], torch.where(valid[1][..., None], maps[1], torch.randn(1, 8, 8, 7))]
    hidden = torch.randn(1, 6, 12)
    images = torch.tensor([[-1, 0, 0, 0, 0, 0]])

    def after(maps, views):
        _, side = connector.project_and_side(maps, views)
        ended = [torch.cat([x[0], torch.zeros_like(x[0, :1])]) for x in side]  # the end of a row
        context = FusionContext(images, images, images, torch.arange(1, 6), {0: ended}, False)
        return connector.layer_apply(LayerSite(0, "after"), hidden, context, ended)

    attention = F.scaled_dot_product_attention

    def strict(query, key, value, mask, *args, **kwargs):
        assert mask is None or mask.any(-1).all()  # a softmax over nothing
        return attention(query, key, value, mask, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", strict)
    padded = Views(shown=valid)
    out = after(maps, padded)
    assert torch.equal(out, after(noisy, padded))
    assert not torch.allclose(after(maps, Views()), after(noisy, Views()))
    assert torch.equal(out[:, [0, 5]], hidden[:, [0, 5]])


def test_a_token_sees_its_own_windows():
    connector = small()
    maps = [torch.randn(1, 3, 4, 5), torch.randn(1, 6, 8, 7)]
    for row in range(6):
        for column in range(8):
            lit = [maps[0], maps[1].clone()]
            lit[1][0, row, column] += 1.0
            changed = (connector(lit) - connector(maps)).abs().amax(-1)[0] > 1e-6
            assert changed.nonzero().flatten().tolist() == [row // 2 * 4 + column // 2]


def test_a_query_group_stands_for_several_tokens():
    connector = small(query_strides=[1, 2])
    maps = [torch.randn(1, 4, 4, 5), torch.randn(1, 8, 8, 7)]
    windows = [cut_windows(m, n) for m, n in zip(maps, (2, 4), strict=True)]
    assert [tuple(w.shape) for w in windows] == [(4, 4, 5), (4, 16, 7)]
    assert [p.table.shape[0] for p in connector.samplers[1].layers[0].positions] == [4, 16]
    assert connector(maps).shape == (1, 16, 12)


def test_published_sizes():
    towers = {"windows": [1, 1, 1, 4], "hidden_dim": 1024, "num_heads": 16, "depth": 3}
    with torch.device("meta"):
        connector = build_connector({"type": "sva", **towers}, [1152, 1024, 1536, 3072], 4096)
        inside = SamplerLayer(4096, 1024, (1, 1, 1, 4))
    count = sum(p.numel() for p in connector.samplers[0].layers[0].parameters())
    assert count == 15_765_504
    assert sum(p.numel() for p in inside.parameters()) == 22_056_960
    assert connector.num_tokens(24, 24) == 576


def test_queries_begin_with_the_language_models_deviation():
    torch.manual_seed(0)
    connector = build_connector({"type": "sva", "hidden_dim": 2048, "depth": 1}, [4], 64)
    assert 0.12 < connector.vision_query.std() < 0.13  # 1 / sqrt(64) = 0.125


BAD = [
    ({"windows": [1]}, r"windows has 1 numbers, but the vision encoder gives 2 feature maps"),
    ({"windows": [0, 1]}, "must be at least 1"),
    ({"query_strides": []}, "must be at least 1"),
    ({"num_heads": 3}, "hidden_dim 16 is no multiple of num_heads 3"),
]


@pytest.mark.parametrize(("config", "message"), BAD, ids=str)
def test_wrong_numbers_are_named(config, message):
    with pytest.raises(UserError, match=message):
        small(**config)


def test_a_grid_that_does_not_fit_is_named():
    with pytest.raises(
        UserError, match=r"grids \(4, 4\), \(6, 6\), which are not windows \[1, 2\]"
    ):
        small()([torch.randn(1, 4, 4, 5), torch.randn(1, 6, 6, 7)])
    with pytest.raises(
        UserError, match="query stride 3 do not divide the first feature grid 4 x 6"
    ):
        connector_token_grid({"type": "sva", "query_strides": [1, 3]}, 4, 6)
    with pytest.raises(UserError, match="weights several feature maps"):
        build_connector({"type": "sva", "kind": "separate"}, [4], 8)
