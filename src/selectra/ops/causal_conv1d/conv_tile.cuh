// What the convolution's forward and backward share: how threads are laid over a tile, the filters in shared memory,
// the numbers of a thread's channels at neighbouring steps, the window of the past.
#pragma once
#include "conv_call.cuh"

// A thread's place in a tile.
struct Place {
    int lane, row;
    // The first of its channels; what it takes of the length; which row of blocks it belongs to.
    int channel, batch, low, high, block_row;
    bool used;
};

DEVICE Place find_place(const ConvCall& call) {
    Place at;
    // Unsigned and of 32 bits, since they are divided by.
    uint32 lanes = uint32(call.lanes), rows = uint32(call.rows), channel_tiles = uint32(call.channel_tiles);
    uint32 thread = thread_index(), block = block_x();
    at.lane = thread % lanes;
    at.row = thread / lanes;
    at.channel = (block % channel_tiles * lanes + at.lane) * VECTOR;
    at.block_row = block / channel_tiles;
    uint32 row = uint32(at.block_row) * rows + uint32(at.row), chunks = uint32(call.chunks);
    at.used = at.row < int(rows) && row < uint32(call.all_rows) && at.channel < int(call.channels);
    at.batch = int(row / chunks);
    at.low = int(row % chunks) * int(call.steps);
    at.high = at.low + int(call.steps);
    if (at.high > int(call.length)) at.high = int(call.length);
    return at;
}

// A row of the block's filters in shared memory: eight numbers more than channels, so that writes meet many banks.
constexpr int PADDING = 8;
// As much as one load brings.
constexpr int PIECE = VECTOR < 4 ? VECTOR : 4;
struct alignas(PIECE * 4) Piece {
    float at[PIECE];
};

// The block's filters and biases, tap by tap, to shared memory.
DEVICE void share_filters(const ConvCall& call, const Place& at, float* room) {
    int width = int(call.lanes) * VECTOR, first = at.channel - at.lane * VECTOR;
    int pitch = width + PADDING;
    int count = int(call.channels) - first;
    if (count > width) count = width;
    for (int i = thread_index(); i < count * TAPS; i += THREADS) {
        int c = i / TAPS, tap = i % TAPS;
        room[tap * pitch + c] = call.weight[(first + c) * call.weight_channel + tap * call.weight_tap];
    }
    for (int c = thread_index(); c < count; c += THREADS) {
        room[TAPS * pitch + c] = call.bias == nullptr ? 0.0f : call.bias[(first + c) * call.bias_channel];
    }
}

DEVICE void read_pieces(const float* from, float (&to)[VECTOR]) {
#pragma unroll
    for (int c = 0; c < VECTOR; c += PIECE) {
        Piece piece = *reinterpret_cast<const Piece*>(from + c);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) to[c + i] = piece.at[i];
    }
}

DEVICE void write_pieces(float* to, const float (&from)[VECTOR]) {
#pragma unroll
    for (int c = 0; c < VECTOR; c += PIECE) {
        Piece piece;
#pragma unroll
        for (int i = 0; i < PIECE; ++i) piece.at[i] = from[c + i];
        *reinterpret_cast<Piece*>(to + c) = piece;
    }
}

// A thread's filters, a tap's channels after the other's, and its biases.
struct Filters {
    float taps[TAPS][VECTOR], bias[VECTOR];
};

DEVICE void read_filters(const ConvCall& call, const Place& at, const float* room, Filters& filters) {
    int pitch = int(call.lanes) * VECTOR + PADDING;
    const float* mine = room + at.lane * VECTOR;
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) read_pieces(mine + tap * pitch, filters.taps[tap]);
    read_pieces(mine + TAPS * pitch, filters.bias);
}

