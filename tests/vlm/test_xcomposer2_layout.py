"""Are the tokens of `hd` XComposer2-4KHD's, in order, in number and from its published weights?"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from connectors.checkpoint_keys import from_published, to_published
from connectors.pixel_shuffle import pixel_shuffle
from vlm.errors import UserError
from vlm.row_ends import published_row_ends
from vlm.tiling import HdTiling
from vlm.token_layout import lay_out, num_image_tokens

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
VALUES, GRADIENTS = {"rtol": 0, "atol": 2e-5}, {"rtol": 0, "atol": 1e-4}
CHAIN = [{"type": "pixel_shuffle", "projection": "plain_mlp"}, {"type": "partial_lora", "rank": 2}]
HD = {"type": "hd", "max_tiles": 3}


def test_order_and_number_of_the_reference() -> None:
    tensors = load_file(GOLDEN / "ixc2_4khd_merge.safetensors")
    patches = tensors["image_patch_values"]  # (1, 3, 80, 40), of 14 pixels each
    image = patches.repeat_interleave(14, 2).repeat_interleave(14, 3)
    # Its fake encoder: the mean of each patch, of the first two colours.
    whole = F.avg_pool2d(F.interpolate(image, (560, 560), mode="bicubic")[:, :2], 14)
    features = torch.cat([whole, *patches[:, :2].split(40, dim=2)]).permute(0, 2, 3, 1)
    ends = published_row_ends(tensors)
    laid = lay_out(
        pixel_shuffle(features, 2).flatten(1, 2),
        *((560, 1120), HdTiling(max_tiles=2), 560, (20, 20)),
        newline=ends["image_newline"],
        separator=ends["image_separator"],
    )
    assert len(laid) == tensors["output_len"].item()
    torch.testing.assert_close(laid[None], tensors["output"], **VALUES)


@pytest.fixture
def parts(make_model, make_image):
    """Model, batch of two images, and published weights for its projection and row ends."""
    model, processor = make_model(connector=CHAIN, tiling=HD)
    images = [make_image(90, 30, 1), make_image(30, 60, 2)]
    batch = processor.image_processor(images)
    projection = model.model.connector.parts[0]
    torch.manual_seed(3)
    published = {
        key: 0.5 * torch.randn_like(projection.state_dict()[own])
        for key, own in projection.published_keys()["xcomposer2"].items()
    }
    width = projection.row_end_dim
    published |= {"plora_sub_GN": torch.randn(1, 1, 1, width)}
    published |= {"plora_glb_GN": torch.randn(1, 1, width)}
    return model.model, batch, published


def test_row_ends_are_learned_before_the_projection(parts) -> None:
    model, batch, published = parts
    projection = model.connector.parts[0]
    projection.load_state_dict(from_published(projection, published))
    model.load_state_dict(published_row_ends(published), strict=False)
    features = model.get_image_features(**batch)
    counts = [len(one) for one in features]
    assert counts == model.count_image_tokens(batch["tile_grids"], batch["image_sizes"])
    parameters = [model.image_newline, model.image_separator, *projection.parameters()]
    cotangent = torch.randn(sum(counts), features[0].shape[1])
    found = torch.autograd.grad((torch.cat(features) * cotangent).sum(), parameters)

    (maps,) = model.vision_tower(batch["pixel_values"])
    merged = pixel_shuffle(maps, 2).flatten(1, 2)
    numbers = (model.tiling, model.vision_tower.image_size, (2, 2))
    views = merged.split([1 + rows * cols for rows, cols in batch["tile_grids"].tolist()])
    sizes = [(width, height) for height, width in batch["image_sizes"].tolist()]
    joined = torch.cat(
        [
            lay_out(v, s, *numbers, newline=parameters[0], separator=parameters[1])
            for v, s in zip(views, sizes, strict=True)
        ]
    )
    expected = projection.layers(joined)  # as the reference: all together
    torch.testing.assert_close(torch.cat(features), expected, **VALUES)
    gradients = torch.autograd.grad((expected * cotangent).sum(), parameters)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **GRADIENTS)


def test_published_weights_come_back(parts) -> None:
    model, _, published = parts
    projection = model.connector.parts[0]
    projection.load_state_dict(from_published(projection, published))
    back = to_published(projection, "xcomposer2")
    assert set(back) == {f"vision_proj.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}
    assert all(torch.equal(back[key], published[key]) for key in back)
    with pytest.raises(UserError, match="no plora_glb_GN; is it"):
        published_row_ends({"plora_sub_GN": torch.zeros(1, 1, 1, 4)})


def test_row_ends_begin_as_published_and_train(parts) -> None:
    model, _, _ = parts
    assert model.image_newline.shape == model.image_separator.shape == (4 * 24,)
    assert not model.image_newline.any() and not model.image_separator.any()
    model.train()
    model._blank_view_term(None).backward()
    assert model.image_newline.grad is not None and model.image_separator.grad is not None


def test_queries_have_their_row_ends_as_tokens(make_model, make_image) -> None:
    queries = {"type": "idefics2_perceiver", "num_queries": 4, "num_layers": 1, "num_heads": 2}
    queries |= {"num_key_heads": 1, "head_dim": 4, "projection_dim": 8}
    model, processor = make_model(connector=queries, tiling=HD)
    parts = model.model
    assert parts.image_separator.shape == (model.config.text_config.hidden_size,)
    with torch.no_grad():
        parts.image_separator.fill_(7.0)
        (tokens,) = parts.get_image_features(**processor.image_processor(make_image(90, 30)))
    (places,) = (tokens == 7.0).all(-1).nonzero(as_tuple=True)
    height, width = parts.view_token_grid()
    assert places.tolist() == [height * (width + 1)]
    assert len(tokens) == num_image_tokens((90, 30), parts.tiling, 32, (height, width))
