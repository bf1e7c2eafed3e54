"""Does a Q-Former's first stage run as every stage does, and does the next one start from it?"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizerFast

from data_recipes.mixture import Mixture, parse_sources
from train.callbacks import read_log
from vlm.caption_tokenizer import count_caption_tokenizer
from vlm.cli import main
from vlm.image_text_model import ImageTextModel
from vlm.image_text_processing import ImageTextProcessor
from vlm.loading import load_model


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_first_stage_then_the_second(
    two_stages, write_recipe, tmp_path, capsys, encoder_folder, shown
):
    two_stages["stages"][0]["objective"]["held_out"] = [
        {"name": "last", "path": str(tmp_path / "held_out.json"), "cap": 10, "take": "end"}
    ]
    rows = json.loads((tmp_path / "captions.json").read_text())
    rows[-1]["conversations"] *= 2  # two answers
    (tmp_path / "held_out.json").write_text(json.dumps(rows))
    two_stages["stages"][1]["training"]["max_steps"] = 1
    two_stages["stages"][1]["trainable"] = {"connector": 1e-12}
    recipe = str(write_recipe(two_stages))
    assert main(["train", recipe]) == 0
    told = capsys.readouterr().out
    folder, after = tmp_path / "run" / "represent", tmp_path / "run" / "align"

    # the encoder is frozen, there is no language model, and what ran is said
    assert "language_model" not in told.split("stage represent: done")[0]
    assert "connector             0.0" in told and "the captions' own words, 46 tokens" in told
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
    assert (held_out["n"], held_out["left_out"]) == (9, 1)
    assert 0.25 < held_out["recall_chance"] < 0.45
    assert "held out (9 pairs, 4 compared at once, 1 left out)" in told
    assert len(held_out["data"]["last"]["sha256"]) == 64

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


def run(tree, write_recipe, *words):
    return main(["train", str(write_recipe(tree)), *words])


def test_it_needs_no_language_model_but_others_do(first_stage, write_recipe, capsys, tmp_path):
    first_stage["stages"][0]["training"]["max_steps"] = 1
    assert run(first_stage, write_recipe) == 0
    del first_stage["stages"][0]["objective"]
    assert run(first_stage, write_recipe) == 2
    assert "needs language_model" in capsys.readouterr().err


FAULTS = {
    "trains the connector alone, not language_model": lambda s, m: s.update(
        trainable={"language_model": 1e-3}
    ),
    "takes no chat_template": lambda s, m: s.update(chat_template="chatml"),
    "has no gradient_checkpointing": lambda s, m: s["training"].update(gradient_checkpointing=True),
    "per_device_train_batch_size to 2 or more": lambda s, m: s["training"].update(
        per_device_train_batch_size=1
    ),
    "one connector of type qformer, but the connector is mlp": lambda s, m: m.update(
        connector={"type": "mlp"}
    ),
    "the pictures that data sources ['main']": lambda s, m: s["data"]["sources"][0].update(
        image_position="none"
    ),
    "unknown objective 'qformer_stage2'": lambda s, m: s["objective"].update(type="qformer_stage2"),
    "did you mean 'shared_dim'": lambda s, m: s["objective"].update(shared_dims=3),
    "with a 'type'": lambda s, m: s.update(objective="qformer_stage1"),
    "shared_dim must be at least 1": lambda s, m: s["objective"].update(shared_dim=0),
    "words of its own tokenizer; set": lambda s, m: s["objective"].update(bert="x"),
    "bert bert cannot be loaded": lambda s, m: (
        s["objective"].update(bert="bert"),
        m["connector"].update(tokenizer="words"),
    ),
    "objective.held_out: gone.json: cannot be read": lambda s, m: s["objective"].update(
        held_out=[{"name": "a", "path": "gone.json"}]
    ),
    "tokenizer nowhere cannot be loaded": lambda s, m: m["connector"].update(tokenizer="nowhere"),
    "reads instructions in the words of a tokenizer": lambda s, m: m["connector"].update(
        instruction=True
    ),
    "has 5 tokens, but the connector knows 4": lambda s, m: m["connector"].update(
        tokenizer="words", vocab_size=4
    ),
}


@pytest.mark.parametrize("words", FAULTS)
def test_mistakes_are_one_sentence(first_stage, write_recipe, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count_caption_tokenizer([], 5).save_pretrained("words")
    FAULTS[words](first_stage["stages"][0], first_stage["model"])
    assert run(first_stage, write_recipe) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_it_stands_before_the_language_model(two_stages, write_recipe, capsys):
    two_stages["stages"].reverse()
    assert run(two_stages, write_recipe) == 2
    assert "['align'] stand before it" in capsys.readouterr().err


def test_another_connector_than_the_first_stage_s(two_stages, write_recipe, capsys):
    recipe = ["--stages.represent.training.max_steps", "1"]
    assert run(two_stages, write_recipe, *recipe, "--stage", "represent") == 0
    two_stages["model"]["connector"]["num_queries"] = 5
    assert run(two_stages, write_recipe, *recipe, "--stage", "align") == 2
    error = capsys.readouterr().err
    assert "for 'queries' it has (4, 16), needed is (5, 16)" in error


def test_accumulation_weighs_pairs_and_words_alike(first_stage, write_recipe, tmp_path):
    """4 + 4 pairs of which one is left out: captions and matching are averaged over all 7.

    The contrast compares fewer pairs, so that the rest is looked at: a rate of next to nothing.
    """
    stage = first_stage["stages"][0]
    stage["trainable"], stage["data"]["on_error"] = {"connector": 1e-30}, "skip"
    stage["training"] |= {"max_steps": 3}
    (source,) = parse_sources(stage["data"]["sources"], "test")
    (tmp_path / f"{Mixture([source], [24], seed=0).locate(1)[1]}.png").unlink()
    logs = []
    for size, parts in ((8, 1), (4, 2)):
        words = ["--stages.represent.training.per_device_train_batch_size", str(size)]
        words += ["--stages.represent.training.gradient_accumulation_steps", str(parts)]
        folder = tmp_path / f"by{parts}"
        assert run(first_stage, write_recipe, *words, "--output_dir", str(folder)) == 0
        logs.append(read_log(folder / "represent" / "training_log.jsonl"))
    for whole, parts in zip(*logs, strict=True):
        assert parts["loss/caption"] == pytest.approx(whole["loss/caption"], rel=1e-5)
        names = ("loss/contrastive", "loss/matching", "loss/caption")
        assert parts["loss"] == pytest.approx(sum(parts[name] for name in names), rel=1e-5)
    manifest = json.loads((tmp_path / "by2" / "represent" / "manifest.json").read_text())
    assert manifest["records"] == {"main": {"seen": 24, "skipped": 1}}


def test_bert_gives_words_and_weights(first_stage, write_recipe, tmp_path, capsys):
    folder = tmp_path / "bert"
    folder.mkdir()
    rows = json.loads((tmp_path / "captions.json").read_text())
    found = {word.lower() for row in rows for word in row["conversations"][1]["value"].split()}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(found)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 20, "vocab_size": len(words)}
    bert = BertModel(BertConfig(**sizes))
    bert.save_pretrained(folder)
    stage = first_stage["stages"][0]
    stage["objective"]["bert"] = str(folder)
    first_stage["model"]["connector"]["tokenizer"] = str(folder)
    stage["trainable"], stage["training"]["max_steps"] = {"connector": 1e-30}, 1
    assert run(first_stage, write_recipe) == 0
    assert "gives the Q-Former's weights" in capsys.readouterr().out
    found = weights(tmp_path / "run" / "represent")
    table = found["connector.qformer.word_embeddings.weight"]
    torch.testing.assert_close(
        table[:-1], bert.embeddings.word_embeddings.weight, rtol=0, atol=1e-20
    )
    assert len(table) == len(words) + 1  # and [DEC]
    for ours in ("query_feed_forward", "text_feed_forward"):
        up = found[f"connector.qformer.layers.1.{ours}.up.weight"]
        torch.testing.assert_close(up, bert.encoder.layer[1].intermediate.dense.weight)


def test_instructions_are_read_in_the_first_stage_s_words(two_stages, write_recipe, tmp_path):
    folder = tmp_path / "words"
    count_caption_tokenizer(["What here", "a red ball"], 50).save_pretrained(folder)
    two_stages["model"]["connector"] |= {"instruction": True, "tokenizer": str(folder)}
    for stage in two_stages["stages"]:
        stage["training"] = {"per_device_train_batch_size": 4, "max_steps": 1}
        stage["training"] |= {"use_cpu": True, "bf16": True}
    two_stages["stages"][1]["trainable"] = {"connector": 1e-12}
    assert run(two_stages, write_recipe) == 0
    first, second = weights(tmp_path / "run" / "represent"), weights(tmp_path / "run" / "align")
    for name in ("word_embeddings.weight", "layers.0.text_feed_forward.up.weight"):
        ours = second[f"model.connector.qformer.{name}"]
        torch.testing.assert_close(ours, first[f"connector.qformer.{name}"], rtol=0, atol=1e-9)


def test_qformer_in_a_list_with_a_feature_map_of_its_own(two_stages, write_recipe, tmp_path):
    two_stages["model"]["vision_encoder"]["layer"] = [-2, -1]
    qformer = {**two_stages["model"]["connector"], "features": [1]}
    two_stages["model"]["connector"] = [qformer, {"type": "partial_lora", "rank": 2}]
    for stage in two_stages["stages"]:
        stage["training"] = {"per_device_train_batch_size": 4, "max_steps": 1, "use_cpu": True}
    two_stages["stages"][1]["trainable"] = {"connector": 1e-12}
    assert run(two_stages, write_recipe) == 0
    first, second = weights(tmp_path / "run" / "represent"), weights(tmp_path / "run" / "align")
    name = "qformer.layers.0.cross_attention.to_k.weight"
    (found,) = [value for key, value in second.items() if key.endswith(name)]
    assert found.shape == (16, 24)
    torch.testing.assert_close(found, first[f"connector.{name}"], rtol=0, atol=1e-9)
