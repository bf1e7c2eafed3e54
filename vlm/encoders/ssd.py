"""How is the scan of Mamba-2 (SSD) computed by matrix products, for any length?

Per head a state (P, N) decays by one number a step and takes an outer product up:
    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T,    y_t = state_t C_t + D x_t
Dao and Gu, "Transformers are SSMs" (2024), section 6: inside a chunk y is a masked product like
attention, between chunks the states are handed on. Work and memory grow linearly with L.
Shapes: B batch, L sequence, H heads, P channels of a head, G groups, N states; inside, also c
chunks, Q steps of a chunk, R = H / G heads of a group. Head h reads group h // R.

Golden: `mamba_ssm/modules/ssd_minimal.py` (state-spaces/mamba e9594ce); library: the PyTorch path
of `transformers.models.mamba2`. Both repeat B and C for each head and pad to whole chunks of 64
(there 256); here the heads of a group share one product and the chunks are cut equally long.
"""

import torch
from torch import Tensor

from vlm.encoders.scan_chunks import chunk_length, cut, segment_sums

LONGEST_CHUNK = 64


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    longest_chunk: int = LONGEST_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, H, P) and the last state (B, H, P, N) of the scan of Mamba-2.

    Args:
        x: (B, L, H, P).
        dt: (B, L, H), step sizes, not negative: after bias and softplus.
        A: (H), negative.
        B, C: (B, L, G, N), where G divides H.
        D: (H), weight of x in y.
        initial_state: (B, H, P, N); zero if None.
        reverse: scan from the end to the start; the last state is then that of step 0.
        longest_chunk: a limit of Q, which changes speed alone.

    float32 inside for inputs of 16 bits; y has the type of x, the state that of the computation.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    log_decay = dt.to(dtype) * A.to(dtype)
    steps = dt.to(dtype)[..., None] * x
    y, state = ssd_scan(
        steps,
        log_decay,
        B,
        C,
        initial_state=initial_state,
        reverse=reverse,
        longest_chunk=longest_chunk,
    )
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    return y.to(x.dtype), state


def ssd_scan(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    longest_chunk: int = LONGEST_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, H, P) and the last state (B, H, P, N), with the decay given step by step.

    Args: as for `ssd`, but x is already multiplied by dt, and `log_decay` (B, L, H), not positive,
    stands for dt A. y has the type of the computation.
    """
    batch, length, heads, channels = x.shape
    groups, states = B.shape[2:]
    assert heads % groups == 0 and C.shape == B.shape, (x.shape, B.shape, C.shape)
    assert log_decay.shape == (batch, length, heads), (x.shape, log_decay.shape)
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, log_decay, B, C = (tensor.to(dtype) for tensor in (x, log_decay, B, C))
    if reverse:
        x, log_decay, B, C = (tensor.flip(1) for tensor in (x, log_decay, B, C))
    if initial_state is None:
        state = x.new_zeros(batch, groups, states, heads // groups, channels, dtype=dtype)
    else:
        state = initial_state.to(dtype).unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3)
    with torch.autocast(x.device.type, enabled=False):
        y, state = _scan_chunks(x, log_decay, B, C, state, chunk_length(length, longest_chunk))
    y = y[:, :length]
    return y.flip(1) if reverse else y, state.permute(0, 1, 3, 4, 2).flatten(1, 2)


def _scan_chunks(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Return y (B, cQ, H, P) and the last state (B, G, N, R, P); `state` is the first one."""
    groups = B.shape[2]
    # Steps filled in at the end are zero: they neither decay nor add, so the last state is right.
    x = cut(x, steps).unflatten(3, (groups, -1)).transpose(2, 3)  # (B, c, G, Q, R, P)
    B, C = (cut(t, steps).transpose(2, 3) for t in (B, C))  # (B, c, G, Q, N)
    logs = cut(log_decay, steps).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)
    running, sums = segment_sums(logs)  # (B, c, G, R, Q), (B, c, G, R, Q, Q)

    within = (C @ B.transpose(-1, -2))[:, :, :, None] * sums.exp()
    y = (within @ x.transpose(3, 4)).transpose(3, 4)  # (B, c, G, Q, R, P)

    to_end = sums[..., -1, :].exp().transpose(-1, -2)[..., None]  # (B, c, G, Q, R, 1)
    added = (B.transpose(-1, -2) @ (x * to_end).flatten(4)).unflatten(4, x.shape[4:])
    kept = running[..., -1].exp()[:, :, :, None, :, None]  # (B, c, G, 1, R, 1)
    starts = []
    for kept_of_chunk, added_of_chunk in zip(kept.unbind(1), added.unbind(1), strict=True):
        starts.append(state)
        state = torch.addcmul(added_of_chunk, kept_of_chunk, state)  # (B, G, N, R, P)

    from_start = (C @ torch.stack(starts, 1).flatten(4)).unflatten(4, x.shape[4:])
    y = y + from_start * running.exp().transpose(-1, -2)[..., None]
    return y.transpose(2, 3).flatten(3, 4).flatten(1, 2), state
