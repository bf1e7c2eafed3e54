"""Does every connector, before or inside the language model, serve in every use of the model?"""

import copy
import gc
import os
import re
import socket
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from connectors import CONNECTORS
from vlm.video import video_of_frames
from vlm.video_layout import VideoConfig

LORA = {"type": "partial_lora", "rank": 4, "alpha": 4.0, "dropout": 0.0}
GATED = {"type": "gated_cross_attention", "every": 1, "num_heads": 2, "head_dim": 4}
PERCEIVER = {
    "type": "perceiver",
    "num_queries": 3,
    "num_layers": 1,
    "num_heads": 2,
    "head_dim": 4,
    "projection": "none",
}
HIGH_RESOLUTION = {
    "type": "high_resolution_cross_attention",
    "inner_dim": 8,
    "position_side": 4,
}
INSTRUCTBLIP = {
    "type": "qformer",
    "instruction": True,
    "num_queries": 3,
    "hidden_dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_dim": 8,
    "vocab_size": 61,
    "dropout": 0.0,
}
SVA = {
    "type": "sva_in_llm",
    "hidden_dim": 8,
    "num_heads": 2,
    "depth": 1,
    "windows": [2],
    "num_samplers": 1,
    "layer_stride": 1,
}
CHAINS = {
    "mlp": {"type": "mlp"},
    "partial_lora": [{"type": "mlp"}, LORA],
    "xcomposer2_4khd": [{"type": "pixel_shuffle", "projection": "plain_mlp"}, LORA],
    "deepstack": [{"type": "pixel_shuffle"}, {"type": "deepstack", "factor": 2}],
    "flamingo": [PERCEIVER, GATED],
    "flamingo_previous": [PERCEIVER, {**GATED, "scope": "previous", "every": 2}],
    "visual_expert": [{"type": "mlp"}, {"type": "visual_expert"}],
    "cogvlm": [
        {"type": "cogvlm_glu", "inner_dim": 12},
        {"type": "visual_expert", "shared_positions": True},
    ],
    "cogagent": [{"type": "mlp"}, HIGH_RESOLUTION],
    "sva_in_llm": SVA,
    "cambrian": {**SVA, "query_strides": [1, 2]},
    "instructblip": INSTRUCTBLIP,
    "minigemini_hd": {"type": "minigemini", "tiles": 2},
    "everything": [{"type": "mlp"}, LORA, HIGH_RESOLUTION, {"type": "deepstack"}],
}
# Those before the language model, with sizes where the published ones are too large.
QUERIES = {"num_queries": 4, "num_heads": 2}
BEFORE = {
    "cabstractor": {"hidden_dim": 8, "depth": 1},
    "channel_concat": {},
    "fuyu": {},
    "idefics2_perceiver": QUERIES
    | {"num_layers": 1, "num_key_heads": 1, "head_dim": 4, "projection_dim": 8},
    "kan": {},
    "linear": {},
    "minicpm_resampler": QUERIES,
    "minigemini": {},
    "perceiver": QUERIES | {"num_layers": 1, "head_dim": 4},
    "pixel_shuffle": {},
    "pooling": {},
    "qformer": QUERIES | {"hidden_dim": 8, "num_layers": 2, "feed_forward_dim": 8, "dropout": 0.0},
    "qwen2vl_merger": {},
    "qwen_vl": QUERIES,
    "sva": {"hidden_dim": 8, "num_heads": 2, "depth": 1, "windows": [1, 2]},
}
CHAINS |= {name: {"type": name, **sizes} for name, sizes in BEFORE.items()}
# The fields of two encoders side by side, for those that need both.
ENCODERS: dict[str, dict] = {name: {} for name in ("channel_concat", "minigemini", "sva")}
ENCODERS["minigemini_hd"] = {"tiles": [2, 1], "resize_to": [2, 8]}
TILINGS = {
    "cambrian": {"type": "pad", "unpad": True},
    "xcomposer2_4khd": {"type": "hd", "max_tiles": 3},
}
# Nothing reads what the last layer makes of image tokens, but their keys and values.
UNREAD = re.compile(r"parts\.\d\.layers\.1\.(linears\.)?(self_attn_[qo]|mlp_\w+)_proj")
ON_ZERO3 = ("flamingo", "cogvlm", "cambrian", "instructblip", "everything")
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(params=CHAINS)
def chain(request):
    return request.param


@pytest.fixture
def make(make_model, make_two_encoders, bert_tokenizer_folder):
    """(chain, **options) -> (model, processor), the connector's zeros and gates filled."""

    def build(chain, **options):
        connector = CHAINS[chain]
        if connector == INSTRUCTBLIP:
            connector = {**connector, "tokenizer": str(bert_tokenizer_folder)}
        if chain in ENCODERS:
            options["vision_encoder"] = make_two_encoders(**ENCODERS[chain])
        options = {"tiling": TILINGS.get(chain), **options}
        model, processor = make_model(connector=connector, **options)
        torch.manual_seed(3)
        for parameter in model.model.connector.parameters():
            std = 0.5 if parameter.abs().sum() == 0 else 0.05
            parameter.data += std * torch.randn_like(parameter)
        return model, processor

    return build


