// What forward and backward of the wide scan share: how a block of warps is laid over channels and states, and how a
// tile of positions comes from memory.
//
// A warp holds 16 channels and 8 STATE_TILES states. With g = lane / 4 and q = lane % 4 a lane holds, of every tile of
// 8 states, the four numbers (channel 2g, state 2q), (2g + 1, 2q), (2g, 2q + 1), (2g + 1, 2q + 1): in this order the
// tensor cores take them as a part of a matrix of 16 channels by 8 states.
#pragma once
#include "scan_call.cuh"

// Constants of one compilation beyond those of scan_call.cuh:
//   CHANNEL_WARPS   warps side by side along the channels
//   STATE_WARPS     warps side by side along the states
//   STATE_TILES     tiles of 8 states in a warp
//   PAIRS           whether two neighbouring states of B and of C lie side by side, aligned

//   THIN            if not 0, a warp holds 8 channels, a lane one of them and so many states: scan_thin_forward.cu

#ifndef THIN
#define THIN 0
#endif

constexpr int WARP = 32;
constexpr int WIDTH = (THIN ? 8 : 16) * CHANNEL_WARPS;
constexpr int PADDED_STATES = (THIN ? 4 * THIN : 8 * STATE_TILES) * STATE_WARPS;
// A lane's channels, and its numbers in each tile of states.
constexpr int LANE_CHANNELS = THIN ? 1 : 2, NUMBERS = THIN ? THIN : 4;
static_assert(STATES <= PADDED_STATES, "");

// The tensor cores read the upper 19 bits of a number: a part of 2^-11 / mantissa is cut off, in the mean 3.45e-4 of it.
constexpr float CUT = 1.0f + 3.45e-4f;

struct Lane {
    int lane, g, q, channel_warp, state_warp;
    // Within the block's channels; of all states.
    int channel, state;
};

DEVICE Lane find_lane() {
    Lane at;
    int warp = thread_index() / WARP;
    at.lane = thread_index() % WARP;
    at.g = at.lane / 4;
    at.q = at.lane % 4;
    at.channel_warp = warp % CHANNEL_WARPS;
    at.state_warp = warp / CHANNEL_WARPS;
    at.channel = (THIN ? 8 : 16) * at.channel_warp + LANE_CHANNELS * at.g;
    at.state = PADDED_STATES / STATE_WARPS * at.state_warp + (THIN ? 1 : 2) * at.q;
    return at;
}

// The states of a lane: [tile][state][channel].
typedef float States[STATE_TILES][NUMBERS];

DEVICE int state_of(const Lane& at, int tile, int i) { return at.state + (THIN ? 4 * i : 8 * tile + (i >> 1)); }
DEVICE int channel_of(const Lane& at, int i) { return at.channel + (THIN ? 0 : i & 1); }

DEVICE bool holds(const Channels& channels, const Lane& at, int tile, int i) {
    return channels.first + channel_of(at, i) < channels.end && state_of(at, tile, i) < STATES;
}

// Read or write the states of a lane in an array (d, n).
DEVICE void load_states(States& h, const float* from, const Channels& channels, const Lane& at) {
#pragma unroll
    for (int tile = 0; tile < STATE_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i) {
            int64 place = int64(channels.first + channel_of(at, i)) * STATES + state_of(at, tile, i);
            h[tile][i] = from != nullptr && holds(channels, at, tile, i) ? from[place] : 0.0f;
        }
}

DEVICE void store_states(float* to, const States& h, const Channels& channels, const Lane& at) {
#pragma unroll
    for (int tile = 0; tile < STATE_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i) {
            int64 place = int64(channels.first + channel_of(at, i)) * STATES + state_of(at, tile, i);
            if (holds(channels, at, tile, i)) to[place] = h[tile][i];
        }
}

// 2^(dt A log2 e)
DEVICE float find_decay(float dt, float a) { return exp2_fast(dt * a); }

// Write sums of steps of the lane's two channels, once for each channel.
DEVICE void store_steps(float* to, const float (&sums)[2], const Channels& channels, const Lane& at) {
    if (at.state_warp != 0 || at.q != 0) return;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i)
        if (channels.first + at.channel + i < channels.end) to[channels.first + at.channel + i] = sums[i];
}

// A log2(e), so that a decay is 2^(dt A log2 e). What is not finite becomes not-a-number and is reported.
DEVICE void load_decays(States& a, const ScanCall& call, const Channels& channels, const Lane& at) {
#pragma unroll
    for (int tile = 0; tile < STATE_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i) {
            a[tile][i] = 0.0f;
            if (!holds(channels, at, tile, i)) continue;
            int64 place = (channels.first + channel_of(at, i)) * call.A_channel + state_of(at, tile, i) * call.A_state;
            float value = call.A[place] * LOG2_E;
            if (!(absolute(value) <= LARGEST)) {
                *call.fault = 1;
                value = from_bits(NOT_A_NUMBER);
            }
            a[tile][i] = value;
        }
}

