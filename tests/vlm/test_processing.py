"""Do conversations become the right ids, labels and views, by every template?"""

import time

import pytest
import torch
from transformers import AutoProcessor

from vlm.chat_templates import CHAT_TEMPLATES, load
from vlm.errors import UserError
from vlm.processing import IGNORE

IMAGE = {"type": "image"}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def turns(*values, system: str | None = None) -> list[dict]:
    """user, assistant, user, ... messages; a list is a content, a string its text."""
    messages = [] if system is None else [{"role": "system", "content": [text(system)]}]
    for i, value in enumerate(values):
        content = [text(value)] if isinstance(value, str) else value
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return messages


def learnt(processor, encoded) -> str:
    return processor.tokenizer.decode(encoded["labels"][encoded["labels"] != IGNORE])


def prompt(processor, encoded) -> str:
    """The text with one token left of each run of image tokens."""
    ids, image = encoded["input_ids"], processor.image_token_id
    keep = [i for i, t in enumerate(ids) if t != image or i == 0 or ids[i - 1] != image]
    return processor.tokenizer.decode(ids[keep])


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
# For system "Be brief.", two rounds with an image in the first: the text, and what is learnt.
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n",
        "A cat.<|im_end|>Yes.<|im_end|>",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
        "A cat.<|eot_id|>Yes.<|eot_id|>",
    ),
    "vicuna_v1": (
        "<s>Be brief. USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>",
        " A cat.</s> Yes.</s>",
    ),
    "llava_plain": ("<s><image>A cat.</s>Yes.</s>", "A cat.</s>Yes.</s>"),
}
OPENINGS = {
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "vicuna_v1": " ASSISTANT:",
    "llava_plain": "<image>",
}


@pytest.fixture(scope="module")
def processors(make_model) -> dict:
    return {name: make_model(chat_template=name)[1] for name in CHAT_TEMPLATES}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_templates(name, processors, make_image) -> None:
    processor = processors[name]
    messages = turns([IMAGE, text("What?")], "A cat.", "Sure?", "Yes.", system="Be brief.")
    encoded = processor.encode(messages, [make_image()], supervise=True)
    assert prompt(processor, encoded) == EXPECTED[name][0]
    assert learnt(processor, encoded) == EXPECTED[name][1]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_opening_is_what_training_saw_before_the_reply(name, processors, make_image) -> None:
    processor = processors[name]
    messages = turns([IMAGE, text("What?")], "A cat.")
    asked = processor.encode(messages[:1], [make_image()], add_generation_prompt=True)
    assert prompt(processor, asked).endswith(OPENINGS[name])
    whole = processor.encode(messages, [make_image()], supervise=True)
    first = int((whole["labels"] != IGNORE).nonzero()[0])
    assert torch.equal(whole["input_ids"][:first], asked["input_ids"])


def test_vicuna_has_its_own_system_message_only_without_one(processors) -> None:
    ids = processors["vicuna_v1"].encode(turns("Hi", "Yo"))["input_ids"]
    assert processors["vicuna_v1"].tokenizer.decode(ids).startswith(f"<s>{SYSTEM} USER: Hi")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_newline_of_the_data_is_not_doubled(name, processors, make_image) -> None:
    contents = [[IMAGE, text("What?")], [IMAGE, text("\nWhat?")]]
    encoded = [processors[name].encode(turns(c, "A."), [make_image()]) for c in contents]
    assert torch.equal(encoded[0]["input_ids"], encoded[1]["input_ids"])


def test_several_leading_images_and_images_inside_a_sentence(processors, make_image) -> None:
    processor, images = processors["chatml"], [make_image(seed=1), make_image(seed=2)]
    leading = processor.encode(turns([IMAGE, IMAGE, text("Same?")], "No."), images)
    assert "<image>\n<image>\nSame?" in prompt(processor, leading)
    written = turns([IMAGE, text("\n"), IMAGE, text("\nSame?")], "No.")
    assert torch.equal(processor.encode(written, images)["input_ids"], leading["input_ids"])
    inside = processor.encode(turns([text("Is "), IMAGE, text(" or "), IMAGE, text("?")]), images)
    assert "Is <image> or <image>?" in prompt(processor, inside)


