// The row-wise optimizers of parallel/optim.py in one pass: each touched row, its state and its gradient are read once.
// A row is one thread's alone, so results do not depend on the number of threads.

#include <cmath>
#include <cstdint>

extern "C" {

// rows, first, second (E, D); index (V) unique rows, negative ones are padding; grad (V, D). control: factor of the
// gradient (0 changes nothing), rate, correction1 = 1 - beta1^step, root2 = sqrt(1 - beta2^step). move1 = 1 - beta1,
// move2 = 1 - beta2 (in float they would lose digits here)
void mocme_rows_adam(float* rows, float* first, float* second, const int64_t* index, const float* grad,
                     const float* control, int64_t V, int64_t D, float decay, float move1, float move2, float eps,
                     int32_t threads) {
    const float factor = control[0], rate = control[1], correction1 = control[2], root2 = control[3];
    if (factor == 0) return;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t v = 0; v < V; ++v) {
        if (index[v] < 0) continue;
        float* __restrict row = rows + index[v] * D;
        float* __restrict mean = first + index[v] * D;
        float* __restrict square = second + index[v] * D;
        const float* __restrict from = grad + v * D;
        for (int64_t d = 0; d < D; ++d) {
            const float g = from[d] * factor + decay * row[d];
            mean[d] += move1 * (g - mean[d]);
            square[d] += move2 * (g * g - square[d]);
            row[d] -= rate * ((mean[d] / correction1) / (std::sqrt(square[d]) / root2 + eps));
        }
    }
}

// square_sum (E): sums of the mean square of a row's gradients
void mocme_rows_adagrad(float* rows, float* square_sum, const int64_t* index, const float* grad, const float* control,
                        int64_t V, int64_t D, float decay, float eps, int32_t threads) {
    const float scale = control[0], rate = control[1];
    if (scale == 0) return;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t v = 0; v < V; ++v) {
        if (index[v] < 0) continue;
        float* __restrict row = rows + index[v] * D;
        const float* __restrict from = grad + v * D;
        constexpr int64_t LANES = 16;  // partial sums that the compiler keeps in one vector
        float part[LANES] = {};
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES)
            for (int64_t i = 0; i < LANES; ++i) {
                const float g = from[d + i] * scale + decay * row[d + i];
                part[i] += g * g;
            }
        float sum = 0;
        for (; d < D; ++d) sum += (from[d] * scale + decay * row[d]) * (from[d] * scale + decay * row[d]);
        for (const float value : part) sum += value;
        square_sum[index[v]] += sum / static_cast<float>(D);
        const float factor = rate / (std::sqrt(square_sum[index[v]]) + eps);
        for (d = 0; d < D; ++d) row[d] -= factor * (from[d] * scale + decay * row[d]);
    }
}

}  // extern "C"
