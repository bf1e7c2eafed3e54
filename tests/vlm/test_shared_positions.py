"""Do an image's tokens share one position in every use of the model, and nobody else's?"""

import pytest
import torch

from vlm.errors import UserError

IMAGE = {"type": "image"}
GLU = {"type": "cogvlm_glu", "inner_dim": 12}
COGVLM = [GLU, {"type": "visual_expert", "shared_positions": True}]


def ask(processor, images, question, **options):
    content = [IMAGE] * len(images) + [{"type": "text", "text": question}]
    return processor.encode([{"role": "user", "content": content}], images, **options)


@pytest.fixture
def seen(monkeypatch):
    """(model) -> a list that grows by the position ids of each call of its language model."""

    def watch(model):
        calls = []

        def note(module, args, kwargs):
            calls.append(kwargs["position_ids"].clone())

        model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
        return calls

    return watch


def expected(is_image):
    """The ids of one row without padding: `boi`, then one for all patches, then `eoi`."""
    ids, position, shares = [], -1, False
    row = [False, *is_image.tolist(), False]
    for before, here, after in zip(row, row[1:], row[2:], strict=False):
        inner = before and here and after
        position += not (inner and shares)
        shares = inner
        ids.append(position)
    return ids


@torch.no_grad()
def test_positions_of_a_padded_batch_and_of_what_is_generated(make_model, make_image, seen) -> None:
    model, processor = make_model(connector=COGVLM)
    rows = [
        ask(processor, [make_image()], "What is it?"),
        ask(processor, [], "No picture?"),
    ]
    batch = processor.collate(rows, "left")
    calls = seen(model)
    model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert len(calls) == 3
    for i, row in enumerate(rows):
        whole = torch.cat([row["input_ids"] == processor.image_token_id, torch.zeros(2)]) > 0
        wanted = expected(whole)
        assert calls[0][i, -len(row["input_ids"]) :].tolist() == wanted[:-2]
        assert [call[i].item() for call in calls[1:]] == wanted[-2:]
    tokens = int((rows[0]["input_ids"] == processor.image_token_id).sum())
    assert tokens == 18 and max(expected(whole)) == len(whole) - 1  # of the text: nothing shared
    assert calls[0][0].max() == len(rows[0]["input_ids"]) - 1 - (tokens - 3)


@torch.no_grad()
def test_without_positions_they_are_counted_from_the_cache(make_model, make_image) -> None:
    model, processor = make_model(connector=COGVLM)
    row = ask(processor, [make_image()], "What?")
    batch = {k: v for k, v in processor.collate([row], "left").items() if k != "attention_mask"}
    positions = torch.arange(len(row["input_ids"]))[None]
    first = model(**batch, use_cache=True)
    given = model(**batch, position_ids=positions, use_cache=True)
    assert torch.equal(first.logits, given.logits)
    new = torch.tensor([[7]])
    step = model(input_ids=new, past_key_values=first.past_key_values).logits
    positions = positions[:, -1:] + 1
    other = model(input_ids=new, past_key_values=given.past_key_values, position_ids=positions)
    assert torch.equal(step, other.logits)
    whole = model(**{**batch, "input_ids": torch.cat([batch["input_ids"], new], 1)}).logits
    torch.testing.assert_close(step[:, -1], whole[:, -1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sharing_changes_what_follows_an_image_and_nothing_without_one(
    make_model, make_image
) -> None:
    model, processor = make_model(connector=COGVLM)
    plain, _ = make_model(connector=[GLU, {"type": "visual_expert"}])
    plain.load_state_dict(model.state_dict())
    for images, same in (([make_image()], False), ([], True)):
        batch = processor.collate([ask(processor, images, "What is it?")], "left")
        shared, own = model(**batch).logits[0, -1], plain(**batch).logits[0, -1]
        assert torch.allclose(shared, own, rtol=1e-5, atol=1e-6) == same


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_packed_documents_by_any_attention(kind, attention, make_model, make_image) -> None:
    model, processor = make_model(connector=COGVLM, kind=kind)
    if attention == "eager":
        model.set_attn_implementation("eager")
    rows = [
        ask(processor, [make_image(seed=i) for i in range(n)], "What is it?") for n in (1, 0, 2)
    ]
    alone = [model(**processor.collate([row], "right")).logits[0] for row in rows]
    packed = processor.pack([{**row, "labels": row["input_ids"]} for row in rows])
    del packed["labels"]
    logits = model(**packed).logits[0]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_flash_attention_is_refused(make_model, make_image) -> None:
    model, processor = make_model(connector=COGVLM)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    batch = processor.collate([ask(processor, [make_image()], "What?")], "left")
    with pytest.raises(UserError, match="cannot run on flash_attention_2"):
        model(**batch)
