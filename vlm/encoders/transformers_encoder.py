"""How does a vision model of transformers become a VisionEncoder?

Shapes: T views, S image size, H W feature grid, D encoder width, P prefix tokens.

Surprises:
- The config is cut to the layers asked for before the model is built, so the others never exist.
- CLIP's `last_hidden_state` has NOT been through the final norm; the other families' has.
- `hidden_states` holds one entry more than there are layers: entry 0 is the input of the first.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from vlm.encoders.base import (
    EncoderConfig,
    VisionEncoder,
    fill,
    missing_weights,
)
from vlm.errors import UserError
from vlm.hub import check_reach


@dataclass(frozen=True)
class Family:
    """What differs between the vision models of transformers."""

    model: str  # class in transformers
    processor: str  # class of image processor its published checkpoints name
    norm: str  # attribute of the final norm
    norm_inside: bool  # whether `last_hidden_state` has been through it
    class_token: bool
    registers: bool = False  # whether the config has `num_register_tokens`
    interpolate: bool = False  # whether another image size has to be announced to `forward`
    unused: tuple[str, ...] = ()  # parameters that make no features
    overrides: tuple[tuple[str, Any], ...] = ()  # config fields that drop unused heads


# By `model_type` of the vision config, exact.
FAMILIES: dict[str, Family] = {
    "clip_vision_model": Family(
        "CLIPVisionModel", "CLIPImageProcessor", "post_layernorm", False, True, interpolate=True
    ),
    "siglip_vision_model": Family(
        "SiglipVisionModel",
        "SiglipImageProcessor",
        "post_layernorm",
        True,
        False,
        interpolate=True,
        overrides=(("vision_use_head", False),),
    ),
    "dinov2": Family(
        "Dinov2Model",
        "BitImageProcessor",
        "layernorm",
        True,
        True,
        unused=("embeddings.mask_token",),
    ),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel",
        "BitImageProcessor",
        "layernorm",
        True,
        True,
        registers=True,
        unused=("embeddings.mask_token",),
    ),
    "internvl_vision": Family(
        "InternVLVisionModel",
        "GotOcr2ImageProcessor",
        "layernorm",
        True,
        True,
        overrides=(("use_mask_token", False),),
    ),
}

# Names of the vision part inside checkpoints of whole vision-language models.
PREFIXES = {r"^(model\.)?(vision_tower|vision_model)\.(vision_model\.)?": ""}
# Not part of the architecture.
NOT_ARCHITECTURE = ("_name_or_path", "architectures", "dtype", "transformers_version")


@dataclass(frozen=True, kw_only=True)
class TransformersEncoderConfig(EncoderConfig):
    """A vision model of transformers; `architecture` is its vision config as a dict."""

    architecture: dict | None = None


class TransformersEncoder(VisionEncoder[TransformersEncoderConfig]):
    """CLIP, SigLIP, DINOv2 (with or without registers) and InternViT as transformers has them."""

    type_name = "transformers"
    config_class = TransformersEncoderConfig

    def __init__(self, config: TransformersEncoderConfig, model: Any = None) -> None:
        """Build the model, or take a loaded one, and drop what makes no features."""
        super().__init__(config)
        model_config = _model_config(config)
        self.family = FAMILIES[model_config.model_type]
        self.model = _model_class(self.family)(model_config) if model is None else model
        self.normed = config.layer == "last"
        if not self.normed:
            setattr(self.model, self.family.norm, nn.Identity())
        for name in self.family.unused:
            path, _, attribute = name.rpartition(".")
            part = self.model.get_submodule(path)
            delattr(part, attribute)
            # No parameter and no values, but still a tensor: transformers fills it when it loads.
            setattr(part, attribute, torch.empty(0))
        depth = model_config.num_hidden_layers
        # Entries of the cut model's `hidden_states`.
        self.entries = [depth + k - max(config.layers) for k in config.layers]
        self.num_prefix_tokens = int(self.family.class_token)
        if self.family.registers:
            self.num_prefix_tokens += model_config.num_register_tokens
        assert config.image_size is not None
        self.patches_per_side = config.image_size // _side(model_config.patch_size)
        # DINOv2 and InternViT resample their positions whenever the size is another.
        resampled = config.image_size != _side(model_config.image_size)
        self.forward_options = (
            {"interpolate_pos_encoding": True} if self.family.interpolate and resampled else {}
        )
        self.settle(config)

    @classmethod
    def resolve(cls, config: TransformersEncoderConfig) -> TransformersEncoderConfig:
        """Return the config with architecture, size, mean and std read from the source."""
        found: dict[str, Any] = {}
        architecture = config.architecture
        if architecture is None:
            architecture = found["architecture"] = _read_architecture(config.source)
        _family(architecture.get("model_type"), config.source)
        found["image_size"] = _side(_read_config(architecture).image_size)
        if config.image_mean is None or config.image_std is None:
            found |= _read_mean_std(config.source)
        filled, patch = fill(config, found), _side(_read_config(architecture).patch_size)
        if filled.image_size is not None and filled.image_size < patch:
            raise UserError(
                f"vision encoder 'transformers': image_size {filled.image_size} is smaller than a "
                f"patch of {patch} pixels"
            )
        return filled

    @classmethod
    def load(cls, config: TransformersEncoderConfig, dtype: torch.dtype) -> Self:
        """Return the encoder with the weights of a hub id or folder, vision part only."""
        config = cls.resolve(config)
        model_config = _model_config(config)
        model_class = _model_class(FAMILIES[model_config.model_type])
        try:
            with _quiet():
                model, info = model_class.from_pretrained(
                    config.source,
                    config=model_config,
                    dtype=dtype,
                    key_mapping=PREFIXES,
                    output_loading_info=True,
                )
        except (OSError, RuntimeError) as error:
            raise _unreadable(config.source, error) from error
        encoder = cls(config, model)
        wanted = encoder.model.state_dict()
        if missing := sorted(set(info["missing_keys"]) & set(wanted)):
            raise missing_weights(str(config.source), missing)
        return encoder

    def extract(self, pixel_values: Tensor) -> Sequence[Tensor]:
        """Return the feature maps (T, H, W, D) of pictures (T, 3, S, S), prefix tokens dropped."""
        several = len(self.entries) > 1
        options = {**self.forward_options, "output_hidden_states": several}
        output = self.model(pixel_values=pixel_values, **options)
        states = [output.last_hidden_state]
        if several:
            states = [output.hidden_states[entry] for entry in self.entries]
        elif self.normed and not self.family.norm_inside:
            states = [self.model.get_submodule(self.family.norm)(states[0])]
        side = self.patches_per_side
        # (T, P + H * W, D) -> (T, H, W, D)
        return [s[:, self.num_prefix_tokens :].unflatten(1, (side, side)) for s in states]

    def save_weights(self, folder: Path) -> None:
        """Write what `from_pretrained` of transformers and its image processors read."""
        with _quiet():
            self.model.save_pretrained(folder)
        size = {"height": self.image_size, "width": self.image_size}
        processor = {
            "image_processor_type": self.family.processor,
            "do_resize": True,
            "size": size,
            "do_center_crop": False,
            "crop_size": size,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }
        text = json.dumps(processor, indent=2)
        (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def _side(size: int | Sequence[int]) -> int:
    """Return one side of a square given as a number or as a pair."""
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise UserError(f"vision encoder: only square images and patches are known, not {size}")
    return size[0]


def _family(model_type: Any, source: str | None) -> Family:
    """Return the family of a vision config's model type."""
    if model_type not in FAMILIES:
        raise UserError(
            f"vision encoder 'transformers': {source or 'architecture'} is of model type "
            f"{model_type!r}, which has no adapter; known are {', '.join(FAMILIES)}, alone or as "
            "the vision part of a larger model (timm has many others)"
        )
    return FAMILIES[model_type]


