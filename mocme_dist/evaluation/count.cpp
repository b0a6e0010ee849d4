// Filtered ranking by counting: how many entities are nearer to each query than its target, and how many as near.
//
// A lane is an entity. A block of entities is laid out once, parts beside parts, in 32 KB that stay in the first cache
// while all queries pass over it; four queries at a time share each load. No distance is ever stored.
#include "vector.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

using namespace mocme;

constexpr int VECTORS = 2;                  // vectors of entities in a block
constexpr int BLOCK = VECTORS * LANES;      // entities in a block
constexpr int64_t SEGMENT = 32;             // complex numbers summed before they join the total
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

// Counts of `Q` queries against one laid out block. Sums only grow, in floating point too, so once every candidate of
// every query here is beyond its target the rest of the sum cannot change a count: it is left out, and counts are
// those of the whole sums bit for bit.
template <int Q>
void count_block(const float* query_QD, const float* tile, int64_t C, const float* target_Q, const uint32_t* inside, bool stop_early,
                 int64_t* nearer_Q, int64_t* equal_Q) {
    Vec total[Q][VECTORS];
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < VECTORS; ++v) total[q][v] = zero();
    for (int64_t start = 0; start < C; start += SEGMENT) {
        Vec sum[Q][VECTORS];
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < VECTORS; ++v) sum[q][v] = zero();
        for (int64_t c = start, end = std::min(C, start + SEGMENT); c < end; ++c) {
            Vec re[VECTORS], im[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                re[v] = load(tile + 2 * c * BLOCK + v * LANES);
                im[v] = load(tile + (2 * c + 1) * BLOCK + v * LANES);
            }
            for (int q = 0; q < Q; ++q) {
                const Vec query_re = fill(query_QD[q * 2 * C + c]), query_im = fill(query_QD[q * 2 * C + C + c]);
                for (int v = 0; v < VECTORS; ++v) sum[q][v] = add_modulus(sum[q][v], sub(query_re, re[v]), sub(query_im, im[v]));
            }
        }
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

}  // namespace

extern "C" {

// Adds to nearer_Q and equal_Q (Q) the entities of rows_rD (num_rows, 2 C) nearer to each query of query_QD (Q, 2 C)
// than its target_Q, NaN counting as nearer, and those as near.
void mocme_count(const float* query_QD, int64_t Q, const float* rows_rD, int64_t num_rows, int64_t C, const float* target_Q,
                 int32_t threads, int64_t* nearer_Q, int64_t* equal_Q) {
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
                count_block<4>(query_QD + q * 2 * C, tile.data(), C, target_Q + q, inside, stop_early, &nearer[q], &equals[q]);
            for (; q < Q; ++q)
                count_block<1>(query_QD + q * 2 * C, tile.data(), C, target_Q + q, inside, stop_early, &nearer[q], &equals[q]);
        }
#pragma omp critical
        for (int64_t q = 0; q < Q; ++q) {
            nearer_Q[q] += nearer[q];
            equal_Q[q] += equals[q];
        }
    }
}

// Distances of pairs: out_P[p] of query query_P[p] and row row_P[p], the same bits that mocme_count compares.
void mocme_pair_distances(const float* query_QD, const float* rows_rD, int64_t C, const int64_t* query_P, const int64_t* row_P,
                          int64_t P, int32_t threads, float* out_P) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < P; first += LANES) {
        const int count = static_cast<int>(std::min<int64_t>(LANES, P - first));
        Vec total = zero();
        for (int64_t start = 0; start < C; start += SEGMENT) {
            Vec sum = zero();
            for (int64_t c = start, end = std::min(C, start + SEGMENT); c < end; ++c) {
                float re[LANES] = {}, im[LANES] = {};
                for (int i = 0; i < count; ++i) {
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
        std::copy(distance, distance + count, out_P + first);
    }
}

}  // extern "C"
