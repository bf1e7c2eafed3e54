"""Which tiny parts do the tests build models from? Everything here is random, small and fast."""

import vlm  # noqa: F401  # isort: skip - before transformers: it mends torchvision's import

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from vlm.caption_tokenizer import count_caption_tokenizer
from vlm.encoders import VisionEncoder, build_vision_encoder
from vlm.loading import assemble
from vlm.modeling import VlmForConditionalGeneration
from vlm.processing import VlmProcessor

TEXT_DIM = 32
VIEW_SIZE = 32  # pixels
PATCH_SIZE = 8  # so a view is a grid of 4 x 4 features
VOCAB_SIZE = 259  # 256 bytes and 3 special tokens

VISION_CONFIG = {
    "type": "transformers",
    "layer": "last",
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.3, 0.25, 0.2],
    "architecture": {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": VIEW_SIZE,
        "patch_size": PATCH_SIZE,
    },
}


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of every later collection of garbage: 0.4 s each else."""
    gc.collect()
    gc.freeze()


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _language_model(kind: str = "llama", tied: bool = False, **changes: Any) -> PreTrainedModel:
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": TEXT_DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 2 * TEXT_DIM,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }
    if kind == "gpt2":  # always tied
        common["tie_word_embeddings"] = True
        del common["intermediate_size"]
    configs = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "gpt_neox": GPTNeoXConfig,
        "gpt2": GPT2Config,
    }
    if kind in ("llama", "qwen2"):
        common["num_key_value_heads"] = 2
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configs[kind](**common))


def _vision_encoder() -> VisionEncoder:
    torch.manual_seed(1)
    return build_vision_encoder(VISION_CONFIG)


def _two_encoders(**fields: Any) -> VisionEncoder:
    finer = {**VISION_CONFIG["architecture"], "image_size": 2 * VIEW_SIZE, "hidden_size": 16}
    torch.manual_seed(1)
    encoders = [VISION_CONFIG, {**VISION_CONFIG, "architecture": finer}]
    return build_vision_encoder({"type": "several", "encoders": encoders, **fields})


def _model(
    tiling: dict[str, Any] | None = None,
    chat_template: str = "chatml",
    kind: str = "llama",
    tied: bool = False,
    connector: dict[str, Any] | None = None,
    vision_encoder: VisionEncoder | None = None,
    **changes: Any,
) -> tuple[VlmForConditionalGeneration, VlmProcessor]:
    encoder = vision_encoder or _vision_encoder()
    language_model = _language_model(kind, tied, **changes)
    torch.manual_seed(2)
    model, processor = assemble(
        encoder,
        connector or {"type": "mlp"},
        language_model,
        tiling=tiling,
        tokenizer=_tokenizer(),
        chat_template=chat_template,
    )
    return model.eval(), processor


def _image(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """() -> a byte-level tokenizer of 259 tokens, eos `</s>`, without a chat template."""
    return _tokenizer


@pytest.fixture(scope="session")
def make_language_model() -> Callable[..., PreTrainedModel]:
    """(kind="llama"|"qwen2"|"gpt_neox"|"gpt2", tied=False, **config) -> a 2-layer causal LM."""
    return _language_model


@pytest.fixture(scope="session")
def make_vision_encoder() -> Callable[..., VisionEncoder]:
    """() -> a 2-layer SigLIP of 32-pixel views and 4 x 4 patches."""
    return _vision_encoder


@pytest.fixture(scope="session")
def make_two_encoders() -> Callable[..., VisionEncoder]:
    """(**fields) -> two SigLIPs side by side, of 4 x 4 and 8 x 8 features."""
    return _two_encoders


@pytest.fixture(scope="session")
def make_model() -> Callable[..., tuple[VlmForConditionalGeneration, VlmProcessor]]:
    """(tiling, chat_template, kind, tied, connector, vision_encoder, **LM config) -> both."""
    return _model


@pytest.fixture(scope="session")
def make_image() -> Callable[..., Image.Image]:
    """(width, height, seed) -> an RGB image of noise."""
    return _image


def _clip(path: Path, num_frames: int = 30, **changes: Any) -> Path:
    """Write a clip of 64 x 48 whose frames show their numbers, a bit a bar; see `frame_number`."""
    av = pytest.importorskip("av")
    from fractions import Fraction

    options = {"codec": "libx264", "pix_fmt": "yuv420p", "rate": 25, "gop": 10, "b_frames": 2}
    options |= {"times_ms": None, "rotation": None, "aspect": None, **changes}
    # keyframes where `gop` says, not where the picture changes
    extra = {"sc_threshold": "0"} if options["codec"] == "libx264" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(options["codec"], rate=options["rate"], options=extra)
        stream.width, stream.height, stream.pix_fmt = 64, 48, options["pix_fmt"]
        stream.gop_size = options["gop"]
        stream.max_b_frames = options["b_frames"]
        if options["aspect"] is not None:
            stream.codec_context.sample_aspect_ratio = options["aspect"]
        if options["rotation"] is not None:
            stream.set_display_rotation(options["rotation"])
        if options["times_ms"] is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            bits = [number >> place & 1 for place in range(8)]
            row = np.repeat(np.array(bits, np.uint8) * 255, 8)
            pixels = np.broadcast_to(row[None, :, None], (48, 64, 3)).copy()
            pixels[:16, 56:] = (255, 0, 0)  # the top right corner, to see turns
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            if options["times_ms"] is not None:
                frame.pts, frame.time_base = options["times_ms"][number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Path]:
    """(path, num_frames=30, codec, pix_fmt, rate, gop, b_frames, times_ms, rotation, aspect)."""
    return _clip


@pytest.fixture(scope="session")
def frame_number() -> Callable[[Image.Image], int]:
    """(frame of `make_clip`) -> its number."""

    def read(image: Image.Image) -> int:
        bars = np.asarray(image.convert("L"))[40]
        return sum(int(bars[8 * place + 4] > 127) << place for place in range(8))

    return read


@pytest.fixture(scope="session")
def bert_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a WordPiece tokenizer as BERT's, of letters alone: 61 tokens."""
    folder = tmp_path_factory.mktemp("bert")
    count_caption_tokenizer(["a quick brown fox jumps over the lazy dog ? ."], 0).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `load_vision_encoder({"type": "transformers", "source": ...})` reads."""
    folder = tmp_path_factory.mktemp("encoder")
    _vision_encoder().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def language_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of 2 layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("language_model")
    _language_model().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved vision-language model: chatml, resize tiling, 16 tokens per image."""
    folder = tmp_path_factory.mktemp("model")
    model, processor = _model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
