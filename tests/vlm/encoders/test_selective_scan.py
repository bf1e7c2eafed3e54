"""Is the selective scan the reference's, in every backend, layout, direction and length?"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm.encoders.scan_backends import chunked
from vlm.encoders.scan_backends.build_kernel import load_kernel
from vlm.encoders.selective_scan import selective_scan, selective_scan_channels_last
from vlm.errors import UserError

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
FAST = ["chunked", "compiled"]
LENGTHS = [1, 2, 7, 197, 513]
DIRECTIONS = [(False,), (True,), (False, True), (True, False, False)]
LAST = selective_scan_channels_last


@pytest.fixture(autouse=True)
def _compiler(request):
    """Skip tests of the compiled kernel where it cannot be built."""
    arguments = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    if "compiled" in (*arguments, *request.node.name.split("_")):
        library = load_kernel()
        if isinstance(library, str):
            pytest.skip(library)


def random_scan(length, groups=1, states=4, channels=6, batch=2, dtype=torch.float64, seed=0):
    """Return channels-last tensors of a stable system with every option in use."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels),
        "A": -normal(channels, states).exp(),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels) - 1,
    }


def with_gradients(function, tensors, weights=None, **options):
    """Return y, the last state and the gradients of a weighted sum of both."""
    tensors = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    options = {"delta_softplus": True, **options}
    y, state = function(**tensors, return_last_state=True, **options)
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = [
            torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, state)
        ]
    torch.autograd.backward([y, state], [w.to(x) for w, x in zip(weights, (y, state), strict=True)])
    grads = {f"grad of {name}": x.grad for name, x in tensors.items()}
    return {"y": y.detach(), "state": state.detach(), **grads}


def assert_near(got, expected, values=2e-5, gradients=1e-4, rtol=1e-6):
    """Compare values and gradients; numbers in the hundreds may be off by float32's rounding."""
    for name, want in expected.items():
        atol = gradients if name.startswith("grad") else values
        torch.testing.assert_close(
            got[name], want, rtol=rtol, atol=atol, check_dtype=False, msg=name
        )


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize(
    "name", ["var", "group4_n1", "const", "plain", "nosoftplus", "stress_large_delta"]
)
def test_golden(name, backend):
    file = GOLDEN / f"selective_scan_{name}.safetensors"
    softplus = json.loads(file.with_suffix(".json").read_text())["config"]["delta_softplus"]
    tensors = load_file(file)
    inputs = {key[3:]: x for key, x in tensors.items() if key.startswith("in.")}
    weights = [tensors["cot.y"], torch.zeros_like(tensors["out.last_state"])]
    got = with_gradients(selective_scan, inputs, weights, delta_softplus=softplus, backend=backend)
    expected = {"y": tensors["out.y"], "state": tensors["out.last_state"]}
    expected |= {f"grad of {name}": tensors[f"grad.{name}"] for name in inputs}
    assert_near(got, expected)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reverse", DIRECTIONS)
def test_chunked_is_the_reference_in_float64(length, reverse):
    tensors, options = random_scan(length, groups=len(reverse)), {"reverse": reverse}
    expected = with_gradients(LAST, tensors, backend="reference", **options)
    got = with_gradients(LAST, tensors, backend="chunked", **options)
    assert_near(got, expected, 1e-11, 1e-11, 1e-11)


@pytest.mark.parametrize(("block", "step"), [(1, 1), (200, 1), (1000, 200), (10**6, 10**6)])
def test_chunked_does_not_depend_on_how_it_is_cut(monkeypatch, block, step):
    tensors, options = random_scan(53, groups=2), {"reverse": (False, True)}
    expected = with_gradients(LAST, tensors, backend="reference", **options)
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(chunked, "STEP_ELEMENTS", step)
    got = with_gradients(LAST, tensors, backend="chunked", **options)
    assert_near(got, expected, 1e-11, 1e-11, 1e-11)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reverse", DIRECTIONS)
