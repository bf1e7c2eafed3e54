"""Is a recipe read, overridden and written back, and is every mistake in it one sentence?"""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from train.arguments import check_fields, training_arguments
from train.engine import deepspeed_config
from train.recipe import load_recipe, parse_recipe
from vlm.adapters import AdapterConfig
from vlm.cli import main
from vlm.errors import UserError
from vlm.yaml_values import parse_value, to_text

ROOT = Path(__file__).parents[2]  # shipped recipes name files from here
SHIPPED = sorted(
    path
    for path in (ROOT / "train/recipes").glob("*.yaml")
    if "stages" in yaml.safe_load(path.read_text())
)


def test_values_are_typed_and_defaults_filled(tree, write_recipe):
    recipe = load_recipe(write_recipe(tree))
    assert recipe.seed == 0
    assert recipe.model.tiling == {"type": "resize"}
    assert recipe.stage("instruct").trainable == {"connector": 1e-3, "language_model": 5e-4}
    assert recipe.stage("align").data.sources[0].name == "main"
    assert recipe.stage("align").data.on_error == "raise"


def test_resolved_recipe_reads_back_as_itself(tree):
    recipe = parse_recipe(tree, "here")
    again = parse_recipe(yaml.safe_load(to_text(recipe.to_dict())), "there")
    assert again == recipe


@pytest.mark.parametrize("text", ["5e-4", "5E-4", "0.0005", "5.0e-4", "+5e-04"])
def test_numbers_as_people_write_them(text):
    assert parse_value(text, "") == pytest.approx(5e-4)
    assert isinstance(parse_value(text, ""), float)


@pytest.mark.parametrize("text", ["5e", "e-4", "v1.5", "1e-4x", "-"])
def test_words_stay_words(text):
    assert not isinstance(parse_value(f"[{text}]", "")[0], float)


def test_overrides_reach_stages_and_sources_by_name(tree, write_recipe):
    words = (
        "--stages.align.trainable.connector 2e-3 --stages.instruct.training.max_steps=9 --seed 7 "
        "--stages.align.data.sources.main.cap 50% --model.connector.depth 3 "
        "--stages.align.training.weight_decay 1e-2 --stages.instruct.training.bf16 false"
    ).split()
    recipe = load_recipe(write_recipe(tree), words)
    assert recipe.seed == 7
    assert recipe.model.connector == {"type": "mlp", "depth": 3}
    align, instruct = recipe.stages
    assert align.trainable == {"connector": 2e-3}
    assert align.training["weight_decay"] == 1e-2
    assert align.data.sources[0].cap == "50%"
    assert instruct.training["max_steps"] == 9
    assert instruct.training["bf16"] is False


def test_override_replaces_a_whole_component(tree, write_recipe):
    recipe = load_recipe(write_recipe(tree), ["--model.connector", "{type: linear}"])
    assert recipe.model.connector == {"type": "linear"}


