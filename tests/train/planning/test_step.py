"""Does a rehearsal hold and compute what the same step does with values?"""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from train.freeze import freeze
from train.planning import rehearsal
from train.planning.rehearsal import Rehearsal
from train.planning.skeleton import hollow_model
from train.planning.step import Pack, Sample, make_batch, plan_views, rehearse
from vlm.video_layout import VideoConfig

SAMPLE = Sample(((48, 40),), 20, 9)
ALL = ("vision_tower", "connector", "language_model")
ANYRES = {"type": "anyres"}
SVA = {"type": "sva", "hidden_dim": 8, "num_heads": 2, "depth": 1, "windows": [1, 2]}
QFORMER = {
    "type": "qformer",
    "num_queries": 4,
    "hidden_dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_dim": 8,
}
INSIDE: dict[str, list[dict]] = {  # the language model
    "partial_lora": [{"type": "mlp"}, {"type": "partial_lora", "rank": 4}],
    "cogvlm": [{"type": "mlp"}, {"type": "visual_expert", "shared_positions": True}],
    "flamingo": [
        {"type": "perceiver", "num_queries": 3, "num_heads": 2, "head_dim": 4},
        {"type": "gated_cross_attention", "every": 1, "num_heads": 2, "head_dim": 4},
    ],
    "deepstack": [{"type": "pixel_shuffle"}, {"type": "deepstack", "factor": 2}],
}
LOWER = (None, torch.bfloat16)
# Forward, 3 rows of 36 tokens: 2 layers, 2 products of 36 x 36 x 32 each.
LLAMA_ATTENTION = 2 * 2 * 2 * 3 * 36 * 36 * 32


def prepare(model, trained, checkpointing=False):
    freeze(model, dict.fromkeys(trained, 1e-3))
    if checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


@pytest.fixture(autouse=True)
def _keep_values(monkeypatch):
    """Follow steps with values whatever their size."""
    monkeypatch.setattr(rehearsal, "MOST_VALUES", 2**40)


def real_peak(model, packed=False, autocast=None, rows=3):
    """Follow the storages of a step with values: (peak without gradients, with them)."""
    batch = make_batch(model, SAMPLE, rows, packed)
    known = [*model.parameters(), *model.buffers()]
    watch = Rehearsal(known)
    hooks = [
        p.register_post_accumulate_grad_hook(watch.take_gradient)
        for p in model.parameters()
        if p.requires_grad
    ]
    with watch:
        batch = make_batch(model, SAMPLE, rows, packed)
        batch["pixel_values"] = torch.rand(batch["pixel_values"].shape)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**batch, num_items_in_batch=1).loss
        loss.backward()
    for hook in hooks:
        hook.remove()
    return watch.peak_without_gradients, watch.peak


CASES = [
    pytest.param({}, ALL, False, False, id="all"),
    pytest.param({}, ("connector",), False, False, id="connector"),
    pytest.param({}, ("connector", "language_model"), True, False, id="checkpointed"),
    pytest.param({}, ALL, True, False, id="all-checkpointed"),
    pytest.param({"tiling": ANYRES}, ALL, False, False, id="anyres"),
    pytest.param({"kind": "qwen2", "tied": True}, ALL, False, False, id="tied"),
    pytest.param({"kind": "gpt2", "attn_pdrop": 0.0}, ALL, False, False, id="gpt2"),
    pytest.param({}, ALL, False, True, id="packed"),
    pytest.param({"connector": QFORMER}, ALL, False, False, id="qformer"),
    pytest.param({"two_encoders": True, "connector": SVA}, ALL, False, False, id="two-encoders"),
    *(
        pytest.param({"connector": chain}, ("connector",), False, packed, id=name)
        for (name, chain), packed in itertools.product(INSIDE.items(), (False, True))
    ),
]


@pytest.mark.parametrize(("choices", "trained", "checkpointing", "packed"), CASES)
def test_bytes_are_those_of_a_step_with_values(both, choices, trained, checkpointing, packed):
    real, hollow = both(**choices)
    peak, with_gradients = real_peak(prepare(real, trained, checkpointing), packed)
    cost = rehearse(prepare(hollow, trained, checkpointing), SAMPLE, 3, packed)
    assert cost.activations == pytest.approx(peak, rel=0.01)
    assert cost.with_gradients == pytest.approx(with_gradients, rel=0.01)