def test_images_are_expanded_by_the_one_count_and_never_learnt(make_model, make_image) -> None:
    _, processor = make_model(tiling={"type": "anyres"})
    images = [make_image(64, 32), make_image(90, 90)]
    messages = turns([IMAGE, IMAGE, text("Which?")], [text("See "), text("left.")])
    encoded = processor.encode(messages, images, supervise=True)
    is_image = encoded["input_ids"] == processor.image_token_id
    counts = [processor.image_processor.num_tokens(image.size, 2) for image in images]
    assert is_image.sum() == sum(counts) and counts[0] == 16 + 4 * 9
    assert (encoded["labels"][is_image] == IGNORE).all()
    assert learnt(processor, encoded) == "See left.<|im_end|>"
    plans = [processor.image_processor.plan(image.size, 2) for image in images]
    assert encoded["tile_grids"].tolist() == [list(plan.grid) for plan in plans]
    assert encoded["image_sizes"].tolist() == [[32, 64], [90, 90]]
    assert len(encoded["pixel_values"]) == sum(plan.num_views for plan in plans)


def test_an_image_the_assistant_shows_is_not_learnt(processors, make_image) -> None:
    messages = turns("Show.", [text("Here: "), IMAGE])
    encoded = processors["chatml"].encode(messages, [make_image()], supervise=True)
    assert learnt(processors["chatml"], encoded) == "Here: <|im_end|>"


def test_pixel_values_are_normalised(processors, make_image) -> None:
    image = make_image(32, 32)
    pixels = processors["chatml"].encode(turns([IMAGE]), [image])["pixel_values"]
    raw = torch.tensor(list(image.getdata())).view(32, 32, 3) / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.3, 0.25, 0.2])
    torch.testing.assert_close(pixels[0], ((raw - mean) / std).permute(2, 0, 1))


def test_text_of_any_script_keeps_its_labels(processors) -> None:
    reply = "Grüße, 猫! 🐈‍⬛\n\n  x"
    encoded = processors["chatml"].encode(turns("¿Qué?", reply), supervise=True)
    assert learnt(processors["chatml"], encoded) == reply + "<|im_end|>"


