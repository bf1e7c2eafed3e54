"""Does `vlm plan` tell what is known of LLaVA-1.5, and of a recipe whose parts are here?"""

import json
import math
import socket
from pathlib import Path

import pytest

from train.build import build_model
from train.planning import cli
from train.planning.gpus import GPUS
from train.planning.memory import GIB, RESERVE
from train.planning.plan import Options, make_plan
from train.planning.report import columns, count, render
from train.recipe import load_recipe, parse_recipe
from vlm import cli as vlm_cli
from vlm.errors import UserError

ROOT = Path(__file__).parents[3]
LLAVA = str(ROOT / "train/recipes/llava-1.5-7b.yaml")


def options(**changes) -> Options:
    values = {
        "gpus": 8,
        "gpu": GPUS["A100-80"],
        "memory": 80.0,
        "reserve": RESERVE,
        "mfu": 0.4,
        "image_sizes": ((336, 336), (1024, 768)),
        "text_tokens": {"": 30},
        "records": {},
        "measured": 24,
    }
    return Options(**{**values, **changes})


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    def refuse(*_):
        raise AssertionError("the plan asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def llava():
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(ROOT)  # its mixes and DeepSpeed files
    known = options(records={"align": 558128, "instruct": 665298})
    plan = make_plan(load_recipe(LLAVA), known)
    monkeypatch.undo()
    return plan


def test_llava_has_7_06_billion_parameters_and_576_tokens(llava):
    assert count(sum(llava.published.values())) == "7.06 B"
    assert sum(llava.published.values()) == 7_062_902_784  # liuhaotian/llava-v1.5-7b and its tower
    assert sum(llava.parameters.values()) == 7_050_304_512  # without CLIP's last layer
    assert [(image.views, image.tokens) for image in llava.images] == [(1, 576), (1, 576)]
    assert llava.load_bytes == 4 * 7_050_304_512


def test_llavas_stages(llava):
    align, instruct = llava.stages
    assert align.trained == {"connector": 20_979_712}
    assert instruct.trained == {"connector": 20_979_712, "language_model": 6_738_415_616}
    assert (align.mean_length, align.longest_length) == (606, 2048)
    assert (align.steps, instruct.steps) == (2181, 5198)
    assert align.fits and instruct.fits  # as published, on 8 GPUs of 80 GB


def test_llavas_operations(llava):
    cost, rows = llava.stages[0].cost, 32 * 1e12
    # 2 x parameters x tokens, and attention: 8.1; but the last of 32 layers attends to all tokens
    # and works on the 5 % that are supervised
    assert cost.forward["language_model"] / rows == pytest.approx(7.9, rel=0.01)
    assert cost.forward["vision_tower"] / rows == pytest.approx(0.38, rel=0.05)
    assert llava.stages[0].encoder_share == pytest.approx(0.015, abs=0.002)
    assert llava.stages[1].cost.backward["language_model"] == pytest.approx(
        2 * cost.forward["language_model"] / 2, rel=0.001
    )  # 16 rows in place of 32
    hours = 558128 * cost.flops / 32 / (8 * 312e12 * 0.4) / 3600
    assert llava.stages[0].hours == pytest.approx(hours, rel=0.001)


def test_llavas_memory_by_level(llava):
    table = llava.stages[1].table
    trained, total = 6_759_395_328, 7_050_304_512
    assert table["no sharding"].optimizer == 12 * trained
    assert table["ZeRO-2"].weights == 2 * total
    assert table["ZeRO-3"].weights == 2 * total / 8
    totals = [memory.total for memory in table.values()]
    assert totals == sorted(totals, reverse=True) and len(totals) == 7
    assert llava.stages[0].other_checkpointing.activations > llava.stages[0].memory.activations


def test_the_report_says_it(llava):
    text = render(llava, options(), "A100-80")
    for words in ("7.06 B", "336x336", "576", "ZeRO-3 (this recipe)", "Assumptions", "2,181 steps"):
        assert words in text
    assert "does not pay" in text
    for assumption in llava.assumptions:
        assert assumption in text


def test_llava_with_lora(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(LLAVA.replace(".yaml", "-lora.yaml"))
    plan = make_plan(recipe, options(), "instruct")
    (stage,) = plan.stages
    # rank 128 beside 32 layers of 4 products of 4096 x 4096 and 3 of 4096 x 11008
    assert stage.adapter == 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008)) == 319_815_680
    assert stage.trained == {"connector": 20_979_712, "language_model": stage.adapter}
    assert stage.table["no sharding"].weights == 2 * (7_050_304_512 + stage.adapter)
    assert stage.table["no sharding"].optimizer == 12 * sum(stage.trained.values())
    text = render(plan, options(), "A100-80")
    assert "connector and an adapter of language_model train, 340.8 M of 7.37 B" in text


