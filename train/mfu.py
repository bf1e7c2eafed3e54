"""Which share of its device's peak does a stage reach with the operations that it must do (MFU)?

Counted are the forward and the backward pass of what a batch holds, as `vlm plan` counts them:
neither padding nor what checkpoints compute again, and of attention all pairs of a document's
tokens, also those that a causal mask hides. The counts are taken once, on tensors without values:
a batch then costs a few sums, which nobody waits for.

They are exact where connectors stand before the language model. One inside it may look at products
of text and pictures; that is counted as in a row of one picture and `TEXT` tokens.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_recipes.dataset import IGNORED
from train.freeze import Group
from train.phases import phase_at
from train.planning.gpus import device_name, peak_of
from train.planning.step import LOSS, Sample, StepCost, rehearse
from vlm.adapters import AdapterConfig, add_adapter
from vlm.modeling import VlmForConditionalGeneration

TEXT = 64  # tokens of the row that is counted


@dataclass(frozen=True)
class BatchWork:
    """Operations of a training step's two passes, by what its batch holds.

    Attributes:
        encoded: of each view that the encoder sees.
        view: of each view beside that, whether the encoder sees it or its features were stored.
        token: of each token, images' included.
        pair: of each pair of a document's tokens.
        learnt: of each supervised token.
    """

    encoded: float
    view: float
    token: float
    pair: float
    learnt: float

    def of(self, batch: Mapping[str, Any]) -> Any:
        """Return the operations of a batch, as a tensor on its device.

        Args:
            batch: input_ids, labels, and attention_mask (rows padded on the right) or position_ids
                (documents of one row); perhaps pixel_values (T, 3, S, S), or vision_features, of
                each map (T, H, W, D).
        """
        encoded = len(batch.get("pixel_values", ()))
        stored = batch.get("vision_features")
        views = encoded if stored is None else len(stored[0])
        tokens, pairs = _tokens_and_pairs(batch)
        learnt = (batch["labels"][..., 1:] != IGNORED).sum()
        pictures = self.encoded * encoded + self.view * views
        return pictures + self.token * tokens + self.pair * pairs + self.learnt * learnt


def _tokens_and_pairs(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return how many tokens a batch has, and the sum of the squares of its documents' lengths."""
    mask = batch.get("attention_mask")
    if mask is None:  # the square of n is the sum of the first n odd numbers
        return batch["input_ids"].numel(), (2 * batch["position_ids"] + 1).sum()
    lengths = (mask != 0).sum(dim=-1)
    return lengths.sum(), (lengths**2).sum()


def count_work(config: Any, trained: set[str], adapter: AdapterConfig | None = None) -> BatchWork:
    """Return what batches of a model cost.

    Args:
        config: the model's.
        trained: names of the parameters that train.
        adapter: what stands beside the language model's linear layers.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = VlmForConditionalGeneration(copy.deepcopy(config))
        model.tie_weights()
        if adapter is not None:
            add_adapter(model, adapter)
    model.model.language_model.config._attn_implementation = "sdpa"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    size = model.model.vision_tower.image_size
    rows = [
        rehearse(model, Sample(((size, size),), text, supervised), 1)
        for text, supervised in ((TEXT, TEXT // 2), (2 * TEXT, TEXT // 2), (TEXT, TEXT))
    ]
    return solve(*rows)


def solve(short: StepCost, long: StepCost, taught: StepCost) -> BatchWork:
    """Return what three rows tell.

    Args:
        short: a row of `TEXT` tokens beside its picture, half of them supervised.
        long: the same with `TEXT` more that are not.
        taught: the first with all its text supervised.
    """
    of_pairs = long.attention - short.attention
    pair = of_pairs / (long.length**2 - short.length**2)
    of_tokens = _of(long, "language_model") - _of(short, "language_model") - of_pairs
    token = of_tokens / (long.length - short.length)
    learnt = (_learnt(taught) - _learnt(short)) / (TEXT // 2)
    text = token * short.length + pair * short.length**2 + learnt * (TEXT // 2)
    beside = _of(short, "connector") + _learnt(short) - text
    return BatchWork(
        encoded=_of(short, "vision_tower") / short.views,
        view=beside / short.views,
        token=token,
        pair=pair,
        learnt=learnt,
    )


def _learnt(cost: StepCost) -> int:
    """Return the operations of all that sees text: the loss, and the language model's layers.

    The last of these works on supervised tokens alone (`vlm/last_layer.py`).
    """
    return _of(cost, "language_model") + _of(cost, LOSS)


def _of(cost: StepCost, part: str) -> int:
    return cost.forward.get(part, 0) + cost.backward.get(part, 0)


@dataclass(frozen=True)
class Meter:
    """Counts what a stage's batches cost.

    Attributes:
        peak: operations a second of this process's device; None: MFU is not told.
        why: why not.
        works: what batches cost in each phase of the stage.
        starts: steps done when each phase begins.
    """

    peak: float | None
    why: str = ""
    works: tuple[BatchWork, ...] = ()
    starts: Sequence[int] = (0,)

    def of(self, batch: Mapping[str, Any], step: int) -> Any:
        """Return the operations of a batch after so many steps."""
        return self.works[phase_at(step, self.starts)].of(batch) if self.works else 0.0


def make_meter(
    model: Any,
    groups: Sequence[Group],
    starts: Sequence[int],
    adapter: AdapterConfig | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Meter:
    """Return what counts a stage's operations, or says why they are not.

    Args:
        model: of the stage.
        groups: see `train.freeze`.
        starts: steps done when each of their phases begins.
        adapter: of the stage.
        device: that it trains on.
        dtype: of its matrix products on a CPU.
    """
    if not isinstance(model, VlmForConditionalGeneration):
        return Meter(None, "the operations of this objective are not counted")
    peak = peak_of(device, dtype)
    if peak is None:
        return Meter(None, f"the peak of {device_name(device)} is not known")
    trained = [
        {name for group in groups if group.phases[phase] is not None for name in group.names}
        for phase in range(len(starts))
    ]
    try:
        works = tuple(count_work(model.config, names, adapter) for names in trained)
    except Exception as error:  # whatever it is: what is only told must not end a training
        return Meter(None, f"its operations could not be counted ({error!r})")
    return Meter(peak, works=works, starts=starts)
