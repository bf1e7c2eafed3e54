"""Is the chunked matrix LSTM exact against the quadratic form and transformers' xLSTM?"""

import math

import pytest
import torch
from transformers.models.xlstm.modeling_xlstm import (
    mlstm_chunkwise_native_autograd,
    mlstm_recurrent_sequence_native,
)

from vlm.encoders.mlstm import best_chunk, mlstm

VALUES, GRADIENTS = 2e-5, 1e-4
NAMES = ("q", "k", "v", "input_gate", "forget_gate")


def inputs(length, dtype=torch.float32, shift=0.0, scale=1.0):
    """q, k, v and the gates: 2 samples, 3 heads, keys of 6 channels, values of 4."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [
        draw(2, length, 3, 6),
        draw(2, length, 3, 6),
        draw(2, length, 3, 4),
        draw(2, length, 3) * scale + shift,
        draw(2, length, 3) * scale + 2,
    ]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def quadratic(q, k, v, input_gate, forget_gate):
    """The parallel form: xLSTM's appendix A.3, equations 98 and following."""
    q, k, v, log_input = (t.transpose(1, 2) for t in (q, k, v, input_gate))
    log_forget = torch.nn.functional.logsigmoid(forget_gate).transpose(1, 2)
    length = q.shape[2]
    sums = [[log_forget[..., j + 1 : i + 1].sum(-1) for j in range(length)] for i in range(length)]
    weights = torch.stack([torch.stack(row, -1) for row in sums], -2) + log_input[..., None, :]
    weights = weights.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    largest = weights.amax(-1, keepdim=True)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) * (weights - largest).exp()
    normaliser = torch.maximum(scores.sum(-1, keepdim=True).abs(), (-largest).exp())
    return (scores / (normaliser + 1e-6) @ v).transpose(1, 2)


def gradients(tensors, *outputs):
    """Of a fixed random sum of the outputs."""
    generator = torch.Generator().manual_seed(5)
    draws = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    totals = [(o * draw.to(o.dtype)).sum() for o, draw in zip(outputs, draws, strict=True)]
    return torch.autograd.grad(totals, tensors)


def check(tensors, got, wanted, values=VALUES, gradient=GRADIENTS):
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=values, atol=values)
    pairs = zip(gradients(tensors, *got), gradients(tensors, *wanted), strict=True)
    for i, (g, w) in enumerate(pairs):
        message = f"gradient {i} differs by {(g - w).abs().max()}"
        torch.testing.assert_close(g, w, rtol=gradient, atol=gradient, msg=message)


@pytest.mark.parametrize("length", [1, 2, 13, 29])
@pytest.mark.parametrize("longest", [1, 4, 64])
def test_quadratic_form_in_float64(length, longest):
    tensors = inputs(length, torch.float64, scale=3.0)
    h, _ = mlstm(*tensors, longest_chunk=longest)
    check(tensors, [h], [quadratic(*tensors)], 1e-10, 1e-9)


def test_quadratic_form_in_float32():
    tensors = inputs(30)
    check(tensors, [mlstm(*tensors, longest_chunk=7)[0]], [quadratic(*tensors)])


def library(function, tensors, state, **options):
    """Their function: heads before the sequence, m with one more dimension."""
    q, k, v, i, f = (t.transpose(1, 2).contiguous() for t in tensors)
    c, n, m = state
    h, (c, n, m) = function(
        query=q,
        key=k,
        value=v,
        igate=i,
        fgate=f,
        c_initial=c,
        n_initial=n,
        m_initial=m[..., None],
        return_last_states=True,
        **options,
    )
    return h.transpose(1, 2), c, n, m.squeeze(-1)


def first_state(zero):
    """C, n and m."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 3, 6, 4), (2, 3, 6), (2, 3)]
    if zero:
        return [torch.zeros(shape) for shape in shapes]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(("length", "theirs"), [(24, "chunks"), (1, "steps"), (13, "steps")])
def test_library(length, theirs, zero):
    tensors, state = inputs(length), first_state(zero)
    if theirs == "chunks":
        wanted = library(mlstm_chunkwise_native_autograd, tensors, state, chunk_size=8)
    else:
        wanted = library(mlstm_recurrent_sequence_native, tensors, state)
    first = (state[0], state[1], state[2])
    h, last = mlstm(*tensors, initial_state=first, return_last_state=True, longest_chunk=5)
    assert last
    check([*tensors, *([] if zero else state[:2])], [h, *last], wanted)


def test_a_last_state_goes_on():
    tensors = inputs(20, torch.float64)
    first, last = mlstm(*(t[:, :13] for t in tensors), return_last_state=True, longest_chunk=4)
    second, _ = mlstm(*(t[:, 13:] for t in tensors), initial_state=last, longest_chunk=4)
    whole, nothing = mlstm(*tensors)
    assert nothing is None
    check(tensors, [torch.cat([first, second], 1)], [whole], 1e-10, 1e-9)


EXTREMES = [(0.0, 50.0), (0.0, 1e4), (300.0, 1.0), (-300.0, 1.0), (-1e4, 1.0), (1e4, 1e3)]


@pytest.mark.parametrize(("shift", "scale"), EXTREMES)
def test_extreme_gates(shift, scale):
    # With q and k positive, q.n cannot vanish and blow up what float32 loses in the gates.
    q, k, *others = inputs(29, shift=shift, scale=scale)
    tensors = [t.detach().requires_grad_() for t in (q.abs(), k.abs(), *others)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    h, last = mlstm(*tensors, longest_chunk=7, return_last_state=True)  # 5 chunks of 6, one filled
    wanted = quadratic(*exact)
    assert wanted.isfinite().all() and (shift < 0 or wanted.abs().max() > 0.5)
    torch.testing.assert_close(h.double(), wanted, rtol=1e-4, atol=1e-4)
    assert all(gradient.isfinite().all() for gradient in gradients(tensors, h))
    _, stepwise = mlstm(*tensors, longest_chunk=1, return_last_state=True)
    assert last and stepwise
    torch.testing.assert_close(last[2], stepwise[2], rtol=1e-5, atol=1e-4)


def test_a_forgotten_past_is_forgotten_and_a_kept_one_kept():
    q, k, v, i, f = (t.detach() for t in inputs(12))
    f = torch.full_like(f, 1e4)
    f[:, 6] = -1e4
    h, _ = mlstm(q, k, v, i, f, longest_chunk=5)
    later, _ = mlstm(*(t[:, 6:] for t in (q, k, v, i, f)), longest_chunk=5)
    torch.testing.assert_close(h[:, 6:], later, rtol=VALUES, atol=VALUES)
    before, _ = mlstm(q, k, v, i, torch.full_like(f, 1e4), longest_chunk=5)
    torch.testing.assert_close(h[:, :6], before[:, :6], rtol=VALUES, atol=VALUES)
    assert (h[:, 6:] - before[:, 6:]).abs().max() > 0.1


def test_sixteen_bits_are_summed_in_float32():
    tensors = [t.detach().bfloat16() for t in inputs(40)]
    wide = [t.float() for t in tensors]
    wanted = mlstm(*wide, longest_chunk=9)[0]
    h = mlstm(*tensors, longest_chunk=9)[0]
    assert h.dtype == torch.bfloat16 and torch.equal(h, wanted.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mlstm(*wide, longest_chunk=9)[0], wanted)


@pytest.mark.parametrize(
    ("length", "channels", "expected"),
    [(64, 96, 64), (196, 96, 64), (196, 192, 196), (4096, 384, 128)],
)
def test_best_chunk(length, channels, expected):
    assert best_chunk(length, channels) == expected
