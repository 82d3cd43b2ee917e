// A lane's channels in the narrow scan: what they keep in registers, their states in memory, chunks of the length.
#pragma once
#include "narrow_tiles.cuh"

// Steps whose B and C are read at once, as vectors of four.
constexpr int AT_ONCE = 4;
constexpr int CHAIN_THREADS = 128;

typedef float PerChannel[EACH];
typedef float PerState[EACH][STATES];

// What does not change along the length, of a lane's channels; zero where there is no channel.
struct Parameters {
    int channel, n_here;
    // A, and A log2(e): a decay is 2^(dt rate).
    float A[EACH][STATES], rate[EACH][STATES], bias[EACH], skip[EACH];

    MEMBER void load(const ScanCall& call, const Work& work) {
        channel = work.channels.first + work.lane * EACH;
        n_here = work.channels.end - channel;
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            bool there = e < n_here;
            bias[e] = there && call.delta_bias != nullptr ? call.delta_bias[channel + e] : 0.0f;
            skip[e] = there && call.D != nullptr ? call.D[channel + e] : 0.0f;
#pragma unroll
            for (int n = 0; n < STATES; ++n) {
                A[e][n] = there ? call.A[(channel + e) * call.A_channel + n * call.A_state] : 0.0f;
                // An infinite decay would hide in states that are zero.
                if (A[e][n] - A[e][n] != 0.0f) {
                    *call.fault = 1;
                    A[e][n] = from_bits(0x7fc00000u);
                }
                rate[e][n] = A[e][n] * LOG2_E;
            }
        }
    }
};

// (d, n) numbers in float32: of a sequence, a checkpoint or a partial result; zero where there is nothing.
DEVICE void load_states(PerState& x, const float* from, const Parameters& own) {
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
        for (int n = 0; n < STATES; ++n)
            x[e][n] = from != nullptr && e < own.n_here ? from[int64(own.channel + e) * STATES + n] : 0.0f;
}

DEVICE void store_states(float* to, const PerState& x, const Parameters& own) {
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
        for (int n = 0; n < STATES; ++n)
            if (e < own.n_here) to[int64(own.channel + e) * STATES + n] = x[e][n];
}

DEVICE void copy_states(PerState& to, const PerState& from) {
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
        for (int n = 0; n < STATES; ++n) to[e][n] = from[e][n];
}

DEVICE void store_channels(float* to, const PerChannel& x, const Parameters& own) {
#pragma unroll
    for (int e = 0; e < EACH; ++e)
        if (e < own.n_here) to[own.channel + e] = x[e];
}

// Entry `index` of many (d, n), or null.
DEVICE const float* states_at(const float* base, const ScanCall& call, int64 index) {
    return base == nullptr ? nullptr : base + index * call.channels * STATES;
}
DEVICE float* states_at(float* base, const ScanCall& call, int64 index) {
    return base == nullptr ? nullptr : base + index * call.channels * STATES;
}

// A chunk's states at its start (backwards: what reaches its end): found by the chain, or the sequence's own.
DEVICE const float* first_states(const float* of_sequence, const ScanCall& call, const Work& work) {
    return call.n_chunks > 1 ? states_at(call.chunk_state, call, work.chunk)
                             : states_at(of_sequence, call, work.sequence.index);
}

// B, C and presence of AT_ONCE steps.
struct Rows {
    float B[AT_ONCE * STATES], C[AT_ONCE * STATES];
#if !SOFTPLUS
    float presence[AT_ONCE];
#endif

    template <typename Tile>
    MEMBER void read(const Tile& tile, int first_step) {
        const float4* from = reinterpret_cast<const float4*>(tile.projections[0] + first_step * STATES);
#pragma unroll
        for (int i = 0; i < STATES; ++i) {
            put(B + 4 * i, from[i]);
            put(C + 4 * i, from[STEPS * STATES / 4 + i]);
        }
#if !SOFTPLUS
        put(presence, *reinterpret_cast<const float4*>(tile.presence + first_step));
#endif
    }

