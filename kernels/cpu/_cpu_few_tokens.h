/* Products for few tokens: R rows of the matrix by T tokens, y[t * stride + r]. Included by _cpu_kernels.h. */

/* Rows of a matrix that are read side by side, row + r * step, so that each of the R is a stream of its own through
 * memory: `row` is the nth of a stretch of `step` rows, and beyond the R stretches come R others. */
struct Side {
    int row, step, nth;
};
/* Where to prefetch, from the start of each such row. */
template <int R, int64_t AHEAD = AHEAD_BYTES>
inline int64_t ahead_of(const Side &side, int64_t at, int64_t row_bytes) {
    const int64_t length = side.step * row_bytes, ahead = AHEAD < length ? AHEAD : length;
    return at + ahead + (side.nth * row_bytes + at + ahead < length ? 0 : (R - 1) * length);
}

template <class S, class E, int R, int T>
__attribute__((noinline)) void tile_floats(const Matrix &m, const char *record, const Side &side, const float *const *x,
                                           float *y, int stride) {
    using V = typename S::V;
    const int k_end = m.in_features, k_whole = k_end / S::LANES * S::LANES;
    const E *w[R];
    V sums[R][T];
    UNROLL for (int r = 0; r < R; ++r) {
        w[r] = (const E *)(record + m.codes) + (int64_t)(side.row + r * side.step) * k_end;
        UNROLL for (int t = 0; t < T; ++t) sums[r][t] = S::zero();
    }
    constexpr int line = 64 / (int)sizeof(E);
    int k = 0;
    for (; k + line <= k_whole; k += line) {
        const int64_t ahead = ahead_of<R>(side, k * (int64_t)sizeof(E), k_end * (int64_t)sizeof(E));
        UNROLL for (int r = 0; r < R; ++r) S::prefetch((const char *)w[r] + ahead);
        UNROLL for (int i = 0; i < line; i += S::LANES) {
            V v[R];
            UNROLL for (int r = 0; r < R; ++r) v[r] = S::load(w[r] + k + i);
            UNROLL for (int t = 0; t < T; ++t) {
                const V value = S::load(x[t] + k + i);
                UNROLL for (int r = 0; r < R; ++r) sums[r][t] = S::fma(v[r], value, sums[r][t]);
            }
        }
    }
    for (; k < k_end; k += S::LANES)
        UNROLL for (int r = 0; r < R; ++r) {
            const V v = k < k_whole ? S::load(w[r] + k) : load_part<S>(w[r] + k, k_end - k);
            UNROLL for (int t = 0; t < T; ++t) sums[r][t] = S::fma(v, S::load(x[t] + k), sums[r][t]);
        }
    UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int r = 0; r < R; ++r) y[t * stride + r * side.step] = S::sum(sums[r][t]);
}

/* The same of codes: one group's products are summed, then scaled. A zero point is taken off every lane by the sum of
 * that lane's own activations, so that nothing large cancels. Rounded activations meet the codes as integers. */
