"""Does a stage with an adapter learn what it should, keep the rest, load, merge and go on?"""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from train.callbacks import read_log
from train.checkpoints import copy_model, newest
from train.recipe import load_recipe
from vlm.adapters import adapted_linears
from vlm.cli import main
from vlm.errors import UserError
from vlm.loading import load_model
from vlm.on_base import NOTE, WEIGHTS, read_base
from vlm.quantization import quantized_linears

ADAPTER = {"type": "lora", "rank": 4, "alpha": 8}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def adapted(tree):
    """The shared recipe: align in full, instruct with an adapter on the language model."""
    tree["stages"][1]["adapter"] = dict(ADAPTER)
    tree["stages"][1]["trainable"] = {"connector": 1e-3, "language_model": 5e-3}
    return tree


@pytest.fixture
def alone(adapted):
    """The same without its first stage: it begins with new parts."""
    del adapted["stages"][0]
    return adapted


@pytest.fixture
def wide(alone, tmp_path, make_language_model, make_tokenizer):
    """The same with a language model whose rows are whole blocks of nf4."""
    make_language_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    alone["model"]["language_model"] = str(tmp_path / "wide")
    return alone


@pytest.fixture
def logits(make_image):
    """(folder, **options of load_model) -> logits of a picture and a question."""

    @torch.no_grad()
    def run(folder, **options):
        model, processor = load_model(folder, device="cpu", **options)
        text = f"{processor.image_token} What?"
        return model(**processor(text=text, images=[make_image()], return_tensors="pt")).logits

    return run


def tensors(tree):
    """Yield the tensors of nested mappings."""
    for value in tree.values():
        yield from tensors(value) if isinstance(value, dict) else [value]


def own(name):
    return name.removeprefix("base_model.model.")


def test_two_stages_the_second_with_an_adapter(adapted, write_recipe, tmp_path, capsys, logits):
    run = tmp_path / "run"
    align, instruct = run / "align", run / "instruct"
    inside = instruct / "checkpoints" / "checkpoint-6"
    assert main(["train", str(write_recipe(adapted))]) == 0
    told = capsys.readouterr().out
    assert "an adapter beside 14 linear layers" in told
    assert "trains at 0.005, its adapter alone: 0.00" in told

    # the folder holds what was trained, and where the rest is
    kept, before, inner = (
        load_file(path)
        for path in (instruct / WEIGHTS, align / "model.safetensors", inside / WEIGHTS)
    )
    assert not (instruct / "model.safetensors").exists()
    assert {own(name).split(".")[1] for name in kept} == {"language_model", "connector"}
    assert sum("lora_" in name for name in kept) == 2 * 14
    assert json.loads((instruct / NOTE).read_text())["folder"] == "../align"
    assert json.loads((inside / NOTE).read_text())["folder"] == "../../../align"
    model, _ = load_model(instruct)
    assert all(name.startswith("model.language_model.layers.") for name in adapted_linears(model))

    # both learned, and a checkpoint inside the stage holds both
    assert set(inner) == set(kept)
    for name, tensor in kept.items():
        assert not torch.equal(tensor, inner[name]), name
        assert "lora_" in name or not torch.equal(inner[name], before[own(name)]), name
    assert json.loads((instruct / "manifest.json").read_text())["adapter"]["rank"] == 4

    # merged, from the end or from inside, it is a plain checkpoint with equal logits
    for source, name in ((instruct, "merged"), (inside, "merged inside")):
        assert main(["merge", str(source), "--out", str(tmp_path / name)]) == 0
        assert not (tmp_path / name / NOTE).exists()
        torch.testing.assert_close(logits(tmp_path / name), logits(source), **CLOSE)
    assert not torch.allclose(logits(instruct), logits(inside), atol=1e-4)
    assert main(["merge", str(tmp_path / "merged"), "--out", str(tmp_path / "twice")]) == 2
    assert "is a plain checkpoint already" in capsys.readouterr().err

    # transformers alone would leave the connector behind
    with pytest.raises(UserError, match="holds only what was trained; load it with"):
        AutoModelForImageTextToText.from_pretrained(instruct)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")

    # the run can be moved, as a whole
    expected = logits(instruct)
    run.rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "instruct"
    assert torch.equal(logits(moved), expected)

    # killed after its last step, before the end was written: the note is right there, too
    (moved / NOTE).unlink()
    copy_model(newest(moved / "checkpoints"), moved)
    assert json.loads((moved / NOTE).read_text())["folder"] == "../align"
    assert torch.equal(logits(moved), expected)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_going_on_from_a_checkpoint_changes_no_bit(wide, write_recipe, tmp_path, quantization):
    if quantization:
        pytest.importorskip("bitsandbytes")
        wide["model"]["quantization"] = quantization
        wide["stages"][0]["training"]["optim"] = "paged_adamw_8bit"
    wide["stages"][0]["adapter"] |= {"rank": 64, "dropout": 0.1, "dora": True}
    wide["stages"][0]["training"] |= {"save_total_limit": 9, "weight_decay": 0.1}
    recipe, folder = write_recipe(wide), tmp_path / "run" / "instruct"
    assert main(["train", str(recipe)]) == 0
    whole, log = (folder / WEIGHTS).read_bytes(), read_log(folder / "training_log.jsonl")
    for path in (folder / "manifest.json", folder / WEIGHTS):
        path.unlink()
    for step in (6, 8):
        (folder / "checkpoints" / f"checkpoint-{step}" / "complete.json").unlink()
    assert main(["train", str(recipe)]) == 0
    again = read_log(folder / "training_log.jsonl")
    assert [line["loss"] for line in again] == [line["loss"] for line in log]
    assert (folder / WEIGHTS).read_bytes() == whole


