// One position through whole Mamba blocks, in one launch: bound by the reading of the weights, once.
//
// Every warp streams its rows of all matrices through a ring in shared memory, without regard to where one part or
// block ends and the next begins: while the thread blocks meet, weights go on coming. A lane reads back only what it
// copied itself, so that the ring needs no barrier.
#include "step_call.cuh"

DEVICE int lane_index() { return thread_index() % LANES; }
DEVICE int warp_index() { return thread_index() / LANES; }

// The part of `count` that belongs to this warp among those of all thread blocks; nothing for the warp of the meetings.
DEVICE void share(int count, int& first, int& end) {
    int warps = grid_x() * WARPS, warp = block_x() * WARPS + warp_index();
    first = warp_index() < WARPS ? int(int64(warp) * count / warps) : 0;
    end = warp_index() < WARPS ? int(int64(warp + 1) * count / warps) : 0;
}

// The weights of this warp, tile after tile.
struct Ring {
    unsigned char* slots;
    const unsigned char* row_start;
    int part, last, row, end, tile, pieces, asked, taken;

    MEMBER Ring(const Call& call, unsigned char* memory) {
        slots = memory + warp_index() * (TILES * TILE_BYTES) + lane_index() * PIECE_BYTES;
        part = int(call.first) - 1, last = int(call.last);
        row = end = tile = pieces = asked = taken = 0;
        row_start = nullptr;
        seek(call);
#pragma unroll 1
        for (int i = 0; i < TILES; ++i) ask(call);
    }

    // The next part in which this warp has rows, or `last`.
    MEMBER void seek(const Call& call) {
        while (row == end && ++part < last) {
            const Block& block = call.blocks[part / PARTS];
            const void* matrix = block.in_weight;
            int rows = 2 * INNER;
            pieces = MODEL / VECTOR;
            if (part % PARTS == SELECT) matrix = block.x_weight, rows = SELECTED, pieces = INNER / VECTOR;
            if (part % PARTS == OUT) matrix = block.out_weight, rows = MODEL, pieces = INNER / VECTOR;
            if (part % PARTS == SCAN) rows = 0;
            share(rows, row, end);
            row_start = static_cast<const unsigned char*>(matrix) + int64(row) * pieces * PIECE_BYTES;
        }
    }

    // Asks for one more tile, if there is one.
    MEMBER void ask(const Call& call) {
        if (part < last) {
            int first = tile * (PIECES * LANES) + lane_index();
            unsigned char* to = slots + asked * TILE_BYTES;
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                int piece = first + i * LANES;
                if (piece < pieces) {
                    copy_async<PIECE_BYTES>(to + i * (LANES * PIECE_BYTES), row_start + int64(piece) * PIECE_BYTES);
                }
            }
            asked = asked + 1 == TILES ? 0 : asked + 1;
            if (++tile * (PIECES * LANES) >= pieces) {
                tile = 0, ++row, row_start += int64(pieces) * PIECE_BYTES;
                seek(call);
            }
        }
        commit_copies();
    }

    // The oldest tile; whoever has read it asks for another.
    MEMBER const unsigned char* take() {
        wait_for_copies<TILES - 1>();
        const unsigned char* from = slots + taken * TILE_BYTES;
        taken = taken + 1 == TILES ? 0 : taken + 1;
        return from;
    }
};

// Where number k of a vector lies in shared memory: lanes that read pieces side by side read fours side by side.
template <int COLUMNS>
DEVICE int place_of(int k) {
    return (k % VECTOR / 4 * (COLUMNS / VECTOR) + k / VECTOR) * 4 + k % 4;
}

// The products of the warp's next row of weights with every row of x, in all lanes.
template <int COLUMNS>
DEVICE void row_products(const Call& call, Ring& ring, const float* x, float (&sums)[ROWS]) {
    constexpr int COUNT = COLUMNS / VECTOR, STEP = PIECES * LANES;
#pragma unroll
    for (int b = 0; b < ROWS; ++b) sums[b] = 0.0f;
#pragma unroll
    for (int start = 0; start < COUNT; start += STEP) {
        const unsigned char* from = ring.take();
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            int piece = start + i * LANES + lane_index();
            if (piece >= COUNT) continue;
            float w[VECTOR];
            unpack(w, *reinterpret_cast<const uint4*>(from + i * (LANES * PIECE_BYTES)));
#pragma unroll
            for (int b = 0; b < ROWS; ++b) {
#pragma unroll
                for (int part = 0; part < VECTOR; part += 4) {
                    const float* four = x + b * WIDEST + (part / 4 * COUNT + piece) * 4;
                    float4 v = *reinterpret_cast<const float4*>(four);
                    sums[b] = fma(w[part], v.x, sums[b]);
                    sums[b] = fma(w[part + 1], v.y, sums[b]);
                    sums[b] = fma(w[part + 2], v.z, sums[b]);
                    sums[b] = fma(w[part + 3], v.w, sums[b]);
                }
            }
        }
        ring.ask(call);
    }
#pragma unroll
    for (int b = 0; b < ROWS; ++b) sums[b] = warp_sum(sums[b]);
}

