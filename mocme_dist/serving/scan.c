/* The streaming kernel of queries: distances of RotatE to every row, and a running list of the k nearest.
 *
 * A row is C real parts, then C imaginary parts, float32 or float16. The distance is the sum over C of
 * sqrt(dr * dr + di * di). Each of Q queries keeps a max-heap of k (distance, id); a row enters when it is nearer than
 * the heap's worst, so an equal distance never displaces a lower id, and NaN never enters. Nor does a row that the query
 * leaves out: query q's are skip[offset[q]] ... skip[offset[q + 1] - 1], ascending. Built by serving/kernel.py; its plain
 * twin is there too. */

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BLOCK 32 /* rows that stay in the first cache while the queries pass over them */

static inline float distance_f32(const float *restrict row, const float *restrict query, int64_t C) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; c++) {
        float dr = row[c] - query[c], di = row[C + c] - query[C + c];
        sum += __builtin_sqrtf(dr * dr + di * di);
    }
    return sum;
}

#if defined(__AVX512F__)
#include <immintrin.h>
#define HALF 1
typedef uint16_t half;
/* By hand: compilers convert halves one at a time here, which is twenty times slower. */
static inline float distance_f16(const half *restrict row, const float *restrict query, int64_t C) {
    __m512 sum = _mm512_setzero_ps();
    int64_t c = 0;
    for (; c + 16 <= C; c += 16) {
        __m512 dr = _mm512_sub_ps(_mm512_cvtph_ps(_mm256_loadu_si256((const void *)(row + c))), _mm512_loadu_ps(query + c));
        __m512 di = _mm512_sub_ps(_mm512_cvtph_ps(_mm256_loadu_si256((const void *)(row + C + c))), _mm512_loadu_ps(query + C + c));
        sum = _mm512_add_ps(sum, _mm512_sqrt_ps(_mm512_fmadd_ps(dr, dr, _mm512_mul_ps(di, di))));
    }
    float total = _mm512_reduce_add_ps(sum);
    for (; c < C; c++) {
        float dr = _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16((short)row[c]))) - query[c];
        float di = _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16((short)row[C + c]))) - query[C + c];
        total += __builtin_sqrtf(dr * dr + di * di);
    }
    return total;
}
#elif defined(__FLT16_MAX__)
#define HALF 1
typedef _Float16 half;
static inline float distance_f16(const half *restrict row, const float *restrict query, int64_t C) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; c++) {
        float dr = (float)row[c] - query[c], di = (float)row[C + c] - query[C + c];
        sum += __builtin_sqrtf(dr * dr + di * di);
    }
    return sum;
}
#endif

static int is_left_out(const int64_t *skip, int64_t low, int64_t high, int64_t id) {
    int64_t end = high;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (skip[middle] < id) low = middle + 1;
        else high = middle;
    }
    return low < end && skip[low] == id;
}

/* Of equal distances the higher id is the worse one. */
static inline int is_worse(float distance, int64_t id, float other, int64_t than) {
    return distance > other || (distance == other && id > than);
}

static void sift(float *heap, int64_t *ids, int64_t k, float distance, int64_t id) {
    int64_t at = 0;
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= k) break;
        if (child + 1 < k && is_worse(heap[child + 1], ids[child + 1], heap[child], ids[child])) child++;
        if (!is_worse(heap[child], ids[child], distance, id)) break;
        heap[at] = heap[child];
        ids[at] = ids[child];
        at = child;
    }
    heap[at] = distance;
    ids[at] = id;
}

#define NEAREST(NAME, TYPE, DISTANCE)                                                                                 \
    void NAME(const TYPE *rows, int64_t n, int64_t C, const float *query, int64_t Q, int64_t k, int64_t first,        \
              float *heap, int64_t *ids, const int64_t *skip, const int64_t *offset) {                                \
        for (int64_t start = 0; start < n; start += BLOCK) {                                                          \
            int64_t stop = start + BLOCK < n ? start + BLOCK : n;                                                     \
            for (int64_t q = 0; q < Q; q++) {                                                                         \
                for (int64_t row = start; row < stop; row++) {                                                        \
                    float distance = DISTANCE(rows + row * 2 * C, query + q * 2 * C, C);                              \
                    if (distance < heap[q * k] && !is_left_out(skip, offset[q], offset[q + 1], first + row))          \
                        sift(heap + q * k, ids + q * k, k, distance, first + row);                                    \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
    }

#define DISTANCES(NAME, TYPE, DISTANCE)                                                                               \
    void NAME(const TYPE *rows, int64_t n, int64_t C, const float *query, int64_t Q, float *out) {                    \
        for (int64_t q = 0; q < Q; q++)                                                                               \
            for (int64_t row = 0; row < n; row++) out[q * n + row] = DISTANCE(rows + row * 2 * C, query + q * 2 * C, C); \
    }

NEAREST(nearest_f32, float, distance_f32)
DISTANCES(distances_f32, float, distance_f32)
#ifdef HALF
NEAREST(nearest_f16, half, distance_f16)
DISTANCES(distances_f16, half, distance_f16)
#endif

#ifdef __cplusplus
}
#endif
