// RotatE distances of queries to a shared pool of candidates, and their gradients, without storing the (b, N, C)
// differences.
//
// Vectors hold C real parts, then C imaginary parts. Forward: candidates of a tile lie side by side in a vector, the
// coordinates are added in order, so a distance is the same bits wherever its query and candidate stand. Backward:
// coordinates lie side by side; a thread owns LANES coordinates of a chunk, so no thread adds to another's sums.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "distance.h"

using namespace mocme;

// Queries that share a load of a candidate: as many as the registers hold.
#if defined(__AVX512F__)
constexpr int QUERIES = 4;
#else
constexpr int QUERIES = 2;
#endif
constexpr int64_t TILE = 2 * LANES;  // candidates of a forward tile
constexpr int64_t POOL_TILE = 128;   // candidates of a backward tile: with their gradients they fit the first cache

struct Buffer {
    float* data;
    explicit Buffer(int64_t count) : data(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64))) {}
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
};

// (C, 2, TILE) from candidates [first, first + TILE) of a (N, 2 C) pool; candidates past N are zeros.
static void pack_tile(float* tile, const float* pool, int64_t first, int64_t N, int64_t C) {
    for (int64_t n = 0; n < TILE; ++n) {
        const float* from = first + n < N ? pool + (first + n) * 2 * C : nullptr;
        for (int64_t c = 0; c < C; ++c) {
            tile[2 * c * TILE + n] = from ? from[c] : 0.0f;
            tile[(2 * c + 1) * TILE + n] = from ? from[C + c] : 0.0f;
        }
    }
}

// |q - t| summed over coordinates, in units of MODULUS_SCALE, for QUERIES queries and a tile.
static inline void tile_distances(Vec (&sum)[QUERIES][2], const float* const (&query)[QUERIES], const float* tile,
                                  int64_t C) {
    for (int r = 0; r < QUERIES; ++r) sum[r][0] = sum[r][1] = zero();
    for (int64_t c = 0; c < C; ++c) {
        const float* at = tile + 2 * c * TILE;
        for (int v = 0; v < 2; ++v) {
            const Vec t_real = load(at + v * LANES), t_imag = load(at + TILE + v * LANES);
            for (int r = 0; r < QUERIES; ++r) {
                sum[r][v] = add_modulus(sum[r][v], sub(fill(query[r][c]), t_real), sub(fill(query[r][C + c]), t_imag));
            }
        }
    }
}

// (count, 2, LANES) from LANES coordinates of rows [first, first + count) of (rows, 2 C); coordinates past C are zeros.
static void pack_block(float* block, const float* rows, int64_t first, int64_t count, int64_t c0, int64_t C) {
    const int64_t width = std::min<int64_t>(LANES, C - c0);
    for (int64_t i = 0; i < count; ++i) {
        for (int part = 0; part < 2; ++part) {
            const float* from = rows + (first + i) * 2 * C + part * C + c0;
            float* to = block + (2 * i + part) * LANES;
            for (int64_t c = 0; c < LANES; ++c) to[c] = c < width ? from[c] : 0.0f;
        }
    }
}

static void unpack_block(float* rows, const float* block, int64_t first, int64_t count, int64_t c0, int64_t C,
                         float factor) {
    const int64_t width = std::min<int64_t>(LANES, C - c0);
    for (int64_t i = 0; i < count; ++i)
        for (int part = 0; part < 2; ++part)
            for (int64_t c = 0; c < width; ++c)
                rows[(first + i) * 2 * C + part * C + c0 + c] = block[(2 * i + part) * LANES + c] * factor;
}

// Adds grad_out * (q - t) / |q - t|, in units of INVERSE_SCALE, to the queries' sums and to the candidates', for
// QUERIES queries and `count` candidates.
static inline void backward_rows(const float* const (&query)[QUERIES], float* const (&query_sum)[QUERIES],
                                 const float* const (&grad_out)[QUERIES], const float* pool, float* pool_sum,
                                 int64_t count) {
    Vec q_real[QUERIES], q_imag[QUERIES], sum_real[QUERIES], sum_imag[QUERIES];
    for (int r = 0; r < QUERIES; ++r) {
        q_real[r] = load(query[r]), q_imag[r] = load(query[r] + LANES);
        sum_real[r] = load(query_sum[r]), sum_imag[r] = load(query_sum[r] + LANES);
    }
    for (int64_t n = 0; n < count; ++n) {
        const Vec t_real = load(pool + 2 * n * LANES), t_imag = load(pool + (2 * n + 1) * LANES);
        Vec pool_real = load(pool_sum + 2 * n * LANES), pool_imag = load(pool_sum + (2 * n + 1) * LANES);
        for (int r = 0; r < QUERIES; ++r) {
            const Vec real = sub(q_real[r], t_real), imag = sub(q_imag[r], t_imag);
            const Vec scaled = mul(fill(grad_out[r][n]), inverse_modulus(real, imag));
            sum_real[r] = fma(scaled, real, sum_real[r]), sum_imag[r] = fma(scaled, imag, sum_imag[r]);
            pool_real = fma(scaled, real, pool_real), pool_imag = fma(scaled, imag, pool_imag);
        }
        store(pool_sum + 2 * n * LANES, pool_real), store(pool_sum + (2 * n + 1) * LANES, pool_imag);
    }
    for (int r = 0; r < QUERIES; ++r) store(query_sum[r], sum_real[r]), store(query_sum[r] + LANES, sum_imag[r]);
}

