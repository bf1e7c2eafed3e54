"""Are tokens, arithmetic and memory of a picture the numbers that can be worked out by hand?"""

import pytest

from eval.ablation.measure import Clip, Picture, Probe, measure
from vlm.video_layout import VideoConfig

TEXT = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
SEEN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


@pytest.fixture
def costs(make_model, make_image, tmp_path):
    def call(**choices):
        model, processor = make_model(**choices)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        probe = Probe(media=[make_image()], messages=SEEN, blind_messages=TEXT)
        pictures = {Picture((48, 40), 1): 3, Picture((96, 40), 1): 1}
        return model, measure({"a": tmp_path, "b": tmp_path}, probe, pictures, rounds=2)

    return call


def test_costs_of_a_linear_connector(costs):
    model, both = costs(connector={"type": "linear"})
    assert list(both) == ["a", "b"]
    found = both["a"]
    assert found["visual_tokens"] == 16
    assert found["parameters_connector"] == 24 * 32 + 32
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["flops_connector"] == 2 * 16 * 24 * 32
    assert found["flops_encoder"] > found["flops_connector"]
    assert found["prefill_peak_mb"] * 1e6 > 4 * found["parameters"]
    assert found["look_ms"] > 0 and found["prefill_ms_low"] <= found["prefill_ms_high"]
    assert found["in_turns"]


def test_the_language_model_pays_for_each_token_and_for_what_acts_inside(costs):
    whole = costs(connector={"type": "mlp"})[1]["a"]
    few = costs(connector={"type": "pooling", "side": 2})[1]["a"]
    inside = costs(connector=[{"type": "mlp"}, {"type": "partial_lora", "rank": 8}])[1]["a"]
    assert few["visual_tokens"] == 4
    assert few["flops_language_model"] < whole["flops_language_model"] / 3
    low_rank = (
        2 * 16 * 8 * sum((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3 for _ in range(2))
    )  # q, o; k, v; gate, up, down of two layers
    assert inside["flops_language_model"] == whole["flops_language_model"] + low_rank
    assert inside["flops_connector"] == whole["flops_connector"]


def test_tokens_are_the_mean_over_the_pictures(costs):
    _, both = costs(connector={"type": "linear"}, tiling={"type": "dynamic", "max_tiles": 4})
    assert both["a"]["visual_tokens"] not in (16, 32)


def test_a_video_costs_the_frames_that_a_model_looks_at(make_model, make_image, tmp_path):
    (tmp_path / "clip").mkdir()
    for number in range(5):
        make_image(seed=number).save(tmp_path / f"clip/{number}.png")
    model, processor = make_model()
    values = {"frames": 3, "stride": 1}
    model.model.set_video(VideoConfig(**values))
    processor.image_processor.set_video(values)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    seen = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
    probe = Probe(media=[tmp_path / "clip"], messages=seen, blind_messages=TEXT)
    clips = {Clip((0.0, 0.5, 1.0, 1.5, 2.0)): 2, Clip((0.0,)): 2}
    found = measure({"a": tmp_path / "model"}, probe, clips, rounds=2)["a"]
    assert found["visual_tokens"] == 16 * (3 + 1) / 2
    assert found["flops_encoder"] > 0 and found["look_ms"] > 0
