"""Has every language model that is known by name the parameters that its makers publish?"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from train.planning.architectures import ARCHITECTURES, text_config
from vlm.errors import UserError

# Names that share a row are built once.
ROWS = {id(row): name for name, row in ARCHITECTURES.items()}
# Billions, from the model cards.
PUBLISHED = {
    "lmsys/vicuna-7b-v1.5": 6.74,
    "lmsys/vicuna-13b-v1.5": 13.0,
    "meta-llama/Llama-3.1-8B": 8.03,
    "meta-llama/Llama-3.2-1B": 1.24,
    "meta-llama/Llama-3.2-3B": 3.21,
    "mistralai/Mistral-7B-v0.1": 7.24,
    "Qwen/Qwen2-0.5B": 0.494,
    "Qwen/Qwen2-1.5B": 1.54,
    "Qwen/Qwen2-7B": 7.62,
    "Qwen/Qwen2.5-3B": 3.09,
    "Qwen/Qwen2.5-14B": 14.8,
    "Qwen/Qwen2.5-32B": 32.8,
    "Qwen/Qwen2.5-72B-Instruct": 72.7,
    "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-4B": 4.02,
    "Qwen/Qwen3-8B": 8.19,
    "Qwen/Qwen3-32B": 32.8,
    "microsoft/phi-2": 2.78,
    "microsoft/Phi-3-mini-4k-instruct": 3.82,
    "google/gemma-2b": 2.51,
    "google/gemma-7b": 8.54,
    "google/gemma-2-2b": 2.61,
    "google/gemma-2-9b": 9.24,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1.10,
}


@pytest.mark.parametrize("name", ROWS.values())
def test_built_as_the_row_says(name):
    config = text_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == ARCHITECTURES[name].parameters
    # Misspelt fields would be kept as extra ones without a word.
    assert set(ARCHITECTURES[name].values()) <= set(type(config)().to_dict())


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_published(name):
    assert ARCHITECTURES[name].parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)


def test_a_folder_says_it_itself(language_model_folder):
    assert text_config(str(language_model_folder)).num_hidden_layers == 2


def test_an_unknown_name_is_one_sentence():
    with pytest.raises(UserError, match=r"'no/such-model' is no folder with a config\.json"):
        text_config("no/such-model")
