"""Which parameters train, and at which learning rate? A positive list, one owner per parameter.

A part that is not named in `trainable` is frozen; of a language model with an adapter, the adapter
alone trains. Norms, biases and single vectors (the newline token) are excluded from weight decay by
their number of dimensions, and beside them what a module's `no_weight_decay()` names, as timm's do:
position tables, class tokens, the decays of a scan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.layers import depths
from train.rates import PartRates, Trainable, part_rates
from vlm.adapters import is_adapter
from vlm.errors import UserError
from vlm.quantization import true_size

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
class Setting:
    """The peak learning rate of a parameter and its weight decay; None: the stage's own."""

    learning_rate: float
    weight_decay: float | None = None


@dataclass(frozen=True)
class Group:
    """Parameters that share a part and, from the stage's first step to its last, their settings.

    Attributes:
        part: which.
        decays: whether their kind has weight decay at all.
        phases: what they are set to at first and after each change; None: they are frozen.
        names: of the parameters.
    """

    part: str
    decays: bool
    phases: tuple[Setting | None, ...]
    names: tuple[str, ...]

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the first phase in which they train."""
        return next(setting.learning_rate for setting in self.phases if setting)

    def weight_decay(self, phase: int, usual: float) -> float:
        """Return the weight decay of a phase; `usual` is the stage's own."""
        setting = self.phases[phase]
        if not self.decays or setting is None:
            return 0.0
        return usual if setting.weight_decay is None else setting.weight_decay


def owner(name: str) -> str:
    """Return the one part that the parameter `name` belongs to."""
    owners = [part for part, prefixes in PARTS.items() if name.startswith(prefixes)]
    assert len(owners) == 1, f"parameter {name} has owners {owners}, it must have exactly one"
    return owners[0]


def freeze(
    model: "nn.Module", trainable: Trainable, changes: Sequence[Trainable] = ()
) -> list[Group]:
    """Set `requires_grad` of what trains at any time, and return the optimizer's groups.

    Args:
        model: a VlmForConditionalGeneration or ImageTextModel; before any sharding, while shapes
            are whole.
        trainable: part -> learning rate, or rates by layer.
        changes: the same after each change inside the run.

    Raises:
        UserError: a range of layers does not fit the model.
    """
    exempt = set(_exempt_from_decay(model))
    phases = [settings(model, each) for each in (trainable, *changes)]
    names: dict[tuple[str, bool, tuple[Setting | None, ...]], list[str]] = {}
    for name, parameter in model.named_parameters():
        part, given = owner(name), tuple(phase.get(name) for phase in phases)
        parameter.requires_grad_(any(given))
        if any(given):
            decays = parameter.ndim >= 2 and name not in exempt
            names.setdefault((part, decays, given), []).append(name)
    return [
        Group(part=part, decays=decays, phases=given, names=tuple(found))
        for (part, decays, given), found in names.items()
    ]


def settings(model: "nn.Module", trainable: Trainable) -> dict[str, Setting]:
    """Return the setting of every parameter that trains, by name.

    Raises:
        UserError: a range of layers does not fit the model.
    """
    owners = {name: owner(name) for name, _ in model.named_parameters()}
    adapters = [name for name in owners if is_adapter(name)]
    found = {}
    for part, value in trainable.items():
        rates = part_rates(value)
        names = [name for name, of in owners.items() if of == part]
        if part == "language_model" and adapters:
            names = adapters
        try:
            for name, rate in _rates_by_name(model, part, rates, names).items():
                found[name] = Setting(rate, rates.weight_decay)
        except UserError as error:
            raise UserError(f"trainable.{part}: {error}") from error
    return found


def _rates_by_name(
    model: "nn.Module", part: str, rates: PartRates, names: Sequence[str]
) -> dict[str, float]:
    """Return the peak rates of those of a part's parameters that train."""
    if not rates.by_layer or not names:
        return dict.fromkeys(names, rates.learning_rate)
    path = next(prefix for prefix in PARTS[part] if names[0].startswith(prefix))
    inside = depths(model.get_submodule(path.removesuffix(".")))
    _, num_layers = next(iter(inside.values()))
    head = num_layers + 1, num_layers  # what is not inside stands above
    found = {}
    for name in names:
        rate = rates.rate_at(*inside.get(name.removeprefix(path), head))
        if rate is not None:
            found[name] = rate
    return found


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
            "weight_decay": group.weight_decay(0, weight_decay),
            "part": group.part,
        }
        for group in groups
    ]


def describe(model: "nn.Module", trainable: Trainable) -> Iterator[str]:
    """Yield one line per part that has any: how many parameters, and what happens to them."""
    sizes, trained = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    found = settings(model, trainable)
    for name, parameter in model.named_parameters():
        sizes[owner(name)] += true_size(parameter)
        trained[owner(name)] += parameter.numel() if name in found else 0
    for part, size in ((part, size) for part, size in sizes.items() if size):
        fate = "frozen"
        if part in trainable:
            fate = _fate(part_rates(trainable[part]), trained[part], size)
        yield f"{part:<16} {size / 1e6:>10.3f} M parameters  {fate}"


def _fate(rates: PartRates, trained: int, size: int) -> str:
    fate = f"trains at {rates.learning_rate:g}"
    if rates.layers is not None:
        fate += f", layers {rates.layers}: {trained / 1e6:.3f} M"
    elif trained < size:
        fate += f", its adapter alone: {trained / 1e6:.3f} M"
    if rates.layer_decay != 1:
        fate += f", times {rates.layer_decay:g} for every layer down"
    return fate
