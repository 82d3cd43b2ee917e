// One position through whole Mamba blocks, in one launch: bound by the reading of the weights, once.
//
// A thread block has rows of every matrix, and each of its threads some columns of them, whose activations stay in its
// registers. Weights stream through a ring in shared memory without regard to where one part or block ends and the next
// begins: while the thread blocks meet, weights go on coming. A lane reads back only what it copied itself, so that the
// ring needs no barrier.
#include "step_call.cuh"

DEVICE int lane_index() { return thread_index() % LANES; }
DEVICE int warp_index() { return thread_index() / LANES; }

// Number `index` of `count` equal parts of `size`.
DEVICE void share(int size, int index, int count, int& first, int& end) {
    first = int(int64(index) * size / count);
    end = int(int64(index + 1) * size / count);
}

// The least power of two of warps with a lane for each of so many pieces, and the largest one of rows that, with so many
// pieces of each, make a tile.
DEVICE constexpr int warps_for(int pieces) {
    int warps = 1;
    while (warps < WARPS && warps * LANES < pieces) warps *= 2;
    return warps;
}

DEVICE constexpr int rows_for(int pieces) {
    int rows = 1;
    while (2 * rows * pieces <= PIECES) rows *= 2;
    return rows;
}

// How the warps of a thread block divide rows of COLUMNS numbers: so many side by side in a row, so many rows at once;
// the pieces of a row that a thread has, and the rows of a tile.
template <int COLUMNS>
struct Layout {
    static constexpr int COUNT = COLUMNS / VECTOR;
    static constexpr int BESIDE = warps_for(COUNT), GROUPS = WARPS / BESIDE;
    static constexpr int OWN = (COUNT + BESIDE * LANES - 1) / (BESIDE * LANES), TILE_ROWS = rows_for(OWN);

    // The thread's piece number i of a row, which there is or not.
    static MEMBER int piece(int i) { return (i * BESIDE + warp_index() % BESIDE) * LANES + lane_index(); }
    static MEMBER bool exists(int i) { return (i + 1) * BESIDE * LANES <= COUNT || piece(i) < COUNT; }
    // The rows of this warp among those of all thread blocks.
    static MEMBER void rows(int count, int& first, int& end) {
        share(count, block_x() * GROUPS + warp_index() / BESIDE, grid_x() * GROUPS, first, end);
    }
};

// The weights of this warp, tile after tile.
struct Ring {
    unsigned char* slots;
    const unsigned char* matrix;
    int part, last, row, end, asked, taken;

    MEMBER Ring(const Call& call, unsigned char* memory) {
        slots = memory + warp_index() * (TILES * TILE_BYTES) + lane_index() * PIECE_BYTES;
        part = int(call.first) - 1, last = int(call.last);
        row = end = asked = taken = 0;
        matrix = nullptr;
        // The warp of the meetings has no rows.
        if (warp_index() == WARPS) part = last;
        seek(call);
#pragma unroll 1
        for (int i = 0; i < TILES; ++i) ask(call);
    }

    // The next part in which this warp has rows, or `last`.
    MEMBER void seek(const Call& call) {
        while (row >= end && part < last && ++part < last) {
            const Block& block = call.blocks[part / PARTS];
            int kind = part % PARTS;
            if (kind == IN) Layout<MODEL>::rows(2 * INNER, row, end), matrix = bytes(block.in_weight);
            if (kind == SELECT) Layout<INNER>::rows(SELECTED, row, end), matrix = bytes(block.x_weight);
            if (kind == SCAN) row = end = 0;
            if (kind == OUT) Layout<INNER>::rows(MODEL, row, end), matrix = bytes(block.out_weight);
        }
    }

    static MEMBER const unsigned char* bytes(const void* x) { return static_cast<const unsigned char*>(x); }

    template <int COLUMNS>
    MEMBER void ask_tile() {
        using L = Layout<COLUMNS>;
        unsigned char* to = slots + asked * TILE_BYTES;
        const unsigned char* from = matrix + int64(row) * (L::COUNT * PIECE_BYTES);
#pragma unroll
        for (int r = 0; r < L::TILE_ROWS; ++r) {
#pragma unroll
            for (int i = 0; i < L::OWN; ++i) {
                if (row + r < end && L::exists(i)) {
                    const unsigned char* piece = from + (r * L::COUNT + L::piece(i)) * PIECE_BYTES;
                    copy_async<PIECE_BYTES>(to + (r * L::OWN + i) * (LANES * PIECE_BYTES), piece);
                }
            }
        }
        row += L::TILE_ROWS;
    }

