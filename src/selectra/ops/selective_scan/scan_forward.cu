// The forward scan for five states and more. README.md, "CUDA", derives the layout.
//
// Constants beyond those of scan_call.cuh and scan_tiles.cuh:
//   UNROLLED      groups of eight steps that are written out one after the other
//   INTERVAL      steps between two checkpoints
//   RESIDENT      blocks of a multiprocessor that the registers must suffice for
//   LAST_TOO      whether scan_states looks at a sequence's last chunk too. 0 where it is not given
#ifndef LAST_TOO
#define LAST_TOO 0
#endif
#include "scan_forward_tiles.cuh"

// A step's decays, of the four numbers of every tile: 2^(dt A log2 e).
DEVICE void find_decays(States& decay, const States& a, float4 step) {
#pragma unroll
    for (int tile = 0; tile < STATE_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) decay[tile][i] = find_decay(i % 2 ? step.z : step.x, a[tile][i]);
}

// h = decay h + dt u B.
DEVICE void advance(States& h, const States& decay, float4 step, const float2 (&Bs)[STATE_TILES]) {
#pragma unroll
    for (int tile = 0; tile < STATE_TILES; ++tile) {
        float2 B = Bs[tile];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            h[tile][i] = fma(i % 2 ? step.w : step.y, i / 2 ? B.y : B.x, decay[tile][i] * h[tile][i]);
    }
}

// Outputs of eight steps: column j of a product over the states is C . h of step j.
struct Outputs {
    float sums[4];
#if !EXACT_OUTPUT
    // C of step g, of this lane's states.
    float2 C[STATE_TILES];
#endif

    MEMBER void begin(const float2* Cs, const Lane& at) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = 0.0f;
#if !EXACT_OUTPUT
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile)
            C[tile] = Cs[at.g * C_ROW + 4 * tile];
#endif
    }

    MEMBER void add(const States& h, int j, const float2* Cs, const Lane& at) {
        bool mine = at.g == j;
#if !EXACT_OUTPUT
        // C has few digits and the output is rounded to as many: h goes in as the tensor cores read it.
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile)
            multiply_add(sums, h[tile][0], h[tile][1], h[tile][2], h[tile][3], mine ? C[tile].x : 0.0f,
                         mine ? C[tile].y : 0.0f);
#else
        // Sums over the lane's own states in float32; upper and lower digits of the rest meet a column of ones.
        float first = 0.0f, second = 0.0f;
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile) {
            float2 C = Cs[j * C_ROW + 4 * tile];
            first = fma(h[tile][2], C.y, fma(h[tile][0], C.x, first));
            second = fma(h[tile][3], C.y, fma(h[tile][1], C.x, second));
        }
        float one = mine ? 1.0f : 0.0f;
        multiply_add(sums, upper(first), upper(second), first - upper(first), second - upper(second), one, one);
#endif
    }

    // to: the row of the group's first step at this warp's first channel.
    MEMBER void store(float* to, const Lane& at) const {
        *reinterpret_cast<float2*>(to + 2 * at.q * ROW + 2 * at.g) = {sums[0], sums[2]};
        *reinterpret_cast<float2*>(to + (2 * at.q + 1) * ROW + 2 * at.g) = {sums[1], sums[3]};
    }
};

// Where a lane reads and a warp writes, from a step of the tile on.
DEVICE const float4* steps_from(const Shared& shared, const Lane& at, int step) {
    return &shared.steps[step_place(step, at.channel / 2)];
}

// B of a step and, with TWO_STEPS, of its neighbour: asked for at every step, the first of a pair reads both.
struct Feed {
    float2 B[2][STATE_TILES];

