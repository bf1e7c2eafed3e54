"""Does each image's instruction reach InstructBLIP's Q-Former, as in transformers' model?"""

import pytest
import torch
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, InstructBlipForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.instructblip.configuration_instructblip import (
    InstructBlipConfig,
    InstructBlipQFormerConfig,
)

from connectors.checkpoint_keys import from_published
from connectors.views import TextSource
from vlm.errors import UserError
from vlm.instructions import instructions, load_tokenizer
from vlm.loading import load_model

IMAGE = {"type": "image"}
IMAGE_INPUTS = ("pixel_values", "tile_grids", "image_sizes")
IMAGE_INPUTS += ("qformer_input_ids", "qformer_attention_mask")
QFORMER = {
    "type": "qformer",
    "instruction": True,
    "vision_norm": False,
    "num_queries": 3,
    "hidden_dim": 8,
    "num_layers": 3,
    "num_heads": 2,
    "feed_forward_dim": 12,
    "vocab_size": 64,
    "max_num_positions": 24,
    "dropout": 0.0,
}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def user(*content) -> dict:
    return {"role": "user", "content": [IMAGE if x is IMAGE else text(x) for x in content]}


@pytest.fixture
def make(make_model, bert_tokenizer_folder):
    def build(**options):
        connector = {**QFORMER, "tokenizer": str(bert_tokenizer_folder)}
        return make_model(connector=connector, **options)

    return build


REPLY = {"role": "assistant", "content": [text("A cat.")]}
CONVERSATIONS = [
    ([user(IMAGE, "What?"), REPLY, user("Sure?")], ["What?"]),
    ([user("Is ", IMAGE, "\nor", IMAGE)], ["Is or", "Is or"]),
    ([user(IMAGE, "What?"), REPLY, user(IMAGE, "And?")], ["What?", "And?"]),
    ([user(IMAGE), REPLY, user("What?")], [""]),
    ([{"role": "system", "content": [IMAGE, text("Look.")]}, user("What?")], [""]),
    ([user("Draw."), {"role": "assistant", "content": [text("Here"), IMAGE]}], ["Draw."]),
]


@pytest.mark.parametrize(("messages", "expected"), CONVERSATIONS)
def test_an_image_has_the_text_of_its_users_message(messages, expected) -> None:
    assert instructions(messages) == expected


def test_ids_are_the_tokenizers_own_and_padded_per_batch(
    make, make_image, bert_tokenizer_folder
) -> None:
    _, processor = make(tiling={"type": "anyres"})
    tokenizer = AutoTokenizer.from_pretrained(bert_tokenizer_folder)
    rows = [
        processor.encode([user(IMAGE, IMAGE, "what?")], [make_image()] * 2),
        processor.encode([user("nothing")]),
        processor.encode([user(IMAGE, "who is it?"), REPLY, user(IMAGE, "a")], [make_image()] * 2),
    ]
    batch = processor.collate(rows, "left")
    texts = ["what?", "what?", "who is it?", "a"]
    expected = tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["qformer_input_ids"], expected["input_ids"])
    assert torch.equal(batch["qformer_attention_mask"], expected["attention_mask"])
    assert batch["qformer_attention_mask"].dtype == torch.long
    assert set(batch) <= set(processor.model_input_names)
    assert "qformer_input_ids" not in processor.collate(rows[1:2], "left")


class Features(nn.Module):
    """Our vision tower in the place of transformers' own."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values, **_):
        return BaseModelOutputWithPooling(self.tower(pixel_values)[0].flatten(1, 2))


def library_model(model) -> InstructBlipForConditionalGeneration:
    """transformers' model with random weights, our vision tower and our language model."""
    qformer = InstructBlipQFormerConfig(
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=12,
        encoder_hidden_size=24,
        vocab_size=64,
        max_position_embeddings=24,
    )
    config = InstructBlipConfig(
        vision_config={"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
        qformer_config=qformer.to_dict(),
        text_config=model.config.text_config.to_dict(),
        num_query_tokens=3,
        image_token_index=model.config.image_token_id,
    )
    library = InstructBlipForConditionalGeneration(config).eval()
    for parameter in library.parameters():
        nn.init.normal_(parameter, std=0.3)
    library.vision_model = Features(model.model.vision_tower)
    library.language_model.model = model.model.language_model
    library.language_model.lm_head = model.lm_head
    return library


@torch.no_grad()
def test_the_whole_model_is_transformers_instructblip(make, make_image) -> None:
    model, processor = make()
    library = library_model(model)
    connector = model.model.connector
    state = {k: v for k, v in library.state_dict().items() if "language_model" not in k}
    connector.load_state_dict(from_published(connector, state))
    rows = [
        processor.encode([user(IMAGE, "what is this?")], [make_image(48, 40, 1)]),
        processor.encode([user(IMAGE, "why?")], [make_image(90, 30, 2)]),
    ]
    batch = processor.collate(rows, "left")
    names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
    theirs = library.get_image_features(**{name: batch[name] for name in names}).pooler_output
    ours = model.get_image_features(**{name: batch[name] for name in IMAGE_INPUTS})
    torch.testing.assert_close(torch.stack(ours), theirs, rtol=0, atol=2e-5)
    assert theirs.std() > 0.1
    own = {k: batch[k] for k in batch if k not in ("tile_grids", "image_sizes")}
    expected = library(**own).logits
    logits = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=2e-5)