MISTAKES = {
    "--sead 3": ["no field 'sead'", "did you mean 'seed'?"],
    "--seed x": ["'seed' must be int", "'x'"],
    "--seed true": ["'seed' must be int"],
    "--seed": ["--seed has no value"],
    "seed 3": ["'seed' is not understood"],
    "--model.vision_encoder.type tranformers": [
        "model.vision_encoder",
        "did you mean 'transformers'?",
    ],
    "--model.vision_encoder.sauce x": ["model.vision_encoder", "did you mean 'source'?"],
    "--model.connector.type mpl": ["model.connector", "did you mean 'mlp'?"],
    "--model.connector.dept 3": ["model.connector", "did you mean 'depth'?"],
    "--model.connector.depth two": ["model.connector", "'depth' must be int"],
    "--model.tiling.type anires": ["model.tiling", "did you mean 'anyres'?"],
    "--model.chat_template chatmml": ["model.chat_template", "did you mean 'chatml'?"],
    "--model.dtype float64": ["'dtype' must be one of"],
    "--model.checkpoint runs/x": ["either checkpoint or vision_encoder"],
    "--model.language_model null": ["needs language_model"],
    "--model.vision_encoder null": ["needs vision_encoder", "{type: patches} is none"],
    "--stages.allign.max_length 3": ["there is no 'allign'", "did you mean 'align'?"],
    "--stages.align.trainable.conector 1e-3": ["stages.align.trainable", "mean 'connector'?"],
    "--stages.align.trainable.connector fast": ["must be a learning rate", "'fast'"],
    "--stages.align.trainable.connector 0": ["must be a learning rate"],
    "--stages.align.trainable {}": ["names no part"],
    "--stages.align.name a/b": ["cannot be a folder's name"],
    "--stages.align.name instruct": ["two stages are named 'instruct'"],
    "--stages.align.chat_template plain": ["stages.align.chat_template"],
    "--stages.align.data.on_error ignore": ["stages.align.data", "'on_error' must be one of"],
    "--stages.align.data.mix m.yaml": ["either mix (a file) or sources"],
    "--stages.align.data.sources.main.pth x": ["did you mean 'path'?"],
    "--stages []": ["stages must be a list"],
    "--name.x 3": ["name is 'tiny' and has no fields"],
    "--output_dir ''": ["output_dir is empty"],
    "--model.language_model ''": ["model.language_model is empty"],
    "--stages.align.max_spike .nan": ["must be a finite number, not nan"],
    "--stages.align.trainable.connector .nan": ["must be a learning rate such as 1e-3"],
    "--stages.align.trainable.connector .inf": ["must be a learning rate such as 1e-3"],
    "--stages.align.data.sources.main.repeat .inf": ["must be a finite number"],
    "--stages.align.data.sources.main.repeat 1e9": ["repeat must be above 0 and at most 1000"],
    "--stages.align.data.sources.main.cap nan%": ["keeps nothing sensible"],
    "--stages.align.training.dataloader_num_workers 5000": ["is 5000; take 256 at most"],
    "--stages.align.training.save_steps 0": ["save_steps must be above 0, not 0"],
    "--stages.align.training.logging_steps -1": ["logging_steps must be above 0, not -1"],
    "--stages.align.training.weight_decay .nan": ["must be a finite number"],
    "--stages.align.training.warmup_ratio 0.03": ["a warmup_steps below 1 is a share"],
    "--num_threads 0": ["num_threads must be in [1, 1024]"],
    "--stages.align.training.learning_rat 1e-3": [
        "stages.align.training",
        "did you mean 'learning_rate'?",
    ],
    "--stages.align.training.max_stepps 4": ["did you mean 'max_steps'?"],
    "--stages.align.training.max_steps 4.5": ["max_steps must be int"],
    "--stages.align.training.weight_decay much": ["weight_decay must be float"],
    "--stages.align.training.output_dir x": ["it is the recipe's output_dir"],
    "--stages.align.training.lr_scheduler_type cosin": ["stages.align.training", "cosin"],
    "--stages.instruct.training.optim adamw_torhc": ["training.optim", "mean 'adamw_torch'?"],
    "--stages.instruct.training.load_best_model_at_end true": ["stages.instruct.training"],
    "--stages.align.training.per_device_train_batch_size 0": ["must be 1 or more, not 0"],
    "--stages.align.training.gradient_accumulation_steps 0": ["must be 1 or more, not 0"],
    "--stages.align.training.dataloader_num_workers -1": ["must be 0 or more, not -1"],
    "--stages.align.training.max_steps 0": ["max_steps must be 1 or more"],
    "--stages.align.training {num_train_epochs: 0}": ["num_train_epochs must be above 0"],
    "--stages.align.training.lr_scheduler_kwargs {foo: 1}": ["cosine refuses", "'foo'"],
    "--stages.align.training.adam_beta1 2": ["adamw_torch", "refuses: Invalid beta"],
    "--stages.align.training.report_to wandbb": ["align.training.report_to", "mean 'wandb'?"],
    "--stages.align.training.eval_strategy steps": ["it is the stage's validation"],
    "--stages.align.training.label_smoothing_factor 0.1": ["the loss is the stage's"],
    "--stages.align.training.save_only_model true": ["goes on from whole checkpoints"],
    "--stages.align.max_length 0": ["max_length must be 1 or more"],
    "--seed -1": ["seed must be in [0, 2**32), not -1"],
    "--stage instruct2": ["unknown stage 'instruct2'", "did you mean 'instruct'?"],
    "--stages.align.data.sources.main.path gone.json": ["stages.align.data", "gone.json"],
    "--stages.instruct.data.sources.main.image_root gone": ["image_root gone is no folder"],
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistake_is_one_sentence_and_exit_2(words, tree, write_recipe, capsys, tmp_path):
    path = write_recipe(tree)
    assert main(["train", str(path), *words.split(" ", 1)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vlm train: ")
    assert len(error.strip().splitlines()) == 1
    for part in MISTAKES[words]:
        assert part in error
    assert not (tmp_path / "run" / "align" / "config.json").exists()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(to_text(recipe.to_dict())), "again") == recipe
    for stage in recipe.stages:
        values = check_fields(stage.training, f"stages.{stage.name}.training")
        if values.get("deepspeed"):
            assert deepspeed_config(values["deepspeed"], stage.name)["zero_optimization"]
    assert {"quickstart", "llava-1.5-7b"} <= {path.stem for path in SHIPPED}


def test_llava_has_the_published_numbers(monkeypatch):
    monkeypatch.chdir(ROOT)
    align, instruct = load_recipe("train/recipes/llava-1.5-7b.yaml").stages
    same, lora = load_recipe("train/recipes/llava-1.5-7b-lora.yaml").stages
    assert same == align
    rates, adapter = {"connector": 2e-5, "language_model": 2e-4}, AdapterConfig()
    assert lora == replace(instruct, trainable=rates, adapter=adapter)
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (128, 256, 0.05)
    assert align.trainable == {"connector": 1e-3}
    assert instruct.trainable == {"connector": 2e-5, "language_model": 2e-5}
    for stage, batch in ((align, 32), (instruct, 16)):
        assert stage.max_length == 2048
        assert stage.training["per_device_train_batch_size"] == batch
        assert stage.training["warmup_steps"] == 0.03
        assert stage.training["weight_decay"] == 0.0
        assert stage.training["num_train_epochs"] == 1
        assert stage.training["lr_scheduler_type"] == "cosine"
    assert align.chat_template == "llava_plain"


def test_files_that_are_no_recipe(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    for text, sentence in [("a: [", "is no YAML"), ("- 1", "must be a mapping"), ("", "mapping")]:
        path.write_text(text)
        with pytest.raises(UserError, match=r"r\.yaml") as error:
            load_recipe(path)
        assert sentence in str(error.value)
    assert main(["train", str(tmp_path / "gone.yaml")]) == 2
    assert "gone.yaml: cannot be read" in capsys.readouterr().err


def test_missing_deepspeed_names_the_extra(tree, write_recipe, monkeypatch):
    monkeypatch.setattr("train.arguments.find_spec", lambda name: None)
    path = write_recipe(tree)
    recipe = load_recipe(path, ["--stages.align.training.deepspeed", "zero.json"])
    with pytest.raises(UserError, match="make extras EXTRAS=train"):
        training_arguments(recipe, recipe.stages[0], Path("x"))


def test_missing_wandb_is_told_before_training(tree, write_recipe, monkeypatch):
    monkeypatch.setattr("train.arguments.find_spec", lambda name: None)
    recipe = load_recipe(write_recipe(tree), ["--stages.align.training.report_to", "wandb"])
    with pytest.raises(UserError, match=r"align\.training\.report_to: wandb is not installed"):
        training_arguments(recipe, recipe.stages[0], Path("x"))


def test_several_connectors_are_a_list(tree, write_recipe):
    tree["model"]["connector"] = [{"type": "mlp"}, {"type": "partial_lora", "rank": 4}]
    assert load_recipe(write_recipe(tree)).model.connector == tree["model"]["connector"]
    tree["model"]["connector"][1]["type"] = "partial_laura"
    with pytest.raises(UserError, match="did you mean 'partial_lora'"):
        load_recipe(write_recipe(tree))


def test_check_prints_the_whole_recipe_and_trains_nothing(tree, write_recipe, capsys):
    path = write_recipe(tree)
    assert main(["train", str(path), "--check", "--stages.align.training.max_steps=3"]) == 0
    printed = parse_value(capsys.readouterr().out, "printed")
    assert parse_recipe(printed, "printed").to_dict() == printed
    assert printed["stages"][0]["training"]["max_steps"] == 3
    assert printed["model"]["tiling"] == {"type": "resize"}  # a default, written out
    assert not Path(tree["output_dir"]).exists()
    gone = "--stages.align.data.sources.main.path=gone.json"
    assert main(["train", str(path), "--check", gone]) == 2
