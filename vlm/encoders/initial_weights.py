"""How do the weights of Vim and VMamba begin, and how do they stay as they began?

Shapes: E channels of a scan, N states a channel, R rank of the step's projection.

Surprise: `VlmModel.__init__` ends with transformers' `post_init`, which draws every Linear and
convolution again from one normal distribution and sets biases to zero. A step bias of zero is a
step of softplus(0) = 0.7, where Mamba begins between 0.001 and 0.1. `keep` marks the weights of an
encoder as drawn; weights that `from_pretrained` does not find lose the mark and are drawn by it.
"""

import math

import torch
from torch import Tensor, nn

STEP_MIN, STEP_MAX, STEP_FLOOR = 1e-3, 1e-1, 1e-4


def step_bias(*shape: int) -> Tensor:
    """Return biases (*shape) whose softplus is log-uniform between 0.001 and 0.1.

    As `Mamba.__init__` in state-spaces/mamba, mamba_ssm/modules/mamba_simple.py.
    """
    drawn = torch.rand(*shape)
    if drawn.is_meta:
        return drawn  # its operations are slow, and a model has hundreds of these
    low, high = math.log(STEP_MIN), math.log(STEP_MAX)
    steps = torch.exp(drawn * (high - low) + low).clamp(min=STEP_FLOOR)
    return steps + torch.log(-torch.expm1(-steps))  # the inverse of softplus


def step_weight(*shape: int) -> Tensor:
    """Return weights (..., R), uniform within 1 / sqrt(R); the same file."""
    bound = shape[-1] ** -0.5
    return torch.empty(*shape).uniform_(-bound, bound)


def decay_logs(channels: int, states: int) -> Tensor:
    """Return log(1), ..., log(N) for each channel, (E, N): S4D-Real, the same file."""
    rows = torch.empty(channels, states)
    if rows.is_meta:
        return rows
    return rows.copy_(torch.arange(1, states + 1, dtype=torch.float32).log())


def linear_weight(*shape: int) -> Tensor:
    """Return weights (..., inputs) as `nn.Linear` draws them, for several stacked projections."""
    bound = shape[-1] ** -0.5
    return torch.empty(*shape).uniform_(-bound, bound)


def keep(module: nn.Module) -> None:
    """Mark all parameters as drawn, so that `PreTrainedModel.post_init` leaves them alone."""
    for parameter in module.parameters():
        parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