    // Of step from + j; `from` is even.
    MEMBER void read(const Shared& shared, const Lane& at, int from, int j, bool first) {
        if (TWO_STEPS && !first) return;
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile) {
            int pair = at.state / 2 + 4 * tile;
            if (TWO_STEPS) {
                float4 both = *reinterpret_cast<const float4*>(&shared.B[B_place(from + j / 2 * 2, pair)]);
                B[0][tile] = {both.x, both.y};
                B[1][tile] = {both.z, both.w};
            } else {
                B[j % 2][tile] = shared.B[B_place(from + j, pair)];
            }
        }
    }
};

DEVICE const float2* C_from(const Shared& shared, const Lane& at, int step) {
    return &shared.C[step * C_ROW + at.state / 2];
}

DEVICE float* outputs_from(Shared& shared, const Lane& at, int step) {
    return &shared.outputs[(at.state_warp * TILE + step) * ROW + 16 * at.channel_warp];
}

// Run a tile's steps in order: `count` of them, in whole groups.
DEVICE void run(Shared& shared, States& h, const States& a, const Lane& at, int count) {
    int end = count < TILE ? count : TILE;
#pragma unroll UNROLLED
    for (int group = 0; group < end; group += GROUP) {
        const float4* steps = steps_from(shared, at, group);
        const float2* Cs = C_from(shared, at, group);
        Feed feed;
        Outputs outputs;
        outputs.begin(Cs, at);
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            States decay;
            float4 step = steps[j * STEP_ROW];
            feed.read(shared, at, group, j, j % 2 == 0);
            find_decays(decay, a, step);
            advance(h, decay, step, feed.B[j % 2]);
            outputs.add(h, j, Cs, at);
        }
        outputs.store(outputs_from(shared, at, group), at);
    }
}

// Saves the state every INTERVAL steps, a multiple of TILE; asked at every start of a tile.
struct Checkpoints {
    float* next;
    int64 size;
    int phase;

    // step: where the first tile starts, a multiple of the interval.
    MEMBER Checkpoints(const ScanCall& call, const Sequence& sequence, int step) {
        phase = 0;
        size = call.channels * STATES;
        int64 index = sequence.first_checkpoint + step / INTERVAL;
        next = call.checkpoints == nullptr ? nullptr : call.checkpoints + index * size;
    }

    MEMBER void save(const States& h, const Channels& channels, const Lane& at) {
        if (next != nullptr && phase == 0) {
            store_states(next, h, channels, at);
            next += size;
        }
        phase = (phase + TILE) % INTERVAL;
    }
};

// What a block starts with.
struct Block {
    Lane at;
    Sequence sequence;
    Channels channels;
    Elements elements;
    Places places;
    int chunk, begin, end;
    int64 states_size, chunk_index;

    MEMBER void find(Shared& shared, const ScanCall& call) {
        int n_blocks = count_blocks<WIDTH>(call);
        at = find_lane();
        channels = find_channels<WIDTH>(call, block_x() % n_blocks);
        sequence = find_sequence(call, block_x() / n_blocks, channels.group);
        elements.find();
        chunk = block_y();
        begin = chunk * int(call.chunk);
        end = sequence.length;
        if (call.n_chunks > 1 && begin + int(call.chunk) < end) end = begin + int(call.chunk);
        states_size = call.channels * STATES;
        chunk_index = int64(sequence.index) * call.n_chunks + chunk;
        for (int i = thread_index(); i < WIDTH; i += THREADS) {
            bool there = channels.first + i < channels.end;
            shared.bias[i] = there && call.delta_bias != nullptr ? call.delta_bias[channels.first + i] : 0.0f;
            shared.skip[i] = there && call.D != nullptr ? call.D[channels.first + i] * (1.0f / WHOLE) : 0.0f;
        }
    }
};

KERNEL __launch_bounds__(THREADS, RESIDENT) scan_forward(const __grid_constant__ ScanCall call) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Block my;
    my.find(shared, call);
    States a, h;
    load_decays(a, call, my.channels, my.at);
    const float* before =
        call.initial_state == nullptr ? nullptr : call.initial_state + my.sequence.index * my.states_size;
    if (call.n_chunks > 1) before = call.chunk_state + my.chunk_index * my.states_size;
    load_states(h, before, my.channels, my.at);
    Checkpoints checkpoints(call, my.sequence, my.begin);
    Loads loads;
    Tile tile = {my.begin, my.end};
    my.places.find(call, my.sequence, my.channels, my.elements, my.begin);
    if (tile.first < tile.end) my.places.load(loads, my.elements, tile);
    synchronize_block();