    // Asks for one more tile, if there is one.
    MEMBER void ask(const Call& call) {
        if (part < last) {
            if (part % PARTS == IN) {
                ask_tile<MODEL>();
            } else {
                ask_tile<INNER>();
            }
            asked = asked + 1 == TILES ? 0 : asked + 1;
            seek(call);
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
            pieces[r][i] = *reinterpret_cast<const uint4*>(from + (r * L::OWN + i) * (LANES * PIECE_BYTES));
        }
    }
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
    ring.ask(call);
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
    constexpr int WARP_GROUPS = L::GROUPS;
    // As many rounds for every warp, since the block waits in each.
    int most = (rows + grid_x() * WARP_GROUPS - 1) / (grid_x() * WARP_GROUPS), first = 0, end = 0;
    if (warp_index() < WARPS) L::rows(rows, first, end);
#pragma unroll 1
    for (int start = 0; start < most; start += BATCH) {
#pragma unroll 1
        for (int row = first + start; row < end && row < first + start + BATCH; row += L::TILE_ROWS) {
            multiply_tile<COLUMNS>(call, ring, own, sums, row - first - start);
        }
        synchronize_block();
        for (int i = thread_index(); i < WARP_GROUPS * BATCH; i += THREADS) {
            int of, until;
            share(rows, block_x() * WARP_GROUPS + i / BATCH, grid_x() * WARP_GROUPS, of, until);
            of += start + i % BATCH;
            if (of >= until) continue;
            float total[ROWS];
#pragma unroll
            for (int b = 0; b < ROWS; ++b) {
                total[b] = 0.0f;
#pragma unroll
                for (int warp = 0; warp < L::BESIDE; ++warp) {
                    total[b] += sums[(b * WARPS + i / BATCH * L::BESIDE + warp) * BATCH + i % BATCH];
                }
            }
            done(of, total);
        }
        if (start + BATCH < most) synchronize_block();
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
    synchronize_block();
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

// The channels whose recurrence this warp steps.
DEVICE void own_channels(int64& first, int64& count) {
    int start, end;
    share(INNER, block_x() * WARPS + warp_index(), grid_x() * WARPS, start, end);
    first = start, count = end - start;
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

// Step size, recurrence, skip and gate of this warp's channels.
DEVICE void scan_channels(const Call& call, const Block& block) {
    constexpr int RANK_PARTS = (RANK + LANES - 1) / LANES, PARTS_OF_STATE = (STATES + LANES - 1) / LANES;
    int64 first, count;
    own_channels(first, count);
    for (int64 end = first + count; first < end; first += TOGETHER) {
        float step[TOGETHER][RANK_PARTS], rate[TOGETHER][PARTS_OF_STATE], skip[TOGETHER], bias[TOGETHER];
        int64 channels[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            // Beyond the last channel it is read again.
            int64 channel = channels[i] = first + i < end ? first + i : end - 1;
#pragma unroll
            for (int j = 0; j < RANK_PARTS; ++j) {
                int k = j * LANES + lane_index();
                step[i][j] = k < RANK ? number<TYPE>(block.dt_weight, channel * RANK + k) : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < PARTS_OF_STATE; ++j) {
                int n = j * LANES + lane_index();
                rate[i][j] = n < STATES ? number<RATE>(block.A_log, channel * STATES + n) : 0.0f;
            }
            skip[i] = block.D ? number<SKIP>(block.D, channel) : 0.0f, bias[i] = weight(block.dt_bias, channel);
        }
#pragma unroll 1
        for (int b = 0; b < ROWS; ++b) {
            const float *low = call.work + LOW + b * SELECTED, *B = low + RANK, *C = B + STATES;
            // All loads before the first use.
            float u[TOGETHER], z[TOGETHER], h[TOGETHER][PARTS_OF_STATE];
            float ranks[RANK_PARTS], in[PARTS_OF_STATE], out[PARTS_OF_STATE];
#pragma unroll
            for (int j = 0; j < RANK_PARTS; ++j) {
                int k = j * LANES + lane_index();
                ranks[j] = k < RANK ? load_one_fresh(low + k) : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < PARTS_OF_STATE; ++j) {
                int n = j * LANES + lane_index();
                in[j] = n < STATES ? load_one_fresh(B + n) : 0.0f, out[j] = n < STATES ? load_one_fresh(C + n) : 0.0f;
            }
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
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) dt[i] = fma(step[i][j], ranks[j], dt[i]);
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) dt[i] = softplus(warp_sum(dt[i]) + bias[i]);
#pragma unroll
            for (int j = 0; j < PARTS_OF_STATE; ++j) {
                int n = j * LANES + lane_index();
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) {
                    float decay = exp2_fast(-dt[i] * LOG2_E * exp2_fast(rate[i][j] * LOG2_E));
                    float state = fma(decay, h[i][j], dt[i] * u[i] * in[j]);
                    int64 at = int64(b) * INNER + channels[i];
                    if (n < STATES && first + i < end) block.ssm[at * STATES + n] = state;
                    y[i] = fma(state, out[j], y[i]);
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
    float* sums = reinterpret_cast<float*>(shared);
    Ring ring(call, shared + SUM_BYTES);
#pragma unroll 1
    for (int64 index = call.first; index < call.last; ++index) {
        int at = int(index / PARTS), part = int(index % PARTS);
        const Block& block = call.blocks[at];
        if (part == IN) ask_for_rest(block);
        // What the parts before have written is there for all.
        if (index > call.first) meet_blocks(call.met, int(index - call.first), WARPS);
        if (part == IN) {
            Own<MODEL> own;
            read_normed(call, at, own, sums);
            synchronize_block();
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
        } else if (part == SELECT) {
            Own<INNER> own;
            read_own(call.work + MIXED, own);
            multiply_rows<INNER>(call, ring, own, sums, SELECTED, [&](int row, const float (&products)[ROWS]) {
                for (int b = 0; b < ROWS; ++b) call.work[LOW + b * SELECTED + row] = products[b];
            });
        } else if (part == SCAN) {
            if (warp_index() < WARPS) scan_channels(call, block);
        } else {
            Own<INNER> own;
            read_own(call.work + GATED, own);
            multiply_rows<INNER>(call, ring, own, sums, MODEL, [&](int row, const float (&products)[ROWS]) {
                for (int b = 0; b < ROWS; ++b) {
                    float v = products[b] + weight(block.out_bias, row);
                    call.work[GIVEN + b * MODEL + row] = v;
                    if (at == DEPTH - 1) put<TYPE>(call.y, b * MODEL + row, v);
                }
            });
        }
    }
}
