"""How is a selective scan done on a GPU? Two Triton kernels, one pass over memory each way.

Shapes: B batch, L sequence, D channels, G groups of d channels, N states; a tile is T rows of time
by W neighbouring channels of one group. A program takes W channels of one batch entry and goes
through their tiles, in the order of the scan; inside a tile, and for one state at a time,
`associative_scan` does T steps at once. Nothing of size L * D * N leaves the chip: forward writes
the states before each tile, backward starts from them and computes the others again.

The grid is (tiles of d in all groups, B). Tensors are contiguous: u, delta, z, y (B, L, D),
A (N, D), B, C (B, L, G, N), the states `before` each tile (B, tiles, N, D), the last (B, N, D).
B's and C's gradients are sums over channels: each program writes its own share, and the shares are
added afterwards. With atomics the last digits would change from run to run.
"""

import triton
import triton.language as tl

# pyright: reportMissingImports=false


@triton.jit
def _then(decay_1, added_1, decay_2, added_2):
    """Join two steps x -> decay x + added into one."""
    return decay_1 * decay_2, added_1 * decay_2 + added_2


@triton.jit
def _softplus(x):
    """Return log(1 + e^x), without losing an e that 1 + e rounds away."""
    e = tl.exp(-tl.abs(x))
    rounded = 1.0 + e
    lost = rounded == 1.0
    log = tl.where(lost, e, tl.log(rounded) * (e / tl.where(lost, 1.0, rounded - 1.0)))
    return tl.maximum(x, 0.0) + log


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _columns(channels, G, W: tl.constexpr):
    """Return the program's group, its number in the group, its channels and which of them exist."""
    d = channels // G
    per_group = tl.cdiv(d, W)
    number = tl.program_id(0) % per_group
    group = tl.program_id(0) // per_group
    inner = number * W + tl.arange(0, W)
    return group, number.to(tl.int64), group * d + inner, inner < d


@triton.jit
def _rows(t, L, backwards):
    """Return where steps t lie among all batch entries' rows, and which of them exist."""
    rows = tl.where(backwards, L - 1 - t, t)
    return tl.program_id(1).to(tl.int64) * L + rows, (t >= 0) & (t < L)


@triton.jit
def _load(data, rows, exist, columns, valid, channels):
    """Return rows of a (B, L, D) tensor's columns, zeros where there is none."""
    place = data + rows[:, None] * channels + columns[None, :]
    return tl.load(place, mask=exist[:, None] & valid[None, :], other=0.0)


@triton.jit
def _store(data, rows, exist, columns, valid, channels, values):
    place = data + rows[:, None] * channels + columns[None, :]
    tl.store(place, values, mask=exist[:, None] & valid[None, :])


@triton.jit
def _steps(delta, bias, rows, exist, columns, valid, channels, SOFTPLUS: tl.constexpr):
    """Return the steps, 0 outside the sequence, and what softplus was applied to."""
    x = _load(delta, rows, exist, columns, valid, channels) + bias[None, :]
    step = _softplus(x) if SOFTPLUS else x
    return tl.where(exist[:, None], step, 0.0), x


@triton.jit
def _of_group(data, rows, exist, group, n, G, N):
    """Return state n of rows of a (B, L, G, N) tensor, (T, 1)."""
    return tl.load(data + (rows * G + group) * N + n, mask=exist, other=0.0)[:, None]


