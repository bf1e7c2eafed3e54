"""How well do pictures and captions find each other? Sums over pairs, and shares with intervals.

Both searches are among the pairs of one step, so their chance level is the share of pairs that
would be right (1 in 64 of 64 different ones). Matching is judged on each pair and on two negatives
drawn for it, the likelier the more similar; pairs and negatives are counted apart, because "no" to
all would be right twice in three times.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from connectors.qformer_losses import Pairs, Stage1Output
from data_recipes.captions import CaptionCollator, CaptionDataset
from train.process import say
from vlm.proportions import wilson

NAMES = Stage1Output._fields


@dataclass
class Totals:
    """Sums over pairs since the last look, and how many pairs there were."""

    pairs: Any = 0  # tensors from the first pair on, so that counting does not wait for the device
    values: Any = 0  # (fields of Stage1Output,)

    def add(self, found: Stage1Output, real: Tensor) -> None:
        """Add one step's pairs, those that are `real`."""
        with torch.no_grad():
            self.values = self.values + (torch.stack([x.float() for x in found]) * real).sum(dim=1)
            self.pairs = self.pairs + real.sum()

    def sums(self, device: torch.device) -> Tensor:
        """Return (fields + 1,): the sums, and the number of pairs last."""
        values = torch.as_tensor(self.values, device=device).expand(len(NAMES))
        return torch.cat(
            [values.double(), torch.as_tensor(self.pairs, device=device).double()[None]]
        )

    @staticmethod
    def averages(sums: Tensor) -> dict[str, float]:
        """Return what the log tells of `sums`, added over processes."""
        *values, pairs = sums.tolist()
        by_name = dict(zip(NAMES, values, strict=True))
        words, pairs = max(by_name.pop("words"), 1.0), max(pairs, 1.0)
        caption = by_name.pop("caption") / words
        share = {name: value / pairs for name, value in by_name.items()}
        return {
            "loss/contrastive": share["contrastive"],
            "loss/matching": share["matching"],
            "loss/caption": caption,
            "recall/image_to_text": share["found_text"],
            "recall/text_to_image": share["found_image"],
            "recall/chance": share["chance"],
            "matching_accuracy": (share["accepted"] + share["refused"]) / 2,  # chance: one half
        }


@torch.no_grad()
def measure(
    model: Any, dataset: CaptionDataset, collate: CaptionCollator, num_pairs: int
) -> dict[str, Any]:
    """Return recall and matching on every pair of a data set, and tell them.

    Args:
        model: an `ImageTextModel`.
        dataset: the pairs.
        collate: makes batches of them.
        num_pairs: how many are compared with each other.
    """
    was_training, device = model.training, model.device
    model.eval()
    totals, skipped = Totals(), 0
    for start in range(0, len(dataset), num_pairs):
        batch = collate([dataset[i] for i in range(start, min(start + num_pairs, len(dataset)))])
        skipped += len(batch["skipped"])
        moved = {name: x.to(device) for name, x in batch.items() if isinstance(x, Tensor)}
        totals.add(model(**model_inputs(moved)), moved["real"])
    model.train(was_training)
    figures = {**figures_of(totals.sums(device), num_pairs), "left_out": skipped}
    say(describe(figures))
    return figures


def figures_of(sums: Tensor, num_pairs: int) -> dict[str, Any]:
    """Return shares with their 95 % intervals, chance levels and losses."""
    averages = Totals.averages(sums)
    *values, n = sums.round().long().tolist()
    exact = dict(zip(NAMES, sums.tolist(), strict=False))
    counts = dict(zip(NAMES, values, strict=True))
    if not n:
        return {"n": 0, "compared_at_once": num_pairs}
    refused = round(2 * exact["refused"])  # its field holds the share of two
    return {
        "n": n,
        "compared_at_once": num_pairs,
        "recall_chance": averages["recall/chance"],
        "recall_image_to_text": asdict(wilson(counts["found_text"], n)),
        "recall_text_to_image": asdict(wilson(counts["found_image"], n)),
        "matching_chance": 0.5,
        "pairs_accepted": asdict(wilson(counts["accepted"], n)),
        "negatives_refused": asdict(wilson(refused, 2 * n)),
        **{name: value for name, value in averages.items() if name.startswith("loss/")},
    }


def describe(figures: Mapping[str, Any]) -> str:
    """Return the figures of `measure` as one line for people."""
    left_out = f", {figures['left_out']} left out" if figures["left_out"] else ""
    if not figures["n"]:
        return f"held out: no pair could be used{left_out}"

    def share(name: str) -> str:
        value, low, high = (100 * figures[name][key] for key in ("value", "low", "high"))
        return f"{value:.1f} % [{low:.1f}, {high:.1f}]"

    return (
        f"held out ({figures['n']} pairs, {figures['compared_at_once']} compared at once{left_out})"
        f": nearest caption right {share('recall_image_to_text')}, nearest picture right "
        f"{share('recall_text_to_image')}, chance {100 * figures['recall_chance']:.1f} %; "
        f"pairs accepted {share('pairs_accepted')}, hard negatives refused "
        f"{share('negatives_refused')}, chance 50 %"
    )


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `ImageTextModel.forward` takes of a batch of `CaptionCollator`."""
    names: Sequence[str] = ("pixel_values", "input_ids", "attention_mask")
    return {
        **{name: batch[name] for name in names},
        "pairs": Pairs(batch["picture"], batch["caption"], batch["draws"], batch["real"]),
    }
