"""Does the model compute what it should: batched, cached, packed, saved, with any LM?"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from vlm.configuration import VlmConfig
from vlm.errors import UserError
from vlm.modeling import VlmForConditionalGeneration

KINDS = [("llama", False), ("llama", True), ("qwen2", True), ("gpt_neox", False), ("gpt2", True)]
ANYRES = {"type": "anyres"}


@pytest.mark.parametrize("kind, tied", KINDS)
def test_batched_generation_equals_one_by_one(kind, tied, make_model, rows) -> None:
    model, processor = make_model(tiling=ANYRES, kind=kind, tied=tied)
    asked = rows(processor, supervise=False)
    options = {"max_new_tokens": 8, "do_sample": False}
    batch = processor.collate(asked, "left")
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, reply in zip(asked, together, strict=True):
        alone = model.generate(**processor.collate([row], "left"), **options)
        alone = alone[0, len(row["input_ids"]) :]
        assert torch.equal(reply[: len(alone)], alone)
        cacheless = model.generate(**processor.collate([row], "left"), **options, use_cache=False)
        assert torch.equal(cacheless[0, len(row["input_ids"]) :], alone)


def test_beams_and_several_replies_keep_their_images(make_model, rows) -> None:
    model, processor = make_model(tiling=ANYRES)
    asked = rows(processor, supervise=False)
    batch = processor.collate(asked, "left")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    together = model.generate(**batch, **options, num_return_sequences=2)
    start = batch["input_ids"].shape[1]
    for i, row in enumerate(asked):
        alone = model.generate(**processor.collate([row], "left"), **options)
        alone = alone[0, len(row["input_ids"]) :]
        assert torch.equal(together[2 * i, start:][: len(alone)], alone)


def test_left_and_right_padding_give_the_same_logits(make_model, rows) -> None:
    model, processor = make_model(kind="gpt2")
    asked = rows(processor, supervise=False)
    alone = [model(**processor.collate([row], "left")).logits[0] for row in asked]
    for side in ("left", "right"):
        batch = processor.collate(asked, side)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=positions).logits
        for row, mask, expected in zip(logits, batch["attention_mask"].bool(), alone, strict=True):
            torch.testing.assert_close(row[mask], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, tied", KINDS)
@pytest.mark.parametrize("attention", ["packed_sdpa", "sdpa", "eager"])
def test_packed_rows_equal_separate_ones(kind, tied, attention, make_model, rows) -> None:
    model, processor = make_model(tiling=ANYRES, kind=kind, tied=tied)
    if attention == "packed_sdpa":  # what a model that runs sdpa gets
        assert model.model.language_model.config._attn_implementation == attention
    else:
        model.set_attn_implementation(attention)
    separate = rows(processor)
    packed = {
        key: torch.cat([row[key] for row in separate if key in row])
        for key in ("pixel_values", "tile_grids", "image_sizes")
    }
    for key in ("input_ids", "labels"):
        packed[key] = torch.cat([row[key] for row in separate])[None]
    lengths = [len(row["input_ids"]) for row in separate]
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = packed.pop("labels")
    alone = [
        model(**processor.collate([{k: v for k, v in row.items() if k != "labels"}], "right"))
        for row in separate
    ]
    expected = torch.cat([output.logits[0] for output in alone])
    for mask in (None, torch.ones_like(packed["input_ids"])):
        logits = model(**packed, attention_mask=mask).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        model.train()  # the cache that training makes must not hide the documents either
        logits = model(**packed, attention_mask=mask, use_cache=True).logits[0]
        model.eval()
        if not kind.startswith("gpt"):  # their default configs have dropout
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    together = model(**packed, labels=labels, num_items_in_batch=1).loss
    each = sum(
        model(**processor.collate([row], "right"), num_items_in_batch=1).loss for row in separate
    )
    torch.testing.assert_close(together, each, rtol=1e-5, atol=1e-4)


FAMILIES = {
    "mistral": {"sliding_window": 9},
    "qwen3": {"head_dim": 8},
    "phi3": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 9},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_that_the_processor_packs_equal_separate_ones(kind, make_with, rows) -> None:
    model, processor = make_with(kind, **FAMILIES[kind])
    separate = rows(processor)
    packed = processor.pack(separate)
    del packed["labels"]
    alone = [
        model(**processor.collate([{k: v for k, v in row.items() if k != "labels"}], "right"))
        for row in separate
    ]
    expected = torch.cat([output.logits[0] for output in alone])
    torch.testing.assert_close(model(**packed).logits[0], expected, rtol=1e-5, atol=1e-5)


def test_logits_to_keep(make_model, rows) -> None:
    model, processor = make_model()
    batch = processor.collate(rows(processor, supervise=False), "left")
    logits = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=1).logits, logits[:, -1:])
    chosen = torch.tensor([3, 7])
    torch.testing.assert_close(model(**batch, logits_to_keep=chosen).logits, logits[:, chosen])


def test_inputs_embeds_equal_input_ids(make_model, rows) -> None:
    model, processor = make_model()
    ids = rows(processor, supervise=False)[1]["input_ids"][None]
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    ours = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **options)
    theirs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(ours[0], theirs[0, ids.shape[1] :])
    with pytest.raises(ValueError, match="images need input_ids"):
        model(inputs_embeds=embeds, pixel_values=torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="either"):
        model()


def test_single_views_need_no_grids(make_model, rows) -> None:
    model, processor = make_model(tiling={"type": "pad"})
    batch = processor.collate(rows(processor, supervise=False), "left")
    expected = model(**batch).logits
    del batch["tile_grids"], batch["image_sizes"]
    assert torch.equal(model(**batch).logits, expected)
    model, _ = make_model(tiling=ANYRES)
    with pytest.raises(ValueError, match="needs tile_grids"):
        model(**batch)


def test_images_reach_only_their_own_row(make_model, rows) -> None:
    model, processor = make_model()
    batch = processor.collate(rows(processor, supervise=False), "right")
    changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][0] += 1
    difference = (model(**batch).logits - model(**changed).logits).abs().amax((1, 2))
    assert difference[0] > 1e-6 and difference[1] == difference[2] == 0


def test_image_features_stand_where_the_image_tokens_are(make_model, rows) -> None:
    model, processor = make_model(tiling=ANYRES)
    batch = processor.collate(rows(processor, supervise=False), "right")
    images = {k: batch[k] for k in ("pixel_values", "tile_grids", "image_sizes")}
    features = torch.cat(model.get_image_features(**images))
    assert torch.equal(model(**batch).image_hidden_states, features)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    embeds[batch["input_ids"] == processor.image_token_id] = features
    logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(logits, model(**batch).logits)


def test_mismatches_name_numbers_and_records(make_model, rows) -> None:
    model, processor = make_model()
    batch = processor.collate(rows(processor), "right")
    images = {k: batch[k][:2] for k in ("pixel_values", "tile_grids", "image_sizes")}
    with pytest.raises(UserError, match=r"48 image tokens.*32 image features.*record c"):
        model(**{**batch, **images}, record_ids=["a", "b", "c"])
    cut = {**batch, "input_ids": batch["input_ids"].clone()}
    cut["input_ids"][0, (cut["input_ids"][0] == processor.image_token_id).nonzero()[0]] = 5
    with pytest.raises(UserError, match=r"47 image tokens.*48 image features.*record a"):
        model(**cut, record_ids=["a", "b", "c"])
    with pytest.raises(ValueError, match="mean 3 views, but pixel_values has 2"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:2]})


@pytest.mark.parametrize("kind, tied", KINDS)
def test_saved_and_loaded_models_are_equal(kind, tied, make_model, rows, tmp_path: Path) -> None:
    model, processor = make_model(tiling=ANYRES, kind=kind, tied=tied)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is VlmForConditionalGeneration
    assert type(AutoConfig.from_pretrained(tmp_path)) is VlmConfig
    batch = processor.collate(rows(processor, supervise=False), "left")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    head, embedding = again.lm_head.weight, again.get_input_embeddings().weight
    assert (head is embedding) == tied
    # Trainer resumes by loading the file as it is, so its keys must be the model's.
    in_file, in_model = set(load_file(tmp_path / "model.safetensors")), set(model.state_dict())
    assert in_file == in_model - ({"lm_head.weight"} if tied else set())


def test_tied_weights_stay_tied_while_training(make_model, rows) -> None:
    model, processor = make_model(kind="qwen2", tied=True)
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**processor.collate(rows(processor), "right")).loss.backward()
    optimizer.step()
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_vocabulary_is_enlarged_for_the_image_token(make_model) -> None:
    model, processor = make_model()
    assert processor.image_token_id >= 259  # the language model had 259 rows
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer)
    assert model.lm_head.out_features == model.config.text_config.vocab_size
    assert len(processor.tokenizer) == model.config.text_config.vocab_size


def test_a_frozen_encoder_keeps_no_graph_and_stays_in_eval_mode(make_model, rows) -> None:
    model, processor = make_model(tiling=ANYRES)
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert not model.model.vision_tower.training and model.model.connector.training
    seen, grad_modes = [], []
    hook = model.model.connector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    tower = model.model.vision_tower
    tower.register_forward_pre_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    model(**processor.collate(rows(processor), "right")).loss.backward()
    hook.remove()
    assert grad_modes == [False]
    assert not seen[0][0][0].requires_grad
    assert all(p.grad is not None for p in model.model.connector.parameters())
    model.model.vision_tower.requires_grad_(True)
    model.train()
    assert model.model.vision_tower.training


def test_pixel_gradients_pass_a_frozen_encoder(make_model, rows) -> None:
    model, processor = make_model()
    model.requires_grad_(False)
    batch = processor.collate(rows(processor), "right")
    batch["pixel_values"].requires_grad_()
    model(**batch).loss.backward()
    assert batch["pixel_values"].grad.abs().sum() > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_text_only_batches_give_gradients_to_what_trains(frozen, make_model, rows) -> None:
    # DistributedDataParallel waits for a gradient of every trained parameter.
    model, processor = make_model(tiling=ANYRES)
    model.model.vision_tower.requires_grad_(not frozen)
    model.train()
    batch = processor.collate(rows(processor)[1:2], "right")
    assert "pixel_values" not in batch
    loss = model(**batch).loss
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # SigLIP's last layers that make no features have no gradient with images either.
    model.zero_grad()
    model(**processor.collate(rows(processor), "right")).loss.backward()
    expected = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == expected
    model.eval()
    torch.testing.assert_close(model(**batch).loss, loss)


def test_text_only_batches_of_frozen_vision_do_not_run_it(make_model, rows) -> None:
    model, processor = make_model()
    model.model.vision_tower.requires_grad_(False)
    model.model.connector.requires_grad_(False)
    model.train()
    model.model.vision_tower.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    model(**processor.collate(rows(processor)[1:2], "right")).loss.backward()


def test_gradient_checkpointing_changes_no_gradient(make_model, rows) -> None:
    model, processor = make_model(tiling=ANYRES)
    batch = processor.collate(rows(processor), "right")
    results = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-5, atol=1e-6)


def test_bfloat16(make_model, rows) -> None:
    model, processor = make_model(tiling=ANYRES)
    batch = processor.collate(rows(processor), "right")
    exact = model(**batch).loss
    loss = model.to(torch.bfloat16)(**batch).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=2e-2)


def test_half_precision_survives_saving(make_model, tmp_path: Path) -> None:
    model, _ = make_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = VlmForConditionalGeneration.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
