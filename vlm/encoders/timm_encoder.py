"""How does a timm model become a VisionEncoder?

Shapes: T views, S image size, H W feature grid, D encoder width.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm.encoders import timm_features
from vlm.encoders.base import CONFIG_FILE, EncoderConfig, VisionEncoder, fill, load_strict
from vlm.errors import UserError

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class TimmEncoderConfig(EncoderConfig):
    """A model of timm: by name, by `hf-hub:` id, or a folder; `model_args` build it."""

    architecture: str | None = None  # timm's name of the model, without the tag of the weights
    model_args: dict = field(default_factory=dict)  # such as {"depths": [1, 1, 2, 1]}


class TimmEncoder(VisionEncoder[TimmEncoderConfig]):
    """Any timm model with `forward_intermediates`."""

    type_name = "timm"
    config_class = TimmEncoderConfig
    gradient_checkpointing = False  # transformers sets it on every module that has it

    def __init__(self, config: TimmEncoderConfig, model: Any = None) -> None:
        """Build the model, or take a loaded one, and drop what makes no features."""
        super().__init__(config)
        assert config.architecture is not None
        name = config.architecture
        self.model = create(name, config) if model is None else model
        self.positions = timm_features.prune(self.model, config, name)
        self.normed = config.layer == "last"
        self.settle(config)

    @classmethod
    def resolve(cls, config: TimmEncoderConfig) -> TimmEncoderConfig:
        """Return the config with architecture, size, mean and std from timm's own records."""
        if config.architecture is None:
            config = fill_architecture(config)
        assert config.architecture is not None
        check_known(config.architecture)
        # The source may carry the tag of its weights: "convnext_atto.d2_in1k".
        tagged = read_record(config.source) if config.source and is_name(config.source) else {}
        return fill(config, tagged or read_record(config.architecture))

    @classmethod
    def load(cls, config: TimmEncoderConfig, dtype: torch.dtype) -> Self:
        """Return the encoder with the weights of a timm name, a hub id or a folder."""
        source = config.source
        assert source is not None
        if (Path(source) / CONFIG_FILE).is_file():
            encoder = cls(cls.resolve(config))
            load_strict(encoder.model, read_weights(Path(source) / WEIGHTS_FILE), source)
            return encoder.to(dtype)
        if config.architecture is None:
            config = fill_architecture(config)
        name = source if is_name(source) else f"local-dir:{source}"
        model = create(name, config, pretrained=True)
        return cls(fill(config, from_record(model.pretrained_cfg)), model).to(dtype)

    def extract(self, pixel_values: Tensor) -> Sequence[Tensor]:
        """Return the feature maps (T, H, W, D) of pictures (T, 3, S, S)."""
        timm_features.recompute(self.model, self.gradient_checkpointing and self.training)
        return timm_features.extract(self.model, pixel_values, self.positions, self.normed)

    def save_weights(self, folder: Path) -> None:
        """Write the weights under timm's names, and the name and arguments that build the model."""
        state = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        names = ("architecture", "model_args")
        text = json.dumps({"num_classes": 0, **{k: self.config[k] for k in names}}, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def is_name(source: str) -> bool:
    """Say whether the source is for timm to look up, not a folder."""
    if Path(source).is_dir():
        return False
    return source.startswith("hf-hub:") or "/" not in source


def fill_architecture(config: TimmEncoderConfig) -> TimmEncoderConfig:
    """Return the config with the name and arguments of the model that its source holds.

    Raises:
        UserError: no source, a folder that is missing or not of timm, or an unreachable hub id.
    """
    source = config.source
    if source is None:
        raise UserError("vision encoder 'timm' needs a 'source' or an 'architecture'")
    if is_name(source) and not source.startswith("hf-hub:"):
        return replace_architecture(config, source.partition(".")[0], {})
    if not is_name(source):
        file = Path(source) / "config.json"
        if not file.is_file():
            raise UserError(
                f"vision encoder 'timm': {source!r} is no folder with a config.json of timm"
            )
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return replace_architecture(
                config, values["architecture"], values.get("model_args") or {}
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"vision encoder 'timm': {file} does not name a timm 'architecture'"
            ) from error
    try:
        _, name, arguments = timm.models.load_model_config_from_hf(source.removeprefix("hf-hub:"))
    except OSError as error:
        raise unloadable(source, error) from error
    return replace_architecture(config, name, arguments or {})


def replace_architecture(
    config: TimmEncoderConfig, architecture: str, model_args: dict[str, Any]
) -> TimmEncoderConfig:
    """Return the config with the architecture; the user's arguments go before the source's."""
    return replace(
        config, architecture=architecture, model_args={**model_args, **config.model_args}
    )


def read_record(name: str) -> dict[str, Any]:
    """Return size, mean and std that timm has on record for a model's name; {} if it has none.

    Raises:
        UserError: the model has no weights of that tag.
    """
    try:
        record = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise unloadable(name, error) from error
    return {} if record is None else from_record(record.to_dict())


def from_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return size, mean and std of a timm `pretrained_cfg`."""
    return {
        "image_size": record["input_size"][-1],
        "image_mean": tuple(record["mean"]),
        "image_std": tuple(record["std"]),
    }


def check_known(architecture: str) -> None:
    """Refuse a name that is no model of timm, with the nearest ones."""
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; the nearest are {', '.join(nearest)}" if nearest else ""
        raise UserError(f"vision encoder 'timm': no model {architecture!r}{hint}")


def create(name: str, config: TimmEncoderConfig, pretrained: bool = False) -> Any:
    """Return timm's model without a classifier.

    Raises:
        UserError: no such model, arguments it does not take, or weights that cannot be loaded.
    """
    arguments = {**config.model_args, "num_classes": 0}
    architecture = str(config.architecture)
    check_known(architecture)
    record = timm.get_pretrained_cfg(architecture)
    if config.image_size is not None and record is not None and record.fixed_input_size:
        arguments["img_size"] = config.image_size
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, ValueError, IndexError, AssertionError) as error:
        raise UserError(f"vision encoder 'timm': model_args of {architecture}: {error}") from error
    except (OSError, RuntimeError) as error:
        raise unloadable(name, error) from error


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: the file is missing or broken.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"vision encoder: cannot read the weights {file}: {error}") from error


def unloadable(name: str, error: Exception) -> UserError:
    """Return the error for weights that timm cannot load."""
    reason = str(error).strip().partition("\n")[0]
    return UserError(f"vision encoder 'timm': cannot load {name!r}: {reason}")