#pragma unroll 1
    for (; tile.first < tile.end; tile.first += TILE) {
        prepare(shared, my.elements, loads);
        Packed u[Elements::EACH], z[Elements::EACH];
#pragma unroll
        for (int i = 0; i < Elements::EACH; ++i) {
            u[i] = loads.u[i];
#if GATED
            z[i] = loads.z[i];
#endif
        }
        Tile next = {tile.first + TILE, tile.end};
        if (next.first < next.end) my.places.load(loads, my.elements, next);
        synchronize_block();
        checkpoints.save(h, my.channels, my.at);
        run(shared, h, a, my.at, tile.end - tile.first);
        synchronize_block();
        finish(shared, my.elements, u, z, my.places, tile);
    }
    if (!ROUTES && call.final_state != nullptr && my.chunk == last_chunk(call, my.sequence))
        store_states(call.final_state + my.sequence.index * my.states_size, h, my.channels, my.at);
}

// What a chunk makes of a zero state, and the sum of its steps: from these the chunks are chained. The chunk is walked
// from its end, each step's part decayed by the steps behind it, until nothing of what lies further back is left.
// Nobody asks what the last chunk makes, but where another process holds what follows.
KERNEL __launch_bounds__(THREADS, RESIDENT) scan_states(const __grid_constant__ ScanCall call) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Block my;
    my.find(shared, call);
    if (!LAST_TOO && my.chunk >= last_chunk(call, my.sequence)) return;
    States a, h;
    load_decays(a, call, my.channels, my.at);
    load_states(h, nullptr, my.channels, my.at);
    float sums[2] = {0.0f, 0.0f};
    Loads loads;
    Tile tile = {my.begin + (my.end - my.begin - 1) / TILE * TILE, my.end};
    if (my.end <= my.begin) tile.first = my.begin - TILE;
    my.places.find(call, my.sequence, my.channels, my.elements, tile.first);
    if (tile.first >= my.begin) my.places.load(loads, my.elements, tile, true);
    synchronize_block();

#pragma unroll 1
    for (; tile.first >= my.begin; tile.first -= TILE) {
        prepare(shared, my.elements, loads);
        Tile next = {tile.first - TILE, tile.end};
        if (next.first >= my.begin) my.places.load(loads, my.elements, next, true);
        synchronize_block();
        const float4* steps = steps_from(shared, my.at, 0);
        Feed feed;
#pragma unroll 8
        for (int j = TILE - 1; j >= 0; --j) {
            float4 step = steps[j * STEP_ROW];
            feed.read(shared, my.at, 0, j, j % 2 == 1);
#pragma unroll
            for (int tile = 0; tile < STATE_TILES; ++tile) {
                float2 B = feed.B[j % 2][tile];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float left = exp2_fast(sums[i % 2] * a[tile][i]) * (i % 2 ? step.w : step.y);
                    h[tile][i] = fma(left, i / 2 ? B.y : B.x, h[tile][i]);
                }
            }
            sums[0] += step.x;
            sums[1] += step.z;
        }
        bool decayed = has_decayed(a, sums[0], sums[1], my.channels, my.at);
        if (my.at.lane == 0) shared.alive[thread_index() / WARP] = !decayed;
        synchronize_block();
        int alive = 0;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) alive |= shared.alive[warp];
        if (!alive) break;
    }
    store_states(call.chunk_state + my.chunk_index * my.states_size, h, my.channels, my.at);
    store_steps(call.chunk_delta + my.chunk_index * call.channels, sums, my.channels, my.at);
}