// The numbers at COUNT steps from `from` on; steps at `end` and later are not read.
template <int COUNT, bool WHOLE, bool ALONG_TIME>
DEVICE void load_lines(const Activation& tensor, const Steps& steps, int channel, int from, int end,
                       Line (&lines)[COUNT]) {
    const Number* start = tensor.data + steps.batch * tensor.batch + position(steps, from) * tensor.time +
                          channel * tensor.channel;
    int64 step = steps.direction * tensor.time;
#if VECTOR == 1
    if constexpr (ALONG_TIME && WHOLE && COUNT % RUN == 0) {
        // Positions rise in memory, whichever way the steps go.
        const Number* lowest = steps.direction > 0 ? start : start - (COUNT - 1);
        if (reinterpret_cast<int64>(lowest) % 16 == 0) {
            Run runs[COUNT / RUN];
#pragma unroll
            for (int i = 0; i < COUNT / RUN; ++i) runs[i] = reinterpret_cast<const Run*>(lowest)[i];
#pragma unroll
            for (int u = 0; u < COUNT; ++u) {
                Number ahead = runs[u / RUN].at[u % RUN];
                Number back = runs[(COUNT - 1 - u) / RUN].at[(COUNT - 1 - u) % RUN];
                lines[u].words[0] = steps.direction > 0 ? ahead : back;
            }
            return;
        }
    }
#endif
#pragma unroll
    for (int u = 0; u < COUNT; ++u) {
        lines[u] = nothing();
        if (WHOLE || from + u < end) lines[u] = *reinterpret_cast<const Line*>(start + u * step);
    }
}

// A bit for each of COUNT steps from `from` on: whether its position is present; steps outside [0, end) are not.
template <int COUNT>
DEVICE uint32 load_present(const ConvCall& call, const Steps& steps, int from, int end) {
    uint32 found = 0;
#pragma unroll
    for (int u = 0; u < COUNT; ++u) {
        int t = from + u;
        bool there = t >= 0 && t < end;
        if (there) there = present(call, steps.batch, position(steps, t));
        found |= uint32(there) << u;
    }
    return found;
}

// The inputs before a thread's part, oldest first.
DEVICE void load_past(const ConvCall& call, const Steps& steps, int channel, float (&past)[WINDOW][VECTOR]) {
#pragma unroll
    for (int i = 0; i < PAST; ++i) {
        int t = steps.first - PAST + i;
        if (t >= 0) {
            Line line[1];
            load_lines<1, true, false>(call.x, steps, channel, t, t + 1, line);
            unpack(line[0], past[i]);
        }
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            if (t < 0 || !present(call, steps.batch, position(steps, t))) {
                past[i][c] = t < 0 ? input(call, steps, channel + c, t) : 0.0f;
            }
        }
    }
}

DEVICE float filtered(const Filters& filters, const float (&past)[WINDOW][VECTOR], float now, int c) {
    float sum = filters.bias[c];
#pragma unroll
    for (int i = 0; i < PAST; ++i) sum = fma(filters.taps[i][c], past[i][c], sum);
    return fma(filters.taps[PAST][c], now, sum);
}

DEVICE void advance(float (&past)[WINDOW][VECTOR], const float (&now)[VECTOR]) {
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
#pragma unroll
        for (int i = 0; i + 1 < PAST; ++i) past[i][c] = past[i + 1][c];
        if (PAST > 0) past[WINDOW - 1][c] = now[c];
    }
}

// Whether the borders are not what borders are: from 0 to the length, never falling. For all threads of the block.
DEVICE bool bad_borders(const ConvCall& call, float* room) {
#if PACKED
    int n = int(call.n_states);
    float bad = call.borders[0] != 0 || call.borders[n] != int(call.length) ? 1.0f : 0.0f;
    for (int i = thread_index(); i < n; i += THREADS) {
        if (call.borders[i + 1] < call.borders[i]) bad = 1.0f;
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) bad = larger(bad, shuffle_xor(bad, lanes));
    if (thread_index() % 32 == 0) room[thread_index() / 32] = bad;
    synchronize_block();
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) bad = larger(bad, room[warp]);
    synchronize_block();
    return bad != 0.0f;
#else
    return false;
#endif
}

// NaN at all positions of a thread, in y or dx: there is no right number.
DEVICE void write_nothing(const ConvCall& call, const Place& at, Number* y) {
    float out[VECTOR];
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) out[c] = from_bits(NOT_A_NUMBER);
    for (int place = at.low; place < at.high; ++place) {
        *reinterpret_cast<Line*>(y + (at.batch * call.length + place) * call.channels + at.channel) = pack(out);
    }
}