@pytest.fixture
def squeeze(tree):
    """(bytes, gpus, **training) -> the plan of stage instruct on GPUs of so little memory."""

    def run(budget, gpus=1, **training):
        tree["stages"][1]["training"] |= training
        known = options(gpus=gpus, memory=budget / GIB, reserve=0)
        plan = make_plan(parse_recipe(tree, "recipe"), known, "instruct")
        return plan.stages[0], render(plan, known, "A100-80")

    return run


def test_what_does_not_fit_gets_advice_until_it_does(squeeze):
    plenty, text = squeeze(1e9)
    assert plenty.fits and not plenty.advice and "does not fit" not in text
    stage, text = squeeze(0.95 * plenty.memory.total)
    assert not stage.fits
    assert [advice.change for advice in stage.advice] == ["gradient_checkpointing: true"]
    assert stage.advice[0].memory.total <= 0.95 * plenty.memory.total < stage.memory.total
    assert "1. gradient_checkpointing: true" in text


def test_the_smallest_change_of_a_kind_is_enough(squeeze):
    known = {"gradient_checkpointing": True}
    plenty, _ = squeeze(1e9, **known)
    states = plenty.memory.total - plenty.memory.activations
    stage, _ = squeeze(states + 0.6 * plenty.memory.activations, **known)
    assert [advice.change for advice in stage.advice] == [
        "per_device_train_batch_size: 2, gradient_accumulation_steps: 2"
    ]


@pytest.mark.parametrize("gpus", [1, 8])
def test_everything_is_offered_in_order(squeeze, gpus):
    stage, text = squeeze(1, gpus)
    told = [advice.change for advice in stage.advice]
    levels = ["deepspeed with ZeRO-3"] if gpus > 1 else []
    assert told == [
        "gradient_checkpointing: true",
        "per_device_train_batch_size: 1, gradient_accumulation_steps: 4",
        *levels,
        "deepspeed with ZeRO-3 and offload_optimizer and offload_param",
    ]  # LoRA of rank 128 is more than this model has
    totals = [stage.memory.total, *(advice.memory.total for advice in stage.advice)]
    assert totals == sorted(totals, reverse=True)
    assert "Then: more GPUs" in text


@pytest.fixture
def wide(tree, tmp_path, make_language_model, make_tokenizer):
    """The shared recipe with an adapter and with rows that are whole blocks of nf4."""
    make_language_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    tree["model"]["language_model"] = str(tmp_path / "wide")
    tree["stages"][1]["trainable"] = {"connector": 1e-3, "language_model": 1e-3}
    tree["stages"][1]["adapter"] = {"rank": 1, "alpha": 1}
    return tree


