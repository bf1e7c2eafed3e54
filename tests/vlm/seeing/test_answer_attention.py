"""Is the attention of an answer's words the model's own, and does its map show the right place?"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from connectors.pixel_shuffle import pixel_shuffle
from vlm.errors import UserError
from vlm.seeing import answer_attention as module
from vlm.seeing.answer_attention import answer_attention
from vlm.seeing.heat_map import heat_map, map_size
from vlm.seeing.passes import LastPositions
from vlm.tiling import build_tiling
from vlm.token_layout import lay_out
from vlm.video import SampledVideo

ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
MESSAGES = [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]


@torch.no_grad()
def plain_rows(model, processor, images):
    """Return (M, H, L, L) of one plain forward, the encoded conversation and its answer's start."""
    encoded = processor.encode(MESSAGES, images, supervise=True)
    config = model.model.language_model.config
    former, config._attn_implementation = config._attn_implementation, "eager"
    batch = processor.collate([encoded], padding_side="left")
    del batch["labels"]
    weights = model(**batch, output_attentions=True, use_cache=False).attentions
    config._attn_implementation = former
    start = int((encoded["labels"] != -100).nonzero()[0])
    return torch.cat(list(weights)), encoded, start


@pytest.mark.parametrize(
    ("kind", "step"), [("llama", 1), ("llama", 3), ("qwen2", None), ("gpt2", None), ("gpt_neox", 2)]
)
def test_rows_are_those_of_a_plain_forward(make_model, make_image, monkeypatch, kind, step):
    model, processor = make_model(kind=kind)
    images = [make_image()]
    rows, encoded, start = plain_rows(model, processor, images)
    if step is not None:  # pieces of one or three positions
        length = start + len("A cat.")
        monkeypatch.setattr(module, "RECORDED_ELEMENTS", rows[:, :, 0, 0].numel() * length * step)
    former = model.model.language_model.config._attn_implementation
    made = answer_attention(model, processor, MESSAGES, images)
    assert model.model.language_model.config._attn_implementation == former
    is_image = encoded["input_ids"] == processor.image_token_id
    wanted = rows[:, :, start - 1 : start + len("A cat.") - 1][..., is_image]
    assert made.weights.shape == wanted.shape
    half = {"rtol": 2e-3, "atol": 1e-6}  # what half precision keeps
    torch.testing.assert_close(made.weights.float(), wanted, **half)
    assert [word.text for word in made.words] == ["A", "cat."]
    chosen = made.on_image(0, [1], layer=1, head=2)
    torch.testing.assert_close(chosen, wanted[1, 2, 2:].mean(0).double(), **half)
    of_words = wanted[:, :, [0, 2, 3, 4, 5]]  # the blank belongs to no word
    whole = of_words.mean((0, 1, 2)).double()
    torch.testing.assert_close(made.on_image(0, []), whole, **half)


def test_heads_are_averaged_where_they_would_take_too_much(make_model, make_image, monkeypatch):
    model, processor = make_model()
    whole = answer_attention(model, processor, MESSAGES, [make_image()])
    monkeypatch.setattr(module, "KEPT_ELEMENTS", 1)
    made = answer_attention(model, processor, MESSAGES, [make_image()])
    assert made.weights.shape[1] == 1
    assert torch.allclose(made.on_image(0, []), whole.on_image(0, []), atol=1e-3)


def test_the_former_attention_comes_back_after_an_error(make_model, make_image, monkeypatch):
    model, processor = make_model()
    config = model.model.language_model.config
    former = config._attn_implementation

    def fail(*args, **kwargs):
        assert config._attn_implementation == "eager"
        raise MemoryError("no more")

    monkeypatch.setattr(LastPositions, "run", fail)
    with pytest.raises(MemoryError):
        answer_attention(model, processor, MESSAGES, [make_image()])
    assert config._attn_implementation == former != "eager"


