"""What would the `config.json` of a published language model say, where there is no network?

Fields are those of each model's config on the hub; the parameters of every row are tested by
building it on the meta device. A folder with a `config.json` needs no row here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.internlm2 import llama_config


@dataclass(frozen=True)
class Architecture:
    """One language model: the sizes, and fields that differ from the config class's defaults."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocab_size: int
    parameters: int  # tied embeddings counted once
    tied: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """Return the fields of the config class of transformers."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied,
            **self.fields,
        }


_HEAD_128 = {"head_dim": 128}
_HEAD_256 = {"head_dim": 256}
_LLAMA2_7B = Architecture("llama", 4096, 11008, 32, 32, 32, 32000, 6_738_415_616)
_LLAMA3_8B = Architecture("llama", 4096, 14336, 32, 32, 8, 128256, 8_030_261_248)
_LLAMA32_1B = Architecture("llama", 2048, 8192, 16, 32, 8, 128256, 1_235_814_400, tied=True)
_LLAMA32_3B = Architecture("llama", 3072, 8192, 28, 24, 8, 128256, 3_212_749_824, tied=True)
_MISTRAL_7B = Architecture("mistral", 4096, 14336, 32, 32, 8, 32000, 7_241_732_096)
_QWEN2_05B = Architecture("qwen2", 896, 4864, 24, 14, 2, 151936, 494_032_768, tied=True)
_QWEN2_15B = Architecture("qwen2", 1536, 8960, 28, 12, 2, 151936, 1_543_714_304, tied=True)
_QWEN2_7B = Architecture("qwen2", 3584, 18944, 28, 28, 4, 152064, 7_615_616_512)
_QWEN25_3B = Architecture("qwen2", 2048, 11008, 36, 16, 2, 151936, 3_085_938_688, tied=True)
_QWEN25_14B = Architecture("qwen2", 5120, 13824, 48, 40, 8, 152064, 14_770_033_664)
_QWEN25_32B = Architecture("qwen2", 5120, 27648, 64, 40, 8, 152064, 32_763_876_352)
_GEMMA_2B = Architecture("gemma", 2048, 16384, 18, 8, 1, 256000, 2_506_172_416, True, _HEAD_256)
_GEMMA_7B = Architecture("gemma", 3072, 24576, 28, 16, 16, 256000, 8_537_680_896, True, _HEAD_256)
_GEMMA2_2B = Architecture("gemma2", 2304, 9216, 26, 8, 4, 256000, 2_614_341_888, True, _HEAD_256)
_GEMMA2_9B = Architecture("gemma2", 3584, 14336, 42, 16, 8, 256000, 9_241_705_984, True, _HEAD_256)
_PHI3_MINI = Architecture("phi3", 3072, 8192, 32, 32, 32, 32064, 3_821_079_552)

# By the exact id on the hub; "-Instruct" and base models share a row.
ARCHITECTURES: dict[str, Architecture] = {
    "lmsys/vicuna-7b-v1.5": _LLAMA2_7B,
    "meta-llama/Llama-2-7b-hf": _LLAMA2_7B,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA2_7B,
    "lmsys/vicuna-13b-v1.5": Architecture("llama", 5120, 13824, 40, 40, 40, 32000, 13_015_864_320),
    "NousResearch/Nous-Hermes-2-Yi-34B": Architecture(
        "llama", 7168, 20480, 60, 56, 8, 64000, 34_388_917_248
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": Architecture(
        "llama", 2048, 5632, 22, 32, 4, 32000, 1_100_048_384
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Architecture(
        "llama", 576, 1536, 30, 9, 3, 49152, 134_515_008, tied=True
    ),
    "HuggingFaceTB/SmolLM2-360M-Instruct": Architecture(
        "llama", 960, 2560, 32, 15, 5, 49152, 361_821_120, tied=True
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": Architecture(
        "llama", 2048, 8192, 24, 32, 32, 49152, 1_711_376_384, tied=True
    ),
    "meta-llama/Meta-Llama-3-8B": _LLAMA3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA3_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA3_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3_8B,
    "meta-llama/Llama-3.2-1B": _LLAMA32_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA32_1B,
    "meta-llama/Llama-3.2-3B": _LLAMA32_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA32_3B,
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL_7B,
    "Qwen/Qwen2-0.5B": _QWEN2_05B,
    "Qwen/Qwen2-0.5B-Instruct": _QWEN2_05B,
    "Qwen/Qwen2-1.5B": _QWEN2_15B,
    "Qwen/Qwen2-1.5B-Instruct": _QWEN2_15B,
    "Qwen/Qwen2-7B": _QWEN2_7B,
    "Qwen/Qwen2-7B-Instruct": _QWEN2_7B,
    "Qwen/Qwen2.5-0.5B": _QWEN2_05B,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2_05B,
    "Qwen/Qwen2.5-1.5B": _QWEN2_15B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN2_15B,
    "Qwen/Qwen2.5-3B": _QWEN25_3B,
    "Qwen/Qwen2.5-3B-Instruct": _QWEN25_3B,
    "Qwen/Qwen2.5-7B": _QWEN2_7B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN2_7B,
    "Qwen/Qwen2.5-14B": _QWEN25_14B,
    "Qwen/Qwen2.5-14B-Instruct": _QWEN25_14B,
    "Qwen/Qwen2.5-32B": _QWEN25_32B,
    "Qwen/Qwen2.5-32B-Instruct": _QWEN25_32B,
    "Qwen/Qwen2.5-72B-Instruct": Architecture(
        "qwen2", 8192, 29568, 80, 64, 8, 152064, 72_706_203_648
    ),
    "Qwen/Qwen3-0.6B": Architecture(
        "qwen3", 1024, 3072, 28, 16, 8, 151936, 596_049_920, True, _HEAD_128
    ),
    "Qwen/Qwen3-1.7B": Architecture(
        "qwen3", 2048, 6144, 28, 16, 8, 151936, 1_720_574_976, True, _HEAD_128
    ),
    "Qwen/Qwen3-4B": Architecture(
        "qwen3", 2560, 9728, 36, 32, 8, 151936, 4_022_468_096, True, _HEAD_128
    ),
    "Qwen/Qwen3-8B": Architecture(
        "qwen3", 4096, 12288, 36, 32, 8, 151936, 8_190_735_360, False, _HEAD_128
    ),
    "Qwen/Qwen3-14B": Architecture(
        "qwen3", 5120, 17408, 40, 40, 8, 151936, 14_768_307_200, False, _HEAD_128
    ),
    "Qwen/Qwen3-32B": Architecture(
        "qwen3", 5120, 25600, 64, 64, 8, 151936, 32_762_123_264, False, _HEAD_128
    ),
    "microsoft/phi-2": Architecture("phi", 2560, 10240, 32, 32, 32, 51200, 2_779_683_840),
    "microsoft/Phi-3-mini-4k-instruct": _PHI3_MINI,
    "microsoft/Phi-3-mini-128k-instruct": _PHI3_MINI,
    "google/gemma-2b": _GEMMA_2B,
    "google/gemma-2b-it": _GEMMA_2B,
    "google/gemma-7b": _GEMMA_7B,
    "google/gemma-7b-it": _GEMMA_7B,
    "google/gemma-2-2b": _GEMMA2_2B,
    "google/gemma-2-2b-it": _GEMMA2_2B,
    "google/gemma-2-9b": _GEMMA2_9B,
    "google/gemma-2-9b-it": _GEMMA2_9B,
}


def text_config(source: str) -> Any:
    """Return the transformers config of a language model, from a folder, this table or the cache.

    Raises:
        UserError: a folder without a readable config, or an id that is not known here.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if source in ARCHITECTURES and not Path(source).is_dir():
        row = ARCHITECTURES[source]
        return AutoConfig.for_model(row.model_type, **row.values())
    try:
        values, _ = PreTrainedConfig.get_config_dict(source, local_files_only=True)
        if values.get("model_type") == "internlm2":
            return llama_config(values)
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.language_model: {source!r} is no folder with a config.json, nor one of the "
            f"{len(ARCHITECTURES)} published models that train/planning/architectures.py knows; "
            "nothing is fetched here"
        ) from error
    return config.get_text_config()
