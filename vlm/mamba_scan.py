"""How do Mamba-1 language models run where transformers finds no CUDA kernel? On our own scan.

Shapes: B batch, L sequence, E language-model width, D channels of the layer, G groups of channels
with B and C of their own (Zamba's heads), N states, R rank of delta.

transformers' fallback is a Python loop over the sequence whose backward takes time quadratic in L,
and which starts from an empty state even where a cache holds one, so that several tokens after a
cached prompt get wrong answers without a word. `use_scan` changes the class of each mixer to one
derived from its own, with the same parameters, names and results. Single steps from a cache stay
transformers' own.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vlm.encoders.selective_scan import selective_scan_channels_last


def use_scan(language_model: PreTrainedModel) -> PreTrainedModel:
    """Let the Mamba-1 mixers of a language model run on our scan; return the same model.

    Models without such mixers are returned as they are.
    """
    mixers = _mixers(language_model.config.model_type)
    for module in language_model.modules():
        if type(module) in mixers:
            module.__class__ = mixers[type(module)]
    return language_model


def _mixers(model_type: str) -> Mapping[type[nn.Module], type[nn.Module]]:
    """Return transformers' mixer class -> ours, for the families that have Mamba-1 layers."""
    ours = NormedScanMixer
    match model_type:
        case "mamba":
            from transformers.models.mamba.modeling_mamba import MambaMixer as mixer

            ours = ScanMixer
        case "falcon_mamba":
            from transformers.models.falcon_mamba.modeling_falcon_mamba import (
                FalconMambaMixer as mixer,
            )
        case "jamba":
            from transformers.models.jamba.modeling_jamba import JambaMambaMixer as mixer
        case "zamba":
            from transformers.models.zamba.modeling_zamba import ZambaMambaMixer as mixer

            ours = HeadedScanMixer
        case _:
            return {}
    return {mixer: cast(type[nn.Module], type(f"Scan{mixer.__name__}", (ours, mixer), {}))}