// All of the warp's rows of a matrix; `done(row, products)` is called by one lane for each.
template <int COLUMNS, typename Done>
DEVICE void multiply_rows(const Call& call, Ring& ring, const float* x, int rows, const Done& done) {
    int row, end;
    share(rows, row, end);
    while (row < end) {
        int count = end - row < LANES ? end - row : LANES;
        float mine[ROWS];
#pragma unroll
        for (int b = 0; b < ROWS; ++b) mine[b] = 0.0f;
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            float sums[ROWS];
            row_products<COLUMNS>(call, ring, x, sums);
#pragma unroll
            for (int b = 0; b < ROWS; ++b) mine[b] = i == lane_index() ? sums[b] : mine[b];
        }
        if (lane_index() < count) done(row + lane_index(), mine);
        row += count;
    }
}

// Vectors that other thread blocks have written, into shared memory.
template <int COLUMNS>
DEVICE void read_vectors(const float* from, float* x) {
#pragma unroll 1
    for (int b = 0; b < ROWS; ++b) {
        for (int k = 4 * thread_index(); k < COLUMNS; k += 4 * THREADS) {
            *reinterpret_cast<float4*>(x + b * WIDEST + place_of<COLUMNS>(k)) = load_fresh(from + b * COLUMNS + k);
        }
    }
    synchronize_block();
}

// The sum of all threads' numbers, in all of them.
DEVICE float block_sum(float x, float* room) {
    x = warp_sum(x);
    synchronize_block();
    if (lane_index() == 0) room[warp_index()] = x;
    synchronize_block();
    x = 0.0f;
#pragma unroll
    for (int warp = 0; warp <= WARPS; ++warp) x += room[warp];
    return x;
}

// Four numbers of the stream behind this block's sum. Every thread block makes them, the first one keeps them.
DEVICE float4 summed(const Call& call, int block, int64 place) {
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
    if (block_x() == 0) {
        *reinterpret_cast<float4*>(call.work + SUM + block % 2 * (ROWS * MODEL) + place) = sum;
        if (block == DEPTH - 1) {
#pragma unroll
            for (int i = 0; i < 4; ++i) put<STREAM>(call.stream, place + i, v[i]);
        }
    }
    return sum;
}