    // dt of step j; 0 where absent.
    MEMBER float step_size(float delta, int j) const {
#if SOFTPLUS
        return softplus(delta);
#else
        return delta * presence[j];
#endif
    }

    // Derivative of dt by delta: with softplus e^(delta - dt).
    MEMBER float slope(float delta, float dt, int j) const {
#if SOFTPLUS
        return exp2_fast((delta - dt) * LOG2_E);
#else
        return presence[j];
#endif
    }

    static MEMBER void put(float* to, const float4& x) {
        to[0] = x.x;
        to[1] = x.y;
        to[2] = x.z;
        to[3] = x.w;
    }
};

// Keep what a chunk does to the state at its start, or backwards to what reaches its end: that times 2^(rate times the
// sum of dt), plus `end`, which was found from zero.
DEVICE void store_chunk(const PerState& end, const PerChannel& sums, const ScanCall& call, const Work& work,
                        const Parameters& own) {
    store_states(states_at(call.chunk_state, call, work.chunk), end, own);
    store_channels(call.chunk_delta + work.chunk * call.channels, sums, own);
}

#if WARPS > 1
// What the warps of a block tell each other: of each the decay of its tile, and what the tile makes of a state of zero.
// Once at the end, in their place, sums over its tiles.
struct Message {
    static constexpr int NUMBERS = EACH * (STATES == 1 ? 3 : 2 * STATES);
    float numbers[NUMBERS][WARP];
};
// For turns with an even number and an odd one: a warp may read one while another writes the next.
typedef Message Messages[2][WARPS];

// Hand the state, or the adjoint, through the tiles of all warps: `carried` stands before the first, and gets what
// stands before the next turn's first. `sums` are those of dt over this warp's tile, `made` what it makes of zero.
// `before` gets what stands before it. All warps of the block take part.
DEVICE void hand_over(PerState& carried, PerState& before, const PerState& made, const PerChannel& sums,
                      Message* messages, const Work& work, const Parameters& own) {
    Message& mine = messages[work.warp];
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
        for (int n = 0; n < STATES; ++n) {
            mine.numbers[(e * STATES + n) * 2][work.lane] = exp2_fast(sums[e] * own.rate[e][n]);
            mine.numbers[(e * STATES + n) * 2 + 1][work.lane] = made[e][n];
        }
    synchronize_block();
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        if (warp == work.warp) copy_states(before, carried);
#pragma unroll
        for (int e = 0; e < EACH; ++e)
#pragma unroll
            for (int n = 0; n < STATES; ++n) {
                const float(*from)[WARP] = messages[warp].numbers + (e * STATES + n) * 2;
                carried[e][n] = fma(from[0][work.lane], carried[e][n], from[1][work.lane]);
            }
    }
}
#endif

// Turn the chunks' own states into those that they start from; a thread has one state of a channel.
DEVICE void chain(const ScanCall& call, const float* first, bool backwards) {
    int64 index = int64(block_x()) * CHAIN_THREADS + thread_index(), of_sequence = call.channels * STATES;
    if (index >= call.n_seqs * of_sequence) return;
    int64 sequence = index / of_sequence, place = index % of_sequence, channel = place / STATES;
    float rate = call.A[channel * call.A_channel + place % STATES * call.A_state] * LOG2_E;
    float state = first == nullptr ? 0.0f : first[index];
    // Many chunks are on their way at once.
    constexpr int AHEAD = 8;
    int n_chunks = int(call.n_chunks);
#pragma unroll 1
    for (int start = 0; start < n_chunks; start += AHEAD) {
        float *places[AHEAD], ends[AHEAD], sums[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            int step = smaller(start + i, n_chunks - 1);
            int64 chunk = sequence * n_chunks + (backwards ? n_chunks - 1 - step : step);
            places[i] = call.chunk_state + chunk * of_sequence + place;
            ends[i] = *places[i];
            sums[i] = call.chunk_delta[chunk * call.channels + channel];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i >= n_chunks) return;
            *places[i] = state;
            state = fma(exp2_fast(sums[i] * rate), state, ends[i]);
        }
    }
}
