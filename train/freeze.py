"""Which parameters train, and at which learning rate? A positive list, one owner per parameter.

A part that is not named in `trainable` is frozen. Norms, biases and single vectors (the newline
token) are excluded from weight decay by their number of dimensions, and beside them what a module's
`no_weight_decay()` names, as timm's do: position tables, class tokens, the decays of a scan.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# part -> the prefixes of its parameters' names in VlmForConditionalGeneration; without `model.`, in
# ImageTextModel, which has no language model
PARTS: dict[str, tuple[str, ...]] = {
    "vision_tower": ("model.vision_tower.", "vision_tower."),
    "connector": ("model.connector.", "model.image_newline", "model.image_separator", "connector."),
    "language_model": ("model.language_model.", "lm_head."),
}


@dataclass(frozen=True)
class Group:
    """Parameters that share a part, a learning rate and a weight decay."""

    part: str
    learning_rate: float
    decays: bool
    names: tuple[str, ...]


def owner(name: str) -> str:
    """Return the one part that the parameter `name` belongs to."""
    owners = [part for part, prefixes in PARTS.items() if name.startswith(prefixes)]
    assert len(owners) == 1, f"parameter {name} has owners {owners}, it must have exactly one"
    return owners[0]


def freeze(model: "nn.Module", trainable: Mapping[str, float]) -> list[Group]:
    """Set `requires_grad` of every parameter and return the optimizer's groups.

    Args:
        model: a VlmForConditionalGeneration or ImageTextModel; before any sharding, while shapes
            are whole.
        trainable: part -> learning rate.
    """
    exempt = set(_exempt_from_decay(model))
    names: dict[tuple[str, bool], list[str]] = {}
    for name, parameter in model.named_parameters():
        part = owner(name)
        parameter.requires_grad_(part in trainable)
        if part in trainable:
            decays = parameter.ndim >= 2 and name not in exempt
            names.setdefault((part, decays), []).append(name)
    return [
        Group(part=part, learning_rate=trainable[part], decays=decays, names=tuple(found))
        for (part, decays), found in names.items()
    ]


def _exempt_from_decay(model: "nn.Module") -> Iterator[str]:
    """Yield the full names of parameters that a module's own `no_weight_decay()` names."""
    for prefix, module in model.named_modules():
        if callable(getattr(module, "no_weight_decay", None)):
            for name in module.no_weight_decay():  # pyright: ignore[reportCallIssue]
                yield f"{prefix}.{name}"


def optimizer_groups(
    model: "nn.Module", groups: list[Group], weight_decay: float
) -> list[dict[str, object]]:
    """Return torch optimizer groups; every trainable parameter stands in exactly one."""
    parameters = dict(model.named_parameters())
    placed = [name for group in groups for name in group.names]
    wanted = [name for name, parameter in parameters.items() if parameter.requires_grad]
    assert sorted(placed) == sorted(wanted), "a trainable parameter without exactly one group"
    return [
        {
            "params": [parameters[name] for name in group.names],
            "lr": group.learning_rate,
            "weight_decay": weight_decay if group.decays else 0.0,
            "part": group.part,
        }
        for group in groups
    ]


def describe(model: "nn.Module", trainable: Mapping[str, float]) -> Iterator[str]:
    """Yield one line per part that has any: how many parameters, and what happens to them."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        sizes[owner(name)] += parameter.numel()
    for part, size in ((part, size) for part, size in sizes.items() if size):
        fate = f"trains at {trainable[part]:g}" if part in trainable else "frozen"
        yield f"{part:<16} {size / 1e6:>10.3f} M parameters  {fate}"
