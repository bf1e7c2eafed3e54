"""What must every vision encoder tell and do? Pictures in, feature maps out, sizes known before.

Shapes: T views, S image size, H W feature grid, D encoder width.

An encoder's config passes through three states:
- as the user writes it: `{"type": "timm", "source": "convnext_atto", "layer": -2}`;
- resolved: everything that is needed to rebuild the architecture without a network is written out,
  `architecture`, sizes, mean and std; it stands in the model's `config.json`;
- saved beside weights: `vision_encoder.json` in a folder made by `save_pretrained` holds the
  resolved config, and a recipe that names the folder needs nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from vlm.errors import UserError

CONFIG_FILE = "vision_encoder.json"
# Measured from the model, so whatever else changes in a config makes them stale.
MEASURED = ("grids", "dims")
# With which Vim, VMamba and ViL were trained: ImageNet's mean and deviation.
IMAGENET_224: Mapping[str, Any] = {
    "image_size": 224,
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}

Layer = int | tuple[int, ...] | Literal["last"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What every adapter understands; None means: read it from the source.

    `layer` counts as `hidden_states` of transformers and LLaVA does, from the end: -1 is the output
    of the last layer (or stage), without the model's final norm; -2 the one before. "last" is the
    last layer with the final norm. Several numbers give several feature maps. Layers above the
    highest one asked for are not built.
    """

    source: str | None = None  # a name on the hub or in the library, or a folder
    layer: Layer = "last"
    image_size: int | None = None  # S, pixels; another size than the source's resamples positions
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    grids: tuple[tuple[int, int], ...] | None = None  # measured, not for recipes
    dims: tuple[int, ...] | None = None  # measured, not for recipes

    def __post_init__(self) -> None:
        layers = () if self.layer == "last" else self.layers
        if self.layer != "last" and (not layers or max(layers) >= 0):
            raise UserError(
                f"vision encoder: layer must be 'last' or count from the end with negative "
                f"numbers, -1 being the last layer, not {self.layer!r}"
            )
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"vision encoder: image_size must be positive, not {self.image_size}")
        if self.image_std is not None and min(self.image_std) <= 0:
            raise UserError(f"vision encoder: image_std must be positive, not {self.image_std}")

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the layers asked for as negative numbers; "last" is layer -1."""
        if self.layer == "last":
            return (-1,)
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)

    def to_dict(self, type_name: str) -> dict[str, Any]:
        """Return the config as JSON keeps it: lists for tuples, `type` first."""
        return json.loads(json.dumps({"type": type_name, **asdict(self)}))


C = TypeVar("C", bound=EncoderConfig)


class VisionEncoder(nn.Module, Generic[C]):
    """Base of the adapters around the libraries' models.

    Attributes:
        config: the resolved config, JSON-able; `build_vision_encoder(config)` rebuilds the encoder.
        image_size: S, the side of the square pictures it takes.
        image_mean, image_std: of RGB values from 0 to 1, three numbers each.
        grids: (H, W) of each feature map.
        dims: D of each feature map.
    """

    type_name: ClassVar[str]
    config_class: ClassVar[type[EncoderConfig]]
    needs_source: ClassVar[bool] = True  # for its weights

    config: dict[str, Any]
    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    grids: tuple[tuple[int, int], ...]
    dims: tuple[int, ...]

    def __init__(self, config: C) -> None:
        """Build the architecture of a resolved config with new weights; `settle` comes last."""
        super().__init__()

    @classmethod
    def resolve(cls, config: C) -> C:
        """Return the config with all that rebuilds the architecture; reads no weights.

        Raises:
            UserError: the source is missing, unreadable, or not of this library.
        """
        raise NotImplementedError

    @classmethod
    def load(cls, config: C, dtype: torch.dtype) -> Self:
        """Return the encoder of an unresolved config with the weights of its source.

        Raises:
            UserError: the source is missing, or lacks weights of the layers asked for.
        """
        raise NotImplementedError

    def extract(self, pixel_values: Tensor) -> Sequence[Tensor]:
        """Return the feature maps (T, H, W, D) of normalised pictures (T, 3, S, S)."""
        raise NotImplementedError

    def save_weights(self, folder: Path) -> None:
        """Write the weights, and the library's own config files, into the folder."""
        raise NotImplementedError

    def settle(self, config: C) -> None:
        """Set the public attributes from the resolved config; subclasses' `__init__` ends with it.

        Grids and widths are measured on the meta device unless the config has them: under ZeRO-3
        the parameters are already empty here.
        """
        assert config.image_size and config.image_mean and config.image_std, config
        self.image_size = config.image_size
        self.image_mean, self.image_std = config.image_mean, config.image_std
        if config.grids is None or config.dims is None:
            shapes = self._measure()
            grids, dims = tuple(s[1:3] for s in shapes), tuple(s[3] for s in shapes)
            config = replace(config, grids=grids, dims=dims)
        assert config.grids is not None and config.dims is not None
        self.grids, self.dims = config.grids, config.dims
        self.config = config.to_dict(self.type_name)

    @property
    def dtype(self) -> torch.dtype:
        """Return the type pictures are cast to: that of the first parameter, never quantised."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps, each (T, H, W, D), of pictures (T, 3, S, S)."""
        size = (self.image_size, self.image_size)
        assert pixel_values.shape[-2:] == size, (tuple(pixel_values.shape), self.image_size)
        if not len(pixel_values):  # most libraries' models refuse no views
            shapes = zip(self.grids, self.dims, strict=True)
            return tuple(pixel_values.new_zeros(0, *g, d, dtype=self.dtype) for g, d in shapes)
        return tuple(self.extract(pixel_values.to(self.dtype)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights and configs; `{"type": ..., "source": folder}` loads the same encoder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder)
        text = json.dumps({**self.config, "source": None}, indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    @torch.no_grad()
    def _measure(self) -> list[tuple[int, ...]]:
        """Return the shapes of the feature maps without computing anything."""
        tensors = chain(self.named_parameters(), self.named_buffers())
        meta = {name: tensor.to("meta") for name, tensor in tensors}
        # Two pictures: in training mode a batch norm refuses one value per channel.
        pictures = torch.empty(2, 3, self.image_size, self.image_size, device="meta")
        maps = torch.func.functional_call(self, meta, (pictures,))
        return [tuple(m.shape) for m in maps]


def saved_type(source: Any) -> dict[str, Any]:
    """Return {"type": ...} of a folder that this suite wrote, {} of anything else."""
    saved = _read_saved(source)
    return {} if saved is None else {"type": saved["type"]}


def saved_config(source: str | None, type_name: str) -> dict[str, Any]:
    """Return what `vision_encoder.json` in the folder `source` says, without the measured fields.

    Empty where the source is no folder, or a folder that this suite did not write.

    Raises:
        UserError: the file is broken, or the folder was saved by another type of encoder.
    """
    values = _read_saved(source)
    if values is None:
        return {}
    saved_type = values.pop("type")
    if saved_type != type_name:
        raise UserError(
            f"{source} was saved by a vision encoder of type {saved_type!r}; "
            f"set vision_encoder.type to {saved_type}, not {type_name}"
        )
    return {key: value for key, value in values.items() if key not in (*MEASURED, "source")}


def _read_saved(source: Any) -> dict[str, Any] | None:
    """Return what `vision_encoder.json` in the folder `source` says, None if there is no such file.

    Raises:
        UserError: the file is broken.
    """
    if not isinstance(source, str) or not (Path(source) / CONFIG_FILE).is_file():
        return None
    file = Path(source) / CONFIG_FILE
    try:
        values = dict(json.loads(file.read_text(encoding="utf-8")))
        values["type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a vision encoder's config: {error!r}") from error
    return values


def fill(config: C, found: Mapping[str, Any]) -> C:
    """Return the config with fields that are None taken from `found`.

    Raises:
        UserError: mean, std or size are still unknown.
    """
    missing = {f.name for f in fields(config) if getattr(config, f.name) is None}
    config = replace(config, **{k: v for k, v in found.items() if k in missing})
    for name in ("image_size", "image_mean", "image_std"):
        if getattr(config, name) is None:
            raise UserError(
                f"vision encoder {config.source!r} does not say its {name}; "
                f"set vision_encoder.{name}"
            )
    return config


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into the module; more is allowed (what was not built), less is not.

    Raises:
        UserError: weights are missing or of another shape.
    """
    wanted = module.state_dict()
    if missing := sorted(set(wanted) - set(state)):
        raise missing_weights(source, missing)
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{source}: weight {name!r} has shape {tuple(state[name].shape)}, but this vision "
                f"encoder's config needs {tuple(tensor.shape)}; check image_size and architecture"
            )
    module.load_state_dict({name: state[name] for name in wanted})


def missing_weights(source: str, missing: Sequence[str]) -> UserError:
    """Return the error for a source without some of the weights."""
    few = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return UserError(
        f"{source} lacks the weights {few}; if it was saved at a lower layer or another size, "
        "leave out vision_encoder.layer and image_size"
    )


def restore_buffers(module: nn.Module) -> None:
    """Compute the buffers that no checkpoint holds, such as timm's tables of rotary positions.

    `from_pretrained` builds on the meta device and then fills such buffers with whatever lies in
    memory; modules of transformers mend theirs in `_init_weights`, those of timm only if asked.
    """
    restore = getattr(module, "init_non_persistent_buffers", None)  # timm's name for it
    if restore is not None:
        restore()