def test_frozen_weights_that_are_gone_or_others(adapted, write_recipe, tmp_path, capsys, logits):
    assert main(["train", str(write_recipe(adapted))]) == 0
    align, instruct = tmp_path / "run" / "align", tmp_path / "run" / "instruct"
    align.rename(tmp_path / "run" / "away")
    with pytest.raises(UserError, match=r"its frozen weights were in .*align, which has none now"):
        load_model(instruct)
    words = ["chat", str(instruct), "--prompt", "What?"]
    assert main(words) == 2
    assert "write their new place as 'folder'" in capsys.readouterr().err
    note = json.loads((instruct / NOTE).read_text())
    (instruct / NOTE).write_text(json.dumps({**note, "folder": str(tmp_path / "run" / "away")}))
    assert main(words) == 0

    path = tmp_path / "run" / "away" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"trained on the frozen weights in .*away, but those are"):
        load_model(instruct)


def test_new_parts_are_written_once_as_the_base(alone, write_recipe, tmp_path, logits):
    alone["model"]["dtype"] = "bfloat16"
    assert main(["train", str(write_recipe(alone))]) == 0
    instruct = tmp_path / "run" / "instruct"
    assert read_base(newest(instruct / "checkpoints")).folder == str(instruct / "base")
    assert load_file(instruct / "base" / "model.safetensors")["lm_head.weight"].dtype == (
        torch.bfloat16
    )
    assert {tensor.dtype for tensor in load_file(instruct / WEIGHTS).values()} == {torch.float32}
    model, _ = load_model(instruct, dtype="float32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    merged, _ = load_model(instruct, merged=True)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_a_stage_after_one_with_an_adapter_begins_with_it_merged(
    alone, write_recipe, tmp_path, logits
):
    first = alone["stages"][0]
    second = {**first, "name": "more", "trainable": {"language_model": 1e-9}}
    third = {**second, "name": "full", "trainable": {"connector": 1e-9}, "adapter": None}
    alone["stages"] += [second, third]
    assert main(["train", str(write_recipe(alone))]) == 0
    run = tmp_path / "run"
    assert read_base(run / "more").folder == str(run / "more" / "base")
    assert (run / "full" / "model.safetensors").exists()
    for name in ("more", "full"):
        torch.testing.assert_close(logits(run / name), logits(run / "instruct"), **CLOSE)