def test_large_masks_lose_their_values_and_nothing_else_changes(both, monkeypatch):
    _, hollow = both()
    prepare(hollow, ALL)
    whole = rehearse(hollow, SAMPLE, 3)
    monkeypatch.setattr(rehearsal, "MOST_VALUES", 1000)  # a mask has 3 x 36 x 36
    assert rehearse(hollow, SAMPLE, 3) == whole


@pytest.mark.parametrize("trained", [ALL, ("connector", "language_model"), ("connector",)])
def test_operations_are_those_that_torch_counts(both, trained):
    real, hollow = both()
    prepare(real, trained)
    batch = make_batch(real, SAMPLE, 3)
    batch["pixel_values"] = torch.rand(batch["pixel_values"].shape)
    with FlopCounterMode(display=False) as forward:
        loss = real(**batch, num_items_in_batch=1).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    cost = rehearse(prepare(hollow, trained), SAMPLE, 3)
    # torch 2.13 does not count the CPU's fused attention.
    assert cost.flops - cost.attention == forward.get_total_flops() + backward.get_total_flops()
    assert cost.recomputed == 0


def test_operations_of_a_llama_by_hand(both):
    _, hollow = both()
    cost = rehearse(prepare(hollow, ALL), SAMPLE, 3)
    rows, length, width, vocabulary = 3, 36, 32, 262
    supervised = rows * SAMPLE.supervised_tokens - 1  # the last row's last token is padding
    # queries 32 x 32, keys and values 32 x 16; then outputs 32 x 32 and three of 32 x 64, which in
    # the last of 2 layers see supervised tokens alone
    before, behind = 32 * 32 + 2 * 32 * 16, 32 * 32 + 3 * 32 * 64
    linears = rows * length * (2 * before + behind) + supervised * behind
    forward = 2 * linears + LLAMA_ATTENTION
    assert cost.forward["language_model"] == forward
    assert cost.backward["language_model"] == 2 * forward
    # the head's gradients are computed with its loss
    assert cost.forward["loss"] == 3 * 2 * supervised * width * vocabulary
    assert "loss" not in cost.backward
    assert (cost.rows, cost.length, cost.views) == (3, 36, 3)


def test_frozen_parts_have_no_gradients_of_weights(both):
    _, hollow = both()
    every = rehearse(prepare(hollow, ALL), SAMPLE, 3)
    frozen = rehearse(prepare(hollow, ("connector",)), SAMPLE, 3)
    assert "vision_tower" not in frozen.backward
    # of each product in two only the one that passes gradients on
    linears = every.forward["language_model"] - LLAMA_ATTENTION
    assert frozen.backward["language_model"] == linears + 2 * LLAMA_ATTENTION
    assert frozen.forward.pop("loss") == every.forward.pop("loss") * 2 / 3
    assert frozen.forward == every.forward
    assert frozen.activations < every.activations


def test_checkpoints_hold_less_and_compute_again(both):
    _, hollow = both()
    plain = rehearse(prepare(hollow, ALL), SAMPLE, 3)
    saved = rehearse(prepare(hollow, ALL, checkpointing=True), SAMPLE, 3)
    assert saved.flops == plain.flops and saved.attention == plain.attention
    assert saved.activations < plain.activations
    assert 0 < saved.recomputed < sum(plain.forward.values())


def test_twice_the_rows_twice_the_activations(both):
    _, hollow = both()
    prepare(hollow, ALL)
    few, many = (rehearse(hollow, SAMPLE, rows) for rows in (4, 8))
    head = hollow.lm_head.weight.nbytes  # its gradient is there before the backward pass
    assert many.activations - head == pytest.approx(2 * (few.activations - head), rel=0.01)
    assert many.flops == pytest.approx(2 * few.flops, rel=0.01)


