// Filtered ranking by counting: how many entities are nearer to each query than its target, and how many as near.
//
// A blended score is a bias of the pair less the weighted distances of the vectors' parts; it is counted the same way.
//
// A lane is an entity. A block of entities is laid out once, parts beside parts, in 32 KB that stay in the first cache
// while all queries pass over it; four queries at a time share each load. No distance is ever stored.
#include "distance.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

using namespace mocme;

constexpr int VECTORS = 2;              // vectors of entities in a block
constexpr int BLOCK = VECTORS * LANES;  // entities in a block
constexpr int64_t SEGMENT = 32;         // complex numbers summed before they join the total
constexpr uint32_t FULL = LANES == 32 ? ~0u : (1u << LANES) - 1;

// Entities [first, first + BLOCK) as tile[c][real, imaginary][entity]; the ones behind the last are copies of it.
void lay_out(const float* rows_rD, int64_t first, int64_t num_rows, int64_t C, float* tile) {
    for (int e = 0; e < BLOCK; ++e) {
        const float* row = rows_rD + std::min(first + e, num_rows - 1) * 2 * C;
        for (int64_t c = 0; c < C; ++c) {
            tile[2 * c * BLOCK + e] = row[c];
            tile[(2 * c + 1) * BLOCK + e] = row[C + c];
        }
    }
}

// Whether all n numbers are finite: those that are not have all bits of the exponent set.
bool finite(const float* values, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        bad |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return !bad;
}

// Moduli of the coordinates [start, end) of `Q` queries and a laid out block, added up.
template <int Q>
inline void sum_segment(const float* query_QD, const float* tile, int64_t C, int64_t start, int64_t end,
                        Vec (&sum)[Q][VECTORS]) {
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < VECTORS; ++v) sum[q][v] = zero();
    for (int64_t c = start; c < end; ++c) {
        Vec re[VECTORS], im[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
            re[v] = load(tile + 2 * c * BLOCK + v * LANES);
            im[v] = load(tile + (2 * c + 1) * BLOCK + v * LANES);
        }
        for (int q = 0; q < Q; ++q) {
            const Vec query_re = fill(query_QD[q * 2 * C + c]), query_im = fill(query_QD[q * 2 * C + C + c]);
            for (int v = 0; v < VECTORS; ++v)
                sum[q][v] = add_modulus(sum[q][v], sub(query_re, re[v]), sub(query_im, im[v]));
        }
    }
}

// Counts of `Q` queries against one laid out block. Sums only grow, in floating point too, so once every candidate of
// every query here is beyond its target the rest of the sum cannot change a count: it is left out, and counts are
// those of the whole sums bit for bit.
template <int Q>
void count_block(const float* query_QD, const float* tile, int64_t C, const float* target_Q, const uint32_t* inside,
                 bool stop_early, int64_t* nearer_Q, int64_t* equal_Q) {
    Vec total[Q][VECTORS];
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < VECTORS; ++v) total[q][v] = zero();
    for (int64_t start = 0; start < C; start += SEGMENT) {
        Vec sum[Q][VECTORS];
        sum_segment(query_QD, tile, C, start, std::min(C, start + SEGMENT), sum);
        uint32_t beyond = FULL;
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < VECTORS; ++v) {
                total[q][v] = add(total[q][v], sum[q][v]);
                beyond &= above(total[q][v], fill(target_Q[q] / MODULUS_SCALE));
            }
        if (stop_early && beyond == FULL) return;
    }
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < VECTORS; ++v) {
            const Vec distance = mul(total[q][v], fill(MODULUS_SCALE)), target = fill(target_Q[q]);
            nearer_Q[q] += __builtin_popcount(not_at_least(distance, target) & inside[v]);
            equal_Q[q] += __builtin_popcount(equal(distance, target) & inside[v]);
        }
}

// The parts of a vector and their weights: coordinates [p C / parts, (p + 1) C / parts) are part p.
struct Parts {
    int64_t count;
    const float* weight_QP;
    int64_t end(int64_t p, int64_t C) const { return (p + 1) * C / count; }
    float weight(int64_t q, int64_t p) const { return weight_QP[q * count + p] * MODULUS_SCALE; }
};

