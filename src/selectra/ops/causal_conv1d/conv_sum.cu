// The last part of the gradients of filters and biases: the sum over the rows of blocks, in a fixed order.
#include "warp.cuh"

struct SumCall {
    // (rows, k + 1, d): the filters' taps, then the bias.
    const float* partial;
    int64 rows, channels, taps;
    // (d, k); (d,) or null.
    float *dweight, *dbias;
};

// The sums of the rows in a fixed order: a warp has 32 neighbouring columns, a block's warps share the rows.
KERNEL __launch_bounds__(512) conv_sum(const __grid_constant__ SumCall call) {
    constexpr int SHARES = 16;
    SHARED_MEMORY(shared);
    float* room = reinterpret_cast<float*>(shared);
    int lane = thread_index() % 32, share = thread_index() / 32;
    int64 columns = call.channels * (call.taps + 1), column = int64(block_x()) * 32 + lane;
    float sum = 0.0f;
    if (column < columns) {
        const float* from = call.partial + column;
#pragma unroll 8
        for (int64 row = share; row < call.rows; row += SHARES) sum += from[row * columns];
    }
    room[share * 32 + lane] = sum;
    synchronize_block();
    if (share != 0 || column >= columns) return;
    sum = 0.0f;
    for (int i = 0; i < SHARES; ++i) sum += room[i * 32 + lane];
    int64 tap = column / call.channels, channel = column % call.channels;
    if (tap < call.taps) {
        call.dweight[channel * call.taps + tap] = sum;
    } else if (call.dbias != nullptr) {
        call.dbias[channel] = sum;
    }
}