@pytest.mark.parametrize(
    "tiling",
    [
        {"type": "resize"},
        {"type": "pad"},
        {"type": "pad", "unpad": True},
        {"type": "anyres"},
        {"type": "dynamic", "max_tiles": 4},
        {"type": "hd", "max_tiles": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("connector", [{"type": "mlp"}, {"type": "pixel_shuffle", "version": "v1"}])
def test_the_map_of_an_answer_that_looks_at_a_light_peaks_there(
    make_model, monkeypatch, tiling, connector
):
    """Two images; the answer's attention is on the one token that saw most light in the second."""
    model, processor = make_model(tiling=tiling, connector=connector)
    pixels = np.zeros((64, 96, 3), dtype=np.uint8)
    x, y = 70, 20
    pixels[y - 5 : y + 5, x - 5 : x + 5] = 255
    if tiling["type"] == "hd":  # it pads with white
        pixels = 255 - pixels
    images = [Image.new("RGB", (48, 48)), Image.fromarray(pixels)]
    token = brightest_token(processor, connector, images[1], tiling["type"] == "hd")
    column = processor.image_processor.num_tokens(images[0].size, 2) + token
    messages = [{**ASKED, "content": [ASKED["content"][0], *ASKED["content"]]}, MESSAGES[1]]
    ids = processor.encode(messages, images, supervise=True)["input_ids"]
    column = int((ids == processor.image_token_id).nonzero()[column])

    def look(self, stop, begin=None, **kwargs):
        weights = torch.zeros(1, 4, stop - begin, stop)
        weights[..., column] = 1
        return SimpleNamespace(attentions=(weights, weights))

    monkeypatch.setattr(LastPositions, "run", look)
    made = answer_attention(model, processor, messages, images)
    assert float(made.on_image(0, []).sum()) == 0
    size = map_size(images[1].size, 48)
    heat = heat_map(made.on_image(1, [0]), made.places[1], images[1].size, size)
    assert float(heat.cells.sum()) == pytest.approx(1.0)
    rows, columns = (heat.cells > 0.5 * heat.cells.max()).nonzero(as_tuple=True)
    peak = (float(columns.double().mean()) + 0.5) * 2, (float(rows.double().mean()) + 0.5) * 2
    left, top, right, bottom = made.places[1].boxes[token].tolist()
    assert left <= x <= right and top <= y <= bottom, (left, top, right, bottom)
    assert left <= peak[0] <= right and top <= peak[1] <= bottom, peak


def brightest_token(processor, connector, image, darkest: bool) -> int:
    """Return which of an image's tokens saw most light, from its views' patches."""
    cutter = processor.image_processor
    tiling = build_tiling(cutter.tiling)
    views = tiling.split(image, cutter.view_size, (0, 0, 0), 2)  # padding is dark
    views = [view.convert("L").resize((4, 4), Image.Resampling.BOX) for view in views]
    light = torch.from_numpy(np.stack([np.asarray(view) for view in views])).double()[..., None]
    light = 255 - light if darkest else light
    if connector["type"] == "pixel_shuffle":
        light = pixel_shuffle(light, 2, connector["version"]).mean(-1, keepdim=True)
    end = torch.zeros(1, dtype=torch.double)
    plan = cutter.plan(image.size, 2)
    tokens = lay_out(
        light.flatten(1, 2),
        *(image.size, tiling, cutter.view_size, cutter.view_token_grid),
        newline=end,
        grid=plan.grid,
        separator=end,
    )
    return int(tokens[:, 0].argmax())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"connector": {"type": "perceiver", "num_queries": 4}}, "keep no places"),
        ({"messages": [{"role": "user", "content": "Hi"}, MESSAGES[1]], "images": 0}, "no picture"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "empty"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_a_sentence(make_model, make_image, changes, words):
    model, processor = make_model(connector=changes.get("connector"))
    images = [make_image()] * changes.get("images", 1)
    with pytest.raises(UserError, match=words):
        answer_attention(model, processor, changes.get("messages", MESSAGES), images)


def test_recurrent_language_models_have_none_and_hybrids_what_their_layers_have(
    make_with, make_image
):
    model, processor = make_with("mamba2")
    with pytest.raises(UserError, match=r"mamba2\) is recurrent"):
        answer_attention(model, processor, MESSAGES, [make_image()])
    model, processor = make_with("lfm2")
    made = answer_attention(model, processor, MESSAGES, [make_image()])
    assert len(made.weights) == 1, "one of its two layers attends"
    assert 0 < float(made.on_image(0, []).sum()) < 1


def test_a_conversation_that_must_run_whole_may_be_too_long(make_with, make_image, monkeypatch):
    model, processor = make_with("lfm2")
    monkeypatch.setattr(module, "RECORDED_ELEMENTS", 1000)
    with pytest.raises(UserError, match="GB"):
        answer_attention(model, processor, MESSAGES, [make_image()])


def test_videos_stand_between_pictures(make_model, make_image):
    model, processor = make_model()
    video = SampledVideo((make_image(40, 30, 1), make_image(40, 30, 2)), (0.0, 1.0), 2.0, 2)
    content = [{"type": "image"}, {"type": "video"}, {"type": "image"}]
    asked = {"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}
    images = [make_image(48, 40, 3), make_image(32, 32, 4)]
    made = answer_attention(model, processor, [asked, MESSAGES[1]], images, [video])
    assert [len(places.boxes) for places in made.places] == [16, 8, 16]
    assert made.places[1].frame.tolist() == [0] * 4 + [1] * 4
    assert made.sizes == ((48, 40), (40, 30), (32, 32)) and made.weights.shape[-1] == 40
    assert torch.equal(
        made.on_image(1, []), made.weights[:, :, [0, 2, 3, 4, 5], 16:24].double().mean((0, 1, 2))
    )