@torch.no_grad()
def test_what_is_asked_changes_its_own_images_and_no_other(make, make_image) -> None:
    model, processor = make(tiling={"type": "anyres"})
    images = [make_image(48, 40, 1), make_image(90, 30, 2)]

    def features(first, second):
        encoded = processor.encode([user(IMAGE, first), REPLY, user(IMAGE, second)], images)
        return model.get_image_features(**{name: encoded[name] for name in IMAGE_INPUTS})

    one, other = features("what?", "who is it?"), features("what?", "where?")
    torch.testing.assert_close(one[0], other[0])
    assert (one[1] - other[1]).abs().max() > 1e-4


def test_beams_keep_what_is_asked_of_each_image(make, make_image) -> None:
    model, processor = make()
    images = [make_image(48, 40, 1), make_image(90, 30, 2)]
    encoded = processor.encode([user(IMAGE, "what?"), REPLY, user(IMAGE, "who is it?")], images)
    batch = processor.collate([encoded], "left")
    ids, kwargs = model._expand_inputs_for_generation(2, **batch)
    expected = model.get_image_features(**{k: batch[k] for k in batch if k in IMAGE_INPUTS})
    repeated = model.get_image_features(**{k: kwargs[k] for k in kwargs if k in IMAGE_INPUTS})
    assert len(ids) == 2 and len(repeated) == 4
    torch.testing.assert_close(torch.stack(repeated), torch.stack(expected * 2))


def test_saved_and_loaded_as_transformers_does(make, make_image, tmp_path) -> None:
    model, processor = make()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "qformer_tokenizer" / "tokenizer.json").is_file()
    conversation = [user(IMAGE, "what?")]
    batch = processor.encode(conversation, [make_image()])
    for again in (AutoProcessor.from_pretrained(tmp_path), load_model(tmp_path, device="cpu")[1]):
        encoded = again.encode(conversation, [make_image()])
        assert encoded.keys() == batch.keys()
        assert all(torch.equal(encoded[k], batch[k]) for k in batch)
        assert again.instruction_tokenizer.model_max_length == 24


def test_transformers_own_interface_wants_the_instructions(make, make_image) -> None:
    _, processor = make()
    conversation = [user(IMAGE, "what?")]
    ours = processor.encode(conversation, [make_image()], add_generation_prompt=True)
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    options = {"images": [make_image()], "text": prompt, "return_tensors": "pt"}
    theirs = processor(**options, instructions=["what?"])
    for key, value in ours.items():
        assert torch.equal(theirs[key] if value.ndim > 1 else theirs[key][0], value), key
    with pytest.raises(UserError, match="1 images, but 0 instructions"):
        processor(**options)


def test_instructions_where_none_are_read(make_model, make_image) -> None:
    model, processor = make_model()
    with pytest.raises(UserError, match="reads no instructions"):
        processor(images=[make_image()], text="<image>", instructions=["what?"])
    batch = processor.collate([processor.encode([user(IMAGE, "what?")], [make_image()])], "left")
    with pytest.raises(ValueError, match="reads no text"):
        model(**batch, qformer_input_ids=torch.zeros(1, 2, dtype=torch.long))


def test_images_without_their_instructions_are_refused(make, make_image) -> None:
    model, processor = make()
    batch = processor.collate([processor.encode([user(IMAGE, "what?")], [make_image()])], "left")
    ids, mask = batch.pop("qformer_input_ids"), batch.pop("qformer_attention_mask")
    with pytest.raises(UserError, match="needs a text for each view"):
        model(**batch)
    with pytest.raises(ValueError, match="has 2 rows for 1 images"):
        model(**batch, qformer_input_ids=ids.repeat(2, 1), qformer_attention_mask=mask)


def test_a_long_instruction_is_refused_with_numbers(make, make_image) -> None:
    _, processor = make()
    with pytest.raises(UserError, match="takes 25 tokens of the Q-Former's tokenizer, more than"):
        processor.encode([user(IMAGE, "a" * 23)], [make_image()])
    processor.encode([user(IMAGE, "a" * 22)], [make_image()])


def test_tokenizers_that_do_not_fit_are_named(make_model, bert_tokenizer_folder, tmp_path) -> None:
    with pytest.raises(UserError, match="does not name; set tokenizer in the connector"):
        make_model(connector=QFORMER)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(TextSource(str(tmp_path / "nowhere"), 64, 24))
    with pytest.raises(UserError, match="has 61 tokens, but the connector knows 60"):
        load_tokenizer(TextSource(str(bert_tokenizer_folder), 60, 24))
