// The gradients of a row, and a block's share of those of weight and bias, summed over its rows.
//
// With n = (r - mean) scale and g = weight dy:  dr = scale (g - n mean(n g) - mean(g)) + the gradient of the stream;
// the last mean only where the norm takes the mean off. dweight = sum of n dy, dbias = sum of dy.
#include "norm_call.cuh"

// Writes the sum over the block's rows, in their order.
DEVICE void write_share(float* share, int width, const float (&mine)[CHUNKS][VECTOR], float* room) {
    if (share == nullptr) return;
    share += int64(block_x()) * width;
    if constexpr (ROWS == 1) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            if (first_column(chunk) < width) store<FLOAT32>(share, first_column(chunk), mine[chunk]);
        }
    } else {
        synchronize_block();
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk)
            store<FLOAT32>(room, thread_index() / ROW_THREADS * COLUMNS + first_column(chunk), mine[chunk]);
        synchronize_block();
        for (int column = thread_index(); column < width; column += THREADS) {
            float sum = 0.0f;
            for (int row = 0; row < ROWS; ++row) sum += room[row * COLUMNS + column];
            share[column] = sum;
        }
    }
}

KERNEL __launch_bounds__(THREADS, RESIDENT) norm_backward(const __grid_constant__ BackwardCall call) {
    SHARED_MEMORY(shared);
    float* room = reinterpret_cast<float*>(shared);
    float over_width = 1.0f / float(call.width);
    float dweight[CHUNKS][VECTOR], dbias[CHUNKS][VECTOR];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) dweight[chunk][i] = dbias[chunk][i] = 0.0f;
    }
    // All threads of a block make the same number of turns.
    for (int64 first = int64(block_x()) * ROWS; first < call.rows; first += int64(grid_x()) * ROWS) {
        int64 row = first + thread_index() / ROW_THREADS, start = row * call.width;
        int width = row < call.rows ? int(call.width) : 0;
        float normal[CHUNKS][VECTOR], grad[CHUNKS][VECTOR];
        float along = 0.0f, across = 0.0f;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            if (first_column(chunk) >= width) continue;
            load<SUM>(normal[chunk], call.sum, start + first_column(chunk));
            load<TYPE>(grad[chunk], call.dy, start + first_column(chunk));
        }
        float scale = width > 0 ? call.scale[row] : 0.0f, mean = 0.0f;
        if constexpr (CENTRED) mean = width > 0 ? call.mean[row] : 0.0f;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            if (first_column(chunk) >= width) continue;
            float weight[VECTOR];
            if constexpr (WEIGHT != NONE) load<WEIGHT>(weight, call.weight, first_column(chunk));
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                normal[chunk][i] = (normal[chunk][i] - mean) * scale;
                if constexpr (WEIGHT != NONE) {
                    dweight[chunk][i] = fma(grad[chunk][i], normal[chunk][i], dweight[chunk][i]);
                    if constexpr (BIAS != NONE) dbias[chunk][i] += grad[chunk][i];
                    grad[chunk][i] *= weight[i];
                } else if constexpr (BIAS != NONE) {
                    dbias[chunk][i] += grad[chunk][i];
                }
                along = fma(normal[chunk][i], grad[chunk][i], along);
                if constexpr (CENTRED) across += grad[chunk][i];
            }
        }
        along = row_sum(along, room) * over_width;
        if constexpr (CENTRED) across = row_sum(across, room) * over_width;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            int64 place = start + first_column(chunk);
            if (first_column(chunk) >= width) continue;
            float stream[VECTOR];
            if constexpr (DSUM) load<SUM>(stream, call.dsum, place);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                float value = scale * (grad[chunk][i] - fma(normal[chunk][i], along, across));
                grad[chunk][i] = DSUM ? value + stream[i] : value;
            }
            store<TYPE>(call.dx, place, grad[chunk]);
            if constexpr (DRESIDUAL) store<RESIDUAL>(call.dresidual, place, grad[chunk]);
        }
    }
    write_share(call.dweight, int(call.width), dweight, room);
    write_share(call.dbias, int(call.width), dbias, room);
}
