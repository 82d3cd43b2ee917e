// One position through whole Mamba blocks, in one launch: bound by the reading of the weights, once.
//
// A thread block has rows of every matrix, and each of its threads some columns of them, whose activations stay in its
// registers. Weights stream through a ring in shared memory without regard to where one part or block ends and the next
// begins: while the thread blocks meet, weights go on coming.
#include "step_channels.cuh"

// The activations of a thread's columns.
template <int COLUMNS>
struct Own {
    float x[ROWS][Layout<COLUMNS>::OWN][VECTOR];
};

// From `v`, a number for each row, to one: the sum over all lanes for row lane % N.
template <int N>
DEVICE float sum_by_lane(float (&v)[N]) {
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2) {
        bool upper_half = lane_index() & half;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            float kept = upper_half ? v[i + half] : v[i], sent = upper_half ? v[i] : v[i + half];
            v[i] = kept + shuffle_xor(sent, half);
        }
    }
    float sum = v[0];
#pragma unroll
    for (int lanes = N; lanes < LANES; lanes *= 2) sum += shuffle_xor(sum, lanes);
    return sum;
}

// The next tile's products with this thread's activations, summed over the warp, into `sums` (ROWS, WARPS, BATCH).
template <int COLUMNS>
DEVICE void multiply_tile(const Call& call, Ring& ring, const Own<COLUMNS>& own, float* sums, int place) {
    using L = Layout<COLUMNS>;
    const unsigned char* from = ring.take();
    uint4 pieces[L::TILE_ROWS][L::OWN];
#pragma unroll
    for (int r = 0; r < L::TILE_ROWS; ++r) {
#pragma unroll
        for (int i = 0; i < L::OWN; ++i) {
            if (L::exists(i)) pieces[r][i] = *reinterpret_cast<const uint4*>(from + ring.place<COLUMNS>(r, i));
        }
    }
    ring.give_back(call);
    float products[ROWS][L::TILE_ROWS];
#pragma unroll
    for (int r = 0; r < L::TILE_ROWS; ++r) {
#pragma unroll
        for (int b = 0; b < ROWS; ++b) products[b][r] = 0.0f;
#pragma unroll
        for (int i = 0; i < L::OWN; ++i) {
            if (!L::exists(i)) continue;
            float w[VECTOR];
            unpack(w, pieces[r][i]);
#pragma unroll
            for (int b = 0; b < ROWS; ++b) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) products[b][r] = fma(w[j], own.x[b][i][j], products[b][r]);
            }
        }
    }
#pragma unroll
    for (int b = 0; b < ROWS; ++b) {
        float sum = sum_by_lane(products[b]);
        if (lane_index() < L::TILE_ROWS) sums[(b * WARPS + warp_index()) * BATCH + place + lane_index()] = sum;
    }
}

// All of the thread block's rows of a matrix; `done(row, products)` is called by one thread for each.
template <int COLUMNS, typename Done>
DEVICE void multiply_rows(const Call& call, Ring& ring, const Own<COLUMNS>& own, float* sums, int rows, const Done& done) {
    using L = Layout<COLUMNS>;
    // As many rounds for every thread block's warps, also those without rows, since the block waits in each.
    int most = (rows + grid_x() - 1) / grid_x(), first, end;
    L::rows(rows, first, end);
#pragma unroll 1
    for (int start = 0; start < most; start += BATCH) {
        int until = end - first < start + BATCH ? end - first : start + BATCH;
        if (warp_index() < WARPS) {
#pragma unroll 1
            for (int row = start; row < until; row += L::ALL_ROWS) {
                multiply_tile<COLUMNS>(call, ring, own, sums, row - start + L::group() * L::TILE_ROWS);
            }
        }
        synchronize_some<WORKERS>();
        for (int i = thread_index(); start + i < until; i += WORKERS) {
            float total[ROWS];
#pragma unroll
            for (int b = 0; b < ROWS; ++b) {
                total[b] = 0.0f;
#pragma unroll
                for (int warp = 0; warp < L::BESIDE; ++warp) {
                    int from = i / L::TILE_ROWS % L::GROUPS * L::BESIDE + warp;
                    total[b] += sums[(b * WARPS + from) * BATCH + i];
                }
            }
            done(first + start + i, total);
        }
        if (start + BATCH < most) synchronize_some<WORKERS>();
    }
}

