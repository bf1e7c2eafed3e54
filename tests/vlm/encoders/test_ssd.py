"""Is the chunked SSD scan the reference's, at any length, direction and step, with gradients?"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from vlm.encoders.ssd import ssd, ssd_scan

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
VALUES, GRADIENTS = 2e-5, 1e-4
NAMES = ("x", "dt", "A", "B", "C", "D", "state")


def inputs(length, groups=2, dtype=torch.float32, longest_step=0.5):
    """x, dt, A, B, C, D and a first state: 2 samples, 6 heads of 4 channels, 5 states."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "x": draw(2, length, 6, 4),
        "dt": draw(2, length, 6).sigmoid() * longest_step,
        "A": -draw(6).exp(),
        "B": draw(2, length, groups, 5),
        "C": draw(2, length, groups, 5),
        "D": draw(6),
        "state": draw(2, 6, 4, 5),
    }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def run(t, **options):
    return ssd(t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], initial_state=t["state"], **options)


def loop(t):
    """The recurrence, step by step."""
    B, C = (t[n].repeat_interleave(6 // t[n].shape[2], dim=2) for n in "BC")
    state, outputs = t["state"], []
    for i in range(t["x"].shape[1]):
        decay = (t["dt"][:, i] * t["A"]).exp()[..., None, None]
        added = (t["dt"][:, i, :, None] * t["x"][:, i])[..., None] * B[:, i, :, None]
        state = decay * state + added
        outputs.append((state * C[:, i, :, None]).sum(-1) + t["D"][:, None] * t["x"][:, i])
    return torch.stack(outputs, 1), state


def gradients(t, outputs):
    """Of a fixed random sum of the outputs."""
    generator = torch.Generator().manual_seed(5)
    draws = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    totals = [(o * draw.to(o.dtype)).sum() for o, draw in zip(outputs, draws, strict=True)]
    return dict(zip(NAMES, torch.autograd.grad(totals, [t[n] for n in NAMES]), strict=True))


def check(t, got, wanted):
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w.to(g.dtype), rtol=VALUES, atol=VALUES)
    pairs = gradients(t, got), gradients(t, wanted)
    for name in NAMES:
        torch.testing.assert_close(
            pairs[0][name],
            pairs[1][name],
            rtol=GRADIENTS,
            atol=GRADIENTS,
            msg=f"gradient of {name}",
        )


@pytest.mark.parametrize("longest", [1, 5, 8, 64])
def test_golden(longest):
    golden = load_file(GOLDEN / "mamba2_ssd_minimal.safetensors")
    t = {n: golden[f"in.{n}"].requires_grad_() for n in "XABC"}
    outputs = ssd_scan(t["X"], t["A"], t["B"], t["C"], longest_chunk=longest)
    for output, name in zip(outputs, ("y", "final_state"), strict=True):
        torch.testing.assert_close(output, golden[f"out.{name}"], rtol=0, atol=VALUES)
    torch.autograd.backward(outputs, [golden["cot.y"], golden["cot.final_state"]])
    for name, tensor in t.items():
        torch.testing.assert_close(tensor.grad, golden[f"grad.{name}"], rtol=0, atol=GRADIENTS)


@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_library(length, groups):
    t = inputs(length, groups)
    wanted = mamba2_chunk_scan(
        t["x"],
        t["dt"],
        t["A"],
        t["B"],
        t["C"],
        chunk_size=8,
        D=t["D"],
        initial_states=t["state"],
        return_final_states=True,
    )
    check(t, run(t, longest_chunk=10), wanted)


@pytest.mark.parametrize("length", [1, 2, 13, 29])
def test_loop_in_float64(length):
    t = inputs(length, dtype=torch.float64)
    outputs, wanted = run(t, longest_chunk=6), loop(t)
    for g, w in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("longest_step", [1e-6, 50.0, 1e4])
def test_extreme_steps(longest_step):
    t = inputs(31, longest_step=longest_step)
    outputs = run(t, longest_chunk=7)
    exact = {n: tensor.detach().double().requires_grad_() for n, tensor in t.items()}
    wanted = loop(exact)
    for g, w in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=VALUES, atol=VALUES * w.abs().max().item())
    pairs = gradients(t, outputs), gradients(exact, wanted)
    for name in NAMES:
        assert pairs[0][name].isfinite().all(), name
        largest = pairs[1][name].abs().max().item() + 1e-30  # what underflows is zero
        torch.testing.assert_close(
            pairs[0][name].double(), pairs[1][name], rtol=GRADIENTS, atol=GRADIENTS * largest
        )


def test_reverse_is_the_scan_of_the_flipped_sequence():
    t = inputs(19)
    flipped = {n: v.flip(1) if n in ("x", "dt", "B", "C") else v for n, v in t.items()}
    y, state = run(flipped, longest_chunk=6)
    check(t, run(t, reverse=True, longest_chunk=6), (y.flip(1), state))


def test_a_last_state_goes_on():
    t = inputs(20)
    first = {n: v[:, :13] if n in ("x", "dt", "B", "C") else v for n, v in t.items()}
    second = {n: v[:, 13:] if n in ("x", "dt", "B", "C") else v for n, v in t.items()}
    y, second["state"] = run(first, longest_chunk=4)
    y2, state = run(second, longest_chunk=4)
    check(t, (torch.cat([y, y2], 1), state), run(t, longest_chunk=64))


def test_gradcheck():
    t = inputs(5, dtype=torch.float64)
    cut = {"B": (..., slice(2)), "C": (..., slice(2)), "state": (..., slice(2))}
    values = [t[n][cut.get(n, ...)].detach()[:1].requires_grad_() for n in NAMES]

    def scan(*values):
        return run(dict(zip(NAMES, values, strict=True)), longest_chunk=2)

    assert torch.autograd.gradcheck(scan, values, fast_mode=True)


def test_sixteen_bits_are_summed_in_float32():
    t = {n: v.detach().bfloat16() for n, v in inputs(40).items()}
    wide = {n: v.float() for n, v in t.items()}
    y, state = run(t)
    wanted, wanted_state = run(wide)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(y, wanted.bfloat16()) and torch.equal(state, wanted_state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(wide)[0], wanted)