DEVICE void read_normed(const Call& call, int block, float* x, float* room) {
    const void* norm = call.blocks[block].norm_weight;
#pragma unroll 1
    for (int b = 0; b < ROWS; ++b) {
        float squares = 0.0f;
        for (int k = 4 * thread_index(); k < MODEL; k += 4 * THREADS) {
            float4 v = summed(call, block, b * MODEL + k);
            squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            *reinterpret_cast<float4*>(x + b * WIDEST + place_of<MODEL>(k)) = v;
        }
        float scale = 1.0f / square_root(block_sum(squares, room) * (1.0f / MODEL) + float(call.eps));
        for (int k = 4 * thread_index(); k < MODEL; k += 4 * THREADS) {
            float4* at = reinterpret_cast<float4*>(x + b * WIDEST + place_of<MODEL>(k));
            float4 v = *at;
            v.x *= scale * weight(norm, k), v.y *= scale * weight(norm, k + 1);
            v.z *= scale * weight(norm, k + 2), v.w *= scale * weight(norm, k + 3);
            *at = v;
        }
    }
    synchronize_block();
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

// What lies outside the ring and will be read by this warp soon.
DEVICE void ask_for_rest(const Block& block) {
    constexpr int BYTES = TYPE == FLOAT32 ? 4 : 2;
    int row, end;
    share(2 * INNER, row, end);
    end = end < INNER ? end : INNER;
    if (row < end) ask_for(static_cast<const char*>(block.conv_weight) + row * (WIDTH * BYTES), (end - row) * (WIDTH * BYTES));
#pragma unroll
    for (int b = 0; b < ROWS; ++b) {
        int64 at = (int64(b) * INNER + row) * (WIDTH * BYTES);
        if (row < end) ask_for(static_cast<const char*>(block.conv) + at, (end - row) * (WIDTH * BYTES));
    }
    share(INNER, row, end);
    ask_for(static_cast<const char*>(block.dt_weight) + int64(row) * (RANK * BYTES), (end - row) * (RANK * BYTES));
    constexpr int RATE_BYTES = RATE == FLOAT32 ? 4 : 2;
    ask_for(static_cast<const char*>(block.A_log) + int64(row) * (STATES * RATE_BYTES), (end - row) * (STATES * RATE_BYTES));
#pragma unroll
    for (int b = 0; b < ROWS; ++b) ask_for(block.ssm + (int64(b) * INNER + row) * STATES, (end - row) * (STATES * 4));
}

// Step size, recurrence, skip and gate of this warp's channels.
DEVICE void scan_channels(const Call& call, const Block& block) {
    constexpr int TOGETHER = 4, RANK_PARTS = (RANK + LANES - 1) / LANES, PARTS_OF_STATE = (STATES + LANES - 1) / LANES;
    int first, end;
    share(INNER, first, end);
    for (; first < end; first += TOGETHER) {
        float step[TOGETHER][RANK_PARTS], rate[TOGETHER][PARTS_OF_STATE], skip[TOGETHER], bias[TOGETHER];
        int channels[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            // Beyond the last channel it is read again.
            int channel = channels[i] = first + i < end ? first + i : end - 1;
#pragma unroll
            for (int j = 0; j < RANK_PARTS; ++j) {
                int k = j * LANES + lane_index();
                step[i][j] = k < RANK ? number<TYPE>(block.dt_weight, int64(channel) * RANK + k) : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < PARTS_OF_STATE; ++j) {
                int n = j * LANES + lane_index();
                rate[i][j] = n < STATES ? number<RATE>(block.A_log, int64(channel) * STATES + n) : 0.0f;
            }
            skip[i] = block.D ? number<SKIP>(block.D, channel) : 0.0f, bias[i] = weight(block.dt_bias, channel);
        }
#pragma unroll 1
        for (int b = 0; b < ROWS; ++b) {
            const float *low = call.work + LOW + b * SELECTED, *B = low + RANK, *C = B + STATES;
            float u[TOGETHER], z[TOGETHER], h[TOGETHER][PARTS_OF_STATE];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                int64 at = int64(b) * INNER + channels[i];
                u[i] = load_one_fresh(call.work + MIXED + at), z[i] = load_one_fresh(call.work + GATE + at);
#pragma unroll
                for (int j = 0; j < PARTS_OF_STATE; ++j) {
                    int n = j * LANES + lane_index();
                    h[i][j] = n < STATES ? block.ssm[at * STATES + n] : 0.0f;
                }
            }
            float dt[TOGETHER] = {}, y[TOGETHER] = {};
#pragma unroll
            for (int j = 0; j < RANK_PARTS; ++j) {
                int k = j * LANES + lane_index();
                float v = k < RANK ? load_one_fresh(low + k) : 0.0f;
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) dt[i] = fma(step[i][j], v, dt[i]);
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) dt[i] = softplus(warp_sum(dt[i]) + bias[i]);
#pragma unroll
            for (int j = 0; j < PARTS_OF_STATE; ++j) {
                int n = j * LANES + lane_index();
                float in = n < STATES ? load_one_fresh(B + n) : 0.0f, out = n < STATES ? load_one_fresh(C + n) : 0.0f;
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) {
                    float decay = exp2_fast(-dt[i] * LOG2_E * exp2_fast(rate[i][j] * LOG2_E));
                    float state = fma(decay, h[i][j], dt[i] * u[i] * in);
                    int64 at = int64(b) * INNER + channels[i];
                    if (n < STATES && first + i < end) block.ssm[at * STATES + n] = state;
                    y[i] = fma(state, out, y[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                float gated = fma(skip[i], u[i], warp_sum(y[i])) * silu(z[i]);
                if (lane_index() == 0 && first + i < end) call.work[GATED + int64(b) * INNER + channels[i]] = gated;
            }
        }
    }
}

KERNEL __launch_bounds__(THREADS, 1) step_blocks(const __grid_constant__ Call call) {
    SHARED_MEMORY(shared);
    float* x = reinterpret_cast<float*>(shared);
    float* room = x + ROWS * WIDEST;
    Ring ring(call, shared + (ROWS * WIDEST + LANES) * 4);
#pragma unroll 1
    for (int64 index = call.first; index < call.last; ++index) {
        // What the parts before have written is there for all.
        if (index > call.first) meet_blocks(call.met, int(index - call.first) * grid_x(), WARPS * LANES);
        int at = int(index / PARTS), part = int(index % PARTS);
        const Block& block = call.blocks[at];
        if (part == IN) {
            ask_for_rest(block);
            read_normed(call, at, x, room);
            multiply_rows<MODEL>(call, ring, x, 2 * INNER, [&](int row, const float (&sums)[ROWS]) {
                for (int b = 0; b < ROWS; ++b) {
                    float v = sums[b] + weight(block.in_bias, row);
                    if (row < INNER) {
                        call.work[MIXED + b * INNER + row] = convolved(block, row, b, v);
                    } else {
                        call.work[GATE + b * INNER + row - INNER] = v;
                    }
                }
            });
        } else if (part == SELECT) {
            read_vectors<INNER>(call.work + MIXED, x);
            multiply_rows<INNER>(call, ring, x, SELECTED, [&](int row, const float (&sums)[ROWS]) {
                for (int b = 0; b < ROWS; ++b) call.work[LOW + b * SELECTED + row] = sums[b];
            });
        } else if (part == SCAN) {
            scan_channels(call, block);
        } else {
            read_vectors<INNER>(call.work + GATED, x);
            multiply_rows<INNER>(call, ring, x, MODEL, [&](int row, const float (&sums)[ROWS]) {
                for (int b = 0; b < ROWS; ++b) {
                    float v = sums[b] + weight(block.out_bias, row);
                    call.work[GIVEN + b * MODEL + row] = v;
                    if (at == DEPTH - 1) put<TYPE>(call.y, b * MODEL + row, v);
                }
            });
        }
    }
}
