"""Does a recipe's model look at videos, and read as far, as the recipe says?"""

import json
from dataclasses import replace

import pytest

from data_recipes.dataset import Skipped
from train.build import build_model
from train.data import longest_record
from train.packing import Packing
from train.parts import stage_parts
from train.recipe import parse_recipe
from vlm.errors import UserError


def parts_of(encoder, language_model):
    return {
        "vision_encoder": {"type": "transformers", "source": str(encoder), "layer": "last"},
        "connector": {"type": "mlp"},
        "language_model": str(language_model),
        "chat_template": "chatml",
    }


def recipe(**model):
    stage = {"name": "one", "trainable": {"connector": 1e-3}, "data": {"sources": []}}
    stage["data"] = {"sources": [{"name": "none", "path": "none.json"}]}
    stage["max_length"] = 1500
    tree = {"name": "t", "output_dir": "out", "model": model, "stages": [stage]}
    return parse_recipe(tree, "recipe")


def test_rows_longer_than_the_context_are_refused(encoder_folder, language_model_folder):
    made = recipe(**parts_of(encoder_folder, language_model_folder))
    with pytest.raises(UserError, match=r"1500 is more than the 1024 .* model\.rope_factor to 2"):
        build_model(made, made.stages[0], None, None)


@pytest.mark.parametrize(
    ("max_length", "packed", "positions", "longest"),
    [
        (None, False, None, None),  # a recurrent language model's
        (None, True, 1024, 1024),
        (90, False, 1024, 90),
        (90, False, None, 90),
        (None, Packing(length=60), 1024, 60),
        (None, Packing(length=2048), 1024, 1024),  # several records, each within its positions
    ],
)
def test_the_longest_record(max_length, packed, positions, longest, tree):
    stage = parse_recipe(tree, "recipe").stages[0]
    stage = replace(stage, max_length=max_length, packed=packed)
    assert longest_record(stage, positions) == longest


def test_a_record_longer_than_the_context_is_a_fault(tree, data_file):
    rows = json.loads(data_file.read_text())
    rows[5]["conversations"][1]["value"] = "and so on " * 600
    data_file.write_text(json.dumps(rows))
    recipe = parse_recipe(tree, "recipe")
    dataset = stage_parts(recipe, recipe.stages[0], None, None).dataset
    words = r"\(id 'r5'\): the conversation takes \d+ tokens .* more than 1024, the least of"
    with pytest.raises(UserError, match=words):
        [dataset[position] for position in range(24)]
    dataset.on_error = "skip"
    (skipped,) = [item for item in map(dataset.__getitem__, range(24)) if isinstance(item, Skipped)]
    assert skipped.row == 5


def test_components_and_checkpoints_take_videos(
    encoder_folder, language_model_folder, model_folder, tmp_path
):
    asked = {"video": {"frames": 4, "newline": "grid"}, "rope_factor": 2}
    made = recipe(**parts_of(encoder_folder, language_model_folder), **asked)
    model, processor = build_model(made, made.stages[0], None, None)
    made = recipe(checkpoint=str(model_folder), **asked)
    from_checkpoint, other = build_model(made, made.stages[0], None, None)
    for each, its in ((model, processor), (from_checkpoint, other)):
        assert each.model.video.frames == its.image_processor.video_config.frames == 4
        assert each.model.image_newline.shape == (32,)
        assert each.config.text_config.max_position_embeddings == 2048
    from_checkpoint.save_pretrained(tmp_path / "one"), other.save_pretrained(tmp_path / "one")
    resumed, _ = build_model(made, made.stages[0], None, tmp_path / "one")
    assert resumed.config.text_config.max_position_embeddings == 2048  # not scaled twice


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"video": {"pool": "mean"}}, "one of 'bilinear', 'average', 'max'"),
        ({"rope_factor": 0.5}, "rope_factor must be 1 or more"),
    ],
)
def test_what_no_model_has_is_refused_on_reading(model, words, encoder_folder):
    with pytest.raises(UserError, match=words):
        recipe(**parts_of(encoder_folder, "somewhere"), **model)