@triton.jit
def forward_kernel(
    inputs,
    results,
    sizes,
    SOFTPLUS: tl.constexpr,
    GATE: tl.constexpr,
    KEEP: tl.constexpr,
    STATES: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
):
    """Write y, the last states and, to KEEP, the states before each tile."""
    u, delta, z, B, C, A, D, bias, reverse = inputs
    y, before, last = results
    L, channels, G, N = sizes
    group, _number, columns, valid = _columns(channels, G, W)
    backwards = tl.load(reverse + group) != 0
    bias_d = tl.load(bias + columns, mask=valid, other=0.0)
    D_d = tl.load(D + columns, mask=valid, other=0.0)
    every = tl.arange(0, STATES)
    tiles = tl.cdiv(L, T)
    carry = tl.zeros((STATES, W), tl.float32)
    for tile in range(tiles):
        t = tile * T + tl.arange(0, T)
        rows, exist = _rows(t, L, backwards)
        if KEEP:
            states = (tl.program_id(1).to(tl.int64) * tiles + tile) * N + every
            _store(before, states, every < N, columns, valid, channels, carry)
        u_t = _load(u, rows, exist, columns, valid, channels)
        step, _x = _steps(delta, bias_d, rows, exist, columns, valid, channels, SOFTPLUS)
        out = D_d[None, :] * u_t
        for n in range(N):
            chosen = every[:, None] == n
            A_n = tl.load(A + n * channels + columns, mask=valid, other=0.0)[None, :]
            added = step * u_t * _of_group(B, rows, exist, group, n, G, N)
            decay, state = tl.associative_scan((tl.exp(step * A_n), added), 0, _then)
            state += decay * tl.sum(tl.where(chosen, carry, 0.0), 0)[None, :]
            out += state * _of_group(C, rows, exist, group, n, G, N)
            end = tl.sum(tl.where((tl.arange(0, T) == T - 1)[:, None], state, 0.0), 0)
            carry = tl.where(chosen, end[None, :], carry)
        if GATE:
            z_t = _load(z, rows, exist, columns, valid, channels)
            out *= z_t * _sigmoid(z_t)
        _store(y, rows, exist, columns, valid, channels, out)
    states = tl.program_id(1).to(tl.int64) * N + every
    _store(last, states, every < N, columns, valid, channels, carry)


@triton.jit
def backward_kernel(
    inputs,
    given,
    results,
    shares,
    sizes,
    SOFTPLUS: tl.constexpr,
    GATE: tl.constexpr,
    STATES: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
):
    """Write the gradients of u, delta and z, and shares of the others, to be added up.

    Shares: of A (B, N, D), of B and C (tiles of d, B, L, G, N), of D and the bias (B, D).
    """
    u, delta, z, B, C, A, D, bias, reverse = inputs
    before, grad_y, grad_last = given
    grad_u, grad_delta, grad_z = results
    grad_A, grad_B, grad_C, grad_D, grad_bias = shares
    L, channels, G, N = sizes
    group, number, columns, valid = _columns(channels, G, W)
    backwards = tl.load(reverse + group) != 0
    bias_d = tl.load(bias + columns, mask=valid, other=0.0)
    D_d = tl.load(D + columns, mask=valid, other=0.0)
    every = tl.arange(0, STATES)
    entry = tl.program_id(1).to(tl.int64)
    carry = _load(grad_last, entry * N + every, every < N, columns, valid, channels)
    sum_A = tl.zeros((STATES, W), tl.float32)
    sum_D = tl.zeros((W,), tl.float32)
    sum_bias = tl.zeros((W,), tl.float32)
    tiles = tl.cdiv(L, T)
    for i in range(tiles):
        tile = tiles - 1 - i
        t = tile * T + tl.arange(0, T)
        rows, exist = _rows(t, L, backwards)
        u_t = _load(u, rows, exist, columns, valid, channels)
        step, x = _steps(delta, bias_d, rows, exist, columns, valid, channels, SOFTPLUS)
        gy = _load(grad_y, rows, exist, columns, valid, channels)
        z_t = gy  # unused without a gate
        gate = gy
        ungated = gy
        if GATE:
            z_t = _load(z, rows, exist, columns, valid, channels)
            gate = _sigmoid(z_t)
            gy *= z_t * gate
        tile_of = (t, tile, rows, exist, group, columns, valid, backwards)
        out, into, exponents, carry, sum_A = _states_back(
            (u, delta, B, C, A, before, grad_B, grad_C),
            (u_t, step, gy, bias_d),
            tile_of,
            (carry, sum_A, number),
            sizes,
            *(SOFTPLUS, STATES, T, W),
        )
        out += D_d[None, :] * u_t
        if GATE:
            grad = ungated * out * gate * (1.0 + z_t * (1.0 - gate))
            _store(grad_z, rows, exist, columns, valid, channels, grad)
        grad = into * u_t + exponents
        grad = tl.where(exist[:, None], grad * _sigmoid(x) if SOFTPLUS else grad, 0.0)
        sum_bias += tl.sum(grad, 0)
        sum_D += tl.sum(gy * u_t, 0)
        _store(grad_delta, rows, exist, columns, valid, channels, grad)
        grad = into * step + gy * D_d[None, :]
        _store(grad_u, rows, exist, columns, valid, channels, grad)
    _store(grad_A, entry * N + every, every < N, columns, valid, channels, sum_A)
    tl.store(grad_D + entry * channels + columns, sum_D, mask=valid)
    tl.store(grad_bias + entry * channels + columns, sum_bias, mask=valid)