def without_labels(row):
    return {key: value for key, value in row.items() if key != "labels"}


def test_every_connector_has_a_row() -> None:
    chains = [chain if isinstance(chain, list) else [chain] for chain in CHAINS.values()]
    assert {part["type"] for chain in chains for part in chain} == set(CONNECTORS)


def test_cached_generation_equals_the_full_pass_in_a_padded_mixed_batch(chain, make, rows) -> None:
    model, processor = make(chain)
    asked = rows(processor, supervise=False)
    batch = processor.collate(asked, "left")
    together = model.generate(**batch, **GREEDY)
    assert torch.equal(together, model.generate(**batch, **GREEDY, use_cache=False))
    sequences = together[:, batch["input_ids"].shape[1] :]
    for row, reply in zip(asked, sequences, strict=True):
        alone = model.generate(**processor.collate([row], "left"), **GREEDY)
        assert torch.equal(
            reply[: alone.shape[1] - len(row["input_ids"])], alone[0, len(row["input_ids"]) :]
        )


@torch.no_grad()
def test_each_step_with_a_cache_has_the_logits_of_the_full_pass(chain, make, rows) -> None:
    model, processor = make(chain)
    batch = processor.collate(rows(processor, supervise=False), "left")
    mask = batch.pop("attention_mask")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(**batch, attention_mask=mask, position_ids=positions, use_cache=True)
    cache, ids = output.past_key_values, batch["input_ids"]
    for token in (7, 8, 9):
        new = torch.full_like(ids[:, :1], token)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        step = model(
            input_ids=new,
            attention_mask=mask,
            position_ids=positions[:, -1:],
            past_key_values=cache,
        )
        whole = model(**{**batch, "input_ids": ids}, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1], rtol=1e-5, atol=1e-5)


def test_beams_keep_their_images(chain, make, rows) -> None:
    model, processor = make(chain)
    asked = rows(processor, supervise=False)
    batch = processor.collate(asked, "left")
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    together = model.generate(**batch, **options)
    start = batch["input_ids"].shape[1]
    for i, row in enumerate(asked):
        alone = model.generate(**processor.collate([row], "left"), **options)
        alone = alone[0, len(row["input_ids"]) :]
        assert torch.equal(together[i, start:][: len(alone)], alone)


def test_packed_documents_do_not_see_each_other(chain, make, rows) -> None:
    model, processor = make(chain)
    separate = [without_labels(row) for row in rows(processor)]
    separate = [separate[0], separate[2], separate[1]]  # the text comes after documents with images
    packed = processor.collate(separate, "right")
    packed["input_ids"] = torch.cat([row["input_ids"] for row in separate])[None]
    lengths = [len(row["input_ids"]) for row in separate]
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = [model(**processor.collate([row], "right")).logits[0] for row in separate]
    packed["attention_mask"] = torch.ones_like(packed["input_ids"])
    logits = model(**packed).logits[0]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cogvlm", "flamingo", "cambrian", "everything"])
def test_pooled_videos_beside_images(name, make, make_image) -> None:
    """A row alone is the row in the batch, and every weight learns."""
    model, processor = make(name)
    values = {"pool": "average", "newline": "grid"}
    model.model.set_video(VideoConfig(**values))
    processor.image_processor.set_video(values)
    videos = [video_of_frames([make_image(48, 40, s) for s in seeds]) for seeds in ((1, 2), (3,))]
    kinds = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    talk = {"role": "user", "content": kinds}, {"role": "assistant", "content": "A cat."}
    options = [{"images": [make_image(90, 30)], "videos": [video]} for video in videos]
    asked = [processor.encode(talk[:1], **each, add_generation_prompt=True) for each in options]
    batch = processor.collate(asked, "left")
    with torch.no_grad():
        together = list(model(**batch).logits[:, -1])
        alone = [model(**processor.collate([row], "left")).logits[0, -1] for row in asked]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    model.train()
    learnt = [processor.encode(talk, **each, supervise=True) for each in options]
    model(**processor.collate(learnt, "right")).loss.backward()
    for name, parameter in model.model.connector.named_parameters():
        assert parameter.grad.any() or UNREAD.search(name), name


def test_training_steps_reach_every_weight_with_and_without_images(chain, make, rows) -> None:
    model, processor = make(chain, tiling=TILINGS.get(chain, {"type": "anyres"}))
    model.train()
    encoded = rows(processor)
    found = []
    for chosen in (encoded, encoded[1:2]):
        model.zero_grad()
        model(**processor.collate(chosen, "right")).loss.backward()
        found.append({n for n, p in model.named_parameters() if p.grad is not None})
        connector = model.model.connector.named_parameters()
        assert all(p.grad is not None for _, p in connector)
    assert found[0] == found[1]
    model.zero_grad()
    model(**processor.collate(encoded, "right")).loss.backward()
    for name, parameter in model.model.connector.named_parameters():
        assert parameter.grad.any() or UNREAD.search(name), name


