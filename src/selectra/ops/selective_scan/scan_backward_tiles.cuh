// Tiles of the backward scan: what shared memory holds, how a tile is made ready, how its gradients are written.
#pragma once
#include "scan_sums.cuh"

constexpr int WARPS = CHANNEL_WARPS * STATE_WARPS;
constexpr int THREADS = WARP * WARPS;
constexpr int TILE = 32;
constexpr int GROUPS = TILE / GROUP;
constexpr int HALF_STATES = PADDED_STATES / 2;
// Rows of dy, in pieces of four channels, padded against bank conflicts.
constexpr int DY_ROW = WIDTH >= 64 ? WIDTH / 4 : WIDTH / 4 + 1;

typedef Units<TILE, THREADS> Elements;

struct alignas(16) Strips {
    Strip<const Number> u, delta, dy, z;
    Strip<Number> du, ddelta, dz;
    ProjectionStrip B, C;
};

// What a thread's units add to the gradients of D and of the bias, as float4s.
constexpr int CHANNEL_SUMS = ALONG_TIME ? Elements::EACH : UNIT;
constexpr int SUMS_WORDS = 2 * ((CHANNEL_SUMS + 3) / 4);

struct Shared {
    // (dt, dt u) of every step and channel, see step_place; the gradient of the output before the gate; B and C.
    float4 steps[TILE * STEP_ROW];
    float4 dy[TILE * DY_ROW];
    float4 projections[TILE * HALF_STATES];
    float bias[WIDTH], skip[WIDTH];
    Strips strips;
    // Numbers that the compiler must not know: see Choice.
    float zeros[2], ones[2];
    // Whether a warp's adjoint needs what follows.
    int alive[WARPS + 4 - WARPS % 4];
    // Beyond this the adjoint pass needs nothing.
    //
    // The state before every group of steps; a group that is done leaves its sums over the states there: see Sums.
    alignas(16) float4 states[GROUPS][WARPS][STATE_TILES][WARP];
#if GATED
    // C . h of every group's steps.
    float2 outputs[GROUPS][WARPS][WARP];
#endif
    // Sums over a warp's channels: the gradients of B and of C.
    alignas(16) float gathered[CHANNEL_WARPS][TILE][GATHERED_ROW];
    float4 channel_sums[SUMS_WORDS][THREADS];
    // The state before every tile of the interval but the first.
    float4 tiles[1];
};

// The place of four channels of dy, in float4s.
DEVICE int dy_place(int step, int four) { return step * DY_ROW + (four ^ (WIDTH >= 64 ? four >> 3 & 1 : 0)); }

// Places of lane (g, q)'s results of a group: neighbouring channels lie side by side, exchanged by bits of the warp's
// number along the channels, so that a unit's eight channels and its neighbours' meet all banks.
DEVICE int sums_place(int channel_warp, int g, int q) { return 8 * q + (g ^ ((channel_warp ^ 2 * q) & 3)); }
DEVICE int outputs_place(int channel_warp, int g, int q) {
    return 8 * (q ^ (channel_warp >> 1 & 1)) + (g ^ 2 * (channel_warp & 1));
}

// A tile's activations on their way from memory.
struct Loads {
    Packed u[Elements::EACH], delta[Elements::EACH], dy[Elements::EACH], z[Elements::EACH];
};

template <bool WITH_GRADIENT>
DEVICE void load(Loads& loads, const Shared& shared, const Elements& elements, const ScanCall& call,
                 const Sequence& sequence, const Channels& channels, const Tile& tile) {
    const Strips& strips = shared.strips;
#pragma unroll
    for (int i = 0; i < Elements::EACH; ++i) {
        const Unit& unit = elements.units[i];
        Marks marks = find_marks(unit, call, sequence, channels, tile);
        loads.u[i] = load_unit(strips.u, unit, marks);
        loads.delta[i] = load_unit(strips.delta, unit, marks);
        if (WITH_GRADIENT) loads.dy[i] = load_unit(strips.dy, unit, marks);
        if (WITH_GRADIENT && GATED) loads.z[i] = load_unit(strips.z, unit, marks);
    }
}

