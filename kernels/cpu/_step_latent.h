/* Latent attention of one new position a sequence. Included by _step.cpp, inside its unnamed namespace.
 *
 * Kept are a latent and a turned key of each position, which all heads share. A head's key is [its first matrix times the
 * latent, the turned key], its value its second matrix times the latent. The query is multiplied by the first matrix
 * instead, and the weighted sum of latents by the second, so that no position is expanded.
 *
 * whole: number among the layers that keep positions, window, chunk (0: none); real: scale.
 * tensors: out [rows, 1, heads, V], queries [rows, heads, 1, D + R], latents [rows, 1, 1, L], turned [rows, 1, 1, R], and
 * both matrices [heads * (D + V), L]. */

constexpr int64_t LATENT_HEADS_AT_ONCE = 8; /* of a piece; no bit depends on it */

thread_local std::vector<float> latent_memory;

void attend_latent(const Instruction &it, const StepState &state) {
    const Tensor &out = it.tensors[0], &q = it.tensors[1], &latent = it.tensors[2], &turned = it.tensors[3];
    const Tensor &matrices = it.tensors[4];
    const Arithmetic &arithmetic = chosen_arithmetic();
    const int64_t rows = state.num_live, heads = q.sizes[1], features = latent.sizes[3], turns = turned.sizes[3];
    const int64_t query_features = q.sizes[3], plain = query_features - turns, values = out.sizes[3];
    const int64_t bytes = width(latent.dtype), window = it.whole[1], chunk = it.whole[2];
    const int64_t absorbed = features + turns, stride = features + 2, row_bytes = features * width(matrices.dtype);
    const KeptPositions *kept = state.kept + it.whole[0] * state.num_rows;

    struct Piece {
        int64_t row, head, first, count, place;
    };
    std::vector<Piece> pieces;
    std::vector<int64_t> begins, counts; /* of each row: its first partial sum of head 0, and how many a head has */
    int64_t num_partials = 0;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t now = state.lengths[row], length = now + 1;
        int64_t first = state.firsts[row];
        if (window && length - window > first) first = length - window;
        if (chunk && now / chunk * chunk > first) first = now / chunk * chunk;
        const auto keep = [&](char *memory, const Tensor &t, int64_t count) {
            Tensor target = t;
            target.data = memory + now * count * bytes;
            copy_exactly(target, 0, 1, t, row * t.strides[0], t.strides[3], count);
        };
        keep(kept[row].keys, latent, features), keep(kept[row].values, turned, turns);
        const int64_t begin_piece = first / POSITIONS_AT_ONCE;
        const int64_t per_head = (length - 1) / POSITIONS_AT_ONCE - begin_piece + 1;
        begins.push_back(num_partials), counts.push_back(per_head);
        for (int64_t i = 0; i < per_head; ++i) {
            const int64_t from = (begin_piece + i) * POSITIONS_AT_ONCE, begin = from > first ? from : first;
            const int64_t end = from + POSITIONS_AT_ONCE < length ? from + POSITIONS_AT_ONCE : length;
            for (int64_t head = 0; head < heads; head += LATENT_HEADS_AT_ONCE)
                pieces.push_back({row, head, begin, end - begin, num_partials + i * heads + head});
        }
        num_partials += per_head * heads;
    }
    const int64_t num_heads = rows * heads, needed = num_heads * (query_features + absorbed + features + values) +
                                                     num_partials * stride;
    if ((int64_t)latent_memory.size() < needed) latent_memory.resize(needed + needed / 2);
    float *given = latent_memory.data(), *query = given + num_heads * query_features;
    float *sums = query + num_heads * absorbed, *results = sums + num_heads * features;
    float *partials = results + num_heads * values;
    in_parallel((int)state.num_threads, [&](Team &team) {
        team.share(num_heads, [&](int64_t i, int) {
            const int64_t row = i / heads, head = i % heads;
            float *from = given + i * query_features, *to = query + i * absorbed;
            load(q, row * q.strides[0] + head * q.strides[1], q.strides[3], (int)query_features, from);
            arithmetic.absorb(from, matrices.data + head * (plain + values) * row_bytes, (int)matrices.dtype, (int)plain,
                              (int)features, to);
            memcpy(to + features, from + plain, sizeof(float) * turns);
        });
        team.share((int64_t)pieces.size(), [&](int64_t i, int) {
            const Piece &piece = pieces[i];
            const int64_t more = heads - piece.head;
            const int count = (int)(more < LATENT_HEADS_AT_ONCE ? more : LATENT_HEADS_AT_ONCE);
            const LatentHeads group{kept[piece.row].keys, kept[piece.row].values,
                                    query + (piece.row * heads + piece.head) * absorbed, features, turns, count,
                                    (int)latent.dtype, (float)it.real[0]};
            arithmetic.attend_latent(group, piece.first, piece.count, partials + piece.place * stride);
        });
        team.share(num_heads, [&](int64_t i, int) {
            const int64_t row = i / heads, head = i % heads;
            const float *first = partials + (begins[row] + head) * stride;
            float most = -INFINITY, total = 0, *sum = sums + i * features;
            for (int64_t p = 0; p < counts[row]; ++p) {
                const float highest = first[p * heads * stride];
                most = highest > most ? highest : most;
            }
            for (int64_t f = 0; f < features; ++f) sum[f] = 0;
            for (int64_t p = 0; p < counts[row]; ++p) {
                const float *from = first + p * heads * stride, factor = expf(from[0] - most);
                total += factor * from[1];
                for (int64_t f = 0; f < features; ++f) sum[f] += factor * from[2 + f];
            }
            for (int64_t f = 0; f < features; ++f) sum[f] /= total;
            float *result = results + i * values;
            arithmetic.expand(sum, matrices.data + (head * (plain + values) + plain) * row_bytes, (int)matrices.dtype,
                              (int)values, (int)features, result);
            store(out, i * values, 1, (int)values, result);
        });
    });
}
