"""How is the matrix LSTM of xLSTM computed in chunks, exactly, with gates of any size?

Per head, with the gates' logs f_t = logsigmoid(forget_t) and i_t = input_t (exponential):
    C_t = exp(f_t) C_{t-1} + exp(i_t) k_t v_t^T,    n_t = exp(f_t) n_{t-1} + exp(i_t) k_t
    h_t = C_t^T q_t / max(|n_t . q_t|, 1),          q_t scaled by 1 / sqrt(K)
Beck et al., "xLSTM" (2024), section 2.3 and appendix A.3. exp(i_t) overflows, so C and n are kept
divided by exp(m_t), m_t being the largest log weight so far; the 1 becomes exp(-m_t).
Shapes: B batch, L sequence, H heads, K channels of a key, P of a value; inside, also c chunks,
Q steps of a chunk.

The quadratic form (NX-AI/vision-lstm, `vision_lstm2.py`, `parallel_stabilized_simple`) makes an
(L, L) matrix; here only (Q, Q) ones exist, and the normaliser n is one more channel of v.

Surprises:
- eps is added to the denominator after the division by exp(m), so it depends on m. xLSTM starts
  with m = 0, the quadratic form with m = -inf. They differ by that much; `initial_state` decides.
- exp(-m) overflows where all input gates so far are below -88; it is held at exp(80), where h is
  zero to float32 either way, and its gradient is zero instead of 0 * inf.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.encoders.scan_chunks import chunk_length, cut, segment_sums

State = tuple[Tensor, Tensor, Tensor]
ChunkState = tuple[Tensor, Tensor]  # [C, n] (B, H, K, P + 1) and m (B, H)
LARGEST_EXPONENT = 80.0


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    initial_state: State | None = None,
    return_last_state: bool = False,
    longest_chunk: int | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, State | None]:
    """Return h (B, L, H, P) of the matrix LSTM, and its last state if asked for.

    Args:
        q, k: (B, L, H, K); q is scaled here.
        v: (B, L, H, P).
        input_gate, forget_gate: (B, L, H), before exp and sigmoid.
        initial_state: C (B, H, K, P), n (B, H, K) and m (B, H), as the last state is returned;
            zeros are the start of xLSTM, None is that of the quadratic form (m = -inf).
        return_last_state: whether to compute the last state; None takes its place otherwise.
        longest_chunk: a limit of Q, which changes speed alone; None chooses by L and P.
        eps: added to the denominator.

    float32 inside for inputs of 16 bits; h has the type of q, the state that of the computation.
    """
    batch, length, heads, keys = q.shape
    assert input_gate.shape == forget_gate.shape == (batch, length, heads), input_gate.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    state = None
    if initial_state is not None:
        memory, normaliser, largest = (tensor.to(dtype) for tensor in initial_state)
        state = (torch.cat([memory, normaliser[..., None]], -1), largest)
    steps = chunk_length(length, longest_chunk or best_chunk(length, v.shape[3]))
    with torch.autocast(q.device.type, enabled=False):
        chunks = Chunks(
            cut(q.to(dtype) * keys**-0.5, steps).transpose(2, 3),
            cut(k.to(dtype), steps).transpose(2, 3),
            # n is the state of one more value, which is always 1.
            F.pad(cut(v.to(dtype), steps).transpose(2, 3), (0, 1), value=1.0),
            # Steps filled in at the end keep all (log 1) and add nothing (log 0).
            cut(input_gate.to(dtype), steps, value=-torch.inf).transpose(2, 3),
            cut(F.logsigmoid(forget_gate.to(dtype)), steps).transpose(2, 3),
        )
        h, state = _scan(chunks, state, return_last_state, eps)
    last = None if state is None else (state[0][..., :-1], state[0][..., -1], state[1])
    return h[:, :length].to(q.dtype), last


def best_chunk(length: int, channels: int) -> int:
    """Return the longest chunk to use: the whole sequence where a state would cost more than it.

    A state has `channels` squared numbers, a chunk as many weights as its square. The factors were
    measured on a CPU with `tests/benchmarks/bench_ssd.py`.
    """
    return length if length <= 1.5 * channels else max(64, channels // 3)


class Chunks(NamedTuple):
    """The inputs, cut: q is scaled, v has a last channel of ones, the gates are logs."""

    q: Tensor  # (B, c, H, Q, K)
    k: Tensor  # (B, c, H, Q, K)
    v: Tensor  # (B, c, H, Q, P + 1)
    log_input: Tensor  # (B, c, H, Q)
    log_forget: Tensor  # (B, c, H, Q)


def _scan(
    chunks: Chunks, state: ChunkState | None, return_last: bool, eps: float
) -> tuple[Tensor, ChunkState | None]:
    """Return h (B, cQ, H, P), and the last state if asked for."""
    q, k, v, log_input, log_forget = chunks
    running, sums = segment_sums(log_forget)
    weights = sums + log_input[..., None, :]  # (B, c, H, Q, Q), log
    largest = weights.amax(-1)  # (B, c, H, Q)
    from_start = None
    if state is not None or return_last or q.shape[1] > 1:
        starts, largest_starts, state = _states(k, v, running[..., -1], weights[..., -1, :], state)
        carried = running + largest_starts[..., None]
        largest = torch.maximum(carried, largest)
        from_start = (q * (carried - largest).exp()[..., None]) @ starts
    h = ((q @ k.transpose(-1, -2)) * (weights - largest[..., None]).exp()) @ v
    if from_start is not None:
        h = h + from_start
    floor = (-largest).clamp(max=LARGEST_EXPONENT).exp()
    h = h[..., :-1] / (torch.maximum(h[..., -1].abs(), floor) + eps)[..., None]
    return h.transpose(2, 3).flatten(1, 2), state if return_last else None


def _states(
    k: Tensor, v: Tensor, log_kept: Tensor, log_added: Tensor, state: ChunkState | None
) -> tuple[Tensor, Tensor, ChunkState]:
    """Return [C, n] (B, c, H, K, P + 1) and m (B, c, H) before each chunk, and both after the last.

    Args:
        k, v: (B, c, H, Q, K) and (B, c, H, Q, P + 1).
        log_kept: (B, c, H), of the state over a whole chunk.
        log_added: (B, c, H, Q), of each step at the end of its chunk.
        state: before the first chunk; None for an empty one.
    """
    if state is None:
        empty = k.new_zeros(k.shape[0], k.shape[2], k.shape[4], v.shape[4])
        state = (empty, k.new_full((k.shape[0], k.shape[2]), -torch.inf))
    memory, m = state
    largest = [m]
    for kept, added in zip(log_kept.unbind(1), log_added.amax(-1).unbind(1), strict=True):
        largest.append(torch.maximum(kept + largest[-1], added))
    before, after = torch.stack(largest[:-1], 1), torch.stack(largest[1:], 1)  # (B, c, H)
    added = (k * (log_added - after[..., None]).exp()[..., None]).transpose(-1, -2) @ v
    kept = (log_kept + before - after).exp()[..., None, None]
    memories = []
    for kept_of_chunk, added_of_chunk in zip(kept.unbind(1), added.unbind(1), strict=True):
        memories.append(memory)
        memory = torch.addcmul(added_of_chunk, kept_of_chunk, memory)
    return torch.stack(memories, 1), before, (memory, largest[-1])
