// Step size, recurrence, skip and gate of some channels of a warp: a lane has one state of each.
#pragma once
#include "step_ring.cuh"

// The channels whose recurrence this warp steps; the warp of the meetings has none.
DEVICE void own_channels(int64& first, int64& count) {
    int start, end;
    share(INNER, block_x() * WARPS + warp_index(), grid_x() * WARPS, start, end);
    first = start, count = warp_index() < WARPS ? end - start : 0;
}

struct Channels {
    static constexpr int RANKS = (RANK + LANES - 1) / LANES, PER_LANE = (STATES + LANES - 1) / LANES;
    float dt_weight[TOGETHER][RANKS], rate[TOGETHER][PER_LANE], skip[TOGETHER], bias[TOGETHER];
    int64 numbers[TOGETHER];
    int present;

    // Channels from `first` on, TOGETHER of `count` at most; beyond the last one it is read again.
    MEMBER Channels(const Block& block, int64 first, int64 count) {
        present = int(count < TOGETHER ? count : TOGETHER);
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            int64 channel = numbers[i] = first + (i < present ? i : present > 0 ? present - 1 : 0);
            if (present == 0) channel = numbers[i] = 0;
#pragma unroll
            for (int j = 0; j < RANKS; ++j) {
                int k = j * LANES + lane_index();
                dt_weight[i][j] = k < RANK ? number<TYPE>(block.dt_weight, channel * RANK + k) : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j) {
                int n = j * LANES + lane_index();
                rate[i][j] = n < STATES ? number<RATE>(block.A_log, channel * STATES + n) : 0.0f;
            }
            skip[i] = block.D ? number<SKIP>(block.D, channel) : 0.0f, bias[i] = weight(block.dt_bias, channel);
        }
    }

    // A step of batch row b.
    MEMBER void step(const Call& call, const Block& block, int b) {
        const float *low = call.work + LOW + b * SELECTED, *B = low + RANK, *C = B + STATES;
        // All loads before the first use.
        float ranks[RANKS], in[PER_LANE], out[PER_LANE], u[TOGETHER], z[TOGETHER], h[TOGETHER][PER_LANE];
#pragma unroll
        for (int j = 0; j < RANKS; ++j) {
            int k = j * LANES + lane_index();
            ranks[j] = k < RANK ? load_one_fresh(low + k) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            int n = j * LANES + lane_index();
            in[j] = n < STATES ? load_one_fresh(B + n) : 0.0f, out[j] = n < STATES ? load_one_fresh(C + n) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            int64 at = int64(b) * INNER + numbers[i];
            u[i] = load_one_fresh(call.work + MIXED + at), z[i] = load_one_fresh(call.work + GATE + at);
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j) {
                int n = j * LANES + lane_index();
                h[i][j] = n < STATES ? block.ssm[at * STATES + n] : 0.0f;
            }
        }
        float dt[TOGETHER], y[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            dt[i] = y[i] = 0.0f;
#pragma unroll
            for (int j = 0; j < RANKS; ++j) dt[i] = fma(dt_weight[i][j], ranks[j], dt[i]);
        }
        warp_sums(dt);
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            dt[i] = softplus(dt[i] + bias[i]);
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j) {
                int n = j * LANES + lane_index();
                float decay = exp2_fast(-dt[i] * LOG2_E * exp2_fast(rate[i][j] * LOG2_E));
                float state = fma(decay, h[i][j], dt[i] * u[i] * in[j]);
                if (n < STATES && i < present) block.ssm[(int64(b) * INNER + numbers[i]) * STATES + n] = state;
                y[i] = fma(state, out[j], y[i]);
            }
        }
        warp_sums(y);
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            float gated = fma(skip[i], u[i], y[i]) * silu(z[i]);
            if (lane_index() == 0 && i < present) call.work[GATED + int64(b) * INNER + numbers[i]] = gated;
        }
    }
};
