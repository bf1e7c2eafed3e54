/* How is a selective scan done in one pass over memory? Forward and backward for float32 on a CPU.

build_kernel.py compiles this file, compiled.py calls it, problem.py has the mathematics. W neighbouring channels of a
group are a tile and share a vector. Time is cut into blocks of T rows, so short that a block's tiles stay in the cache;
tiles run inside blocks, so memory is read and written once, in long rows. Backward starts each block from the states
that forward left before it and computes the block's decays and states again. An item of work is some tiles of one
group of one batch entry: no two items add to the same number, so no result depends on which thread does what. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE__
#include <immintrin.h>
#endif
/* MAX(a, b) and MIN(a, b) are b where b is NaN. */
#if defined(__AVX512F__)
#define W 16
#define EXTREME(which, sign, a, b) (vec) _mm512_##which##_ps(a, b)
#elif defined(__AVX__)
#define W 8
#define EXTREME(which, sign, a, b) (vec) _mm256_##which##_ps(a, b)
#else
#define W 4
#define EXTREME(which, sign, a, b) (vec)((((a) sign (b)) & (ivec)(a)) | (~((a) sign (b)) & (ivec)(b)))
#endif
#define MAX(a, b) EXTREME(max, >, a, b)
#define MIN(a, b) EXTREME(min, <, a, b)
typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
#define EACH(i, count) for (int64_t i = 0; i < (count); i++)
#define INLINE static inline __attribute__((always_inline))

typedef struct { float *data; int64_t batch, row, channel, state; } strided; /* strides count floats */
typedef struct { /* compiled.py fills this, field by field, 8 bytes each */
    int64_t batch, length, channels, groups, states, T, parts, threads, softplus, const_B, const_C;
    strided u, delta, z, y, grad_y, grad_u, grad_delta, grad_z; /* (B, L, D); z and grad_z may be NULL */
    strided B, C;                                               /* (B, L, G, N); or (D, N), contiguous */
    float *A, *D, *bias, *grad_last;                            /* (D, N), (D), (D), (B, D, N) */
    uint8_t *reverse;                                           /* (G) */
    float *before, *last;                                       /* (B, blocks, G, tiles, N, W) or NULL; (B, D, N) */
    float *grad_A, *grad_D, *grad_bias; /* (B, D, N), (B, D), (B, D): to be summed over B */
    float *grad_B, *grad_C;             /* (parts, B, L, G, N), to be summed over parts; or (B, D, N) */
    int64_t next, failed;               /* the item that the next free thread takes; no memory */
} scan;
typedef struct { /* what a thread works with: one item */
    int64_t b, g, width, tiles, first, count; /* batch entry, group, its channels and tiles, the item's tiles */
    vec *A, *D, *bias, *state, *grad_A, *grad_D, *grad_bias;                        /* [tile] or [tile][n] */
    vec *u, *step, *slope, *z, *gy, *y, *decay, *states;                            /* [row] or [row][n] */
    vec *B, *C, *grad_B, *grad_C; /* B, C: floats [row][n], or vec [tile][n] if constant; gradients: vec, likewise */
} work;
INLINE vec splat(float x) { return x - (vec){0}; }

/* 2^x: zero below -126, infinity from 128 on, NaN for NaN. The polynomial is exact at 0, so that thousands of decays
near 1 do not drift; elsewhere its error is 2e-9. */
INLINE vec exp2_(vec x) {
    x = MAX(splat(-127), MIN(splat(128), x));
    vec magic = splat(12582912.f + 127), shifted = x + magic, f = x - (shifted - magic); /* low bits: round(x) + 127 */
    vec p = splat(1.53533621e-4f) * f + 1.33988746e-3f;
    p = ((((p * f + 9.61843736e-3f) * f + 5.55033247e-2f) * f + 2.40226479e-1f) * f + 6.93147203e-1f) * f + 1.f;
    return p * (vec)((ivec)shifted << 23);
}
#define LOG2E 1.44269504f
#define LN2 0.693147181f
INLINE vec sigmoid(vec x) { return 1.f / (1.f + exp2_(x * -LOG2E)); }

/* log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x|, and log(1 + e) = 2 atanh(q), q = e / (2 + e). */
INLINE vec softplus(vec x) {
    vec e = exp2_(MIN(-x, x) * LOG2E), q = e / (e + 2.f), s = q * q;
    vec p = (((s * .12144781f + .1071537f) * s + .14308298f) * s + .19999444f) * s + .33333338f;
    return MAX(splat(0), x) + 2.f * (q + q * s * p);
}

