"""How is a model made: from a checkpoint folder, or from parts?"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

import vlm.registration  # noqa: F401 - loading needs the Auto classes to know this model
from connectors import ConnectorChoice, text_source, view_token_grid
from vlm.adapters import merge_adapter
from vlm.chat_templates import CHAT_TEMPLATES
from vlm.configuration import VlmConfig
from vlm.encoders import load_vision_encoder
from vlm.encoders.base import VisionEncoder
from vlm.errors import UserError
from vlm.hub import check_reach
from vlm.image_processing import VlmImageProcessor
from vlm.internlm2 import is_internlm2, load_internlm2
from vlm.long_context import scale_positions
from vlm.modeling import VlmForConditionalGeneration
from vlm.on_base import load_trained, read_base, stands_on_base
from vlm.processing import VlmProcessor
from vlm.tiling import build_tiling, tiling_config
from vlm.video_layout import parse_video

__all__ = [
    "VlmConfig",
    "VlmForConditionalGeneration",
    "VlmProcessor",
    "assemble",
    "load_model",
    "load_weights",
]

M = TypeVar("M", bound=PreTrainedModel)


def load_model(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    merged: bool = False,
) -> tuple[VlmForConditionalGeneration, VlmProcessor]:
    """Load a checkpoint for use: in eval mode, on a device.

    Args:
        source: a folder written by `save_pretrained`, or a Hub id. Where it holds only what was
            trained, its frozen weights are loaded with it, quantised as they were.
        dtype: None keeps the checkpoint's.
        device: None: a GPU if there is one.
        merged: make a plain model of one with an adapter or quantised weights.

    Raises:
        UserError: the source is not a checkpoint of this suite.
    """
    check_checkpoint(source)
    device = usable_device(device)
    try:
        processor = VlmProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be loaded: {_first_line(error)}") from error
    if stands_on_base(source):
        model: Any = _load_on_base(Path(source), dtype, merged)
    else:
        model = load_weights(VlmForConditionalGeneration, source, dtype)
    return model.to(device).eval(), processor


def _load_on_base(
    source: Path, dtype: torch.dtype | str | None, merged: bool
) -> VlmForConditionalGeneration:
    """Return the model of a folder that holds only what was trained; see `load_model`."""
    base = read_base(source)
    wanted: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = load_weights(VlmForConditionalGeneration, base.folder, wanted or base.dtype)
    plain_dtype = model.dtype
    load_trained(model, base, source, wanted, merged)
    if not merged:
        model.on_base = base
        return model
    if model._hf_peft_config_loaded:
        merge_adapter(model)
    return cast(Any, model).to(plain_dtype)


def load_weights(
    model_class: type[M], source: str | Path, dtype: torch.dtype | str | None = None
) -> M:
    """Return the model of a checkpoint, on the CPU, with every weight that it has and no other.

    Args:
        model_class: what the checkpoint is known to hold.
        source: a folder written by `save_pretrained`, or a Hub id.
        dtype: None keeps the checkpoint's.

    Raises:
        UserError: weights cannot be read, are missing, left over, or of another shape.
    """
    try:
        with _quiet():  # its report of wrong weights is a screenful; ours is a sentence
            loaded: Any = model_class.from_pretrained(
                source,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{source} cannot be loaded: {_first_line(error)}") from error
    model, report = loaded
    _check_report(source, report)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers log errors only."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_report(source: str | Path, report: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit: transformers would go on with random ones.

    Raises:
        UserError: weights are missing, left over, or of another shape than the config says.
    """
    wrong = {
        "are missing": sorted(report["missing_keys"]),
        "are not of this model": sorted(report["unexpected_keys"]),
        "have another shape than config.json says": sorted(k[0] for k in report["mismatched_keys"]),
    }
    for what, names in wrong.items():
        if names:
            raise UserError(
                f"{source} cannot be loaded: {len(names)} weights {what}, such as {names[0]}"
            )


def usable_device(device: torch.device | str | None) -> torch.device:
    """Return the device asked for, or the best one here.

    Raises:
        UserError: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device} cannot be used: {_first_line(error)}") from error
    return torch.device(device)


def check_checkpoint(source: str | Path) -> None:
    """Say early and in one sentence why a source is not a checkpoint of this suite.

    Raises:
        UserError: it does not exist, has no config, no weights, or is another kind of model.
    """
    path = Path(source)
    if path.is_file():
        raise UserError(f"{source} is a file; give the folder of a checkpoint")
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = checkpoint_hint(path)
            raise UserError(f"{source} is no checkpoint: it has no config.json{hint}")
        if not any(path.glob("*.safetensors")):
            raise UserError(f"{source} is no complete checkpoint: it has no *.safetensors file")
    try:
        check_reach(source)
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        if path.is_dir():
            raise UserError(
                f"{path / 'config.json'} cannot be read: {_first_line(error)}"
            ) from error
        raise UserError(
            f"{source} is neither a folder here nor a model that can be fetched from the Hub"
        ) from error
    if not isinstance(config, VlmConfig):
        raise UserError(
            f"{source} is a {config.model_type!r} model, not a vision-language model of this suite"
        )
    for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json"):
        if path.is_dir() and not (path / name).is_file():
            raise UserError(f"{source} is no complete checkpoint: it has no {name}")


def checkpoint_hint(folder: Path) -> str:
    """Return where in a run's folder the checkpoints are, as the end of a sentence."""
    marker = f'"model_type": "{VlmConfig.model_type}"'
    configs = sorted(folder.glob("*/config.json"))
    inside = [path.parent for path in configs if marker in path.read_text(errors="replace")]
    if not inside:
        return ""
    latest = max(inside, key=lambda path: (path / "config.json").stat().st_mtime)
    return f"; did you mean {latest}?"