extern "C" {

// query (G, b, 2 C), pool (G, N, 2 C) -> out (G, b, N)
void mocme_pool_distance(const float* query, const float* pool, float* out, int64_t G, int64_t b, int64_t N, int64_t C,
                         int32_t threads) {
    const int64_t tiles = (N + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
    {
        Buffer tile(2 * C * TILE), row(TILE);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < G * tiles; ++item) {
            const int64_t g = item / tiles, first = item % tiles * TILE, count = std::min(TILE, N - first);
            pack_tile(tile.data, pool + g * N * 2 * C, first, N, C);
            for (int64_t i = 0; i < b; i += QUERIES) {
                const float* from[QUERIES];
                // Rows past the end repeat the last one: one code path, so all distances come from the same
                // instructions.
                for (int r = 0; r < QUERIES; ++r) from[r] = query + (g * b + std::min(i + r, b - 1)) * 2 * C;
                Vec sum[QUERIES][2];
                tile_distances(sum, from, tile.data, C);
                for (int r = 0; r < QUERIES && i + r < b; ++r) {
                    store(row.data, mul(fill(MODULUS_SCALE), sum[r][0])),
                        store(row.data + LANES, mul(fill(MODULUS_SCALE), sum[r][1]));
                    std::memcpy(out + (g * b + i + r) * N + first, row.data, count * sizeof(float));
                }
            }
        }
    }
}

// grad_out (G, b, N), the gradient of the distances -> grad_query (G, b, 2 C), grad_pool (G, N, 2 C)
void mocme_pool_distance_backward(const float* query, const float* pool, const float* grad_out, float* grad_query,
                                  float* grad_pool, int64_t G, int64_t b, int64_t N, int64_t C, int32_t threads) {
    const int64_t blocks = (C + LANES - 1) / LANES, padded = (b + QUERIES - 1) / QUERIES * QUERIES;
#pragma omp parallel num_threads(threads)
    {
        Buffer queries(padded * 2 * LANES), query_sums(padded * 2 * LANES), candidates(POOL_TILE * 2 * LANES),
            pool_sums(POOL_TILE * 2 * LANES);
        const std::vector<float> nothing(POOL_TILE, 0.0f);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < G * blocks; ++item) {
            const int64_t g = item / blocks, c0 = item % blocks * LANES;
            std::fill_n(queries.data, padded * 2 * LANES, 0.0f);
            std::fill_n(query_sums.data, padded * 2 * LANES, 0.0f);
            pack_block(queries.data, query + g * b * 2 * C, 0, b, c0, C);
            for (int64_t first = 0; first < N; first += POOL_TILE) {
                const int64_t count = std::min(POOL_TILE, N - first);
                pack_block(candidates.data, pool + g * N * 2 * C, first, count, c0, C);
                std::fill_n(pool_sums.data, count * 2 * LANES, 0.0f);
                for (int64_t i = 0; i < b; i += QUERIES) {
                    const float *from[QUERIES], *weight[QUERIES];
                    float* to[QUERIES];
                    for (int r = 0; r < QUERIES; ++r) {
                        from[r] = queries.data + (i + r) * 2 * LANES, to[r] = query_sums.data + (i + r) * 2 * LANES;
                        weight[r] = i + r < b ? grad_out + (g * b + i + r) * N + first : nothing.data();
                    }
                    backward_rows(from, to, weight, candidates.data, pool_sums.data, count);
                }
                unpack_block(grad_pool + g * N * 2 * C, pool_sums.data, first, count, c0, C, -INVERSE_SCALE);
            }
            unpack_block(grad_query + g * b * 2 * C, query_sums.data, 0, b, c0, C, INVERSE_SCALE);
        }
    }
}

}  // extern "C"