def test_packed_rows_attend_within_themselves(both):
    _, hollow = both()
    prepare(hollow, ALL)
    assert rehearse(hollow, SAMPLE, 4, packed=True).length == 36
    packed, padded = rehearse(hollow, SAMPLE, 4, packed=True), rehearse(hollow, SAMPLE, 4)
    assert packed.attention == padded.attention


def test_a_gpu_takes_documents_of_all_lengths_in_one_call(both):
    documents = (SAMPLE, Sample((), 8, 3), Sample(((48, 40), (32, 32)), 9, 2))
    _, hollow = both(kind="llama", hidden_size=64)
    prepare(hollow.to(torch.bfloat16), ALL)
    each, at_once = (rehearse(hollow, Pack(documents), 2, gpu=gpu) for gpu in (False, True))
    assert at_once.length == each.length == 36 + 8 + 41
    assert (at_once.views, at_once.rows) == (2 * 3, 2)
    assert at_once.flops == each.flops and at_once.attention == each.attention
    assert at_once.activations != each.activations
    mixed = [rehearse(hollow.float(), Pack(documents), 2, autocast=t, gpu=True) for t in LOWER]
    assert mixed[0].attention == mixed[1].attention == each.attention


def test_a_gpus_dropout_keeps_bytes(both):
    sizes = []
    for gpu in (False, True):
        _, hollow = both(kind="gpt2", attn_pdrop=0.0, resid_pdrop=0.1)
        sizes.append(rehearse(prepare(hollow, ALL), SAMPLE, 3, gpu=gpu).activations)
    assert sizes[1] < sizes[0]


def test_lower_types_halve_activations(both):
    _, hollow = both()
    full = rehearse(prepare(hollow, ALL), SAMPLE, 3)
    half = rehearse(hollow.to(torch.bfloat16), SAMPLE, 3)
    assert 0.45 < half.activations / full.activations < 0.75  # norms and the loss stay float32


def test_autocast_holds_what_torchs_does(both):
    real, hollow = both(kind="llama", intermediate_size=256)
    peak, _ = real_peak(prepare(real, ALL), autocast=torch.bfloat16)
    cost = rehearse(prepare(hollow, ALL), SAMPLE, 3, autocast=torch.bfloat16)
    # The CPU's autocast has other lists than CUDA's: it leaves norms in the lower type.
    assert cost.activations == pytest.approx(peak, rel=0.1)


def test_a_samples_tokens_are_those_that_the_model_counts(both):
    _, hollow = both(tiling=ANYRES)
    grids, tokens, views = plan_views(hollow, Sample(((64, 32), (32, 32)), 0, 0))
    assert (grids[0], views) == ((1, 2), 6)
    assert tokens == sum(
        hollow.model.count_image_tokens(torch.tensor(grids), torch.tensor([[32, 64], [32, 32]]))
    )


@pytest.mark.parametrize("newline", ["no_token", "grid"])
def test_frames_are_views_and_their_tokens_are_pooled(newline, both):
    video = {"frames": 8, "stride": 2, "newline": newline}
    real, _ = both(tiling=ANYRES)
    real.model.set_video(VideoConfig(**video))
    real.config.video = video
    hollow = hollow_model(real.config)
    shown = Sample(((64, 32),), 20, 9, frames=(3, 5))
    grids, tokens, views = plan_views(hollow, shown)
    assert (grids, views) == ([(1, 2), (0, 3), (0, 5)], 3 + 3 + 5)
    sizes = torch.tensor([[32, 64], [1, 1], [1, 1]])
    assert tokens == sum(real.model.count_image_tokens(torch.tensor(grids), sizes))
    lone = rehearse(prepare(hollow, ALL), Sample(((64, 32),), 20, 9), 2)
    cost = rehearse(hollow, shown, 2)
    assert (cost.views, cost.length) == (2 * views, tokens + 20)
    # the encoder's operations grow with the views alone
    assert cost.forward["vision_tower"] * 3 == lone.forward["vision_tower"] * views
    packed = rehearse(hollow, Pack((shown, Sample((), 8, 3))), 1)
    assert (packed.views, packed.length) == (views, tokens + 28)