// Vectors that other thread blocks have written.
template <int COLUMNS>
DEVICE void read_own(const float* from, Own<COLUMNS>& own) {
    using L = Layout<COLUMNS>;
#pragma unroll
    for (int b = 0; b < ROWS; ++b) {
#pragma unroll
        for (int i = 0; i < L::OWN; ++i) {
#pragma unroll
            for (int j = 0; j < VECTOR; j += 4) {
                float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
                if (L::exists(i) && warp_index() < WARPS) v = load_fresh(from + b * COLUMNS + L::piece(i) * VECTOR + j);
                own.x[b][i][j] = v.x, own.x[b][i][j + 1] = v.y, own.x[b][i][j + 2] = v.z, own.x[b][i][j + 3] = v.w;
            }
        }
    }
}

// Four numbers of the stream behind this block's sum. All thread blocks make them; one set of threads keeps them.
DEVICE float4 summed(const Call& call, int block, int64 place, bool kept) {
    float v[4];
    if (block == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = number<TYPE>(call.x, place + i) + number<RESIDUAL>(call.residual, place + i);
    } else {
        float4 given = load_fresh(call.work + GIVEN + place);
        float4 before = load_fresh(call.work + SUM + (block - 1) % 2 * (ROWS * MODEL) + place);
        v[0] = given.x + before.x, v[1] = given.y + before.y, v[2] = given.z + before.z, v[3] = given.w + before.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = rounded<STREAM>(v[i]);
    float4 sum = {v[0], v[1], v[2], v[3]};
    if (kept) {
        *reinterpret_cast<float4*>(call.work + SUM + block % 2 * (ROWS * MODEL) + place) = sum;
        if (block == DEPTH - 1) {
#pragma unroll
            for (int i = 0; i < 4; ++i) put<STREAM>(call.stream, place + i, v[i]);
        }
    }
    return sum;
}

// The normalised sum; `room` has a place for every warp and batch row.
DEVICE void read_normed(const Call& call, int block, Own<MODEL>& own, float* room) {
    using L = Layout<MODEL>;
    const void* norm = call.blocks[block].norm_weight;
    bool kept = block_x() == 0 && warp_index() < L::BESIDE;
#pragma unroll
    for (int b = 0; b < ROWS; ++b) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < L::OWN; ++i) {
#pragma unroll
            for (int j = 0; j < VECTOR; j += 4) {
                float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
                if (L::exists(i) && warp_index() < WARPS) v = summed(call, block, b * MODEL + L::piece(i) * VECTOR + j, kept);
                squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
                own.x[b][i][j] = v.x, own.x[b][i][j + 1] = v.y, own.x[b][i][j + 2] = v.z, own.x[b][i][j + 3] = v.w;
            }
        }
        squares = warp_sum(squares);
        if (lane_index() == 0) room[b * (WARPS + 1) + warp_index()] = squares;
    }
    synchronize_some<WORKERS>();
#pragma unroll
    for (int b = 0; b < ROWS; ++b) {
        float squares = 0.0f;
        // Warps that have other rows have the same columns.
#pragma unroll
        for (int warp = 0; warp < L::BESIDE; ++warp) squares += room[b * (WARPS + 1) + warp];
        float scale = 1.0f / square_root(squares * (1.0f / MODEL) + float(call.eps));
#pragma unroll
        for (int i = 0; i < L::OWN; ++i) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                if (L::exists(i) && warp_index() < WARPS) {
                    own.x[b][i][j] *= scale * weight(norm, L::piece(i) * VECTOR + j);
                }
            }
        }
    }
}

// Takes a channel's window a position further and gives u behind convolution and SiLU.
DEVICE float convolved(const Block& block, int channel, int b, float u) {
    int64 window = (int64(b) * INNER + channel) * WIDTH;
    float inputs[WIDTH], weights[WIDTH];
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
        inputs[k] = k + 1 < WIDTH ? number<TYPE>(block.conv, window + k + 1) : rounded<TYPE>(u);
        weights[k] = number<TYPE>(block.conv_weight, int64(channel) * WIDTH + k);
    }
    float sum = weight(block.conv_bias, channel);
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
        put<TYPE>(block.conv, window + k, inputs[k]);
        sum = fma(inputs[k], weights[k], sum);
    }
    return silu(sum);
}

DEVICE void ask_for(const void* from, int64 bytes) {
    constexpr int LINE = 128;
    for (int64 i = lane_index() * LINE; i < bytes; i += LANES * LINE) prefetch(static_cast<const char*>(from) + i);
}

