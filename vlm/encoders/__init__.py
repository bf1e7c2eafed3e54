"""Which vision encoders are there, and how is one built or loaded from its config dict?"""

from collections.abc import Mapping
from typing import Any

import torch

from connectors.config import config_from_mapping
from connectors.registry import lookup
from vlm.encoders.base import EncoderConfig, VisionEncoder, saved_config, saved_type
from vlm.encoders.open_clip_encoder import OpenClipEncoder
from vlm.encoders.patches import PatchesEncoder
from vlm.encoders.presets import expand_preset, published_at
from vlm.encoders.several import SeveralEncoder
from vlm.encoders.timm_encoder import TimmEncoder
from vlm.encoders.transformers_encoder import TransformersEncoder
from vlm.encoders.vil import ViLEncoder
from vlm.encoders.vim import VimEncoder
from vlm.encoders.vmamba import VMambaEncoder
from vlm.errors import UserError

__all__ = [
    "VISION_ENCODERS",
    "VisionEncoder",
    "build_vision_encoder",
    "load_vision_encoder",
    "parse_encoder_config",
]

VISION_ENCODERS: dict[str, type[VisionEncoder]] = {
    "transformers": TransformersEncoder,
    "timm": TimmEncoder,
    "open_clip": OpenClipEncoder,
    "vim": VimEncoder,
    "vmamba": VMambaEncoder,
    "vil": ViLEncoder,
    "patches": PatchesEncoder,
    "several": SeveralEncoder,
}


def parse_encoder_config(config: Mapping[str, Any]) -> tuple[type[VisionEncoder], EncoderConfig]:
    """Return the adapter that a config names, and its checked config; loads nothing.

    Raises:
        UserError: unknown preset, type or field, or a value of the wrong type.
    """
    config = expand_preset(config)
    if isinstance(config, Mapping) and "type" not in config:
        config = {**saved_type(config.get("source")), **config}
    if not isinstance(config, Mapping) or not isinstance(config.get("type"), str):
        raise UserError(
            "vision_encoder must be a mapping with a 'preset', a 'type', or a 'source' that this "
            "suite saved, such as {preset: clip-l-336} or {type: timm, source: convnext_atto}, not "
            f"{config!r}; types are {', '.join(sorted(VISION_ENCODERS))}"
        )
    values = dict(config)
    name = values.pop("type")
    encoder_class = lookup("vision encoder", name, VISION_ENCODERS, group="vlm.encoders")
    where = f"vision encoder {name!r}"
    config_from_mapping(encoder_class.config_class, values, where)  # names the user's own fields
    merged = {**saved_config(values.get("source"), name), **values}
    return encoder_class, config_from_mapping(encoder_class.config_class, merged, where)


def build_vision_encoder(config: Mapping[str, Any]) -> VisionEncoder:
    """Build the encoder of `config` with new weights; without a network where it is resolved.

    Raises:
        UserError: unknown type, field or source, or a value of the wrong type.
    """
    encoder_class, parsed = parse_encoder_config(config)
    return encoder_class(encoder_class.resolve(parsed))


def load_vision_encoder(
    config: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> VisionEncoder:
    """Load the encoder of `config` with the weights of its `source`.

    Args:
        config: such as `{"type": "transformers", "source": "openai/clip-vit-large-patch14-336",
            "layer": -2}`; `source` is a hub id, a name of the library or a folder.
        dtype: of the weights.

    Raises:
        UserError: unknown type, field or source, missing weights, or a value of the wrong type.
    """
    encoder_class, parsed = parse_encoder_config(config)
    if parsed.source is None and encoder_class.needs_source:
        place = published_at(config)
        hint = f"; the weights of this preset are at {place}" if place else ""
        raise UserError(
            f"vision encoder {encoder_class.type_name!r} needs a 'source' to load from: "
            f"a name on the hub or in the library, a folder, or a published file{hint}"
        )
    return encoder_class.load(parsed, dtype)