def test_merging_tokenizers_keep_labels(make_model) -> None:
    # A tokenizer whose merges could join what the user and the assistant say.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from vlm.processing import VlmProcessor

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(["ASSISTANT: A cat. USER: What is it? the cat sat"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", bos_token="<s>")
    processor = VlmProcessor.prepare(tokenizer, make_model()[1].image_processor, "vicuna_v1")
    encoded = processor.encode(turns("What is it?", "A cat."), supervise=True)
    assert learnt(processor, encoded) == " A cat.</s>"


def test_a_language_models_own_text_template_gets_placeholders(make_tokenizer, make_model) -> None:
    from vlm.processing import VlmProcessor

    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    processor = VlmProcessor.prepare(tokenizer, make_model()[1].image_processor)
    encoded = processor.encode(turns([IMAGE, text("What?")], "A cat."), [_image()], supervise=True)
    assert prompt(processor, encoded) == "[user] <image>\nWhat?[assistant] A cat.</s>"
    assert learnt(processor, encoded) == "A cat.</s>"


def _image():
    from PIL import Image

    return Image.new("RGB", (32, 32))


def test_a_template_without_marks_can_answer_but_not_teach(make_tokenizer, make_model) -> None:
    from vlm.processing import VlmProcessor

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    processor = VlmProcessor.prepare(tokenizer, make_model()[1].image_processor)
    assert len(processor.encode(turns("Hi", "Yo"))["input_ids"]) == 4
    with pytest.raises(UserError, match="generation"):
        processor.encode(turns("Hi", "Yo"), supervise=True)


@pytest.mark.parametrize(
    "messages, num_images, words",
    [
        ([], 0, "empty"),
        ([{"role": "robot", "content": "x"}], 0, "'robot'"),
        ([{"content": "x"}], 0, "None"),
        ([{"role": "user", "content": None}], 0, "needs a content"),
        ([{"role": "user", "content": [{"type": "video"}]}], 0, "video"),
        ([{"role": "user", "content": [{"type": "text"}]}], 0, "type"),
        (turns([IMAGE, text("x")], "y"), 0, "1 image placeholders but 0 images"),
        (turns("x", "y"), 1, "0 image placeholders but 1 images"),
        (turns([IMAGE, text("x")], "y"), 2, "1 image placeholders but 2 images"),
        (turns("what does <image> mean?", "y"), 0, "'<image>'"),
        (turns("x"), 0, "no assistant turn"),
    ],
)
def test_mistakes_are_named(messages, num_images, words, processors) -> None:
    with pytest.raises(UserError) as error:
        processors["chatml"].encode(messages, [_image()] * num_images, supervise=True)
    assert words in str(error.value)


def test_too_long_is_an_error_with_numbers_never_a_cut(processors) -> None:
    messages = turns([IMAGE, text("x")], "y")
    length = len(processors["chatml"].encode(messages, [_image()])["input_ids"])
    assert processors["chatml"].encode(messages, [_image()], max_length=length)
    with pytest.raises(UserError, match=rf"takes {length} tokens \(16 .* more than {length - 1},"):
        processors["chatml"].encode(messages, [_image()], max_length=length - 1)


@pytest.mark.parametrize("tiling", [{"type": "resize"}, {"type": "anyres"}, {"type": "dynamic"}])
def test_sizes_give_all_but_the_pixels(tiling, make_model, make_image) -> None:
    _, processor = make_model(tiling=tiling)
    messages = turns([IMAGE, IMAGE, text("What?")], "A cat.")
    images = [make_image(90, 30), make_image(30, 70)]
    expected = processor.encode(messages, images, supervise=True)
    found = processor.encode(messages, shown=[image.size for image in images], supervise=True)
    del expected["pixel_values"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_and_joins(side, processors) -> None:
    processor = processors["chatml"]
    rows = [
        processor.encode(turns("A longer question?", "y"), supervise=True),
        processor.encode(turns([IMAGE], "y"), [_image()], supervise=True),
        processor.encode(turns([IMAGE, IMAGE], "y"), [_image()] * 2, supervise=True),
    ]
    batch = processor.collate(rows, side)
    longest = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, longest)
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["tile_grids"].shape == batch["image_sizes"].shape == (3, 2)
    for i, row in enumerate(rows):
        real = batch["attention_mask"][i].bool()
        assert torch.equal(batch["input_ids"][i][real], row["input_ids"])
        assert torch.equal(batch["labels"][i][real], row["labels"])
        assert (batch["labels"][i][~real] == IGNORE).all()
        assert bool(real[0]) == (side == "right" or len(row["input_ids"]) == longest)
    assert "pixel_values" not in processor.collate(rows[:1], side)


def test_saved_and_loaded_processors_agree(make_model, make_image, tmp_path) -> None:
    tiling = {"type": "anyres", "grids": "(1x1),...,(2x2)", "max_tiles": 3}
    _, processor = make_model(tiling=tiling)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    messages = turns([IMAGE, text("What?")], "A cat.")
    one = processor.encode(messages, [make_image(90, 40)], supervise=True)
    two = again.encode(messages, [make_image(90, 40)], supervise=True)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_transformers_own_interface_agrees(make_model, make_image) -> None:
    _, processor = make_model(tiling={"type": "dynamic", "max_tiles": 6})
    messages = turns([IMAGE, IMAGE, text("Which?")])
    images = [make_image(90, 40), make_image(40, 40)]
    ours = processor.encode(messages, images, add_generation_prompt=True)
    prompt_text = processor.apply_chat_template(messages, add_generation_prompt=True)
    theirs = processor(images=images, text=prompt_text, return_tensors="pt")
    for key, value in ours.items():
        assert torch.equal(theirs[key] if value.ndim > 1 else theirs[key][0], value), key
    with pytest.raises(UserError, match="2 image tokens, but 1 images"):
        processor(images=images[:1], text=prompt_text)


def test_transformers_batches_of_conversations(make_model, make_image) -> None:
    _, processor = make_model()
    texts = ["<image> a", "b", "<image><image> c"]
    batch = processor(
        images=[[make_image(seed=1)], [], [make_image(seed=2), make_image(seed=3)]],
        text=texts,
        padding=True,
        return_tensors="pt",
    )
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [16, 0, 32]
    assert len(batch["pixel_values"]) == 3


def test_tokenizers_that_cannot_do_it_are_refused(make_tokenizer, make_model) -> None:
    from vlm.processing import VlmProcessor

    images = make_model()[1].image_processor
    with pytest.raises(UserError, match="chat_template"):
        VlmProcessor.prepare(make_tokenizer(), images)
    with pytest.raises(UserError, match="did you mean 'chatml'"):
        VlmProcessor.prepare(make_tokenizer(), images, "chatlm")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos"):
        VlmProcessor.prepare(tokenizer, images, "chatml")


def test_a_known_special_token_is_not_added_twice(make_model) -> None:
    from vlm.processing import VlmProcessor

    _, processor = make_model()
    before = len(processor.tokenizer)
    again = VlmProcessor.prepare(processor.tokenizer, processor.image_processor, "chatml")
    assert len(again.tokenizer) == before
    assert load("chatml") == again.chat_template


def test_a_record_takes_about_a_millisecond(processors) -> None:
    messages = turns([IMAGE, text("What is in the picture? " * 4)], "A cat on a mat. " * 8)
    image = _image()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        processors["chatml"].encode(messages, [image], supervise=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01  # ten times what it takes, for a loaded machine