def _model_class(family: Family) -> Any:
    """Return the model class; transformers imports it only now."""
    return getattr(transformers, family.model)


def _read_config(architecture: dict[str, Any]) -> PreTrainedConfig:
    """Return the config object of a vision config's dict."""
    values = dict(architecture)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"vision encoder 'transformers': bad architecture: {reason}") from error


def _model_config(config: TransformersEncoderConfig) -> PreTrainedConfig:
    """Return the config of the model that is built: cut to the layers asked for."""
    assert config.architecture is not None
    model_config = _read_config(config.architecture)
    depth = model_config.num_hidden_layers
    if min(config.layers) < -depth:
        raise UserError(
            f"vision encoder: layer {min(config.layers)} of {config.source or 'the architecture'} "
            f"does not exist; it has {depth} layers, -{depth} to -1"
        )
    model_config.num_hidden_layers = depth + 1 + max(config.layers)
    for name, value in FAMILIES[model_config.model_type].overrides:
        setattr(model_config, name, value)
    return model_config


def _read_architecture(source: str | None) -> dict[str, Any]:
    """Return the vision config of a hub id or folder as a dict."""
    if source is None:
        raise UserError("vision encoder 'transformers' needs a 'source' or an 'architecture'")
    try:
        check_reach(source)
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise _unreadable(source, error) from error
    if "vision_config" in config.sub_configs:
        config = config.vision_config
    values = {"model_type": config.model_type, **json.loads(config.to_json_string(use_diff=False))}
    return {k: v for k, v in values.items() if k not in NOT_ARCHITECTURE}


def _read_mean_std(source: str | None) -> dict[str, tuple[float, ...]]:
    """Return mean and std of the source's image processor, as far as it has them."""
    if source is None:
        return {}
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except OSError:
        return {}  # `fill` says which field is missing and where to set it
    names = ("image_mean", "image_std")
    return {name: tuple(values[name]) for name in names if values.get(name) is not None}


def _unreadable(source: str | None, error: Exception) -> UserError:
    """Return the error for a source that is no checkpoint of transformers."""
    reason = str(error).strip().partition("\n")[0]
    return UserError(
        f"vision encoder 'transformers': cannot load {source!r}: it is neither a folder with a "
        f"model's config.json and weights nor a model on the hub that can be reached ({reason})"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back bars and the report of unused weights: the text part, and layers not built."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
