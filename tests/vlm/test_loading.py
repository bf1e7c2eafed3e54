"""Do models load as they were saved, and is everything that is no checkpoint one clear sentence?"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlm
from connectors.float32 import float32_modules
from vlm.errors import UserError
from vlm.loading import assemble, check_checkpoint, load_model


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def test_a_saved_model_loads_with_its_processor(model_folder: Path, make_image) -> None:
    model, processor = load_model(model_folder)
    assert not model.training
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    encoded = processor.encode(messages, [make_image()], add_generation_prompt=True)
    batch = processor.collate([encoded], "left")
    assert model.generate(**batch, max_new_tokens=3).shape[1] > encoded["input_ids"].shape[0]
    half, _ = load_model(str(model_folder), dtype=torch.bfloat16, device="cpu")
    assert half.dtype == torch.bfloat16


def test_vlm_exports_what_it_says() -> None:
    assert vlm.load_model is load_model
    assert {name for name in vlm.__all__ if getattr(vlm, name) is not None} == set(vlm.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = vlm.nothing


def test_auto_classes_know_the_model_after_import_vlm(model_folder: Path) -> None:
    code = (
        "import sys, vlm; from transformers import AutoModelForImageTextToText, AutoProcessor;"
        "m = AutoModelForImageTextToText.from_pretrained(sys.argv[1]);"
        "p = AutoProcessor.from_pretrained(sys.argv[1]); print(type(m).__name__, type(p).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model_folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["VlmForConditionalGeneration", "VlmProcessor"]


def test_parts_from_folders(encoder_folder: Path, language_model_folder: Path, tmp_path) -> None:
    model, processor = assemble(
        {"type": "transformers", "source": str(encoder_folder)},
        {"type": "linear"},
        language_model_folder,
        tiling={"type": "pad"},
        chat_template="vicuna_v1",
        dtype="bfloat16",
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.generation_config.eos_token_id == [processor.tokenizer.eos_token_id]
    # The folder is complete: nothing of where the parts came from is needed to load it.
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_generation_stops_at_the_end_of_turn(make_model) -> None:
    model, processor = make_model(chat_template="chatml")
    tokenizer = processor.tokenizer
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert model.generation_config.eos_token_id == sorted(stops)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def spoil(folder: Path, kind: str) -> None:
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "broken config":
        (folder / "config.json").write_text("{")
    elif kind == "truncated weights":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif kind == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif kind == "no processor":
        (folder / "processor_config.json").unlink()
    elif kind == "missing weights":
        weights = load_file(folder / "model.safetensors")
        del weights["model.connector.layers.0.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "weights of another shape":
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["hidden_size"] *= 2
        (folder / "config.json").write_text(json.dumps(config))


KINDS = {
    "no config": "no config.json",
    "no weights": "safetensors",
    "broken config": "config.json",
    "truncated weights": "cannot be loaded",
    "no tokenizer": "no tokenizer_config.json",
    "no processor": "no processor_config.json",
    "weights of another shape": "another shape than config.json says",
    "missing weights": "1 weights are missing, such as model.connector",
}


@pytest.mark.parametrize("kind", KINDS)
def test_spoilt_folders_are_one_sentence(kind: str, copy: Path) -> None:
    spoil(copy, kind)
    with pytest.raises(UserError) as error:
        load_model(copy)
    assert KINDS[kind] in str(error.value) and str(copy) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_checkpoint(
    language_model_folder: Path, model_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="'llama' model"):
        check_checkpoint(language_model_folder)
    with pytest.raises(UserError, match="is a file"):
        check_checkpoint(model_folder / "config.json")
    with pytest.raises(UserError, match="neither a folder"):
        check_checkpoint(tmp_path / "nothing")
    (tmp_path / "run").mkdir()
    shutil.copytree(model_folder, tmp_path / "run" / "instruct")
    with pytest.raises(UserError, match=r"did you mean .*run/instruct\?"):
        check_checkpoint(tmp_path / "run")


def test_a_device_that_is_not_there(model_folder: Path) -> None:
    for device in ("cuda:99", "toaster"):
        with pytest.raises(UserError, match=device):
            load_model(model_folder, device=device)


def test_a_language_model_that_is_not_there(make_vision_encoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="language model"):
        assemble(make_vision_encoder(), {"type": "mlp"}, tmp_path, chat_template="chatml")


@pytest.mark.parametrize(
    "connector",
    [
        {"type": "kan"},
        {"type": "qformer", "num_queries": 2, "hidden_dim": 8, "num_layers": 2, "num_heads": 2},
    ],
    ids=lambda connector: connector["type"],
)
def test_what_a_connector_keeps_in_float32_is_loaded_so(make_model, tmp_path, connector):
    model, processor = make_model(connector=connector)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    half, _ = load_model(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    kept = float32_modules(half.model.connector, "connector")
    assert kept
    for name, tensor in half.model.state_dict().items():
        inside = any(name.startswith(f"{module}.") for module in kept)
        assert tensor.dtype == (torch.float32 if inside else torch.bfloat16), name