def test_peft_itself_loads_the_folder(adapted, write_recipe, tmp_path, logits, make_image):
    from peft import PeftModel

    assert main(["train", str(write_recipe(adapted))]) == 0
    run = tmp_path / "run"
    model, processor = load_model(run / "align", device="cpu")
    wrapped = PeftModel.from_pretrained(model, run / "instruct").eval()
    text = f"{processor.image_token} What?"
    inputs = processor(text=text, images=[make_image()], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(wrapped(**inputs).logits, logits(run / "instruct"), **CLOSE)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_quantised_weights(wide, write_recipe, tmp_path, capsys, logits, kind):
    pytest.importorskip("bitsandbytes")
    wide["model"]["quantization"] = kind
    wide["stages"][0]["trainable"]["vision_tower"] = 1e-4
    assert main(["train", str(write_recipe(wide))]) == 0
    assert f"14 linear layers in {kind}, an adapter beside 14" in capsys.readouterr().out
    instruct = tmp_path / "run" / "instruct"
    model, _ = load_model(instruct)
    assert len(quantized_linears(model)) == 14
    assert main(["merge", str(instruct), "--out", str(tmp_path / "merged")]) == 0
    theirs, ours = logits(tmp_path / "merged"), logits(instruct)
    # int8 rounds the inputs of a layer too, which nothing merged does
    assert (theirs - ours).norm() < {"nf4": 1e-4, "int8": 2e-2}[kind] * ours.norm()
    merged, base = load_model(tmp_path / "merged")[0], load_model(instruct / "base")[0]
    assert merged.state_dict().keys() == base.state_dict().keys()


def test_a_connector_alone_beside_quantised_weights(wide, write_recipe, tmp_path, logits):
    pytest.importorskip("bitsandbytes")
    wide["model"]["quantization"] = "nf4"
    second = wide["stages"][0]
    first = {**second, "name": "align", "trainable": {"connector": 1e-3}, "adapter": None}
    wide["stages"] = [first, second]
    assert main(["train", str(write_recipe(wide))]) == 0
    run = tmp_path / "run"
    assert {own(name).split(".")[1] for name in load_file(run / "align" / WEIGHTS)} == {"connector"}
    assert not (run / "align" / "adapter_config.json").exists()
    assert logits(run / "align").shape == logits(run / "instruct").shape


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_an_optimizer_of_bitsandbytes_takes_our_groups(wide, write_recipe, tmp_path, name):
    pytest.importorskip("bitsandbytes")
    wide["stages"][0]["training"] |= {"optim": name, "max_steps": 4}
    wide["stages"][0]["adapter"]["rank"] = 64  # it keeps 8 bits of 4096 numbers or more
    assert main(["train", str(write_recipe(wide))]) == 0
    folder = tmp_path / "run" / "instruct"
    log = read_log(folder / "training_log.jsonl")
    assert log[-1]["loss"] < log[0]["loss"]
    rates = [log[0][f"learning_rate/{part}"] for part in ("connector", "language_model")]
    assert rates[1] == pytest.approx(5 * rates[0])
    path = newest(folder / "checkpoints") / "optimizer.pt"
    states = torch.load(path, weights_only=True)["state"].values()
    kept = [tensor for state in states for tensor in tensors(state) if torch.is_tensor(tensor)]
    assert any(tensor.dtype == torch.uint8 for tensor in kept) == name.endswith("8bit")


WRONG = {
    "misspelt": ({"rnk": 4}, "adapter has no field 'rnk' (did you mean 'rank'?)"),
    "rank": ({"rank": 0}, "adapter: rank must be at least 1, not 0"),
    "dropout": ({"dropout": 1.0}, "adapter: dropout must be at least 0 and below 1"),
    "type": ({"type": "ia3"}, "adapter: field 'type' must be one of 'lora'"),
    "targets": ({"targets": []}, "adapter: targets names no layer"),
}


@pytest.mark.parametrize(("fields", "sentence"), WRONG.values(), ids=WRONG)
def test_what_an_adapter_cannot_be(adapted, write_recipe, fields, sentence):
    adapted["stages"][1]["adapter"] |= fields
    with pytest.raises(UserError) as error:
        load_recipe(write_recipe(adapted))
    assert f"stages.instruct: {sentence}" in str(error.value)


def test_what_a_stage_cannot_have(adapted, write_recipe):
    def sentence(*words):
        with pytest.raises(UserError) as error:
            load_recipe(write_recipe(adapted), words)
        return str(error.value)

    adapted["model"]["quantization"] = "int8"
    for words in (["deepspeed", "zero3"], ["fsdp", "true"]):
        words = [f"--stages.align.training.{words[0]}", words[1]]
        assert "stages.align: training." in (told := sentence(*words))
        assert "would cut quantised weights" in told
    load_recipe(write_recipe(adapted), ["--stages.align.training.deepspeed", "zero2"])
    stage = adapted["stages"][1]
    assert "dora cannot stand beside int8" in sentence("--stages.instruct.adapter.dora", "true")
    chain = [{"type": "mlp"}, {"type": "partial_lora"}]
    adapted["model"] |= {"quantization": None, "connector": chain}
    load_recipe(write_recipe(adapted))
    assert "which dora would rescale" in sentence("--stages.instruct.adapter.dora", "true")
    adapted["model"]["connector"] = [{"type": "mlp"}, {"type": "visual_expert"}]
    assert "could not be merged; train without one" in sentence()
    adapted["model"]["connector"] = {"type": "mlp"}
    del stage["trainable"]["language_model"]
    assert "name language_model in trainable" in sentence()
    stage |= {"trainable": {"language_model": 1e-3}, "adapter": None}
    assert "give the stage an adapter" in sentence("--model.quantization", "nf4")


@pytest.mark.parametrize("name", ["peft", "bitsandbytes"])
def test_a_missing_library_names_the_extra(alone, write_recipe, capsys, monkeypatch, name):
    alone["model"]["quantization"] = "nf4"
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", str(write_recipe(alone)), "--check"]) == 2
    assert f"{name} is not installed; it comes with: make extras EXTRAS=train" in (
        capsys.readouterr().err
    )


def test_a_target_that_is_not_there(alone, write_recipe, capsys):
    alone["stages"][0]["adapter"]["targets"] = ["q_proj", "query"]
    assert main(["train", str(write_recipe(alone))]) == 2
    error = capsys.readouterr().err
    assert "targets names 'query', but no linear layer of the language model is called so" in error
    assert "down_proj, gate_proj, k_proj" in error