// 2^-127 and less is 0 in the kernels' arithmetic.
constexpr float NOTHING_LEFT = -127.0f;

// Whether all that a warp's states have decayed by sums of steps is 0 in float32: what lies beyond adds nothing.
DEVICE bool has_decayed(const States& a, float first_sum, float second_sum, const Channels& channels, const Lane& at) {
    float most = NOTHING_LEFT - 1.0f;
#pragma unroll
    for (int tile = 0; tile < STATE_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i)
            if (holds(channels, at, tile, i)) most = larger(most, (i % LANE_CHANNELS ? second_sum : first_sum) * a[tile][i]);
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) most = larger(most, shuffle_xor(most, lanes));
    // Steps can be negative where there is no softplus.
    return SOFTPLUS && most < NOTHING_LEFT;
}

// A tile of positions of one sequence: steps first .. first + TILE, of which those before end exist.
struct Tile {
    int first, end;
};

// One sequence of an activation, from the block's first channel on. Strides fit 32 bits: cuda.py sees to it.
template <typename T>
struct Strip {
    T* data;
    int row, channel;
};

template <typename T>
DEVICE Strip<T> find_strip(const Activation<T>& x, const Sequence& sequence, const Channels& channels) {
    T* data = x.data + sequence.batch * x.batch + sequence.start * x.row + first_of(x, channels);
    return {data, int(x.row), int(x.channel)};
}

// Eight elements of a tile that one thread handles: neighbouring channels of one step, or steps of one channel.
constexpr int UNIT = 8;

struct Unit {
    int step, channel;
    bool inside;

    MEMBER int step_of(int i) const { return ALONG_TIME ? step + i : step; }
    MEMBER int channel_of(int i) const { return ALONG_TIME ? channel : channel + i; }
};

// Where in its sequence an element lies, whether it exists, and whether it takes part: exists and is not masked.
struct Mark {
    int position;
    bool exists, part;
};

// Of a unit's elements in one tile; eight channels of a step share one.
struct Marks {
    static constexpr int COUNT = VECTORS ? 1 : UNIT;
    Mark marks[COUNT];

    MEMBER const Mark& of(int i) const { return marks[VECTORS ? 0 : i]; }
};

DEVICE Marks find_marks(const Unit& unit, const ScanCall& call, const Sequence& sequence, const Channels& channels,
                        const Tile& tile) {
    Marks marks;
#pragma unroll
    for (int i = 0; i < Marks::COUNT; ++i) {
        int step = tile.first + unit.step_of(i);
        Mark& mark = marks.marks[i];
        mark.position = position_in(call, sequence, step);
        mark.exists = unit.inside && step < tile.end && channels.first + unit.channel_of(i) < channels.end;
        mark.part = mark.exists && present(call, sequence, sequence.start + mark.position);
    }
    return marks;
}

template <int TILE, int THREADS>
struct Units {
    static constexpr int COUNT = TILE * WIDTH / UNIT;
    static constexpr int EACH = (COUNT + THREADS - 1) / THREADS;
    Unit units[EACH];

    MEMBER void find() {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            int index = thread_index() + i * THREADS;
            units[i].inside = COUNT % THREADS == 0 || index < COUNT;
            units[i].step = ALONG_TIME ? index % (TILE / UNIT) * UNIT : index / (WIDTH / UNIT);
            units[i].channel = ALONG_TIME ? index / (TILE / UNIT) : index % (WIDTH / UNIT) * UNIT;
        }
    }
};

template <typename T>
DEVICE T* place(const Strip<T>& strip, const Unit& unit, const Marks& marks, int i) {
    return global_pointer(strip.data + int64(marks.of(i).position) * strip.row +
                          (VECTORS ? unit.channel : unit.channel_of(i) * strip.channel));
}

// A unit's numbers as they lie in memory.
struct Packed {
#if TYPE == FLOAT32
    uint4 words[2];
#else
    uint4 words[1];
#endif
};

DEVICE uint32 word_of(const uint4& four, int i) {
    return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

DEVICE void unpack(const Packed& packed, float (&x)[UNIT]) {
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
#if TYPE == FLOAT32
        x[i] = from_bits(word_of(packed.words[i / 4], i % 4));
#elif TYPE == BFLOAT16
        // The upper half needs no shift, only the lower digits cut.
        uint32 word = word_of(packed.words[0], i / 2);
        x[i] = from_bits(i % 2 ? word & 0xffff0000u : word << 16);
#else
        x[i] = from_float16(uint16(word_of(packed.words[0], i / 2) >> (i % 2 ? 16 : 0)));
#endif
    }
}