@triton.jit
def _states_back(
    pointers,
    values,
    tile_of,
    sums,
    sizes,
    SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
):
    """Go through a tile's states, one n after the other.

    Returns:
        y without D u; the gradients of step * u and of step's part in the decays, all (T, W); the
        gradient of the tile's first states, and A's so far, both (STATES, W).
    """
    u, delta, B, C, A, before, grad_B, grad_C = pointers
    u_t, step, gy, bias_d = values
    t, tile, rows, exist, group, columns, valid, backwards = tile_of
    carry, sum_A, number = sums
    L, channels, G, N = sizes
    entry = tl.program_id(1).to(tl.int64)
    first = (tl.arange(0, T) == 0)[:, None]
    every = tl.arange(0, STATES)
    # The row before, for the states before each step; the tile's own first has `before`.
    rows_0, exist_0 = _rows(t - 1, L, backwards)
    exist_0 = exist_0 & (tl.arange(0, T) > 0)
    u_0 = _load(u, rows_0, exist_0, columns, valid, channels)
    step_0, _x = _steps(delta, bias_d, rows_0, exist_0, columns, valid, channels, SOFTPLUS)
    # The row after, whose decay takes its state's gradient back to this one.
    rows_2, exist_2 = _rows(t + 1, L, backwards)
    step_2, _x = _steps(delta, bias_d, rows_2, exist_2, columns, valid, channels, SOFTPLUS)
    share = number * tl.num_programs(1) * L * G * N
    out = tl.zeros((T, W), tl.float32)
    into = tl.zeros((T, W), tl.float32)
    exponents = tl.zeros((T, W), tl.float32)
    for n in range(N):
        chosen = every[:, None] == n
        A_n = tl.load(A + n * channels + columns, mask=valid, other=0.0)[None, :]
        B_n = _of_group(B, rows, exist, group, n, G, N)
        C_n = _of_group(C, rows, exist, group, n, G, N)
        added = step_0 * u_0 * _of_group(B, rows_0, exist_0, group, n, G, N)
        place = before + ((entry * tl.cdiv(L, T) + tile) * N + n) * channels + columns
        start = tl.load(place, mask=valid, other=0.0)[None, :]
        total, old = tl.associative_scan((tl.exp(step_0 * A_n), added), 0, _then)
        old += total * start
        decay = tl.exp(step * A_n)
        state = decay * old + step * u_t * B_n
        total, grad = tl.associative_scan((tl.exp(step_2 * A_n), gy * C_n), 0, _then, reverse=True)
        grad += total * tl.sum(tl.where(chosen, carry, 0.0), 0)[None, :]
        carry = tl.where(chosen, tl.sum(tl.where(first, grad, 0.0), 0)[None, :], carry)
        out += state * C_n
        into += grad * B_n
        exponent = grad * old * decay
        exponents += exponent * A_n
        sum_A += tl.where(chosen, tl.sum(exponent * step, 0)[None, :], 0.0)
        place = share + (rows * G + group) * N + n
        tl.store(grad_B + place, tl.sum(grad * step * u_t, 1), mask=exist)
        tl.store(grad_C + place, tl.sum(gy * state, 1), mask=exist)
    return out, into, exponents, carry, sum_A
