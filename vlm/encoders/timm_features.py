"""How are feature maps taken out of any timm model, cut to the layers that are needed?

Shapes: T views, H W feature grid, D encoder width. Layers are blocks of a ViT, stages of a pyramid.

Surprises:
- A final norm may stand in three places: `norm` (which `forward_intermediates(norm=True)` applies),
  `fc_norm` (models pooled by average) or `head.norm` (ConvNeXt, MambaOut), which timm applies after
  pooling and we at every position.
- `forward_intermediates` of MambaOut ignores its `norm` argument.
- `indices=2` means the last two; a list means positions, so lists are used here throughout.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers.norm import LayerNorm2d, RmsNorm2d, SimpleNorm2d
from torch import Tensor, nn

from vlm.encoders.base import EncoderConfig
from vlm.errors import UserError

# All other norms want channels last.
CHANNELS_FIRST = (LayerNorm2d, RmsNorm2d, SimpleNorm2d, nn.BatchNorm2d, nn.GroupNorm)
LATE_NORMS = ("fc_norm", "head.norm")


def prune(model: Any, config: EncoderConfig, name: str) -> list[int]:
    """Drop the classifier and all layers above the highest one asked for, in place.

    Returns:
        The positions of the layers asked for, counted from the first.

    Raises:
        UserError: the model gives no feature maps, or has not so many layers.
    """
    if not hasattr(model, "forward_intermediates") or not hasattr(
        model, "prune_intermediate_layers"
    ):
        raise UserError(f"vision encoder: timm model {name!r} has no forward_intermediates")
    normed = config.layer == "last"
    late = {path: norm for path in LATE_NORMS if (norm := late_norm(model, path))} if normed else {}
    try:
        positions = model.prune_intermediate_layers(
            list(config.layers), prune_norm=not normed, prune_head=True
        )
    except AssertionError as error:  # what timm says to a position out of range
        raise UserError(f"vision encoder: layer {config.layer} of {name!r}: {error}") from error
    for path, norm in late.items():
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, norm)
    return positions


def late_norm(model: nn.Module, path: str) -> nn.Module | None:
    """Return the norm at `path`, or None where there is none."""
    modules = dict(model.named_modules())
    norm = modules.get(path)
    return None if norm is None or isinstance(norm, nn.Identity) else norm


def extract(
    model: Any, pixel_values: Tensor, positions: Sequence[int], normed: bool
) -> list[Tensor]:
    """Return the feature maps (T, H, W, D) at `positions` of a pruned model, in that order."""
    late = [norm for path in LATE_NORMS if normed and (norm := late_norm(model, path))]
    ascending = sorted(set(positions))  # the order in which they come back
    maps = model.forward_intermediates(
        pixel_values,
        indices=ascending,
        norm=normed and not late,  # Hiera refuses it, and has a late one
        stop_early=True,
        output_fmt="NCHW",
        intermediates_only=True,
    )
    for norm in late:
        maps = [apply_norm(norm, m) for m in maps]
    return [maps[ascending.index(position)].permute(0, 2, 3, 1) for position in positions]


def recompute(model: Any, wanted: bool) -> None:
    """Have the model's own switch compute its blocks again in the backward pass, or not.

    Raises:
        UserError: it is wanted, and the model cannot.
    """
    try:
        model.set_grad_checkpointing(wanted)
    except AssertionError as error:  # what timm says of a model without it
        raise UserError(
            f"vision encoder: {type(model).__name__} cannot be recomputed ({error}); freeze the "
            "encoder, or leave out training.gradient_checkpointing"
        ) from error


def apply_norm(norm: nn.Module, features: Tensor) -> Tensor:
    """Return the norm of (T, D, H, W) features at every position, same shape."""
    if isinstance(norm, CHANNELS_FIRST):
        return norm(features)
    return norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
