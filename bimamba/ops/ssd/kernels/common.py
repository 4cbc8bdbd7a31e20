"""What the stages share: tiles, step sizes, and the decays of one chunk.

Symbols, as in Dao and Gu, "Transformers are SSMs" (2024, arXiv:2405.21060); `a_t = delta_t A` in units of log2(e):

    s_t  inclusive sum of `a` from the chunk's first row,  e_t = s_t - a_t  exclusive sum,  total = s of the last row
    f_i, b_i  the sum at which row i reads the forward and the backward state: (s_i, e_i), or (e_i, s_i) when shifted

A source j reaches a reader i with exp2(f_i - s_j) rightward (j <= i) and exp2(e_j - b_i) leftward (j >= i). It reaches
the chunk's right edge with exp2(total - s_j), the left edge with exp2(e_j); a reader i reads what enters on the left
with exp2(f_i), on the right with exp2(total - b_i). Every one of these exponents is <= 0, so nothing overflows.

Prefixes: `i_` index, `o_` offset, `m_` mask, `p_` pointer. Sizes in capitals are constexpr. Layouts:

    x, y, z (b, l, h, p)   B, C (b, l, g, n)   dt (b, l, h)
    states  (b, chunks, h, directions, P2, N2)   what enters a chunk; P2, N2 = p, n rounded up to powers of two >= 16;
            slot 0 is passed left to right, slot 1 right to left
    rows    (b, h, sets, ROW_LINES, padded l)   fp32: s, e, delta; s and e count anew from every Q-th row on; delta is 0
            in the padding; two sets if untied
"""

import triton
import triton.language as tl

from bimamba.ops import launch

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(launch.INTERPRETED)
ROW_LINES = tl.constexpr(3)


# ------------------------------------------------------------------------------------------------ tiles


@triton.jit
def load_tile(
    T,
    i_b,
    o_l,
    i_h,
    L,
    H: tl.constexpr,
    o_w,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):
    """(ROWS, BLOCK) of head `i_h` of a (b, l, h, w) tensor from row `o_l` and column `o_w` on; zero outside of it."""
    if TMA:
        return T.load([i_b.to(tl.int32), o_l, i_h * W + o_w]).reshape(ROWS, BLOCK)
    else:
        o_r = tl.arange(0, ROWS)
        o_c = o_w + tl.arange(0, BLOCK)
        p_t = T + ((i_b.to(tl.int64) * L + o_l) * H + i_h) * W
        m = ((o_l + o_r >= 0) & (o_l + o_r < L))[:, None]
        if W % BLOCK != 0:
            m = m & (o_c < W)[None, :]
        return tl.load(p_t + o_r[:, None] * (H * W) + o_c[None, :], mask=m, other=0.0)


@triton.jit
def store_tile(
    T,
    tile,
    i_b,
    o_l,
    i_h,
    L,
    H: tl.constexpr,
    o_w,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):
    if TMA:
        T.store([i_b.to(tl.int32), o_l, i_h * W + o_w], tile.to(T.dtype).reshape(1, ROWS, BLOCK))
    else:
        o_r = tl.arange(0, ROWS)
        o_c = o_w + tl.arange(0, BLOCK)
        p_t = T + ((i_b.to(tl.int64) * L + o_l) * H + i_h) * W
        m = (o_l + o_r < L)[:, None]
        if W % BLOCK != 0:
            m = m & (o_c < W)[None, :]
        tl.store(p_t + o_r[:, None] * (H * W) + o_c[None, :], tile.to(T.dtype.element_ty), mask=m)


