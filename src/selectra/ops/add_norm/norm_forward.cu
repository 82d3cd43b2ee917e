// Adds a row to its residual and normalises the sum, which stays in registers in between.
#include "norm_call.cuh"

KERNEL __launch_bounds__(THREADS, RESIDENT) norm_forward(const __grid_constant__ ForwardCall call) {
    SHARED_MEMORY(shared);
    float* room = reinterpret_cast<float*>(shared);
    int64 row = int64(block_x()) * ROWS + thread_index() / ROW_THREADS, start = row * call.width;
    int width = row < call.rows ? int(call.width) : 0;
    float sum[CHUNKS][VECTOR];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        if (first_column(chunk) < width) {
            load<TYPE>(sum[chunk], call.x, start + first_column(chunk));
        } else {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) sum[chunk][i] = 0.0f;
        }
    }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        if (first_column(chunk) >= width) continue;
        if constexpr (RESIDUAL != NONE) {
            float residual[VECTOR];
            load<RESIDUAL>(residual, call.residual, start + first_column(chunk));
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) sum[chunk][i] += residual[i];
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[chunk][i] = rounded<SUM>(sum[chunk][i]);
        if constexpr (KEEP) store<SUM>(call.sum, start + first_column(chunk), sum[chunk]);
    }
    float over_width = 1.0f / float(call.width), mean = 0.0f;
    if constexpr (CENTRED) {
        float part = 0.0f;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) part += sum[chunk][i];
        }
        mean = row_sum(part, room) * over_width;
    }
    float part = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        if (first_column(chunk) >= width) continue;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) part = fma(sum[chunk][i] - mean, sum[chunk][i] - mean, part);
    }
    float scale = 1.0f / square_root(row_sum(part, room) * over_width + float(call.eps));
    if (thread_index() % ROW_THREADS == 0 && width > 0) {
        call.scale[row] = scale;
        if constexpr (CENTRED) call.mean[row] = mean;
    }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        int column = first_column(chunk);
        if (column >= width) continue;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[chunk][i] = (sum[chunk][i] - mean) * scale;
        if constexpr (WEIGHT != NONE) {
            float weight[VECTOR];
            load<WEIGHT>(weight, call.weight, column);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) sum[chunk][i] *= weight[i];
        }
        if constexpr (BIAS != NONE) {
            float bias[VECTOR];
            load<BIAS>(bias, call.bias, column);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) sum[chunk][i] += bias[i];
        }
        store<TYPE>(call.y, start + column, sum[chunk]);
    }
}
