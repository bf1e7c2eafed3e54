"""How do several vision encoders look at the same views, each at its own size?

Shapes: T views, S size of the views, S_i size encoder i sees, H W feature grid, D encoder width.

The views come once, at the largest size and in the first encoder's mean and std. Each encoder gets
them resized to its own size and normalised by its own mean and std; its layers are resized to one
grid and joined, so that every encoder gives one feature map. An encoder may look twice, at the
whole view and at its tiles (`tiles`), and gives a second map: the tiles' features side by side.
Surprise: an encoder smaller than the largest sees views that were resized twice, by the processor
and here, where Cambrian resizes the image for each encoder. Over eleven photographs, colours differ
from that by 0.5 of 255 on average (root mean square 0.8, at worst 26, at sharp edges), and the
colour that pads a view to a square is the first encoder's mean, not each one's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlm.encoders.base import (
    CONFIG_FILE,
    EncoderConfig,
    VisionEncoder,
    fill,
)
from vlm.encoders.presets import expand_preset
from vlm.errors import UserError

MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
Downscale = Literal["antialias", "bilinear"]


@dataclass(frozen=True, kw_only=True)
class SeveralEncoderConfig(EncoderConfig):
    """Encoders side by side; `image_size`, mean and std are those of the views that come in.

    `source` is None, because every encoder has its own, or a folder that this suite saved.
    `downscale` makes the smaller views: "antialias" with PIL's bicubic filter, "bilinear" without
    antialiasing, as Mini-Gemini's scripts make CLIP's view of the ConvNeXt's. An encoder with
    `tiles` n above 1 also sees each view in n x n pieces of its own size, the whole made of them.
    """

    encoders: tuple[dict, ...] = ()  # configs as `build_vision_encoder` takes them
    resize_to: tuple[int | None, ...] | None = None  # side of each feature grid; None: its finest
    downscale: Downscale = "antialias"
    tiles: tuple[int, ...] | None = None  # rows, and columns, of pieces; None: 1 for each encoder

    @property
    def pieces(self) -> tuple[int, ...]:
        """Return into how many rows and columns each encoder's view is cut."""
        return self.tiles or (1,) * len(self.encoders)

    @property
    def sides(self) -> tuple[int | None, ...]:
        """Return the side of each encoder's feature grid; None: that of its finest layer."""
        return self.resize_to or (None,) * len(self.encoders)