@triton.jit
def load_state(
    S,
    i_state,
    o_p,
    o_n,
    P2: tl.constexpr,
    N2: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """(BLOCK_P, BLOCK_N) of state `i_state`; states are padded, so there is no mask."""
    if TMA:
        return S.load([i_state * P2 + o_p, o_n])
    else:
        o = (o_p + tl.arange(0, BLOCK_P))[:, None] * N2 + (o_n + tl.arange(0, BLOCK_N))[None, :]
        return tl.load(S + i_state.to(tl.int64) * (P2 * N2) + o)


@triton.jit
def store_state(
    S,
    tile,
    i_state,
    o_p,
    o_n,
    P2: tl.constexpr,
    N2: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    if TMA:
        S.store([i_state * P2 + o_p, o_n], tile.to(S.dtype))
    else:
        o = (o_p + tl.arange(0, BLOCK_P))[:, None] * N2 + (o_n + tl.arange(0, BLOCK_N))[None, :]
        tl.store(S + i_state.to(tl.int64) * (P2 * N2) + o, tile.to(S.dtype.element_ty))


# ------------------------------------------------------------------------------------------------ sums


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_triples(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def sum_both(a, b, AXIS: tl.constexpr):
    """Two sums in one exchange between threads, in one layout."""
    if INTERPRETED:  # it takes a reduction of our own element by element
        return tl.sum(a, AXIS), tl.sum(b, AXIS)
    else:
        return tl.reduce((a, b), AXIS, _add_pairs)


@triton.jit
def sum_three(a, b, c, AXIS: tl.constexpr):
    if INTERPRETED:
        return tl.sum(a, AXIS), tl.sum(b, AXIS), tl.sum(c, AXIS)
    else:
        return tl.reduce((a, b, c), AXIS, _add_triples)


# ------------------------------------------------------------------------------------------------ step sizes


@triton.jit
def softplus(v):
    """log(1 + exp(v)), to the last bits also where exp(v) vanishes beside 1 (log1p by Goldberg's correction)."""
    e = tl.exp(tl.where(v > 20.0, 20.0, v))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(v > 20.0, v, log1p)


@triton.jit
def step_size(v, least, largest, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr):
    """delta from `v = dt + dt_bias`. Comparisons, not min and max: a NaN must stay one."""
    if SOFTPLUS:
        v = softplus(v)
    if LIMITED:
        v = tl.where(v < least, least, v)
        v = tl.where(v > largest, largest, v)
    return v


# ------------------------------------------------------------------------------------------------ decays


@triton.jit
def load_row(rows, i_line, o_l, PADDED, ROWS: tl.constexpr, TMA: tl.constexpr):
    """Entries `o_l .. o_l + ROWS` of a line of `rows`."""
    if TMA:
        return rows.load([i_line, o_l]).reshape(ROWS)
    else:
        return tl.load(rows + i_line.to(tl.int64) * PADDED + o_l + tl.arange(0, ROWS))


@triton.jit
def load_rows(rows, i_line, o_l, PADDED, ROWS: tl.constexpr, TMA: tl.constexpr):
    """s, e and delta of rows `o_l .. o_l + ROWS`."""
    s = load_row(rows, i_line, o_l, PADDED, ROWS, TMA)
    e = load_row(rows, i_line + 1, o_l, PADDED, ROWS, TMA)
    delta = load_row(rows, i_line + 2, o_l, PADDED, ROWS, TMA)
    return s, e, delta


@triton.jit
def reading(s, e, SHIFT: tl.constexpr):
    """f and b: where a row reads the forward and the backward state."""
    if SHIFT:
        return e, s
    else:
        return s, e


@triton.jit
def rightward(i, j, f_i, s_j, SHIFT: tl.constexpr):
    """exp(f_i - s_j) for j <= i (j < i when shifted), else 0; `i, j` broadcast against each other."""
    keep = (i > j) if SHIFT else (i >= j)
    return tl.where(keep, tl.exp2(tl.minimum(f_i - s_j, 0.0)), 0.0)


@triton.jit
def leftward(i, j, b_i, e_j, SHIFT: tl.constexpr):
    """exp(e_j - b_i) for j >= i (j > i when shifted), else 0."""
    keep = (i < j) if SHIFT else (i <= j)
    return tl.where(keep, tl.exp2(tl.minimum(e_j - b_i, 0.0)), 0.0)


@triton.jit
def both_ways(f_i, b_i, s_j, e_j):
    """Rightward decay below the diagonal, leftward above it, with one exp2 and no mask: the exponent that holds is <=
    0,
    the other >= 0. The diagonal is 1 unshifted, and counts twice; shifted it must be masked."""
    return tl.exp2(tl.minimum(f_i - s_j, e_j - b_i))


@triton.jit
def sequence_ids(p_seq, o_l, L, ROWS: tl.constexpr):
    """Ids of rows `o_l ..`; rows beyond the end repeat the last, so that they change nothing."""
    return tl.load(p_seq + tl.minimum(o_l + tl.arange(0, ROWS), L - 1))


@triton.jit
def sequence_id(p_seq, o_l, L):
    return tl.load(p_seq + tl.minimum(o_l, L - 1))


@triton.jit
def mixed_rows(p_seq, o_l, L, ROWS: tl.constexpr):
    """Whether rows `o_l ..` are of several sequences: ids never fall. Most are not, and need no mask. By its edges: all
    rows compared made the gradients a sixth slower (H200, 9 rows of 17,080 tokens: grad_bc 10.1 -> 11.9 ns a token,
    grad_x 9.3 -> 10.9)."""
    return sequence_id(p_seq, o_l, L) != sequence_id(p_seq, o_l + ROWS - 1, L)


@triton.jit
def of_sequence(w, p_seq, o_l, o_edge, L, mixed, ROWS: tl.constexpr):
    """`w (ROWS)` of rows `o_l ..`, zero where they are not of the sequence of row `o_edge`; as it is unless `mixed`."""
    if mixed:
        w = tl.where(sequence_ids(p_seq, o_l, L, ROWS) == sequence_id(p_seq, o_edge, L), w, 0.0)
    return w


@triton.jit
def within_sequences(m, p_seq, o_l, L, mixed, ROWS: tl.constexpr):
    """`m (ROWS, ROWS)`, zero where the two rows are of different sequences; as it is unless `mixed`."""
    if mixed:
        ids = sequence_ids(p_seq, o_l, L, ROWS)
        m = tl.where(ids[:, None] == ids[None, :], m, 0.0)
    return m
