"""Does a Q-Former's first stage run as every stage does, and does the next one start from it?"""

import json

import pytest
import torch
from safetensors.torch import load_file

from train.callbacks import read_log
from vlm.cli import main
from vlm.image_text_model import ImageTextModel
from vlm.image_text_processing import ImageTextProcessor
from vlm.loading import load_model

QFORMER = {"type": "qformer", "num_queries": 4, "hidden_dim": 16, "num_layers": 2, "num_heads": 2}
QFORMER |= {"feed_forward_dim": 32, "max_num_positions": 20, "vocab_size": 60, "dropout": 0.0}
COLORS, THINGS = ("red", "blue", "green", "grey"), ("ball", "cube", "cone", "box", "pen", "cup")


@pytest.fixture
def captions(tmp_path, make_image):
    """24 records, each with a picture and a caption of its own."""
    rows = []
    for number in range(24):
        make_image(seed=number).save(tmp_path / f"{number}.png")
        text = f"A {COLORS[number % 4]} {THINGS[number // 4]}" + " here" * (number % 3)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text}]
        rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def two_stages(tree, captions):
    """The shared recipe with a Q-Former, whose first stage stands where `align` stood."""
    source = {"name": "main", "path": str(captions)}
    tree["model"]["connector"] = dict(QFORMER)
    first, second = tree["stages"]
    first |= {"name": "represent", "data": {"sources": [source]}}
    first["objective"] = {"type": "qformer_stage1", "shared_dim": 8}
    del first["chat_template"]
    second |= {"name": "align", "trainable": {"connector": 1e-3}}
    second["data"] = {"sources": [source]}
    return tree


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_first_stage_then_the_second(two_stages, write_recipe, tmp_path, capsys, encoder_folder):
    two_stages["stages"][0]["objective"]["held_out"] = [
        {"name": "last", "path": str(tmp_path / "captions.json"), "cap": 9, "take": "end"}
    ]
    two_stages["stages"][1]["training"]["max_steps"] = 1
    two_stages["stages"][1]["trainable"] = {"connector": 1e-12}
    recipe = str(write_recipe(two_stages))
    assert main(["train", recipe]) == 0
    told = capsys.readouterr().out
    folder, after = tmp_path / "run" / "represent", tmp_path / "run" / "align"

    # the encoder is frozen, there is no language model, and what ran is said
    assert "language_model" not in told.split("stage represent: done")[0]
    assert "connector             0.0" in told and "the captions' own words" in told
    encoder = load_file(encoder_folder / "model.safetensors")
    first = weights(folder)
    tower = {k.removeprefix("vision_tower."): v for k, v in first.items() if "vision_tower" in k}
    assert all(torch.equal(tower[key], value) for key, value in encoder.items() if key in tower)
    assert len(tower) > 10

    # the log tells the losses and figures apart
    log = read_log(folder / "training_log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 7))
    names = ("contrastive", "matching", "caption")
    for line in log:
        summed = sum(line[f"loss/{name}"] for name in names)
        assert line["loss"] == pytest.approx(summed, rel=1e-5)
        assert 0 <= line["matching_accuracy"] <= 1
        assert line["recall/chance"] == pytest.approx(0.25)
        assert line["supervised_tokens_per_second"] > 0
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["records"] == {"main": {"seen": 24, "skipped": 0}}
    held_out = manifest["held_out"]
    assert held_out["n"] == 9 and held_out["recall_chance"] == pytest.approx((8 * 0.25 + 1) / 9)
    assert "held out (9 pairs, 4 compared at once)" in told

    # it is a checkpoint with its own words, and no chat model
    processor = ImageTextProcessor.from_pretrained(folder)
    assert processor.tokenizer("a red cube").input_ids[0] == processor.tokenizer.cls_token_id
    assert ImageTextModel.from_pretrained(folder).config.vocab_size == len(processor.tokenizer)
    assert main(["chat", str(folder)]) == 2
    assert "not a vision-language model" in capsys.readouterr().err

    # the second stage begins with its queries and blocks (the rate is next to nothing)
    model, _ = load_model(after)
    qformer = model.model.connector.qformer.state_dict()
    assert "queries and blocks from" in told
    assert set(qformer) <= {k.removeprefix("connector.qformer.") for k in first}
    for name, value in qformer.items():
        torch.testing.assert_close(value, first[f"connector.qformer.{name}"], rtol=0, atol=1e-9)

    # a third run finds all done
    assert main(["train", recipe]) == 0
    assert capsys.readouterr().out.count("done before, kept") == 2