def test_an_adapter_is_advised_4_bits_and_these_are_planned(wide, squeeze):
    pytest.importorskip("peft")
    stage, _ = squeeze(1)
    told = [advice.change for advice in stage.advice]
    assert told[2:] == ["model.quantization: nf4"]  # no engine can cut these any more
    wide["model"] |= {"quantization": "nf4", "dtype": "bfloat16"}
    packed, text = squeeze(1e9, bf16=True, use_cpu=True)
    plan = make_plan(parse_recipe(wide, "recipe"), options(), "instruct")
    linears = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    tables = 2 * 7 * 4 * (16 + 256 + 1)
    others = plan.parameters["vision_tower"] + plan.parameters["language_model"] - linears
    # 4 bits, a byte for each 64 and a number for 256 of these; what trains is kept in float32
    weights = linears * (1 / 2 + 1 / 64) + tables + 2 * others + 4 * sum(packed.trained.values())
    assert packed.memory.weights == pytest.approx(weights, abs=2 * 7 * 4)
    assert packed.memory.optimizer == 8 * sum(packed.trained.values())
    assert not packed.table and not packed.advice
    assert "an adapter of language_model train, " in text and "kept in nf4" in text


def test_parts_that_are_here(tree):
    recipe = parse_recipe(tree, "recipe")
    plan = make_plan(recipe, options(gpus=1, text_tokens={}))
    model, _ = build_model(recipe, recipe.stages[0], None, None)
    assert sum(plan.parameters.values()) == sum(p.numel() for p in model.parameters())
    align, instruct = plan.stages
    assert (align.records, align.steps, instruct.steps) == (24, 6, 8)
    assert align.lengths.origin.startswith("mean and longest of 24 records")
    assert "<image>" not in " ".join(plan.assumptions)
    # float32 AdamW: 4 + 4 + 8 bytes
    trained = sum(instruct.trained.values())
    assert instruct.memory.optimizer == 8 * trained
    assert instruct.memory.weights == 4 * sum(plan.parameters.values())


def test_layers_changes_and_an_average(tree):
    upper = {"learning_rate": 1e-4, "layers": "1-"}
    tree["stages"] = [
        {**tree["stages"][0], "name": "half", "trainable": {"language_model": upper}},
        {**tree["stages"][0], "name": "mean", "ema": {"decay": 0.9}},
        {**tree["stages"][0], "name": "later"}
        | {"changes": [{"at_step": 3, "trainable": {"vision_tower": 1e-4}}]},
    ]
    plan = make_plan(parse_recipe(tree, "recipe"), options(gpus=1))
    half, mean, later = plan.stages
    whole = plan.parameters["language_model"]
    assert 0 < half.trained["language_model"] < whole
    assert mean.memory.optimizer == (8 + 4) * sum(mean.trained.values())
    assert list(later.trained) == ["vision_tower", "connector"]
    told = "later: what trains at any time counts as training from the first step on"
    assert told in plan.assumptions and len(plan.assumptions) == len(set(plan.assumptions))


def test_a_checkpoint_of_ours(tree, model_folder):
    tree["model"] = {"checkpoint": str(model_folder)}
    plan = make_plan(parse_recipe(tree, "recipe"), options())
    assert plan.images[0].tokens == 16


def test_rows_filled_to_a_length(tree):
    tree["stages"][1] |= {"packed": {"length": 200}}
    tree["stages"][1]["training"] |= {"max_steps": -1, "num_train_epochs": 2}
    plan = make_plan(parse_recipe(tree, "recipe"), options(gpus=1, text_tokens={}))
    stage = plan.stages[1]
    assert 100 < stage.mean_length <= stage.longest_length <= 200
    micro = stage.settings.micro_batch
    assert stage.steps == 2 * math.ceil(math.ceil(24 / stage.lengths.records) / micro)
    assert "records share a row" in render(plan, options(), "A100-80")
    given = make_plan(parse_recipe(tree, "recipe"), options(text_tokens={"": 30}), "instruct")
    assert given.stages[0].lengths.records == 200 // 46
    assert (given.stages[0].mean_length, given.stages[0].longest_length) == (4 * 46, 200)