// Whether score = bias - distance, with what is known of the distance, lies below its target for all.
inline bool all_below(const Vec* distance, const float* bias, const float* target) {
    uint32_t below = FULL;
    for (int v = 0; v < VECTORS; ++v) below &= above(fill(*target), sub(load(bias + v * LANES), distance[v]));
    return below == FULL;
}

// Counts of blended scores of `Q` queries against one laid out block: bias_QE (Q, BLOCK) less the weighted distances of
// the parts. Weights are not negative, so scores only fall as distances grow, in floating point too, and sums stop
// early as above.
template <int Q>
void count_block_blended(const float* query_QD, const float* tile, int64_t C, Parts parts, const float* bias_QE,
                         const float* target_Q, const uint32_t* inside, bool stop_early, int64_t* above_Q,
                         int64_t* equal_Q) {
    Vec total[Q][VECTORS], distance[Q][VECTORS];
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < VECTORS; ++v) distance[q][v] = zero();
    int64_t start = 0;
    for (int64_t p = 0; p < parts.count; ++p) {
        Vec before[Q][VECTORS];
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < VECTORS; ++v) {
                before[q][v] = distance[q][v];
                total[q][v] = zero();
            }
        for (const int64_t last = parts.end(p, C); start < last; start += SEGMENT) {
            Vec sum[Q][VECTORS];
            sum_segment(query_QD, tile, C, start, std::min(last, start + SEGMENT), sum);
            bool below = true;
            for (int q = 0; q < Q; ++q) {
                for (int v = 0; v < VECTORS; ++v) {
                    total[q][v] = add(total[q][v], sum[q][v]);
                    distance[q][v] = add(before[q][v], mul(fill(parts.weight(q, p)), total[q][v]));
                }
                below = below && all_below(distance[q], bias_QE + q * BLOCK, target_Q + q);
            }
            if (stop_early && below) return;
        }
        start = parts.end(p, C);
    }
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < VECTORS; ++v) {
            const Vec score = sub(load(bias_QE + q * BLOCK + v * LANES), distance[q][v]), target = fill(target_Q[q]);
            above_Q[q] += __builtin_popcount(not_at_least(target, score) & inside[v]);
            equal_Q[q] += __builtin_popcount(equal(score, target) & inside[v]);
        }
}

// Biases of `Q` queries, rows which_Q of bias_ur, for the entities [first, first + BLOCK), zeros behind the last.
inline void lay_out_bias(const float* bias_ur, const int64_t* which_Q, int64_t num_rows, int64_t first, int Q,
                         float* bias_QE) {
    const int64_t count = std::min<int64_t>(BLOCK, num_rows - first);
    for (int q = 0; q < Q; ++q) {
        std::copy_n(bias_ur + which_Q[q] * num_rows + first, count, bias_QE + q * BLOCK);
        std::fill_n(bias_QE + q * BLOCK + count, BLOCK - count, 0.0f);
    }
}

}  // namespace

extern "C" {

// Adds to counts_2Q (2, Q) the entities whose blended score is above the target's, NaN counting as above, and those
// that are equal: the row which_Q of bias_ur (u, num_rows) less the distances of the `count` parts times weight_QP
// (Q, count), none negative.
void mocme_count_blended(const float* query_QD, const float* rows_rD, const float* weight_QP, const float* bias_ur,
                         const int64_t* which_Q, const float* target_Q, int64_t* counts_2Q, int64_t Q,
                         int64_t num_rows, int64_t C, int64_t count, int32_t threads) {
    const int64_t blocks = (num_rows + BLOCK - 1) / BLOCK;
    const bool finite_queries = finite(query_QD, Q * 2 * C) && finite(target_Q, Q);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> tile(static_cast<size_t>(2 * C * BLOCK));
        std::vector<int64_t> higher(static_cast<size_t>(Q)), equals(static_cast<size_t>(Q));
        float bias[4 * BLOCK];
#pragma omp for schedule(dynamic, 4)
        for (int64_t block = 0; block < blocks; ++block) {
            lay_out(rows_rD, block * BLOCK, num_rows, C, tile.data());
            const bool stop_early = finite_queries && finite(tile.data(), 2 * C * BLOCK);
            uint32_t inside[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                const int64_t left = num_rows - block * BLOCK - v * LANES;
                inside[v] = left >= LANES ? FULL : left <= 0 ? 0 : (1u << left) - 1;
            }
            int64_t q = 0;
            for (; q + 4 <= Q; q += 4) {
                lay_out_bias(bias_ur, which_Q + q, num_rows, block * BLOCK, 4, bias);
                count_block_blended<4>(query_QD + q * 2 * C, tile.data(), C, {count, weight_QP + q * count}, bias,
                                       target_Q + q, inside, stop_early, &higher[q], &equals[q]);
            }
            for (; q < Q; ++q) {
                lay_out_bias(bias_ur, which_Q + q, num_rows, block * BLOCK, 1, bias);
                count_block_blended<1>(query_QD + q * 2 * C, tile.data(), C, {count, weight_QP + q * count}, bias,
                                       target_Q + q, inside, stop_early, &higher[q], &equals[q]);
            }
        }
#pragma omp critical
        for (int64_t q = 0; q < Q; ++q) {
            counts_2Q[q] += higher[q];
            counts_2Q[Q + q] += equals[q];
        }
    }
}