def assemble(
    vision_encoder: VisionEncoder | Mapping[str, Any],
    connector: ConnectorChoice,
    language_model: PreTrainedModel | str | Path,
    tiling: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template: str | None = None,
    dtype: torch.dtype | str | None = None,
    video: Mapping[str, Any] | None = None,
    rope_factor: float | None = None,
) -> tuple[VlmForConditionalGeneration, VlmProcessor]:
    """Join an encoder, a new connector and a language model into a model and its processor.

    Args:
        vision_encoder: a loaded encoder, or a config for `load_vision_encoder`.
        connector: `{"type": ..., fields}`, or a list of them (connectors/chain.py).
        language_model: a loaded `AutoModelForCausalLM`, or a folder or Hub id of one.
        tiling: `{"type": ..., fields}`; None: one stretched view.
        tokenizer: the language model's; None: from the same folder or id. It is changed.
        chat_template: a name of `vlm.chat_templates`; None keeps the tokenizer's own.
        dtype: of all parts; None keeps each part's own.
        video: fields of `VideoConfig`: how videos are looked at; None: the defaults.
        rope_factor: positions are divided by it, and so many times as many are known; see
            `vlm.long_context`.

    Raises:
        UserError: a part cannot be found, or the parts do not fit.
    """
    if isinstance(vision_encoder, Mapping):
        vision_encoder = load_vision_encoder(vision_encoder)
    if not isinstance(language_model, PreTrainedModel):
        language_model, tokenizer = _load_language_model(language_model, tokenizer)
    if tokenizer is None:
        raise UserError("a loaded language model needs its tokenizer beside it")
    if rope_factor is not None:
        scale_positions(language_model, rope_factor)
    if dtype is not None:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        vision_encoder.to(dtype)
        language_model.to(dtype)  # pyright: ignore[reportArgumentType]

    resolved_video = None if video is None else asdict(parse_video(video))
    resolved_tiling = tiling_config(build_tiling(tiling or {"type": "resize"}))
    image_processor = VlmImageProcessor(
        view_size=vision_encoder.image_size,
        view_token_grid=view_token_grid(connector, vision_encoder.grids),
        tiling=resolved_tiling,
        image_mean=vision_encoder.image_mean,
        image_std=vision_encoder.image_std,
        video=resolved_video,
    )
    processor = VlmProcessor.prepare(
        tokenizer, image_processor, chat_template, text_source(connector)
    )
    model = VlmForConditionalGeneration.from_components(
        vision_encoder,
        connector,
        language_model,
        resolved_tiling,
        image_token_id=processor.image_token_id,
        vocab_size=len(tokenizer),
        video=resolved_video,
    )
    set_stop_tokens(model, tokenizer, chat_template)
    return model, processor


def set_stop_tokens(
    model: VlmForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
) -> None:
    """Let generation stop at eos and at the template's end-of-turn, and pad with the pad token."""
    known = model.generation_config.eos_token_id
    stops: list[Any] = [] if known is None else [known] if isinstance(known, int) else list(known)
    stops.append(tokenizer.eos_token_id)
    end_of_turn = None if chat_template is None else CHAT_TEMPLATES[chat_template].end_of_turn
    if end_of_turn is not None:
        stops.append(tokenizer.convert_tokens_to_ids(end_of_turn))
    model.generation_config.eos_token_id = sorted(set(stops))
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def _load_language_model(
    source: str | Path, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a language model and, if none is given, its tokenizer."""
    try:
        check_reach(source)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
        if is_internlm2(source):
            return load_internlm2(source), tokenizer
        return AutoModelForCausalLM.from_pretrained(source, dtype="auto"), tokenizer
    except UserError:
        raise  # it is a ValueError too
    except (OSError, ValueError) as error:
        raise UserError(
            f"the language model {source} cannot be loaded: it is neither a folder with a model's "
            "config.json, weights and tokenizer nor a model on the hub that can be reached "
            f"({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