// Ask for the activations of the tile that comes next.
DEVICE void prefetch(const Shared& shared, const ScanCall& call, const Sequence& sequence, const Tile& tile) {
#if VECTORS && !defined(NO_PREFETCH)
    constexpr int LINE = 128 / sizeof(Number), LINES = (WIDTH + LINE - 1) / LINE, TENSORS = GATED ? 4 : 3;
    constexpr int COUNT = TILE * LINES * TENSORS;
#pragma unroll
    for (int round = 0; round < (COUNT + THREADS - 1) / THREADS; ++round) {
        int i = thread_index() + round * THREADS;
        int step = tile.first + i % TILE, line = i / TILE % LINES;
        if (i >= COUNT || step < 0) continue;
        const Strip<const Number>& strip = (&shared.strips.u)[i / (TILE * LINES)];
        int position = call.reverse ? sequence.length - 1 - step : step;
        prefetch(strip.data + int64(position) * strip.row + line * LINE);
    }
#endif
}

// Put dt, dt u, the output's gradient before the gate, B and C where the warps read them.
template <bool WITH_GRADIENT>
DEVICE void prepare(Shared& shared, const Elements& elements, const ScanCall& call, const Sequence& sequence,
                    const Channels& channels, const Tile& tile) {
    Loads loads;
    load<WITH_GRADIENT>(loads, shared, elements, call, sequence, channels, tile);
    Projections<TILE, THREADS> projections;
    projections.load(shared.strips.B, shared.strips.C, call, sequence, tile);
#pragma unroll
    for (int i = 0; i < Elements::EACH; ++i) {
        const Unit& unit = elements.units[i];
        if (!unit.inside) continue;
        Marks marks = find_marks(unit, call, sequence, channels, tile);
        float u[UNIT], delta[UNIT], bias[UNIT];
        unpack(loads.u[i], u);
        unpack(loads.delta[i], delta);
        read_channels(bias, shared.bias, unit);
#pragma unroll
        for (int k = 0; k < UNIT; ++k) {
            delta[k] = find_step(delta[k], bias[k], marks.of(k).part);
            u[k] *= delta[k];
        }
        write_steps(shared.steps, delta, u, unit);
        if (!WITH_GRADIENT) continue;
        float dy[UNIT], z[UNIT];
        unpack(loads.dy[i], dy);
        if (GATED) unpack(loads.z[i], z);
#pragma unroll
        for (int k = 0; k < UNIT; ++k) {
            if (GATED) dy[k] *= z[k] * sigmoid(z[k]);
            if (ALONG_TIME)
                reinterpret_cast<float*>(&shared.dy[dy_place(unit.step + k, unit.channel / 4)])[unit.channel % 4] = dy[k];
        }
        if (ALONG_TIME) continue;
        shared.dy[dy_place(unit.step, unit.channel / 4)] = {dy[0], dy[1], dy[2], dy[3]};
        shared.dy[dy_place(unit.step, unit.channel / 4 + 1)] = {dy[4], dy[5], dy[6], dy[7]};
    }
    projections.store(shared.projections);
}

// Where a lane reads from a step of the tile on; B and C come as (B, B, C, C) of its two states of a tile of states.
DEVICE const float4* steps_from(const Shared& shared, const Lane& at, int step) {
    return &shared.steps[step_place(step, at.channel / 2)];
}

DEVICE const float2* dy_from(const Shared& shared, const Lane& at, int step) {
    return reinterpret_cast<const float2*>(&shared.dy[dy_place(step, at.channel / 4)]) + (at.channel / 2 & 1);
}

DEVICE const float4* projections_from(const Shared& shared, const Lane& at, int step) {
    return &shared.projections[step * HALF_STATES + 4 * STATE_TILES * at.state_warp + at.q];
}

// Sums for the gradients of D and of the bias: of every unit's channels. They wait in shared memory, a column a thread.
struct ChannelSums {
    static constexpr int HALF = SUMS_WORDS / 2;
    float skip[4 * HALF], bias[4 * HALF];

    MEMBER void clear() {
#pragma unroll
        for (int i = 0; i < 4 * HALF; ++i) skip[i] = bias[i] = 0.0f;
    }

    MEMBER void keep(Shared& shared) const {
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            shared.channel_sums[i][thread_index()] = {skip[4 * i], skip[4 * i + 1], skip[4 * i + 2], skip[4 * i + 3]};
            shared.channel_sums[HALF + i][thread_index()] = {bias[4 * i], bias[4 * i + 1], bias[4 * i + 2],
                                                             bias[4 * i + 3]};
        }
    }

    MEMBER void recall(const Shared& shared) {
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            float4 x = shared.channel_sums[i][thread_index()], y = shared.channel_sums[HALF + i][thread_index()];
            skip[4 * i] = x.x;
            skip[4 * i + 1] = x.y;
            skip[4 * i + 2] = x.z;
            skip[4 * i + 3] = x.w;
            bias[4 * i] = y.x;
            bias[4 * i + 1] = y.y;
            bias[4 * i + 2] = y.z;
            bias[4 * i + 3] = y.w;
        }
    }
};