@pytest.mark.parametrize(("states", "channels"), [(1, 6), (16, 18), (5, 36)])
def test_float32_is_near_float64(backend, length, reverse, states, channels):
    tensors = random_scan(length, len(reverse), states, channels, batch=1)
    expected = with_gradients(LAST, tensors, backend="reference", reverse=reverse)
    single = {name: x.float() for name, x in tensors.items()}
    got = with_gradients(LAST, single, backend=backend, reverse=reverse)
    # Sums over the sequence grow with it, and with them what float32 rounds away.
    assert_near(got, expected, rtol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_sums_over_a_long_sequence_keep_their_digits(backend):
    tensors = {name: x.abs() for name, x in random_scan(6000, batch=1).items()}
    tensors["A"] = -tensors["A"]
    weights = [torch.ones(1, 6000, 6), torch.zeros(1, 6, 4)]
    expected = with_gradients(LAST, tensors, weights, backend="chunked")  # in float64
    single = {name: x.float() for name, x in tensors.items()}
    got = with_gradients(LAST, single, weights, backend=backend)
    for name in ("grad of A", "grad of D", "grad of delta_bias"):
        far = (got[name].double() - expected[name]).abs().max()
        assert far < 1e-6 * expected[name].abs().max(), name


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_options_may_be_absent(backend, without):
    tensors = {k: v for k, v in random_scan(20).items() if k not in without}
    neutral = {"D": torch.zeros(6), "delta_bias": torch.zeros(6)}
    filled = tensors | {k: v.double() for k, v in neutral.items() if k in without}
    single = {name: x.float() for name, x in tensors.items()}
    got = with_gradients(LAST, single, backend=backend)
    expected = with_gradients(LAST, filled, backend="reference")
    assert_near(got, {name: expected[name] for name in got})


@pytest.mark.parametrize("backend", FAST)
def test_constant_and_varying_coefficients_mix(backend):
    tensors = random_scan(20)
    tensors["B"] = tensors["B"][0, :6, 0]
    expected = with_gradients(LAST, tensors, backend="reference", reverse=(True, False))
    single = {name: x.float() for name, x in tensors.items()}
    got = with_gradients(LAST, single, backend=backend, reverse=(True, False))
    assert_near(got, expected)


def test_groups_of_b_and_c_may_differ():
    tensors = random_scan(9, groups=2)
    tensors["C"] = random_scan(9, groups=3)["C"]
    each = {k: tensors[k].repeat_interleave(6 // tensors[k].shape[2], 2) for k in ("B", "C")}
    assert torch.equal(LAST(**tensors), LAST(**tensors | each))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("size", [1e-6, 30.0, 1e4, 1e30])
def test_extreme_deltas_neither_overflow_nor_vanish(backend, size):
    """Deltas of 1e4 have decays of exp(-1e4 A): zero is right, and no quotient may notice it."""
    tensors = random_scan(130)
    tensors["delta"] = tensors["delta"].abs() * size
    del tensors["delta_bias"]
    expected = with_gradients(LAST, tensors, backend="reference", delta_softplus=False)
    single = {name: x.float() for name, x in tensors.items()}
    got = with_gradients(LAST, single, backend=backend, delta_softplus=False)
    for name, want in expected.items():
        assert got[name].isfinite().all(), name
        bound = 2e-5 * want.abs().max().clamp(min=1e-30)
        assert (got[name] - want).abs().max() <= bound, name


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_a_nan_is_not_hidden(backend, name):
    tensors = {k: v.float() for k, v in random_scan(12).items()}
    tensors[name].view(-1)[0] = float("nan")
    assert LAST(**tensors, backend=backend).isnan().any()


def test_growing_states_overflow_like_the_reference():
    tensors = {k: v.float() for k, v in random_scan(30).items()}
    tensors["A"] = -100 * tensors["A"]
    expected = LAST(**tensors, delta_softplus=True, backend="reference")
    assert not expected.isfinite().all()
    got = LAST(**tensors, delta_softplus=True, backend="compiled")
    assert torch.equal(got.isfinite(), expected.isfinite())


@pytest.mark.parametrize("reverse", [(False,), (False, True)])
@pytest.mark.parametrize("constant", [False, True])
def test_gradcheck(reverse, constant):
    tensors = random_scan(3, len(reverse), states=2, channels=2, batch=1)
    if constant:
        tensors |= {name: tensors[name].new_ones(2, 2).cumsum(0) / 3 for name in ("B", "C")}
    names = list(tensors)

    def function(*values):
        options = {"delta_softplus": True, "return_last_state": True, "backend": "chunked"}
        return LAST(**dict(zip(names, values, strict=True)), reverse=reverse, **options)

    torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors.values()])


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_goes_in_and_out_and_float32_is_kept_between(backend):
    tensors = {name: x.bfloat16() for name, x in random_scan(300).items()}
    got = with_gradients(LAST, tensors, backend=backend)
    assert got["y"].dtype == torch.bfloat16 and got["state"].dtype == torch.float32
    assert got["grad of A"].dtype == torch.bfloat16
    exact = {name: x.double() for name, x in tensors.items()}
    expected = with_gradients(LAST, exact, backend="reference")
    assert_near({"state": got["state"]}, {"state": expected["state"]})
    assert_near({"y": got["y"]}, {"y": expected["y"]}, rtol=2**-8)  # only y itself is rounded


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_autocast_changes_nothing(backend):
    tensors = {name: x.float() for name, x in random_scan(40).items()}
    expected = with_gradients(LAST, tensors, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(LAST, tensors, backend=backend)
    for name, want in expected.items():
        assert torch.equal(got[name], want), name


@pytest.mark.parametrize("backend", FAST)
def test_strides_do_not_matter(backend):
    """Transposed and sliced tensors, as models make them, and an expanded gradient."""
    tensors = {name: x.float() for name, x in random_scan(21, channels=32).items()}
    options = {"delta_softplus": True, "backend": backend}
    expected = LAST(**tensors, **options)
    odd = dict(tensors)
    odd["u"] = tensors["u"].transpose(1, 2).contiguous().transpose(1, 2)
    odd["z"] = torch.cat([tensors["z"], tensors["u"]], -1)[..., :32]
    odd["B"] = tensors["B"].transpose(1, 3).contiguous().transpose(1, 3)
    odd["A"] = tensors["A"].T.contiguous().T
    torch.testing.assert_close(LAST(**odd, **options), expected)
    u = tensors["u"].requires_grad_()
    (of_sum,) = torch.autograd.grad(LAST(**tensors, **options).sum(), u)
    y = LAST(**tensors, **options)
    (of_ones,) = torch.autograd.grad(y, u, torch.ones_like(y))
    torch.testing.assert_close(of_sum, of_ones)


def test_reversed_scan_is_the_scan_of_the_flipped_sequence():
    tensors = random_scan(7)
    over_time = ("u", "delta", "B", "C", "z")
    flipped = {k: v.flip(1) if k in over_time else v for k, v in tensors.items()}
    expected = LAST(**flipped, backend="reference").flip(1)
    assert torch.equal(LAST(**tensors, backend="reference", reverse=True), expected)


def test_one_call_for_both_directions_of_vim():
    """Each half of the channels is what a call of its own gives."""
    tensors = random_scan(33, groups=2)
    per_channel = {"A": 0, "D": 0, "delta_bias": 0}
    halves = []
    for half, reverse in ((0, False), (1, True)):
        part = {k: v.chunk(2, per_channel.get(k, 2))[half] for k, v in tensors.items()}
        halves.append(LAST(**part, delta_softplus=True, reverse=reverse))
    together = LAST(**tensors, delta_softplus=True, reverse=(False, True))
    torch.testing.assert_close(together, torch.cat(halves, 2), rtol=0, atol=1e-12)


def test_compiled_gives_the_same_with_more_threads():
    tensors = {k: v.float() for k, v in random_scan(40, channels=100, groups=2).items()}
    one = with_gradients(LAST, tensors, backend="compiled")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = with_gradients(LAST, tensors, backend="compiled")
    finally:
        torch.set_num_threads(threads)
    assert_near(three, one, 1e-6, 1e-5)


def test_meta_tensors_have_shapes_only():
    tensors = {name: x.float().to("meta") for name, x in random_scan(300).items()}
    y, state = LAST(**tensors, return_last_state=True)
    assert y.is_meta and y.shape == (2, 300, 6) and state.shape == (2, 6, 4)


WRONG = [
    ({"delta": torch.ones(2, 6, 6)}, {}, r"delta must be \(2, 7, 6\), not \(2, 6, 6\)"),
    ({"B": torch.ones(2, 7, 4, 4)}, {}, "6 channels are no 4 equal groups"),
    ({"u": torch.ones(2, 7)}, {}, "u must have three axes"),
    ({"u": torch.ones(2, 0, 6)}, {}, "none of them empty but the batch"),
    ({"u": torch.ones(2, 7, 6).long()}, {}, r"u must have a floating type.*not torch.int64"),
    ({"B": torch.ones(2, 7, 1, 4) > 0}, {}, r"B must have a floating type.*not torch.bool"),
    ({"A": torch.ones(6, 4, device="meta")}, {}, "u is on cpu, but A is on meta"),
    ({"A": torch.ones(6, 4, dtype=torch.complex64)}, {}, "A is complex"),
    ({}, {"reverse": (True,) * 4}, "reverse has 4 directions for 6 channels"),
    ({}, {"backend": "cuda"}, "must be auto or one of reference, chunked, compiled, triton"),
    ({}, {"backend": "compiled"}, "'compiled' cannot be used: it is for float32 on a CPU"),
]


@pytest.mark.parametrize(("changes", "options", "message"), WRONG)
def test_mistakes_are_named(changes, options, message):
    with pytest.raises(UserError, match=message):
        LAST(**random_scan(7) | changes, **options)


def test_channels_first_names_its_mistakes_too():
    ones = torch.ones(5)
    with pytest.raises(UserError, match="u must have three axes"):
        selective_scan(ones, ones, torch.ones(6, 4), torch.ones(6, 4), torch.ones(6, 4))


@pytest.mark.parametrize("backend", ["auto", *FAST, "reference"])
def test_an_empty_batch_gives_an_empty_result(backend):
    tensors = {name: x.float() for name, x in random_scan(7, batch=0).items()}
    got = with_gradients(LAST, tensors, backend=backend)
    assert got["y"].shape == (0, 7, 6) and got["state"].shape == (0, 6, 4)
    assert all(torch.equal(got[f"grad of {k}"], torch.zeros_like(x)) for k, x in tensors.items())


@pytest.mark.parametrize("backend", FAST)
def test_second_derivatives_are_refused_not_left_out(backend):
    tensors = {name: x.float().requires_grad_() for name, x in random_scan(7).items()}
    y = LAST(**tensors, backend=backend)
    with pytest.raises(RuntimeError, match="only backend='reference' has second derivatives"):
        torch.autograd.grad(y.sum(), tensors["u"], create_graph=True)


@pytest.mark.parametrize("backend", FAST)
def test_a_gate_of_any_size_closes(backend):
    tensors = {name: x.float() for name, x in random_scan(7).items()}
    tensors["z"] = torch.full_like(tensors["z"], -1e38)
    tensors["D"] = tensors["D"] * 1e3
    y = LAST(**tensors, delta_softplus=True, backend=backend)
    assert torch.equal(y, torch.zeros_like(y))