INLINE int64_t channel(const work *w, int64_t k) { return w->g * w->width + (w->first + k) * W; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t lanes(const work *w, int64_t k) { return least(W, w->width - (w->first + k) * W); }
INLINE int64_t row_of(const scan *s, const work *w, int64_t t) { return s->reverse[w->g] ? s->length - 1 - t : t; }

/* Copy `count` steps from `start` of tile k to vectors, or from there. */
static void copy(const scan *s, const work *w, strided x, int64_t k, int64_t start, int64_t count, vec *v, int store) {
    int64_t width = lanes(w, k), row = s->reverse[w->g] ? -x.row : x.row, whole = x.channel == 1 && width == W;
    float *m = x.data + w->b * x.batch + row_of(s, w, start) * x.row + channel(w, k) * x.channel, *f = (float *)v;
    if (!whole && !store) memset(v, 0, count * sizeof(vec));
    if (whole && store) EACH(t, count) memcpy(m + t * row, v + t, sizeof(vec));
    else if (whole) EACH(t, count) memcpy(v + t, m + t * row, sizeof(vec));
    else if (store) EACH(i, width) EACH(t, count) m[t * row + i * x.channel] = f[t * W + i];
    else EACH(i, width) EACH(t, count) f[t * W + i] = m[t * row + i * x.channel];
}
/* Copy the item's part of a (D, N) array, times a factor, to vectors [tile][n], zeros where m is NULL; and back. */
static void spread(const work *w, const float *m, int64_t N, float factor, vec *v) {
    memset(v, 0, w->count * N * sizeof(vec));
    EACH(k, m ? w->count : 0) EACH(i, lanes(w, k)) EACH(n, N)
        ((float *)v)[(k * N + n) * W + i] = m[(channel(w, k) + i) * N + n] * factor;
}
static void gather(const work *w, const vec *v, int64_t N, float *m) {
    EACH(k, w->count) EACH(i, lanes(w, k)) EACH(n, N)
        m[(channel(w, k) + i) * N + n] = ((const float *)v)[(k * N + n) * W + i];
}
/* Copy B or C, unless constant, for `count` steps to floats [row][n]. */
static void mix(const scan *s, const work *w, strided x, int64_t start, int64_t count, vec *v) {
    EACH(t, count) EACH(n, s->states) ((float *)v)[t * s->states + n] =
        x.data[w->b * x.batch + row_of(s, w, start + t) * x.row + w->g * x.channel + n * x.state];
}
/* Add up the lanes of [row][n] and store them as a part of B's or C's gradient. */
static void unmix(const scan *s, const work *w, const vec *v, int64_t part, int64_t start, int64_t count, float *m) {
    typedef float quad __attribute__((vector_size(16)));
    EACH(t, count) EACH(n, s->states) {
        const quad *x = (const quad *)(v + t * s->states + n);
        quad sum = x[0];
        for (int i = 1; i < W / 4; i++) sum += x[i];
        int64_t row = ((part * s->batch + w->b) * s->length + row_of(s, w, start + t)) * s->groups + w->g;
        m[row * s->states + n] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
}

#define COEFFICIENT(x, fixed, k, t, n) (fixed ? x[(k) * N + n] : splat(((const float *)x)[(t) * N + n]))

/* Step through a block of tile k, y to w->y. For backward (`keep`) leave decay[t][n], states[t + 1][n], y without its
gate, step and its slope in delta; states[0] are the ones before the block. */
INLINE void ahead(const scan *s, const work *w, int64_t k, int64_t rows, int keep, const int64_t N, int cB, int cC) {
    const vec *A = w->A + k * N, *B = w->B, *C = w->C;
    EACH(t, rows) {
        vec u = w->u[t], x = w->step[t] + w->bias[k], step = s->softplus ? softplus(x) : x, y = w->D[k] * u;
        vec added = step * u, *old = keep ? w->states + t * N : w->state + k * N, *state = keep ? old + N : old;
        EACH(n, N) {
            vec decay = exp2_(step * A[n]), now = decay * old[n] + added * COEFFICIENT(B, cB, k, t, n);
            y += now * COEFFICIENT(C, cC, k, t, n), state[n] = now;
            if (keep) w->decay[t * N + n] = decay;
        }
        w->y[t] = s->z.data && !keep ? y * (w->z[t] * sigmoid(w->z[t])) : y;
        if (keep) w->step[t] = step, w->slope[t] = s->softplus ? sigmoid(x) : splat(1);
    }
}

/* Step back through the block: u, step and z become the gradients of u, delta and z; w->state is the gradient of the
state after the block, then of the one before it. */
INLINE void back(const scan *s, const work *w, int64_t k, int64_t rows, const int64_t N, int cB, int cC) {
    const vec *A = w->A + k * N, *B = w->B, *C = w->C;
    vec *carry = w->state + k * N, sum_A[N], sum_D = {0}, sum_bias = {0}; /* of the block: long sums lose digits */
    EACH(n, N) sum_A[n] = splat(0);
    for (int64_t t = rows - 1; t >= 0; t--) {
        vec u = w->u[t], step = w->step[t], gy = w->gy[t], added = step * u, into = {0}, exponents = {0};
        vec *grad_B = w->grad_B + (cB ? k : t) * N, *grad_C = w->grad_C + (cC ? k : t) * N;
        const vec *decay = w->decay + t * N, *old = w->states + t * N;
        if (s->z.data) {
            vec z = w->z[t], gate = sigmoid(z);
            w->z[t] = gy * w->y[t] * gate * (1.f + z * (1.f - gate));
            gy *= z * gate;
        }
        EACH(n, N) {
            vec grad = carry[n] + gy * COEFFICIENT(C, cC, k, t, n);
            grad_C[n] += gy * old[N + n], grad_B[n] += grad * added;
            into += grad * COEFFICIENT(B, cB, k, t, n);
            carry[n] = grad * decay[n];
            vec exponent = carry[n] * old[n];
            exponents += exponent * A[n], sum_A[n] += exponent * step;
        }
        vec grad_step = (into * u + exponents * LN2) * w->slope[t];
        sum_D += gy * u, sum_bias += grad_step;
        w->u[t] = gy * w->D[k] + into * step, w->step[t] = grad_step;
    }
    EACH(n, N) w->grad_A[k * N + n] += sum_A[n];
    w->grad_D[k] += sum_D, w->grad_bias[k] += sum_bias;
}

/* The common numbers of states are compiled on their own. */
#define DISPATCH(function, ...)                                                                           \
    (s->const_B || s->const_C ? function(__VA_ARGS__, s->states, s->const_B, s->const_C)                  \
     : s->states == 1         ? function(__VA_ARGS__, 1, 0, 0)                                            \
     : s->states == 16        ? function(__VA_ARGS__, 16, 0, 0)                                           \
                              : function(__VA_ARGS__, s->states, 0, 0))

static void run_block(const scan *s, const work *w, int64_t block, int64_t part) {
    int64_t N = s->states, blocks = (s->length + s->T - 1) / s->T, start = block * s->T;
    int64_t rows = least(s->T, s->length - start), backward = s->grad_y.data != NULL;
    int64_t place = (((w->b * blocks + block) * s->groups + w->g) * w->tiles + w->first) * N * W;
    if (!s->const_B) mix(s, w, s->B, start, rows, w->B), memset(w->grad_B, 0, rows * N * sizeof(vec));
    if (!s->const_C) mix(s, w, s->C, start, rows, w->C), memset(w->grad_C, 0, rows * N * sizeof(vec));
    if (!backward && s->before) memcpy(s->before + place, w->state, w->count * N * sizeof(vec));
    EACH(k, w->count) {
        copy(s, w, s->u, k, start, rows, w->u, 0);
        copy(s, w, s->delta, k, start, rows, w->step, 0);
        if (s->z.data) copy(s, w, s->z, k, start, rows, w->z, 0);
        if (backward) memcpy(w->states, s->before + place + k * N * W, N * sizeof(vec));
        if (backward) DISPATCH(ahead, s, w, k, rows, 1);
        else DISPATCH(ahead, s, w, k, rows, 0), copy(s, w, s->y, k, start, rows, w->y, 1);
        if (!backward) continue;
        copy(s, w, s->grad_y, k, start, rows, w->gy, 0);
        DISPATCH(back, s, w, k, rows);
        copy(s, w, s->grad_u, k, start, rows, w->u, 1);
        copy(s, w, s->grad_delta, k, start, rows, w->step, 1);
        if (s->z.data) copy(s, w, s->grad_z, k, start, rows, w->z, 1);
    }
    if (backward && !s->const_B) unmix(s, w, w->grad_B, part, start, rows, s->grad_B);
    if (backward && !s->const_C) unmix(s, w, w->grad_C, part, start, rows, s->grad_C);
}

static void run_item(const scan *s, work *w, int64_t item) {
    int64_t N = s->states, part = item % s->parts, blocks = (s->length + s->T - 1) / s->T;
    w->g = item / s->parts % s->groups, w->b = item / s->parts / s->groups;
    w->first = part * w->tiles / s->parts, w->count = (part + 1) * w->tiles / s->parts - w->first;
    int64_t offset = w->b * s->channels * N, backward = s->grad_y.data != NULL;
    spread(w, s->A, N, LOG2E, w->A), spread(w, s->D, 1, 1, w->D), spread(w, s->bias, 1, 1, w->bias);
    if (s->const_B) spread(w, s->B.data, N, 1, w->B), spread(w, NULL, N, 1, w->grad_B);
    if (s->const_C) spread(w, s->C.data, N, 1, w->C), spread(w, NULL, N, 1, w->grad_C);
    spread(w, backward ? s->grad_last + offset : NULL, N, 1, w->state);
    spread(w, NULL, N, 1, w->grad_A), spread(w, NULL, 1, 1, w->grad_D), spread(w, NULL, 1, 1, w->grad_bias);
    EACH(i, blocks) run_block(s, w, backward ? blocks - 1 - i : i, part);
    gather(w, backward ? w->grad_A : w->state, N, (backward ? s->grad_A : s->last) + offset);
    if (!backward) return;
    gather(w, w->grad_D, 1, s->grad_D + w->b * s->channels);
    gather(w, w->grad_bias, 1, s->grad_bias + w->b * s->channels);
    if (s->const_B) gather(w, w->grad_B, N, s->grad_B + offset);
    if (s->const_C) gather(w, w->grad_C, N, s->grad_C + offset);
}

static void *thread(void *argument) {
    scan *s = argument;
    work w = {.width = s->channels / s->groups, .tiles = (s->channels / s->groups + W - 1) / W};
    int64_t N = s->states, T = s->T, tiles = (w.tiles + s->parts - 1) / s->parts, more = tiles > T ? tiles : T;
    struct { vec **array; int64_t size; } arrays[] = {
        {&w.A, tiles * N}, {&w.D, tiles}, {&w.bias, tiles}, {&w.state, tiles * N}, {&w.grad_A, tiles * N},
        {&w.grad_D, tiles}, {&w.grad_bias, tiles}, {&w.u, T}, {&w.step, T}, {&w.slope, T}, {&w.z, T}, {&w.gy, T},
        {&w.y, T}, {&w.decay, T * N}, {&w.states, (T + 1) * N}, {&w.B, more * N}, {&w.C, more * N},
        {&w.grad_B, more * N}, {&w.grad_C, more * N}};
    int64_t total = 0, items = s->batch * s->groups * s->parts, kinds = sizeof(arrays) / sizeof(arrays[0]);
    void *memory;
    EACH(i, kinds) total += arrays[i].size;
    if (posix_memalign(&memory, 64, total * sizeof(vec))) return s->failed = 1, NULL;
    vec *rest = memory;
    EACH(i, kinds) *arrays[i].array = rest, rest += arrays[i].size;
#ifdef __SSE__
    unsigned mode = _mm_getcsr(); /* numbers below 1e-38 count as zero: they are slow, and states decay into them */
    _mm_setcsr(mode | 0x8040);
#endif
    for (int64_t item; (item = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED)) < items;) run_item(s, &w, item);
#ifdef __SSE__
    _mm_setcsr(mode);
#endif
    return free(memory), NULL;
}

int scan_lanes(void) { return W; }
int scan_run(scan *s) { /* backward if grad_y is there; 0, or 1 if there was no memory */
    int64_t started = 0; pthread_t others[256];
    while (started < least(256, s->threads - 1) && !pthread_create(others + started, NULL, thread, s)) started++;
    thread(s);
    EACH(i, started) pthread_join(others[i], NULL);
    return s->failed;
}