template <class S, class F, bool IS_ROUNDED, int R, int T>
__attribute__((noinline)) void tile_codes(const Matrix &m, const char *record, const Side &side, const Rows &input,
                                          const float *const *x, float *y, int stride) {
    using V = typename S::V;
    constexpr int line = F::BLOCK_BYTES == 32 ? 1 : F::BLOCK_BYTES == 16 ? 3 : 7; /* blocks of one prefetch, less 1 */
    constexpr int64_t ahead_bytes = AHEAD_BLOCKS * F::BLOCK_BYTES;
    const int num_blocks = (m.in_features + 31) / 32, group_blocks = m.group_size / 32;
    const int num_groups = (num_blocks + group_blocks - 1) / group_blocks;
    const int64_t row_bytes = m.padded / 32 * F::BLOCK_BYTES;
    const int64_t sums_at = F::HAS_ZEROS ? input.sums[sums_slot(m.group_size)] / 4 : 0;
    const int64_t deltas_at = input.deltas / 4;
    Line<S, F> lines[R];
    V sums[R][T];
    float scales[R][S::LANES], zeros[R][S::LANES];
    UNROLL for (int r = 0; r < R; ++r) {
        lines[r].set(m, record, side.row + r * side.step);
        S::prefetch(lines[r].scale + AHEAD_GRID_BYTES); /* of rows that come soon */
        if constexpr (F::HAS_ZEROS) S::prefetch((const char *)lines[r].zero + AHEAD_GRID_BYTES);
        UNROLL for (int t = 0; t < T; ++t) sums[r][t] = S::zero();
    }
    for (int group = 0, block = 0; group < num_groups; ++group) {
        const int at = group % S::LANES;
        if (at == 0) UNROLL for (int r = 0; r < R; ++r)
                lines[r].grid(group, least(S::LANES, num_groups - group), scales[r], zeros[r]);
        V inner[R][T];
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int t = 0; t < T; ++t) {
                if constexpr (F::HAS_ZEROS)
                    inner[r][t] = S::mul(S::all(-zeros[r][at]), S::load(x[t] + sums_at + group * S::LANES));
                else inner[r][t] = S::zero();
            }
        const int group_end = least(block + group_blocks, num_blocks);
        if constexpr (IS_ROUNDED) {
            while (block < group_end) { /* as long as the activations' own scale stays the same */
                const int delta = block / (ROUNDED_TOGETHER / 32);
                const int end = least((delta + 1) * (ROUNDED_TOGETHER / 32), group_end);
                typename S::I whole[R][T];
                UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t) whole[r][t] = S::none();
                for (; block < end; ++block) {
                    if ((block & line) == 0) { /* here and not in a function: GCC drops those that only prefetch */
                        const int64_t ahead = ahead_of<R, ahead_bytes>(side, block * F::BLOCK_BYTES, row_bytes);
                        UNROLL for (int r = 0; r < R; ++r) S::prefetch(lines[r].codes + ahead);
                    }
                    UNROLL for (int r = 0; r < R; ++r) {
                        const auto words = F::words(lines[r].codes + block * F::BLOCK_BYTES);
                        UNROLL for (int t = 0; t < T; ++t) {
                            const auto rounded = (const int16_t *)((const char *)x[t] + input.codes);
                            whole[r][t] = S::dot(whole[r][t], words, rounded + block * 32);
                        }
                    }
                }
                UNROLL for (int t = 0; t < T; ++t) {
                    const V unit = S::all(x[t][deltas_at + delta]);
                    UNROLL for (int r = 0; r < R; ++r)
                        inner[r][t] = S::fma(S::to_float(whole[r][t]), unit, inner[r][t]);
                }
            }
        } else
            for (; block < group_end; ++block) {
                if ((block & line) == 0) {
                    const int64_t ahead = ahead_of<R, ahead_bytes>(side, block * F::BLOCK_BYTES, row_bytes);
                    UNROLL for (int r = 0; r < R; ++r) S::prefetch(lines[r].codes + ahead);
                }
                UNROLL for (int r = 0; r < R; ++r) {
                    V v[32 / S::LANES];
                    lines[r].floats(block, m.in_features, v);
                    UNROLL for (int t = 0; t < T; ++t)
                        UNROLL for (int i = 0; i < 32 / S::LANES; ++i)
                            inner[r][t] = S::fma(v[i], S::load(x[t] + block * 32 + i * S::LANES), inner[r][t]);
                }
            }
        UNROLL for (int r = 0; r < R; ++r) {
            const V scale = S::all(scales[r][at]);
            UNROLL for (int t = 0; t < T; ++t) sums[r][t] = S::fma(scale, inner[r][t], sums[r][t]);
        }
    }
    UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int r = 0; r < R; ++r) y[t * stride + r * side.step] = S::sum(sums[r][t]);
}

template <class S, class E> struct FloatTile {
    template <int R, int T>
    static void run(const Matrix &m, const char *record, const Side &side, const Rows &, const float *const *x,
                    float *y, int stride) {
        tile_floats<S, E, R, T>(m, record, side, x, y, stride);
    }
};
template <class S, class F, bool IS_ROUNDED> struct CodeTile {
    template <int R, int T>
    static void run(const Matrix &m, const char *record, const Side &side, const Rows &input, const float *const *x,
                    float *y, int stride) {
        tile_codes<S, F, IS_ROUNDED, R, T>(m, record, side, input, x, y, stride);
    }
};

template <class Tile, int R, int T>
inline void few_rows(const Matrix &m, const char *record, int first, int count, const Rows &input,
                     const float *const *x, float *y, int stride) {
    const int step = count / R;
    for (int r = 0; r < step; ++r) Tile::template run<R, T>(m, record, {first + r, step, r}, input, x, y + r, stride);
    if constexpr (R > 1)
        for (int r = step * R; r < count; ++r)
            Tile::template run<1, T>(m, record, {first + r, 1, 0}, input, x, y + r, stride);
}

template <class Tile>
inline void few_tokens(const Matrix &m, const char *record, int first, int count, const Rows &input,
                       const float *const *x, int num_tokens, float *y, int stride) {
    if (num_tokens == 1) return few_rows<Tile, 4, 1>(m, record, first, count, input, x, y, stride);
    for (int r = 0; r < count; r += 2) { /* two rows stay in the nearest cache while all tokens pass */
        const int rows = least(2, count - r);
        for (int t = 0; t < num_tokens; t += 4) {
            float *to = y + t * stride + r;
            switch (num_tokens - t) {
            case 1: few_rows<Tile, 1, 1>(m, record, first + r, rows, input, x + t, to, stride); break;
            case 2: few_rows<Tile, 2, 2>(m, record, first + r, rows, input, x + t, to, stride); break;
            case 3: few_rows<Tile, 1, 3>(m, record, first + r, rows, input, x + t, to, stride); break;
            default: few_rows<Tile, 1, 4>(m, record, first + r, rows, input, x + t, to, stride);
            }
        }
    }
}
