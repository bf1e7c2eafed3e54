"""What is the exponential moving average of the weights (EMA), and how does it outlive a kill?

It is kept in float32, whatever the model's type, of what trains at any time of the stage, on the
main process alone. Frozen weights are their own average.

Surprise: the decay grows with the steps, as TensorFlow's does: after n of them it is at most
(1 + n) / (10 + n), or a short stage would end with much of the weights it began with.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = "average.safetensors"


def decay_at(step: int, decay: float) -> float:
    """Return how much of the average the step number `step`, counted from 1, leaves in it."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """The average of a model's trainable weights, by name.

    Args:
        model: on its device; the average begins with its weights.
        decay: in [0, 1); what a step leaves of the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1."""
        parameters = dict(model.named_parameters())
        weight = 1 - decay_at(step, self.decay)
        for name, average in self.values.items():
            average.lerp_(parameters[name].float(), weight)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the average in place of the model's weights, in the model's types."""
        parameters = dict(model.named_parameters())
        for name, average in self.values.items():
            parameters[name].copy_(average)

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint's folder."""
        save_file(self.values, folder / FILE)

    def load(self, folder: Path) -> None:
        """Go on from the average that a checkpoint holds."""
        saved = load_file(folder / FILE)
        assert saved.keys() == self.values.keys(), "the checkpoint is of another stage"
        for name, average in self.values.items():
            average.copy_(saved[name])