def test_a_missing_checkpoint_is_told(tree):
    tree["model"] = {"checkpoint": "no/where"}
    with pytest.raises(UserError, match=r"model.checkpoint: no/where"):
        make_plan(parse_recipe(tree, "recipe"), options())


def test_json_holds_every_figure(tree, write_recipe, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = write_recipe(tree)
    words = ["plan", str(path), "--json", "--gpus", "2", "--stage", "align"]
    assert vlm_cli.main([*words, "--stages.align.training.max_steps", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in told["stages"]] == ["align"]
    assert told["stages"][0]["steps"] == 3
    assert told["stages"][0]["memory"]["weights"] > 0


def test_a_cpu_attends_by_document_and_has_no_reserve(tree, write_recipe, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tree["stages"][0]["packed"] = True
    words = ["plan", str(write_recipe(tree)), "--json", "--stage", "align", "--gpu"]
    stages = []
    for gpu in ("CPU", "4090"):
        assert vlm_cli.main([*words, gpu, *(["--gpus", "1"] * (gpu != "CPU"))]) == 0
        stages += json.loads(capsys.readouterr().out)["stages"]
    assert [stage["memory"]["reserve"] for stage in stages] == [0, RESERVE]
    assert [len(stage["table"]) for stage in stages] == [0, 4]
    assert stages[0]["cost"]["attention"] == stages[1]["cost"]["attention"]


def test_a_cpus_loss_holds_as_many_logits_as_on_a_cpu(tree, write_recipe, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["plan", str(write_recipe(tree)), "--json", "--stage", "instruct", "--gpu", "CPU"]
    activations = []
    for rows in (1, 1000):
        monkeypatch.setattr(
            "train.planning.stage.usual_chunk_elements",
            lambda on_gpu, rows=rows: rows * (10**6 if on_gpu else 259),
        )
        assert vlm_cli.main(words) == 0
        told = json.loads(capsys.readouterr().out)
        activations.append(told["stages"][0]["memory"]["activations"])
    assert activations[0] < activations[1]
    monkeypatch.undo()
    recipe = load_recipe(words[1])
    for reserve, logits in ((0, "33,554,432"), (RESERVE, "67,108,864")):
        assert f"chunks of {logits} logits" in " ".join(
            make_plan(recipe, options(reserve=reserve)).assumptions
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "H1000"], "unknown GPU 'H1000' (did you mean 'H100'?)"),
        (["--gpus", "0"], "--gpus must be 1 or more"),
        (["--mfu", "40"], "--mfu above 0 and at most 1"),
        (["--image-sizes", "336"], "'336' is not of the form WIDTHxHEIGHT"),
        (["--text-tokens", "align=many"], "'align=many' is not of the form STAGE=NUMBER"),
        (["--text-tokens", "alin=3"], "unknown stage 'alin' (did you mean 'align'?)"),
        (["--stage", "alin"], "unknown stage 'alin' (did you mean 'align'?)"),
    ],
)
def test_mistakes_are_one_sentence(tree, write_recipe, capsys, monkeypatch, words, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert vlm_cli.main(["plan", str(write_recipe(tree)), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_numbers_by_stage():
    assert cli.parse_numbers("--records", ["align=5", "7"]) == {"align": 5, "": 7}
    assert cli.parse_size("1024x768") == (1024, 768)


def test_columns_line_up():
    assert columns([["a", "100"], ["bcd", "2"]], "") == ["a    100", "bcd    2"]


def test_rows_longer_than_the_context_are_refused(tree):
    stage = {**tree["stages"][1], "max_length": 1500}
    tree["stages"] = [stage]
    known = options(image_sizes=((32, 32),))
    with pytest.raises(UserError, match=r"1500 is more than the 1024 .* model\.rope_factor to 2"):
        make_plan(parse_recipe(tree, "recipe"), known)
    tree["model"]["rope_factor"] = 2.0
    assert make_plan(parse_recipe(tree, "recipe"), known).stages[0].longest_length == 1500