// What lies outside the ring and will be read by this warp or its thread block soon.
DEVICE void ask_for_rest(const Block& block) {
    constexpr int BYTES = TYPE == FLOAT32 ? 4 : 2, RATE_BYTES = RATE == FLOAT32 ? 4 : 2;
    if (warp_index() == WARPS) {
        int row, end;
        share(2 * INNER, block_x(), grid_x(), row, end);
        end = end < INNER ? end : INNER;
        if (row >= end) return;
        ask_for(static_cast<const char*>(block.conv_weight) + row * (WIDTH * BYTES), (end - row) * (WIDTH * BYTES));
#pragma unroll
        for (int b = 0; b < ROWS; ++b) {
            int64 at = (int64(b) * INNER + row) * (WIDTH * BYTES);
            ask_for(static_cast<const char*>(block.conv) + at, (end - row) * (WIDTH * BYTES));
        }
        return;
    }
    int64 first, count;
    own_channels(first, count);
    ask_for(static_cast<const char*>(block.dt_weight) + first * (RANK * BYTES), count * (RANK * BYTES));
    ask_for(static_cast<const char*>(block.A_log) + first * (STATES * RATE_BYTES), count * (STATES * RATE_BYTES));
#pragma unroll
    for (int b = 0; b < ROWS; ++b) ask_for(block.ssm + (int64(b) * INNER + first) * STATES, count * (STATES * 4));
}

// What the parts before have written is there for all.
DEVICE void meet(const Call& call, int64 index) {
    if (index == call.first) return;
    synchronize_some<WORKERS>();
    if (warp_index() == WARPS) meet_blocks(call.met, int(index - call.first));
    synchronize_some<WORKERS>();
}

DEVICE void do_in(const Call& call, Ring& ring, int64 index, float* sums) {
    int at = int(index / PARTS);
    const Block& block = call.blocks[at];
    ask_for_rest(block);
    meet(call, index);
    Own<MODEL> own;
    read_normed(call, at, own, sums);
    synchronize_some<WORKERS>();
    multiply_rows<MODEL>(call, ring, own, sums, 2 * INNER, [&](int row, const float (&products)[ROWS]) {
        for (int b = 0; b < ROWS; ++b) {
            float v = products[b] + weight(block.in_bias, row);
            if (row < INNER) {
                call.work[MIXED + b * INNER + row] = convolved(block, row, b, v);
            } else {
                call.work[GATE + b * INNER + row - INNER] = v;
            }
        }
    });
}

DEVICE void do_select(const Call& call, Ring& ring, int64 index, float* sums) {
    meet(call, index);
    Own<INNER> own;
    read_own(call.work + MIXED, own);
    multiply_rows<INNER>(call, ring, own, sums, SELECTED, [&](int row, const float (&products)[ROWS]) {
        for (int b = 0; b < ROWS; ++b) call.work[LOW + b * SELECTED + row] = products[b];
    });
}

DEVICE void do_scan(const Call& call, int64 index) {
    const Block& block = call.blocks[index / PARTS];
    int64 first, count;
    own_channels(first, count);
    // The first ones' weights come while thread blocks meet.
    Channels channels(block, first, count);
    meet(call, index);
#pragma unroll 1
    for (int64 next = first; next < first + count;) {
#pragma unroll 1
        for (int b = 0; b < ROWS; ++b) channels.step(call, block, b);
        next += TOGETHER;
        if (next < first + count) channels = Channels(block, next, first + count - next);
    }
}

DEVICE void do_out(const Call& call, Ring& ring, int64 index, float* sums) {
    int at = int(index / PARTS);
    meet(call, index);
    Own<INNER> own;
    read_own(call.work + GATED, own);
    multiply_rows<INNER>(call, ring, own, sums, MODEL, [&](int row, const float (&products)[ROWS]) {
        for (int b = 0; b < ROWS; ++b) {
            float v = products[b] + weight(call.blocks[at].out_bias, row);
            call.work[GIVEN + b * MODEL + row] = v;
            if (at == DEPTH - 1) put<TYPE>(call.y, b * MODEL + row, v);
        }
    });
}

KERNEL __launch_bounds__(THREADS, 1) step_blocks(const __grid_constant__ Call call) {
    SHARED_MEMORY(shared);
    float* sums = reinterpret_cast<float*>(shared);
    Ring ring(call, shared + SUM_BYTES);
    if (ring.is_at_work_for_others(call)) return;
#pragma unroll 1
    for (int64 index = call.first; index < call.last; ++index) {
        int part = int(index % PARTS);
        if (part == IN) do_in(call, ring, index, sums);
        if (part == SELECT) do_select(call, ring, index, sums);
        if (part == SCAN) do_scan(call, index);
        if (part == OUT) do_out(call, ring, index, sums);
    }
}