// Sums over the states, of a unit's elements: what reaches dt u, what reaches dt by the decays, C . h.
struct UnitSums {
    float x[UNIT], y[UNIT], output[UNIT];

    MEMBER void find(const Shared& shared, const Unit& unit) {
        int channel_warp = unit.channel / 16, g = unit.channel % 16 / 2;
#pragma unroll
        for (int part = 0; part < STATE_WARPS; ++part) {
            int warp = part * CHANNEL_WARPS + channel_warp;
#if ALONG_TIME
            int which = unit.channel & 1;
#pragma unroll
            for (int i = 0; i < UNIT; ++i) {
                int group = (unit.step + i) / GROUP, q = (unit.step + i) % GROUP;
                int place = sums_place(channel_warp, g, q);
                const float2* sums = reinterpret_cast<const float2*>(&shared.states[group][warp][0][place]);
                add(i, sums[which].x, sums[which].y, part);
#if GATED
                float2 outputs = shared.outputs[group][warp][outputs_place(channel_warp, g, q)];
                add_output(i, which ? outputs.y : outputs.x, part);
#endif
            }
#else
            int group = unit.step / GROUP, q = unit.step % GROUP;
#pragma unroll
            for (int i = 0; i < UNIT; i += 2) {
                float4 sums = shared.states[group][warp][0][sums_place(channel_warp, g + i / 2, q)];
                add(i, sums.x, sums.y, part);
                add(i + 1, sums.z, sums.w, part);
#if GATED
                float2 outputs = shared.outputs[group][warp][outputs_place(channel_warp, g + i / 2, q)];
                add_output(i, outputs.x, part);
                add_output(i + 1, outputs.y, part);
#endif
            }
#endif
        }
    }

    MEMBER void add(int i, float to_x, float to_y, int part) {
        x[i] = part == 0 ? to_x : x[i] + to_x;
        y[i] = part == 0 ? to_y : y[i] + to_y;
    }

    MEMBER void add_output(int i, float to_output, int part) { output[i] = part == 0 ? to_output : output[i] + to_output; }
};

// Write a tile's gradients of u, delta and z. What takes no part has zeros in u, dy, z, B and C.
DEVICE void finish(Shared& shared, const Elements& elements, const Loads& loads, const ScanCall& call,
                   const Sequence& sequence, const Channels& channels, const Tile& tile) {
    const Strips& strips = shared.strips;
    ChannelSums sums;
    sums.recall(shared);
#pragma unroll
    for (int i = 0; i < Elements::EACH; ++i) {
        const Unit& unit = elements.units[i];
        if (!unit.inside) continue;
        Marks marks = find_marks(unit, call, sequence, channels, tile);
        float u[UNIT], delta[UNIT], dy[UNIT], z[UNIT], bias[UNIT], skip[UNIT];
        unpack(loads.u[i], u);
        unpack(loads.delta[i], delta);
        unpack(loads.dy[i], dy);
        if (GATED) unpack(loads.z[i], z);
        read_channels(bias, shared.bias, unit);
        read_channels(skip, shared.skip, unit);
        UnitSums found;
        found.find(shared, unit);
        // This thread has written them, and will write the next tile's.
        float steps[UNIT];
#pragma unroll
        for (int k = 0; k < UNIT; k += 2) {
#if ALONG_TIME
            int pair = unit.channel / 2, which = unit.channel % 2;
            steps[k] = reinterpret_cast<const float2*>(&shared.steps[step_place(unit.step + k, pair)])[which].x;
            steps[k + 1] = reinterpret_cast<const float2*>(&shared.steps[step_place(unit.step + k + 1, pair)])[which].x;
#else
            float4 both = shared.steps[step_place(unit.step, (unit.channel + k) / 2)];
            steps[k] = both.x;
            steps[k + 1] = both.z;
#endif
        }
#pragma unroll
        for (int k = 0; k < UNIT; ++k) {
            if (GATED) {
                float s = sigmoid(z[k]), gate = z[k] * s;
                float output = fma(skip[k], u[k], EXACT ? found.output[k] : found.output[k] * CUT);
                // silu'(z) = s (1 + z (1 - s))
                z[k] = dy[k] * output * fma(gate, 1.0f - s, s);
                dy[k] *= gate;
            }
            float ddelta = fma(u[k], found.x[k], found.y[k] * LN_2);
            if (SOFTPLUS) ddelta *= sigmoid(delta[k] + bias[k]);
            delta[k] = marks.of(k).part ? ddelta : 0.0f;
            int slot = ALONG_TIME ? i : k;
            sums.skip[slot] = fma(dy[k], u[k], sums.skip[slot]);
            sums.bias[slot] += delta[k];
            u[k] = fma(steps[k], found.x[k], skip[k] * dy[k]);
            // A state that is not finite would leave not-a-numbers where nothing is.
            if (MASKED && !marks.of(k).part) u[k] = z[k] = 0.0f;
        }
        store_unit(strips.du, u, unit, marks);
        store_unit(strips.ddelta, delta, unit, marks);
        if (GATED) store_unit(strips.dz, z, unit, marks);
    }
    sums.keep(shared);
}