DEVICE uint32 pack_two(float first, float second) {
#if TYPE == FLOAT16
    return pack_float16(first, second);
#else
    return pack_bfloat16(first, second);
#endif
}

DEVICE Packed pack(const float (&x)[UNIT]) {
    Packed packed;
#if TYPE == FLOAT32
    packed.words[0] = {bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3])};
    packed.words[1] = {bits(x[4]), bits(x[5]), bits(x[6]), bits(x[7])};
#else
    packed.words[0] = {pack_two(x[0], x[1]), pack_two(x[2], x[3]), pack_two(x[4], x[5]), pack_two(x[6], x[7])};
#endif
    return packed;
}

// A unit of one number.
DEVICE Packed all_of(float x) {
    float values[UNIT];
#pragma unroll
    for (int i = 0; i < UNIT; ++i) values[i] = x;
    return pack(values);
}

DEVICE Packed zeros() { return all_of(0.0f); }

// A unit's elements; those that take no part are `absent`.
DEVICE Packed load_unit(const Strip<const Number>& strip, const Unit& unit, const Marks& marks, float absent = 0.0f) {
#if VECTORS
    return marks.of(0).part ? *reinterpret_cast<const Packed*>(place(strip, unit, marks, 0)) : all_of(absent);
#else
    float values[UNIT];
#pragma unroll
    for (int i = 0; i < UNIT; ++i) values[i] = marks.of(i).part ? number(*place(strip, unit, marks, i)) : absent;
    return pack(values);
#endif
}

#if TYPE != FLOAT32
DEVICE void store_eight(uint16* to, const float (&x)[UNIT]) { *reinterpret_cast<Packed*>(to) = pack(x); }
#endif
DEVICE void store_eight(float* to, const float (&x)[UNIT]) {
    reinterpret_cast<float4*>(to)[0] = {x[0], x[1], x[2], x[3]};
    reinterpret_cast<float4*>(to)[1] = {x[4], x[5], x[6], x[7]};
}

template <typename T>
DEVICE void store_unit(const Strip<T>& strip, const float (&values)[UNIT], const Unit& unit, const Marks& marks) {
#if VECTORS
    if (marks.of(0).exists) store_eight(place(strip, unit, marks, 0), values);
#else
#pragma unroll
    for (int i = 0; i < UNIT; ++i)
        if (marks.of(i).exists) put(place(strip, unit, marks, i), values[i]);
#endif
}

// A unit's neighbours in shared memory, or a part of them: channels, or, ALONG_TIME, steps a row apart.
DEVICE void read_unit(float (&values)[UNIT], const float* from, int row, int first = 0, int last = UNIT) {
#if ALONG_TIME
#pragma unroll
    for (int i = first; i < last; ++i) values[i] = from[i * row];
#else
#pragma unroll
    for (int i = first; i < last; i += 4) {
        float4 four = *reinterpret_cast<const float4*>(from + i);
        values[i] = four.x;
        values[i + 1] = four.y;
        values[i + 2] = four.z;
        values[i + 3] = four.w;
    }
#endif
}

// A parameter of a unit's channels.
DEVICE void read_channels(float (&values)[UNIT], const float* from, const Unit& unit) {
    read_unit(values, from + unit.channel, 0);
}

// Shared memory gives a warp 128 bytes a cycle where its lanes meet all banks. Warps read two channels a lane, side by
// side; units write eight. So pieces of 16 bytes are exchanged by bits of their own number, and short rows are padded.

// The place of a pair of channels, (dt, dt u, dt, dt u), in float4s.
constexpr int STEP_ROW = WIDTH >= 64 ? WIDTH / 2 : WIDTH / 2 + WIDTH / 16;
DEVICE int step_place(int step, int pair) {
    constexpr int EXCHANGED = WIDTH >= 64 ? 3 : WIDTH == 32 ? 1 : 0;
    return step * STEP_ROW + (pair ^ (pair >> 3 & EXCHANGED));
}

DEVICE void write_steps(float4* steps, const float (&dt)[UNIT], const float (&du)[UNIT], const Unit& unit) {
#if ALONG_TIME
#pragma unroll
    for (int i = 0; i < UNIT; ++i)
        reinterpret_cast<float2*>(&steps[step_place(unit.step + i, unit.channel / 2)])[unit.channel & 1] = {dt[i],
                                                                                                          du[i]};
#else
#pragma unroll
    for (int i = 0; i < UNIT; i += 2)
        steps[step_place(unit.step, (unit.channel + i) / 2)] = {dt[i], du[i], dt[i + 1], du[i + 1]};
#endif
}

