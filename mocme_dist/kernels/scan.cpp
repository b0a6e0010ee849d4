// Distances of queries to rows that stream by, and a running list of the k nearest; the kernel of queries, see scan.py.
//
// A row is C real parts, then C imaginary parts, float32 or float16. Each of Q queries keeps a max-heap of k (distance,
// id). A row enters if it is nearer than the heap's worst, so an equal distance never displaces a lower id, and NaN
// never enters. Nor does a row that the query excludes: ids skip[offset[q]] ... skip[offset[q + 1] - 1], ascending.
#include "distance.h"

#include <algorithm>
#include <utility>

namespace {

using namespace mocme;

constexpr int64_t BLOCK = 32;  // rows that stay in the first cache while the queries pass over them

// Up to LANES numbers, zeros behind the last.
template <typename T>
Vec load_some(const T* from, int64_t count) {
    T padded[LANES] = {};
    std::copy_n(from, count, padded);
    return load(padded);
}

template <typename T>
float distance(const T* row, const float* query, int64_t C) {
    Vec sum = zero();
    int64_t c = 0;
    for (; c + LANES <= C; c += LANES)
        sum = add_modulus(sum, sub(load(row + c), load(query + c)), sub(load(row + C + c), load(query + C + c)));
    if (const int64_t left = C - c; left > 0) {  // lanes behind the last coordinate add a modulus of 0
        const Vec re = sub(load_some(row + c, left), load_some(query + c, left));
        const Vec im = sub(load_some(row + C + c, left), load_some(query + C + c, left));
        sum = add_modulus(sum, re, im);
    }
    return sum_lanes(sum) * MODULUS_SCALE;
}

bool is_excluded(const int64_t* skip, int64_t low, int64_t high, int64_t id) {
    return std::binary_search(skip + low, skip + high, id);
}

// Puts (distance, id) in the place of the heap's worst. Of equal distances the higher id is the worse one.
void replace_worst(float* heap, int64_t* ids, int64_t k, float distance, int64_t id) {
    const auto entry = [&](int64_t at) { return std::pair(heap[at], ids[at]); };
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < k; at = child) {
        if (child + 1 < k && entry(child + 1) > entry(child)) ++child;
        if (entry(child) <= std::pair(distance, id)) break;
        heap[at] = heap[child];
        ids[at] = ids[child];
    }
    heap[at] = distance;
    ids[at] = id;
}

template <typename T>
void nearest(const T* rows, const float* query, float* heap, int64_t* ids, const int64_t* skip, const int64_t* offset,
             int64_t n, int64_t C, int64_t Q, int64_t k, int64_t first) {
    for (int64_t start = 0; start < n; start += BLOCK)
        for (int64_t q = 0; q < Q; ++q)
            for (int64_t row = start, stop = std::min(start + BLOCK, n); row < stop; ++row) {
                const float found = distance(rows + row * 2 * C, query + q * 2 * C, C);
                if (found < heap[q * k] && !is_excluded(skip, offset[q], offset[q + 1], first + row))
                    replace_worst(heap + q * k, ids + q * k, k, found, first + row);
            }
}

template <typename T>
void distances(const T* rows, const float* query, float* out, int64_t n, int64_t C, int64_t Q) {
    for (int64_t q = 0; q < Q; ++q)
        for (int64_t row = 0; row < n; ++row) out[q * n + row] = distance(rows + row * 2 * C, query + q * 2 * C, C);
}

}  // namespace

extern "C" {

// rows (n, 2 C) of the ids from `first` on; query (Q, 2 C); heap and ids (Q, k), updated. One thread: the caller has
// its own.
void mocme_nearest_float32(const float* rows, const float* query, float* heap, int64_t* ids, const int64_t* skip,
                           const int64_t* offset, int64_t n, int64_t C, int64_t Q, int64_t k, int64_t first, int32_t) {
    nearest(rows, query, heap, ids, skip, offset, n, C, Q, k, first);
}
void mocme_nearest_float16(const Half* rows, const float* query, float* heap, int64_t* ids, const int64_t* skip,
                           const int64_t* offset, int64_t n, int64_t C, int64_t Q, int64_t k, int64_t first, int32_t) {
    nearest(rows, query, heap, ids, skip, offset, n, C, Q, k, first);
}

// Distances (Q, n) of a few rows.
void mocme_distances_float32(const float* rows, const float* query, float* out, int64_t n, int64_t C, int64_t Q,
                             int32_t) {
    distances(rows, query, out, n, C, Q);
}
void mocme_distances_float16(const Half* rows, const float* query, float* out, int64_t n, int64_t C, int64_t Q,
                             int32_t) {
    distances(rows, query, out, n, C, Q);
}

}  // extern "C"
