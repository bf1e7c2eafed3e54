"""Is a stage's `training:` read as the Trainer and DeepSpeed will read it?"""

import json
from dataclasses import replace

import pytest

from train.planning.memory import Bytes, Sharding
from train.planning.settings import (
    LIVE,
    all_shardings,
    bytes_per_parameter,
    read_settings,
)
from train.recipe import load_recipe, parse_recipe
from vlm.errors import UserError


@pytest.fixture
def settings_of(tree):
    """(**training) -> the settings of stage align."""

    def read(**training):
        tree["stages"][0]["training"] = training
        return read_settings(parse_recipe(tree, "recipe").stages[0])

    return read


def test_transformers_defaults(settings_of):
    settings = settings_of()
    assert (settings.micro_batch, settings.accumulation, settings.epochs) == (8, 1, 3.0)
    assert (settings.engine, settings.level, settings.lower) == ("ddp", 0, None)
    assert settings.optimizer == "adamw_torch_fused" and not settings.checkpointing


def test_llava_as_published():
    align, instruct = map(read_settings, load_recipe("train/recipes/llava-1.5-7b.yaml").stages)
    assert (align.micro_batch, instruct.micro_batch) == (32, 16)
    assert (align.engine, align.level, instruct.level) == ("deepspeed", 2, 3)
    assert align.lower == instruct.lower == "bfloat16" and align.checkpointing
    assert instruct.sharding(8, 4096, 0) == Sharding(
        "deepspeed", 8, 3, bucket=2 * 4096**2, live=LIVE
    )


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_by_both_names(settings_of, name):
    settings = settings_of(**{name: True})
    assert settings.checkpointing and not settings.keeps_products
    keep = {"activation_checkpointing_kwargs": {"keep": "products"}}
    assert settings_of(**{name: True}, **keep).keeps_products


def test_offload_and_numbers_of_a_deepspeed_file(settings_of, tmp_path):
    zero = {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "none"},
        "overlap_comm": False,
        "reduce_bucket_size": 2e8,
        "stage3_max_live_parameters": 5e8,
    }
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    sharding = settings_of(deepspeed=str(file), bf16=True).sharding(4, 64, 0)
    assert sharding == Sharding("deepspeed", 4, 3, True, False, 200_000_000, 500_000_000)


def test_a_deepspeed_file_that_is_none(settings_of):
    with pytest.raises(UserError, match=r"stages.align.training.deepspeed: no.json cannot be read"):
        settings_of(deepspeed="no.json")


def test_a_misspelt_field_is_told(settings_of):
    with pytest.raises(UserError, match="per_device_train_batch_size"):
        settings_of(per_device_train_batchsize=4)


def test_fsdp_shards_all(settings_of):
    assert settings_of(fsdp="full_shard").sharding(8, 64, 1000) == Sharding("fsdp", 8, 3, live=2000)


@pytest.mark.parametrize(
    ("training", "dtype", "engine", "expected"),
    [
        ({}, "float32", "ddp", Bytes(4, 4, 0, 8, 0)),
        ({}, "bfloat16", "ddp", Bytes(2, 2, 0, 4, 0)),  # torch's moments are of the weight's type
        ({"bf16": True}, "float32", "ddp", Bytes(4, 4, 0, 8, 0)),
        ({"bf16": True}, "float32", "deepspeed", Bytes(2, 2, 4, 8, 4)),
        ({}, "float32", "deepspeed", Bytes(4, 4, 4, 8, 4)),
        ({"optim": "adamw_8bit"}, "bfloat16", "ddp", Bytes(2, 2, 0, 2.03, 0)),
        ({"optim": "adamw_torch"}, "float32", "ddp", Bytes(4, 4, 0, 8, 4)),
        ({"optim": "sgd"}, "float32", "ddp", Bytes(4, 4, 0, 0, 0)),
        ({"bf16": True, "fsdp": "full_shard"}, "float32", "fsdp", Bytes(4, 4, 0, 8, 0)),
    ],
)
def test_bytes_of_a_parameter(settings_of, training, dtype, engine, expected):
    assert bytes_per_parameter(dtype, settings_of(**training), engine) == expected


def test_deepspeed_in_mixed_precision_is_the_papers_sixteen_bytes(settings_of):
    assert bytes_per_parameter("float32", settings_of(bf16=True), "deepspeed").trained == 16


def test_a_table_compares_levels_and_offload():
    names = [sharding.name for sharding in all_shardings("ddp", 8, 64)]
    assert names[:4] == ["no sharding", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    assert len(set(names)) == len(names) == 7
    assert len(all_shardings("ddp", 1, 64)) == 4  # one has nobody to share with
    assert all_shardings("ddp", 8, 64)[0] == replace(Sharding("ddp", 8, 0))