def test_gradient_checkpointing_changes_no_gradient(chain, make, rows) -> None:
    model, processor = make(chain)
    batch = processor.collate(rows(processor), "right")
    other = processor.collate(rows(processor)[1:2], "right")
    results = []
    for enabled in (False, True):
        if enabled:
            model.activation_checkpointing_enable()
        model.train()
        model.zero_grad()
        loss = model(**batch).loss
        with torch.no_grad():
            model(**other)  # a forward between must not change what is computed again
        loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-5, atol=1e-6)


def test_peft_beside_it_trains_the_connector_and_merges(chain, make, rows) -> None:
    from peft import LoraConfig, get_peft_model

    model, processor = make(chain)
    batch = processor.collate(rows(processor), "right")
    before = model(**batch).loss
    config = LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q_proj|down_proj)",
        modules_to_save=["connector"],
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    torch.testing.assert_close(wrapped(**batch).loss, before)
    wrapped.train()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    wrapped(**batch).loss.backward()
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    optimizer.step()
    wrapped.eval()
    after = wrapped(**batch).loss
    assert not torch.allclose(after, before)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(**batch).loss, after, rtol=1e-4, atol=1e-5)


def test_saved_loaded_and_copied_models_are_equal(chain, make, rows, tmp_path: Path) -> None:
    model, processor = make(chain)
    batch = processor.collate(rows(processor, supervise=False), "left")
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, expected)
    twin = copy.deepcopy(model)
    for parameter in model.model.connector.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(**batch).logits, expected)


def step_on(engine, model, batch):
    """Return (this rank's loss, all weights after a step of plain SGD) of two ranks."""
    if engine == "ZeRO-3":
        import deepspeed  # pyright: ignore[reportMissingImports]
        from transformers.integrations import HfDeepSpeedConfig

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
        known = HfDeepSpeedConfig(config)  # the model asks for it while it is alive
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        run, *_ = deepspeed.initialize(model=model, optimizer=sgd, config=known.config)
        loss = run(**batch).loss
        run.backward(2 * loss)
        run.step()
        return loss.item(), run._zero3_consolidated_16bit_state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    for module in (*model.model.language_model.layers, model.lm_head, model):
        fully_shard(module)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    loss = model(**batch).loss
    (2 * loss).backward()
    sgd.step()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return loss.item(), get_model_state_dict(model, options=whole)


def one_of_two(rank, port, engine, cases, folder):
    """Take a step with each model, with this rank's batch, as one process of two."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    for name, (model, batches) in cases.items():
        loss, weights = step_on(engine, model, batches[rank])
        torch.save((loss, weights), folder / f"{name}.{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ZeRO-3", "FSDP2"])
def test_two_ranks_with_pieces_of_the_weights_step_as_one(engine, make, rows, tmp_path) -> None:
    """One rank's records have pictures, the other's none; one pair of ranks takes them all.

    DeepSpeed is slow to begin: those that reach into the language model, unless EVERY_CONNECTOR is
    set in the environment.
    """
    if engine == "ZeRO-3":
        deepspeed = pytest.importorskip("deepspeed")
        deepspeed.ops.__compatible_ops__ = {}  # it would compile one for minutes
    every = engine != "ZeRO-3" or "EVERY_CONNECTOR" in os.environ
    cases, expected = {}, {}
    for name in CHAINS if every else ON_ZERO3:
        model, processor = make(name)
        encoded = rows(processor)
        seen = [row for row in encoded if "pixel_values" in row]
        blind = [row for row in encoded if "pixel_values" not in row]
        batches = [processor.collate(part, "right") for part in (seen, blind)]
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        batches = [{**batch, "num_items_in_batch": count} for batch in batches]
        model.train()
        cases[name] = copy.deepcopy(model), batches
        losses = [model(**batch).loss for batch in batches]
        sum(losses).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        expected[name] = [loss.item() for loss in losses], dict(model.state_dict())
    gc.collect()
    gc.freeze()  # DeepSpeed collects often
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = port, engine, cases, tmp_path
    started = torch.multiprocessing.start_processes(
        one_of_two, given, 2, join=False, start_method="fork"
    )
    assert started is not None
    end = time.monotonic() + 500
    try:
        while not started.join(5):
            assert time.monotonic() < end, "a rank waits for the other"
    finally:
        for process in started.processes:
            process.kill()
    for name, (losses, weights) in expected.items():
        told = [torch.load(tmp_path / f"{name}.{rank}.pt") for rank in (0, 1)]
        assert [loss for loss, _ in told] == pytest.approx(losses, abs=1e-4), name
        moved = told[0][1]
        torch.testing.assert_close(
            moved, weights, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m
        )