// The row of a step's partial sums: by its position, or by its place in the slice, whose first step is `begin`.
DEVICE int64 row_of_sums(const ScanCall& call, const Sequence& sequence, int position, int step, int begin) {
#if SLICED
    return ((sequence.index - call.first_sequence) * call.n_chunks + block_y()) * call.slice + step - begin;
#else
    return int64(sequence.batch) * call.length + sequence.start + position;
#endif
}

// Write a tile's gradients of B and of C, summed over the block's channels. begin: the block's first step.
DEVICE void finish_projections(const Shared& shared, const ScanCall& call, const Sequence& sequence, int block,
                               int n_blocks, const Tile& tile, int begin) {
    constexpr int STEP = STATES % 4 == 0 ? 4 : 1, EACH_STEP = 2 * STATES / STEP, COUNT = TILE * EACH_STEP;
#pragma unroll
    for (int round = 0; round < (COUNT + THREADS - 1) / THREADS; ++round) {
        int index = thread_index() + round * THREADS;
        int step = index / EACH_STEP, which = index / (STATES / STEP) % 2, state = index % (STATES / STEP) * STEP;
        if (index >= COUNT || tile.first + step >= tile.end) break;
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int warp = 0; warp < CHANNEL_WARPS; ++warp) {
            const float* from = &shared.gathered[warp][step][which * PADDED_STATES + state];
#if STATES % 4 == 0
            float4 four = *reinterpret_cast<const float4*>(from);
            sum[0] += four.x;
            sum[1] += four.y;
            sum[2] += four.z;
            sum[3] += four.w;
#else
            sum[0] += *from;
#endif
        }
        step += tile.first;
        int position = position_in(call, sequence, step);
        if (MASKED && !present(call, sequence, sequence.start + position)) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
        int64 row = row_of_sums(call, sequence, position, step, begin);
        float* to = call.partial_bc + ((row * n_blocks + block) * 2 + which) * STATES + state;
        float factor = EXACT ? 1.0f : CUT * CUT;
#if STATES % 4 == 0
        *reinterpret_cast<float4*>(to) = {sum[0] * factor, sum[1] * factor, sum[2] * factor, sum[3] * factor};
#else
        *to = sum[0] * factor;
#endif
    }
}

// Sum over the block's threads, in a fixed order, what each found for its channels; add: to what stands there.
DEVICE void finish_channels(const Shared& shared, const ScanCall& call, const Channels& channels, int64 chunk_index,
                            bool add) {
    synchronize_block();
    constexpr int HALF = ChannelSums::HALF;
    for (int channel = thread_index(); channel < WIDTH && channels.first + channel < channels.end; channel += THREADS) {
        float skip = 0.0f, bias = 0.0f;
#if ALONG_TIME
        for (int part = 0; part < TILE / UNIT; ++part) {
            int index = channel * (TILE / UNIT) + part, thread = index % THREADS, k = index / THREADS;
#else
        for (int thread = channel / UNIT; thread < THREADS; thread += WIDTH / UNIT) {
            int k = channel % UNIT;
#endif
            skip += reinterpret_cast<const float*>(&shared.channel_sums[k / 4][thread])[k % 4];
            bias += reinterpret_cast<const float*>(&shared.channel_sums[HALF + k / 4][thread])[k % 4];
        }
        int64 place = chunk_index * call.channels + channels.first + channel;
        call.partial_d[place] = add ? call.partial_d[place] + skip : skip;
        call.partial_bias[place] = add ? call.partial_bias[place] + bias : bias;
    }
}
