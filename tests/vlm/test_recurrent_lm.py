"""Do language models with a state do what the others do: batched, cached, packed, saved?"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from vlm.errors import UserError

KINDS = (
    "mamba",
    "falcon_mamba",
    "mamba2",
    "xlstm",
    "jamba",
    "zamba",
    "zamba2",
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "nemotron_h",
    "qwen3_next",
    "qwen3_5_text",
    "olmo_hybrid",
    "lfm2",
)
SOME = ("mamba", "mamba2", "xlstm", "jamba", "qwen3_next")  # one of each construction
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_language_models_own(kind, make_causal_lm, make_with) -> None:
    ids = torch.arange(3, 40).reshape(1, -1)
    expected = make_causal_lm(kind).eval()(ids).logits
    model, _ = make_with(kind)
    logits = model(input_ids=ids).logits[..., : expected.shape[-1]]  # without the new tokens
    torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_lowers_the_loss(kind, make_with, rows) -> None:
    model, processor = make_with(kind)
    batch = processor.collate(rows(processor), "right")
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss = model(**batch).loss
    loss.backward()
    for part in (model.model.language_model, model.model.connector, model.lm_head):
        assert all(p.grad is not None for p in part.parameters())
    optimizer.step()
    assert model(**batch).loss < loss - 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_same_cached_and_not_in_a_batch_and_alone(kind, make_with, rows) -> None:
    model, processor = make_with(kind)
    asked = rows(processor, supervise=False)  # one image, none, two images: three lengths
    batch = processor.collate(asked, "left")
    assert (batch["attention_mask"] == 0).any()
    together = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    for row, reply in zip(asked, together, strict=True):
        alone = processor.collate([row], "left")
        cached = model.generate(**alone, **GREEDY)[0, len(row["input_ids"]) :]
        assert torch.equal(reply[: len(cached)], cached)
        full_passes = model.generate(**alone, **GREEDY, use_cache=False)
        assert torch.equal(full_passes[0, len(row["input_ids"]) :], cached)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_changes_no_logits(kind, make_with, rows) -> None:
    model, processor = make_with(kind)
    asked = rows(processor, supervise=False)
    alone = [model(**processor.collate([row], "left")).logits[0] for row in asked]
    for side in ("left", "right"):
        batch = processor.collate(asked, side)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=positions).logits
        for row, mask, expected in zip(logits, batch["attention_mask"].bool(), alone, strict=True):
            torch.testing.assert_close(row[mask], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_several_tokens_after_a_cache_equal_a_full_pass(kind, make_with) -> None:
    # transformers' own Mamba-1 starts from an empty state here and says nothing.
    model, _ = make_with(kind)
    ids = torch.randint(3, 250, (2, 24))
    logits, cache = [], None
    for start, end in ((0, 10), (10, 17), (17, 18), (18, 24)):
        output = model(
            input_ids=ids[:, start:end],
            position_ids=torch.arange(start, end)[None],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits.append(output.logits)
        assert cache.get_seq_length() == end
    expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", SOME)
def test_beams_and_several_replies_keep_their_images_and_states(kind, make_with, rows) -> None:
    model, processor = make_with(kind)
    asked = rows(processor, supervise=False)
    batch = processor.collate(asked, "left")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    together = model.generate(**batch, **options, num_return_sequences=2)
    full_passes = model.generate(**batch, **options, num_return_sequences=2, use_cache=False)
    assert torch.equal(together, full_passes)
    start = batch["input_ids"].shape[1]
    for i, row in enumerate(asked):
        alone = model.generate(**processor.collate([row], "left"), **options)
        alone = alone[0, len(row["input_ids"]) :]
        assert torch.equal(together[2 * i, start:][: len(alone)], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_do_not_see_each_other(kind, make_with, rows) -> None:
    model, processor = make_with(kind)
    separate = rows(processor)
    packed = {
        key: torch.cat([row[key] for row in separate if key in row])
        for key in ("pixel_values", "tile_grids", "image_sizes")
    }
    packed["input_ids"] = torch.cat([row["input_ids"] for row in separate])[None]
    labels = torch.cat([row["labels"] for row in separate])[None]
    positions = [torch.arange(len(row["input_ids"])) for row in separate]
    packed["position_ids"] = torch.cat(positions)[None]
    asked = [{k: v for k, v in row.items() if k != "labels"} for row in separate]
    alone = [model(**processor.collate([row], "right")).logits[0] for row in asked]
    for mask in (None, torch.ones_like(packed["input_ids"])):
        logits = model(**packed, attention_mask=mask).logits[0]
        torch.testing.assert_close(logits, torch.cat(alone), rtol=2e-5, atol=2e-5)
    together = model.train()(**packed, labels=labels, num_items_in_batch=1).loss
    each = sum(
        model(**processor.collate([row], "right"), num_items_in_batch=1).loss for row in separate
    )
    torch.testing.assert_close(together, each, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_models_are_equal(kind, make_with, rows, tmp_path: Path) -> None:
    model, processor = make_with(kind)
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    batch = processor.collate(rows(processor, supervise=False), "left")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(again.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))


@pytest.mark.parametrize("kind", SOME)
def test_gradient_checkpointing_changes_no_gradient(kind, make_with, rows) -> None:
    model, processor = make_with(kind)
    batch = processor.collate(rows(processor), "right")
    results = []
    for enabled in (False, True):
        if enabled:
            model.activation_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SOME)
def test_embeddings_instead_of_ids_and_the_last_logits_alone(kind, make_with, rows) -> None:
    model, processor = make_with(kind)
    batch = processor.collate(rows(processor, supervise=False), "left")
    logits = model(**batch).logits
    kept = model(**batch, logits_to_keep=1).logits
    torch.testing.assert_close(kept, logits[:, -1:], rtol=1e-5, atol=1e-5)
    ids = rows(processor, supervise=False)[1]["input_ids"][None]
    mask = torch.ones_like(ids)
    embeds = model.get_input_embeddings()(ids)
    ours = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    theirs = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours[0], theirs[0, ids.shape[1] :])


@pytest.mark.parametrize("kind", SOME)
def test_bfloat16(kind, make_with, rows) -> None:
    model, processor = make_with(kind)
    batch = processor.collate(rows(processor), "right")
    exact = model(**batch).loss
    model.to(torch.bfloat16)
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=2e-2)
    asked = processor.collate(rows(processor, supervise=False), "left")
    assert model.generate(**asked, **GREEDY).shape[1] > asked["input_ids"].shape[1]


def test_padding_that_reaches_the_state_is_refused(make_with, rows) -> None:
    # With biases, xLSTM makes something of embeddings of zero, and it takes no mask.
    model, processor = make_with("xlstm", use_bias=True)
    asked = rows(processor, supervise=False)
    with pytest.raises(UserError, match=r"xLSTMModel lets padding on the left .* one row at a"):
        model.generate(**processor.collate(asked, "left"), **GREEDY)
    model.generate(**processor.collate(asked[:1], "left"), **GREEDY)
    model.train()
    with pytest.raises(UserError, match="xLSTMModel lets padding"):
        model(**processor.collate(asked, "left"))
    assert all(module.training for module in model.model.language_model.modules())


def test_padding_after_a_token_is_refused_where_the_state_goes_on(make_with, rows) -> None:
    model, processor = make_with("mamba")
    batch = processor.collate(rows(processor, supervise=False), "right")
    model(**batch)  # no cache: what follows a row's end is read by nobody
    with pytest.raises(UserError, match=r"MambaModel .* pad the rows on the left"):
        model.generate(**batch, **GREEDY)
    ids, mask = torch.arange(3, 9)[None], torch.tensor([[1, 1, 0, 0, 1, 1]])
    with pytest.raises(UserError, match="MambaModel"):
        model(input_ids=ids, attention_mask=mask)


def test_hidden_states_of_packed_documents_are_put_back(make_with) -> None:
    model, _ = make_with("mamba")
    ids = torch.randint(3, 250, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(input_ids=ids, position_ids=positions, output_hidden_states=True).hidden_states
    alone = model(input_ids=ids[:, 4:], output_hidden_states=True).hidden_states
    assert len(packed) == len(alone) == 3
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours[:, 4:], theirs)