class SeveralEncoder(VisionEncoder[SeveralEncoderConfig]):
    """Encoders side by side, such as Cambrian's four or Mini-Gemini's two; a map or two of each."""

    type_name = "several"
    config_class = SeveralEncoderConfig
    needs_source: ClassVar[bool] = False  # its encoders have theirs

    def __init__(
        self, config: SeveralEncoderConfig, encoders: Sequence[VisionEncoder] | None = None
    ) -> None:
        """Build the encoders of a resolved config, or take loaded ones."""
        super().__init__(config)
        if encoders is None:
            from vlm.encoders import build_vision_encoder  # it imports this module

            encoders = [build_vision_encoder(part) for part in config.encoders]
        self.encoders = nn.ModuleList(encoders)
        self.sides, self.pieces = config.sides, config.pieces
        self.downscale: Downscale = config.downscale
        grids, dims = [], []
        for encoder, side, pieces in zip(encoders, self.sides, self.pieces, strict=True):
            height, width = max(encoder.grids) if side is None else (side, side)
            for times in (1,) if pieces == 1 else (1, pieces):
                grids.append((times * height, times * width))
                dims.append(sum(encoder.dims))
        # With what was measured: under ZeRO-3 the parameters are empty the next time.
        pairs = zip(encoders, config.encoders, strict=True)
        parts = tuple({**encoder.config, "source": part["source"]} for encoder, part in pairs)
        self.settle(replace(config, encoders=parts, grids=tuple(grids), dims=tuple(dims)))

    @classmethod
    def resolve(cls, config: SeveralEncoderConfig) -> SeveralEncoderConfig:
        """Return the config with every encoder's resolved, and the views' size, mean and std."""
        from vlm.encoders import parse_encoder_config  # it imports this module

        check(config)
        parts = []
        for part in config.encoders:
            encoder_class, parsed = parse_encoder_config(part)
            parts.append(encoder_class.resolve(parsed).to_dict(encoder_class.type_name))
        return with_parts(config, parts)

    @classmethod
    def load(cls, config: SeveralEncoderConfig, dtype: torch.dtype) -> Self:
        """Return the encoders with the weights of their sources, or of one folder for all."""
        from vlm.encoders import load_vision_encoder  # it imports this module

        check(config)
        if config.source is not None and not (Path(config.source) / CONFIG_FILE).is_file():
            raise UserError(
                f"vision encoder 'several': {config.source!r} is no folder saved by it; set a "
                "source in each of 'encoders' instead"
            )
        encoders, parts = [], []
        for i, part in enumerate(map(expand_preset, config.encoders)):
            values = dict(part)
            if config.source is not None:
                values["source"] = str(part_folder(config.source, i))
            encoders.append(load_vision_encoder(values, dtype))
            # Weights came from where the config says, even if a saved folder has passed them on.
            parts.append({**encoders[-1].config, "source": part.get("source")})
        return cls(with_parts(config, parts), encoders)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all encoders; a frozen one beside trained ones stays in eval mode."""
        super().train(mode)
        for encoder in self.encoders:
            if not any(parameter.requires_grad for parameter in encoder.parameters()):
                encoder.eval()
        return self

    def extract(self, pixel_values: Tensor) -> Sequence[Tensor]:
        """Return one feature map (T, H, W, D) per encoder of views (T, 3, S, S), or two."""
        maps = []
        came = (self.image_mean, self.image_std)
        for encoder, side, pieces in zip(self.encoders, self.sides, self.pieces, strict=True):
            assert isinstance(encoder, VisionEncoder)
            wanted = (encoder.image_mean, encoder.image_std)
            size = encoder.image_size
            views = fit_views(pixel_values, pieces * size, came, wanted, self.downscale)
            if pieces > 1:
                whole = fit_views(views, size, wanted, wanted, self.downscale)
                views = torch.cat([whole.to(views.dtype), cut_pieces(views, pieces)])
            features = join_layers(encoder(views), side)
            if pieces > 1:
                features, tiles = features.split(
                    [len(pixel_values), len(views) - len(pixel_values)]
                )
                maps += [features, join_pieces(tiles, pieces)]
            else:
                maps.append(features)
        return maps

    def save_weights(self, folder: Path) -> None:
        """Write each encoder into a folder of its own."""
        for i, encoder in enumerate(self.encoders):
            assert isinstance(encoder, VisionEncoder)
            encoder.save_pretrained(part_folder(folder, i))


def with_parts(config: SeveralEncoderConfig, parts: Sequence[dict]) -> SeveralEncoderConfig:
    """Return the config with the encoders' resolved ones, and the views' size, mean and std."""
    pairs = zip(parts, config.pieces, strict=True)
    found = {
        "image_size": max(part["image_size"] * pieces for part, pieces in pairs),
        "image_mean": tuple(parts[0]["image_mean"]),
        "image_std": tuple(parts[0]["image_std"]),
    }
    return fill(replace(config, encoders=tuple(parts)), found)


def check(config: SeveralEncoderConfig) -> None:
    """Refuse numbers that do not fit each other; what a saved folder says has been filled in.

    Raises:
        UserError: in these cases.
    """
    where = "vision encoder 'several'"
    if config.layer != "last":
        raise UserError(f"{where}: set layer in each of 'encoders', not beside them")
    if not config.encoders:
        raise UserError(
            f"{where} needs 'encoders', such as [{{preset: siglip-so400m-384}}, "
            "{preset: clip-l-336}]"
        )
    if len(config.sides) != len(config.encoders):
        raise UserError(
            f"{where}: resize_to has {len(config.sides)} sides for {len(config.encoders)} "
            "encoders; give one each, or null"
        )
    if len(config.pieces) != len(config.encoders) or min(config.pieces) < 1:
        raise UserError(
            f"{where}: tiles is {list(config.pieces)} for {len(config.encoders)} encoders; give "
            "one number each, 1 for those that see the whole view alone"
        )
    if min((side for side in config.sides if side is not None), default=1) < 1:
        raise UserError(f"{where}: resize_to must be positive, not {config.resize_to}")


def part_folder(folder: str | Path, index: int) -> Path:
    """Return where encoder number `index` is saved."""
    return Path(folder) / f"encoder_{index}"


def fit_views(
    views: Tensor, size: int, came: MeanStd, wanted: MeanStd, downscale: Downscale
) -> Tensor:
    """Return views (T, 3, S, S) as (T, 3, size, size) in another normalisation; float32 if changed.

    Args:
        views: normalised by `came`.
        size: in pixels.
        came: mean and std they have.
        wanted: mean and std they get.
        downscale: see `SeveralEncoderConfig`.
    """
    resized = views.shape[-1] != size
    if not resized and came == wanted:
        return views
    views = views.float()
    antialias = resized and downscale == "antialias"
    if antialias:
        views = interpolate(views, (size, size), mode="bicubic", antialias=True)
    elif resized:
        views = interpolate(views, (size, size), mode="bilinear", align_corners=False)
    if came == wanted and not antialias:
        return views
    mean, std, new_mean, new_std = torch.tensor([*came, *wanted], device=views.device)[
        ..., None, None
    ]
    colors = views * std + mean
    if antialias:
        colors = colors.clamp(0, 1)  # a cubic filter overshoots at edges; PIL has no room for it
    return (colors - new_mean) / new_std


def cut_pieces(views: Tensor, count: int) -> Tensor:
    """Cut views (T, 3, n * S, n * S) into n x n pieces each, row by row: (T * n * n, 3, S, S)."""
    rows = views.unflatten(3, (count, -1)).unflatten(2, (count, -1))  # (T, 3, n, S, n, S)
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def join_pieces(features: Tensor, count: int) -> Tensor:
    """Put pieces' features (T * n * n, H, W, D) side by side: (T, n * H, n * W, D)."""
    rows = features.unflatten(0, (-1, count, count)).transpose(2, 3)  # (T, n, H, n, W, D)
    return rows.flatten(3, 4).flatten(1, 2)


def join_layers(maps: Sequence[Tensor], side: int | None) -> Tensor:
    """Return maps (T, H_i, W_i, D_i) as one (T, H, W, sum of D_i).

    Resized bilinearly without antialiasing, in float32, as Cambrian (clip_convnext_encoder.py,
    dino_encoder.py) and Mini-Gemini (openclip_encoder.py) do.

    Args:
        maps: features of one encoder's layers.
        side: H and W; None: those of the finest map.
    """
    grid = max(tuple(m.shape[1:3]) for m in maps) if side is None else (side, side)
    resized = [_resize(m, grid) for m in maps]
    return resized[0] if len(resized) == 1 else torch.cat(resized, dim=-1)


def _resize(features: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return features (T, H, W, D) at another grid, same type."""
    if tuple(features.shape[1:3]) == tuple(grid):
        return features
    channels_first = features.permute(0, 3, 1, 2).float()
    resized = interpolate(channels_first, grid, mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(features.dtype)
