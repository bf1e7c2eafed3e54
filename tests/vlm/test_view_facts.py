"""Is the connector told, of each view of each image, what it reads and nothing else?"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from connectors import build_connector
from connectors.checkpoint_keys import from_published
from connectors.views import TextInput, Views
from vlm.tiling import AnyresTiling, PadTiling, ResizeTiling
from vlm.token_layout import lay_out
from vlm.view_facts import describe_views, of_a_blank

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"

GRIDS, SIZES = torch.tensor([[1, 2], [2, 1]]), torch.tensor([[10, 40], [40, 10]])  # height, width
TEXT = TextInput(torch.tensor([[5, 6], [7, 0]]), torch.tensor([[True, True], [True, False]]))


def describe(reads, tiling, grids=GRIDS, text=None):
    return describe_views(reads, tiling, grids, SIZES, [(4, 4), (8, 8)], text)


def test_nothing_that_is_not_read() -> None:
    assert describe((), PadTiling()) == Views()
    assert describe({"padding"}, ResizeTiling()) == Views()


def test_each_view_has_its_images_text() -> None:
    text = describe({"text"}, AnyresTiling(), text=TEXT).text
    assert text.ids.tolist() == [[5, 6]] * 3 + [[7, 0]] * 3
    assert text.mask.tolist() == [[True, True]] * 3 + [[True, False]] * 3


def test_each_map_has_the_padding_of_its_own_grid() -> None:
    small, large = describe({"padding"}, PadTiling(), torch.ones(2, 2, dtype=torch.long)).shown
    # A quarter of four rows is one; what is left over is even, so two stay.
    assert small[0].any(-1).tolist() == [False, True, True, False] and small[0, 1].all()
    assert small[1].any(-2).tolist() == [False, True, True, False]
    assert large[0].any(-1).tolist() == [False] * 3 + [True] * 2 + [False] * 3
    assert torch.equal(large[1], large[0].T)
    (whole, left, _, other, _, low), _ = describe({"padding"}, AnyresTiling()).shown
    assert whole.all() and other.all()
    assert left.any(-1).tolist() == [False, True, True, False] and left[1].all()
    assert low.any(-2).tolist() == [False, True, True, False]


def test_a_blank_has_a_text_where_one_is_read() -> None:
    assert of_a_blank((), torch.device("cpu")) == Views()
    text = of_a_blank({"text"}, torch.device("cpu")).text
    assert text.ids.shape == (1, 1) and text.mask.all()


@pytest.mark.parametrize("image", [0, 1])
def test_image_sizes_give_cambrians_sequence(image) -> None:
    """From two images' sizes to embeddings: masks, tokens without padding, newlines."""
    tensors = load_file(GOLDEN / "sva_connector_e2e.safetensors")
    config = {"windows": [1, 2], "query_strides": [1, 2], "depth": 1, "hidden_dim": 32}
    connector = build_connector({"type": "sva", **config}, [12, 20], 48)
    state = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    connector.load_state_dict(from_published(connector, state))
    maps = [tensors[f"tower_features_{i}"].unflatten(1, (4 * 2**i, 4 * 2**i)) for i in (0, 1)]
    tiling, grids = PadTiling(unpad=True), torch.ones(2, 2, dtype=torch.long)
    sizes = torch.tensor([[50, 100], [60, 60]])
    views = describe_views(connector.reads, tiling, grids, sizes, [(4, 4), (8, 8)], None)
    tokens = connector(maps, views)[image]
    height, width = sizes[image].tolist()
    newline = state["model.image_newline"]
    laid = lay_out(tokens[None], (width, height), tiling, 56, (4, 4), newline)
    start = tensors["input_ids"][image].tolist().index(-200)
    expected = tensors["inputs_embeds"][image, start : start + len(laid)]
    assert len(laid) == (10, 20)[image]
    torch.testing.assert_close(laid, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("connector", "tiling", "needed"),
    [
        ({"type": "mlp"}, {"type": "pad"}, False),
        ({"type": "mlp"}, {"type": "pad", "unpad": True}, True),
        ({"type": "sva", "hidden_dim": 8, "num_heads": 2}, {"type": "pad"}, True),
        ({"type": "sva", "hidden_dim": 8, "num_heads": 2}, {"type": "resize"}, False),
    ],
)
def test_sizes_may_be_left_out_only_where_nothing_asks_for_them(
    connector, tiling, needed, make_model
) -> None:
    model, _ = make_model(connector=connector, tiling=tiling)
    if needed:
        with pytest.raises(ValueError, match="needs tile_grids and image_sizes"):
            model.model.with_default_grids(torch.zeros(1, 3, 32, 32), None, None)
    else:
        assert model.model.with_default_grids(torch.zeros(1, 3, 32, 32), None, None)[1].all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sva", "sva_in_llm"])
def test_the_model_tells_its_connector_what_pads_an_image(kind, make_model, make_image) -> None:
    connector = {"type": kind, "hidden_dim": 8, "num_heads": 2, "windows": [2]}
    if kind == "sva_in_llm":
        connector |= {"num_samplers": 1}
    model, processor = make_model(connector=connector, tiling={"type": "pad"})
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    encoded = processor.encode([{"role": "user", "content": content}], [make_image(64, 32)])
    batch = processor.collate([encoded], "left")
    padded = model(**batch)
    del batch["input_ids"], batch["attention_mask"]
    (features,) = model.get_image_features(**batch)
    assert torch.equal(features, padded.image_hidden_states)
    (whole,) = model.get_image_features(**{**batch, "image_sizes": torch.tensor([[64, 64]])})
    # Each window of 2 x 2 features has one row of padding.
    assert (whole - features).abs().amax(-1).min() > 1e-6
