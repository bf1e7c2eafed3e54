"""How does the Trainer run a Q-Former's first stage? Pairs, not rows of tokens; three losses.

Shapes: B pairs of this process, A pairs of all processes, L text tokens.

Contrast and matching are averaged over all pairs of an optimizer step, captions over all of their
words, whatever the number of processes and accumulation steps. Negatives come from the pairs of one
accumulation step of all processes, as in every reference: two steps of half the batch compare less
than one step of the whole.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from connectors.qformer_losses import Stage1Output
from connectors.qformer_stage1 import alone
from train.gather import exchange_sizes, gather_rows
from train.manifest import hash_sources
from train.retrieval import Totals, measure, model_inputs
from train.trainer import VlmTrainer


class PairTrainer(VlmTrainer):
    """Trains an `ImageTextModel` on batches of `CaptionCollator`.

    Args:
        held_out: what to measure on when the stage ends: a `CaptionDataset`, or None.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *, held_out: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.held_out = held_out
        self.totals = Totals()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Return (2,): the pairs and the captions' words of the whole step, each at least 1."""
        pairs = sum(batch["real"].sum() for batch in batch_samples)
        words = sum(
            (batch["attention_mask"][:, 1:].sum(dim=1) * batch["real"]).sum()
            for batch in batch_samples
        )
        counts = torch.stack([torch.as_tensor(pairs), torch.as_tensor(words)]).to(device)
        counts = self._over_processes(counts)
        self.window.tokens += counts[1]
        return counts.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return this process's share of the loss, times the number of processes.

        The gradients' mean over processes is then that of the loss over all pairs.
        """
        batch, gather = self._shared(inputs)
        found: Stage1Output = model(**model_inputs(batch), gather=gather)
        real = batch["real"]
        self.totals.add(found, real)
        num_pairs, num_words = num_items_in_batch
        by_pair = ((found.contrastive + found.matching) * real).sum() / num_pairs
        loss = by_pair + (found.caption * real).sum() / num_words
        return loss * self.accelerator.num_processes

    def _shared(self, inputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], Callable]:
        """Return the batch with texts as long in all processes, and what gathers their pairs."""
        ids = inputs["input_ids"]
        if self.accelerator.num_processes == 1:
            return inputs, alone
        counts, longest = exchange_sizes(len(ids), ids.shape[1], ids.device)
        more = (0, longest - ids.shape[1])
        mask = F.pad(inputs["attention_mask"], more)  # what is padded with does not matter there
        padded = {"input_ids": F.pad(ids, more), "attention_mask": mask}
        return {**inputs, **padded}, gather_rows(counts)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the three losses and what was found, averaged since the last line over all ranks."""
        if "loss" in logs:
            logs.update(Totals.averages(self._over_processes(self.totals.sums(self.args.device))))
            logs["temperature"] = self._temperature()
            self.totals = Totals()
        super().log(logs, start_time)

    def _temperature(self) -> float:
        model: Any = self.model
        return float(model.connector.temperature.detach())

    def final_figures(self) -> dict[str, Any]:
        """Measure on what was held out, comparing as many pairs at once as in training."""
        if self.held_out is None:
            return {}
        size = self.args.train_batch_size * self.args.world_size
        collate: Any = self.data_collator
        figures = measure(self.model, self.held_out, collate, size)
        return {"held_out": {**figures, "data": hash_sources(self.held_out.mixture.sources)}}