// Adds to counts_2Q (2, Q) the entities of rows_rD (num_rows, 2 C) nearer to each query of query_QD (Q, 2 C)
// than its target_Q, NaN counting as nearer, and those as near.
void mocme_count(const float* query_QD, const float* rows_rD, const float* target_Q, int64_t* counts_2Q, int64_t Q,
                 int64_t num_rows, int64_t C, int32_t threads) {
    const int64_t blocks = (num_rows + BLOCK - 1) / BLOCK;
    const bool finite_queries = finite(query_QD, Q * 2 * C);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> tile(static_cast<size_t>(2 * C * BLOCK));
        std::vector<int64_t> nearer(static_cast<size_t>(Q)), equals(static_cast<size_t>(Q));
#pragma omp for schedule(dynamic, 4)
        for (int64_t block = 0; block < blocks; ++block) {
            lay_out(rows_rD, block * BLOCK, num_rows, C, tile.data());
            const bool stop_early = finite_queries && finite(tile.data(), 2 * C * BLOCK);  // a NaN must be met
            uint32_t inside[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                const int64_t left = num_rows - block * BLOCK - v * LANES;
                inside[v] = left >= LANES ? FULL : left <= 0 ? 0 : (1u << left) - 1;
            }
            int64_t q = 0;
            for (; q + 4 <= Q; q += 4)
                count_block<4>(query_QD + q * 2 * C, tile.data(), C, target_Q + q, inside, stop_early, &nearer[q],
                               &equals[q]);
            for (; q < Q; ++q)
                count_block<1>(query_QD + q * 2 * C, tile.data(), C, target_Q + q, inside, stop_early, &nearer[q],
                               &equals[q]);
        }
#pragma omp critical
        for (int64_t q = 0; q < Q; ++q) {
            counts_2Q[q] += nearer[q];
            counts_2Q[Q + q] += equals[q];
        }
    }
}

// Distances of pairs: out_PC[p, i] of part i of query query_P[p] and row row_P[p], the same bits that are compared
// above.
void mocme_pair_distances(const float* query_QD, const float* rows_rD, const int64_t* query_P, const int64_t* row_P,
                          float* out_PC, int64_t C, int64_t count, int64_t P, int32_t threads) {
    const Parts parts{count, nullptr};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < P; first += LANES) {
        const int pairs = static_cast<int>(std::min<int64_t>(LANES, P - first));
        for (int64_t part = 0, start = 0; part < count; ++part, start = parts.end(part - 1, C)) {
            Vec total = zero();
            for (const int64_t last = parts.end(part, C); start < last; start += SEGMENT) {
                Vec sum = zero();
                for (int64_t c = start, end = std::min(last, start + SEGMENT); c < end; ++c) {
                    float re[LANES] = {}, im[LANES] = {};
                    for (int i = 0; i < pairs; ++i) {
                        const float* query = query_QD + query_P[first + i] * 2 * C;
                        const float* row = rows_rD + row_P[first + i] * 2 * C;
                        re[i] = query[c] - row[c];
                        im[i] = query[C + c] - row[C + c];
                    }
                    sum = add_modulus(sum, load(re), load(im));
                }
                total = add(total, sum);
            }
            float distance[LANES];
            store(distance, mul(total, fill(MODULUS_SCALE)));
            for (int i = 0; i < pairs; ++i) out_PC[(first + i) * count + part] = distance[i];
        }
    }
}

}  // extern "C"