class ScanMixer(nn.Module):
    """The forward of Mamba's mixer; transformers' class comes after it among the bases.

    Mamba paper (arXiv 2312.00752), algorithm 2 and section 3.4. Parameters and cache are those of
    transformers' class.
    """

    # Of transformers' classes.
    layer_idx: int
    time_step_rank: int
    ssm_state_size: int
    in_proj: nn.Module
    conv1d: nn.Conv1d
    act: nn.Module
    x_proj: nn.Module
    dt_proj: nn.Linear
    A_log: Tensor
    D: Tensor
    out_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Mix (B, L, E) along the sequence.

        Args:
            hidden_states: (B, L, E).
            cache_params: what was read before; brought up to date.
            attention_mask: (B, L) 0 on padding, which leaves the state as it is.
            **kwargs: to transformers' own forward.
        """
        length, state = hidden_states.shape[1], None
        if cache_params is not None:
            state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
        fused = state is None and hidden_states.is_cuda and self._can_be_fused()
        if fused or (state is not None and length == 1):
            return super().forward(hidden_states, cache_params, attention_mask, **kwargs)

        x, z = self.split_input(self.in_proj(_masked(hidden_states, attention_mask)))  # (B, L, D)
        x = _masked(self._convolve(x, cache_params), attention_mask)
        delta, delta_bias, B, C = self.select(x)
        A = -torch.exp(self.A_log.float()).flatten(0, -2)  # (D, N)
        y, last = selective_scan_channels_last(
            x,
            delta,
            A,
            B,
            C,
            D=self.D.float().flatten(),
            delta_bias=delta_bias,
            delta_softplus=True,
            return_last_state=True,
        )
        if state is not None:
            step = delta.float() if delta_bias is None else delta + delta_bias
            past_y, past_last = fade(state.flatten(1, -2), F.softplus(step), A, C)
            y, last = y + past_y, last + past_last
        if cache_params is not None:
            last = last.unflatten(1, self.A_log.shape[:-1])
            cache_params.update_recurrent_state(last, self.layer_idx)
        return self.out_proj((y * F.silu(z)).to(hidden_states.dtype))

    def _can_be_fused(self) -> bool:
        """Return whether mamba_ssm's one kernel for all of the mixer is there and gives its result.

        It takes the weights of the projections, and so passes adapters (modules in modules) by.
        """
        adapted = any(True for child in self.children() for _ in child.children())
        return not adapted and find_spec("mamba_ssm") is not None

    def _convolve(self, x: Tensor, cache: Cache | None) -> Tensor:
        """Apply the causal convolution to (B, L, D), after the inputs that a cache holds."""
        x, length = x.transpose(1, 2), x.shape[1]
        if cache is not None:
            x = cache.update_conv_state(
                x, self.layer_idx, conv_kernel_size=self.conv1d.kernel_size[0]
            )
        # The convolution pads both ends; what it makes of the right one is cut off.
        x = self.conv1d(x)[..., : x.shape[-1]][..., -length:]
        return self.act(x).transpose(1, 2)

    def split_input(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, 2 D) -> what is scanned and its gate, (B, L, D) each."""
        x, z = projected.chunk(2, dim=-1)
        return x, z

    def select(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(B, L, D) -> delta (B, L, D), its bias (D), B and C (B, L, 1, N)."""
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        rank, B, C = self.normalise(*self.x_proj(x).split(sizes, dim=-1))
        if type(self.dt_proj) is nn.Linear:
            # The bias is added in float32: rounded to bfloat16 the sum would move every decay.
            delta, bias = F.linear(rank, self.dt_proj.weight), self.dt_proj.bias.float()
        else:  # an adapter or quantised weights, which `.weight` would pass by
            delta, bias = self.dt_proj(rank), None
        return delta, bias, B.unsqueeze(2), C.unsqueeze(2)

    def normalise(self, rank: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return delta's R numbers, B and C as they are."""
        return rank, B, C


class NormedScanMixer(ScanMixer):
    """The forward of Falcon-Mamba's and Jamba's mixers, which normalise delta, B and C."""

    dt_layernorm: nn.Module
    b_layernorm: nn.Module
    c_layernorm: nn.Module

    def normalise(self, rank: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return all three normalised."""
        return self.dt_layernorm(rank), self.b_layernorm(B), self.c_layernorm(C)


class HeadedScanMixer(ScanMixer):
    """The forward of Zamba's mixer: each head of D / G channels selects delta, B and C itself."""

    x_proj_weight: Tensor
    dt_proj_weight: Tensor
    dt_proj_bias: Tensor

    def split_input(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, 2 D), each channel's input beside its gate -> (B, L, D) each."""
        x, z = projected.unflatten(-1, (-1, 2)).unbind(-1)
        return x, z

    def select(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(B, L, D) -> delta (B, L, D), its bias (D), B and C (B, L, G, N)."""
        heads = x.unflatten(-1, self.dt_proj_bias.shape)  # (B, L, G, D / G)
        selected = torch.einsum("blgp,grp->blgr", heads, self.x_proj_weight)
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        rank, B, C = selected.split(sizes, dim=-1)
        delta = torch.einsum("blgr,gpr->blgp", rank, self.dt_proj_weight).flatten(-2)
        return delta, self.dt_proj_bias.float().flatten(), B, C


def fade(state: Tensor, step: Tensor, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Return what an earlier state adds to the scan after it: to y, and to the last state.

    The recurrence is linear in the state, so its part is the state times all decays so far.

    Args:
        state: (B, D, N) before the first step.
        step: (B, L, D), after softplus.
        A: (D, N).
        C: (B, L, G, N).

    Returns:
        (B, L, D) and (B, D, N).
    """
    decayed = torch.exp(step.cumsum(1)[..., None] * A) * state[:, None]  # (B, L, D, N)
    heads = decayed.unflatten(2, (C.shape[2], -1))  # (B, L, G, D / G, N)
    return (heads * C[:, :, :, None].float()).sum(-1).flatten(2), decayed[:, -1]


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return (B, L, ...) with zeros where the mask (B, L) is 0."""
    return x if mask is None else x * mask[..., None].to(x.dtype)