// The step of the recurrence; 0 where nothing takes part, so that the state passes unchanged.
DEVICE float find_step(float delta, float bias, bool part) {
    float dt = delta + bias;
#if SOFTPLUS
    dt = softplus(dt);
#endif
    return part ? dt : 0.0f;
}

// Two neighbouring states of B and of C at one step: a float4 (B, B, C, C) in shared memory.
template <int TILE, int THREADS>
struct ProjectionUnits {
    static constexpr int HALF = PADDED_STATES / 2;
    static constexpr int COUNT = TILE * HALF;
    static constexpr int EACH = (COUNT + THREADS - 1) / THREADS;
};

struct Pair {
#if TYPE == FLOAT32
    uint2 words;
#else
    uint32 words;
#endif
};

DEVICE float2 unpack(const Pair& pair) {
#if TYPE == FLOAT32
    return {from_bits(pair.words.x), from_bits(pair.words.y)};
#else
    return {number(uint16(pair.words)), number(uint16(pair.words >> 16))};
#endif
}

// One sequence of B or of C, of the block's group.
struct ProjectionStrip {
    const Number* data;
    int row, state;
};

DEVICE ProjectionStrip find_strip(const Projection& x, const Sequence& sequence, const Channels& channels) {
    const Number* data = x.data + sequence.batch * x.batch + sequence.start * x.row + channels.group * x.group;
    return {data, int(x.row), int(x.state)};
}

DEVICE Pair load_pair(const ProjectionStrip& strip, int position, int state, bool wanted) {
    const Number* from =
        global_pointer(strip.data + int64(position) * strip.row + (PAIRS ? state : state * strip.state));
    Pair pair;
#if PAIRS
#if TYPE == FLOAT32
    pair.words = {0, 0};
#else
    pair.words = 0;
#endif
    if (wanted) pair = *reinterpret_cast<const Pair*>(from);
#else
    float first = wanted && state < STATES ? number(from[0]) : 0.0f;
    float second = wanted && state + 1 < STATES ? number(from[strip.state]) : 0.0f;
#if TYPE == FLOAT32
    pair.words = {bits(first), bits(second)};
#elif TYPE == BFLOAT16
    pair.words = pack_bfloat16(first, second);
#else
    pair.words = pack_float16(first, second);
#endif
#endif
    return pair;
}

// The place of a pair of states of B among a tile's: two neighbouring steps' lie side by side, to be read together,
// where registers suffice for that.
constexpr bool TWO_STEPS = STATE_TILES <= 2;
DEVICE int B_place(int step, int pair) {
    constexpr int HALF = PADDED_STATES / 2;
    return TWO_STEPS ? (step / 2 * HALF + pair) * 2 + step % 2 : step * HALF + pair;
}

// B and C of a tile on their way from memory.
template <int TILE, int THREADS>
struct Projections {
    typedef ProjectionUnits<TILE, THREADS> All;
    Pair B[All::EACH], C[All::EACH];

    MEMBER void load(const ProjectionStrip& B_strip, const ProjectionStrip& C_strip, const ScanCall& call,
                     const Sequence& sequence, const Tile& tile) {
#pragma unroll
        for (int i = 0; i < All::EACH; ++i) {
            int index = thread_index() + i * THREADS;
            int step = tile.first + index / All::HALF, state = 2 * (index % All::HALF);
            bool wanted = (All::COUNT % THREADS == 0 || index < All::COUNT) && step < tile.end &&
                          (PADDED_STATES == STATES || state < STATES);
            int position = position_in(call, sequence, step);
            wanted = wanted && present(call, sequence, sequence.start + position);
            B[i] = load_pair(B_strip, position, state, wanted);
            C[i] = load_pair(C_strip, position, state, wanted);
        }
    }

    // One array of (B, B, C, C), or one of (B, B), see B_place, and one of (C, C) with rows of C_row.
    MEMBER void store(float4* shared) const {
#pragma unroll
        for (int i = 0; i < All::EACH; ++i) {
            int index = thread_index() + i * THREADS;
            float2 b = unpack(B[i]), c = unpack(C[i]);
            if (All::COUNT % THREADS == 0 || index < All::COUNT) shared[index] = {b.x, b.y, c.x, c.y};
        }
    }

    MEMBER void store(float2* Bs, float2* Cs, int C_row) const {
#pragma unroll
        for (int i = 0; i < All::EACH; ++i) {
            int index = thread_index() + i * THREADS;
            if (All::COUNT % THREADS != 0 && index >= All::COUNT) continue;
            Bs[B_place(index / All::HALF, index % All::HALF)] = unpack(B[i]);
            Cs[index / All::HALF * C_row + index % All::HALF] = unpack(C[i]);
        }
    }
};
