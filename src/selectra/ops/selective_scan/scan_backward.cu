// The backward scan for five states and more. README.md, "CUDA", derives the layout.
//
// Checkpoints hold the state every `interval` steps. A block takes a chunk's intervals from the last to the first, and
// an interval's tiles likewise: a tile is run forward from its first state, keeping the state of every fourth step in
// shared memory; then, four steps at a time from the last, the states are run once more, kept with their decays in
// registers, and the adjoint walks back through them.
//
// Constants beyond those of scan_call.cuh and scan_tiles.cuh:
//   INTERVAL      steps between two checkpoints, a multiple of 32
//   UNROLLED      groups of four steps of the pass forward that are written out one after the other
//   RESIDENT      blocks of a multiprocessor that the registers must suffice for
#include "scan_backward_tiles.cuh"

DEVICE int warp_of(const Lane& at) { return at.state_warp * CHANNEL_WARPS + at.channel_warp; }

DEVICE void read_B(float2 (&B)[STATE_TILES], const float4* projections) {
#pragma unroll
    for (int tile = 0; tile < STATE_TILES; ++tile) B[tile] = *reinterpret_cast<const float2*>(projections + 4 * tile);
}

// One step of the states without anything kept.
DEVICE void advance(States& h, const States& a, float4 step, const float2 (&B)[STATE_TILES]) {
#pragma unroll
    for (int tile = 0; tile < STATE_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float decay = find_decay(i % 2 ? step.z : step.x, a[tile][i]);
            h[tile][i] = fma(i % 2 ? step.w : step.y, i / 2 ? B[tile].y : B[tile].x, decay * h[tile][i]);
        }
}

DEVICE void keep(float4 (&to)[STATE_TILES][WARP], const States& h, const Lane& at) {
#pragma unroll
    for (int tile = 0; tile < STATE_TILES; ++tile)
        to[tile][at.lane] = {h[tile][0], h[tile][1], h[tile][2], h[tile][3]};
}

DEVICE void recall(States& h, const float4 (&from)[STATE_TILES][WARP], const Lane& at) {
#pragma unroll
    for (int tile = 0; tile < STATE_TILES; ++tile) {
        float4 x = from[tile][at.lane];
        h[tile][0] = x.x;
        h[tile][1] = x.y;
        h[tile][2] = x.z;
        h[tile][3] = x.w;
    }
}

#if GATED
// C . h of one step, for the gradient of the gate.
DEVICE void add_output(Sums& outputs, const States& h, const float4* projections, int j, const Lane& at,
                       const Choice& choice) {
#if !EXACT
    float mine = choice.column[2 * j];
#pragma unroll
    for (int tile = 0; tile < STATE_TILES; ++tile) {
        float4 BC = projections[4 * tile];
        multiply_add(outputs.values, h[tile][0], h[tile][1], h[tile][2], h[tile][3], mine * BC.z, mine * BC.w);
    }
#else
    float first = 0.0f, second = 0.0f;
#pragma unroll
    for (int tile = 0; tile < STATE_TILES; ++tile) {
        float4 BC = projections[4 * tile];
        first = fma(h[tile][2], BC.w, fma(h[tile][0], BC.z, first));
        second = fma(h[tile][3], BC.w, fma(h[tile][1], BC.z, second));
    }
    outputs.add(first, second, j, choice);
#endif
}
#endif

#if GATED
DEVICE void put_outputs(float2& to, const Sums& outputs) {
    const float(&x)[4] = outputs.values;
    to = EXACT ? float2{x[0] + x[1], x[2] + x[3]} : float2{x[0], x[2]};
}
#endif

// What a warp carries from tile to tile.
struct Adjoint {
    // A log2 e; the adjoint of the state; the gradient of A.
    States a, g, dA;
};

// One group of four steps: forward once more, then back.
DEVICE void walk_back(Shared& shared, Adjoint& adjoint, const Lane& at, const Choice& choice, int group) {
    States h, decay[GROUP], decayed[GROUP];
    const float4* steps = steps_from(shared, at, group * GROUP);
    const float2* dys = dy_from(shared, at, group * GROUP);
    const float4* projections = projections_from(shared, at, group * GROUP);
    recall(h, shared.states[group][warp_of(at)], at);
    Gather gather;
    gather.begin<OF_C>();
#if GATED
    Sums outputs;
    outputs.begin();
#endif
#pragma unroll
    for (int j = 0; j < GROUP; ++j) {
        float4 step = steps[j * STEP_ROW];
        float2 dy = dys[j * 2 * DY_ROW];
        float v[STATE_TILES][2];
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile) {
            float4 BC = projections[j * HALF_STATES + 4 * tile];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                decay[j][tile][i] = find_decay(i % 2 ? step.z : step.x, adjoint.a[tile][i]);
                decayed[j][tile][i] = decay[j][tile][i] * h[tile][i];
                h[tile][i] = fma(i % 2 ? step.w : step.y, i / 2 ? BC.y : BC.x, decayed[j][tile][i]);
            }
            v[tile][0] = fma(dy.y, h[tile][1], dy.x * h[tile][0]);
            v[tile][1] = fma(dy.y, h[tile][3], dy.x * h[tile][2]);
        }
        gather.add<OF_C>(v, j, choice);
#if GATED
        add_output(outputs, h, projections + j * HALF_STATES, j, at, choice);
#endif
    }
    float of_C[Gather::ENDS];
    gather.end<OF_C>(of_C, at);
    float(*rows)[GATHERED_ROW] = &shared.gathered[at.channel_warp][group * GROUP];
    // Products take long, and no load passes a store: their results wait for the end. But in float32 registers are few,
    // and what was read before is better read anew than kept.
#if GATED
    float2& to = shared.outputs[group][warp_of(at)][outputs_place(at.channel_warp, at.g, at.q)];
    if (EXACT) put_outputs(to, outputs);
#endif
    if (EXACT) Gather::put<OF_C>(rows, of_C, at);
    gather.begin<OF_B>();
    Sums sums;
    sums.begin();
#pragma unroll
    for (int j = GROUP - 1; j >= 0; --j) {
        float4 step = steps[j * STEP_ROW];
        float2 dy = dys[j * 2 * DY_ROW];
        float v[STATE_TILES][2], x[2] = {0.0f, 0.0f}, y[2] = {0.0f, 0.0f};
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile) {
            float4 BC = projections[j * HALF_STATES + 4 * tile];
            float(&g)[4] = adjoint.g[tile];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                g[i] = fma(i % 2 ? dy.y : dy.x, i / 2 ? BC.w : BC.z, g[i]);
                float w = g[i] * decayed[j][tile][i];
                adjoint.dA[tile][i] = fma(i % 2 ? step.z : step.x, w, adjoint.dA[tile][i]);
                y[i % 2] = fma(w, adjoint.a[tile][i], y[i % 2]);
                x[i % 2] = fma(g[i], i / 2 ? BC.y : BC.x, x[i % 2]);
            }
            v[tile][0] = fma(step.w, g[1], step.y * g[0]);
            v[tile][1] = fma(step.w, g[3], step.y * g[2]);
#pragma unroll
            for (int i = 0; i < 4; ++i) g[i] *= decay[j][tile][i];
        }
        sums.add(x[0], x[1], y[0], y[1], j, choice);
        gather.add<OF_B>(v, j, choice);
    }
    float of_B[Gather::ENDS];
    gather.end<OF_B>(of_B, at);
    synchronize_warp();
#if GATED
    if (!EXACT) put_outputs(to, outputs);
#endif
    shared.states[group][warp_of(at)][0][sums_place(at.channel_warp, at.g, at.q)] = {sums.values[0], sums.values[1],
                                                                                    sums.values[2], sums.values[3]};
    if (!EXACT) Gather::put<OF_C>(rows, of_C, at);
    Gather::put<OF_B>(rows, of_B, at);
}

// Run a tile: h is the state before it.
DEVICE void run(Shared& shared, Adjoint& adjoint, States& h, const Lane& at, const Choice& choice) {
#pragma unroll UNROLLED
    for (int group = 0; group < GROUPS - 1; ++group) {
        const float4* steps = steps_from(shared, at, group * GROUP);
        const float4* projections = projections_from(shared, at, group * GROUP);
        float2 B[GROUP][STATE_TILES];
        float4 step[GROUP];
        if (EXACT) keep(shared.states[group][warp_of(at)], h, at);
        // Before the store, which no load passes.
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            step[j] = steps[j * STEP_ROW];
            read_B(B[j], projections + j * HALF_STATES);
        }
        if (!EXACT) keep(shared.states[group][warp_of(at)], h, at);
#pragma unroll
        for (int j = 0; j < GROUP; ++j) advance(h, adjoint.a, step[j], B[j]);
    }
    keep(shared.states[GROUPS - 1][warp_of(at)], h, at);
    synchronize_warp();
#pragma unroll UNROLLED
    for (int group = GROUPS - 1; group >= 0; --group) walk_back(shared, adjoint, at, choice, group);
}

static_assert(ALONG_TIME || THREADS % (WIDTH / UNIT) == 0, "a thread's channels are the same in all its units");

// What a block starts with.
struct Block {
    Lane at;
    Sequence sequence;
    Channels channels;
    Elements elements;
    int block, n_blocks, begin, end;
    int64 states_size, chunk_index;

    // sliced: whether the block takes a slice of its chunk alone.
    MEMBER void find(Shared& shared, const ScanCall& call, bool sliced) {
        at = find_lane();
        n_blocks = count_blocks<WIDTH>(call);
        block = block_x() % n_blocks;
        channels = find_channels<WIDTH>(call, block);
        int index = block_x() / n_blocks + (sliced ? int(call.first_sequence) : 0);
        sequence = find_sequence(call, index, channels.group);
        elements.find();
        begin = block_y() * int(call.chunk);
        end = sequence.length;
        if (call.n_chunks > 1 && begin + int(call.chunk) < end) end = begin + int(call.chunk);
        if (sliced) begin += int(call.first_step);
        if (sliced && begin + int(call.slice) < end) end = begin + int(call.slice);
        states_size = call.channels * STATES;
        chunk_index = int64(sequence.index) * call.n_chunks + block_y();
        for (int i = thread_index(); i < WIDTH; i += THREADS) {
            bool there = channels.first + i < channels.end;
            shared.bias[i] = there && call.delta_bias != nullptr ? call.delta_bias[channels.first + i] : 0.0f;
            shared.skip[i] = there && call.D != nullptr ? call.D[channels.first + i] : 0.0f;
        }
        if (thread_index() != 0) return;
        shared.zeros[0] = shared.zeros[1] = 0.0f;
        shared.ones[0] = shared.ones[1] = 1.0f;
        shared.strips.u = find_strip(call.u, sequence, channels);
        shared.strips.delta = find_strip(call.delta, sequence, channels);
        shared.strips.dy = find_strip(call.dy, sequence, channels);
        shared.strips.z = find_strip(call.z, sequence, channels);
        shared.strips.du = find_strip(call.du, sequence, channels);
        shared.strips.ddelta = find_strip(call.ddelta, sequence, channels);
        shared.strips.dz = find_strip(call.dz, sequence, channels);
        shared.strips.B = find_strip(call.B, sequence, channels);
        shared.strips.C = find_strip(call.C, sequence, channels);
    }
};

DEVICE void clear(States& x) {
#pragma unroll
    for (int tile = 0; tile < STATE_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[tile][i] = 0.0f;
}

KERNEL __launch_bounds__(THREADS, RESIDENT) scan_backward(const __grid_constant__ ScanCall call) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Block my;
    my.find(shared, call, SLICED);
    // Slices are launched from the last to the first: what one leaves the next one starts with.
    bool goes_on = SLICED && call.first_step + call.slice < call.span;
    Adjoint adjoint;
    load_decays(adjoint.a, call, my.channels, my.at);
    const float* after = call.n_chunks > 1 || goes_on ? call.chunk_state + my.chunk_index * my.states_size
                         : ROUTES                     ? nullptr
                                                      : call.dfinal + my.sequence.index * my.states_size;
    load_states(adjoint.g, after, my.channels, my.at);
    load_states(adjoint.dA, goes_on ? call.partial_a + my.chunk_index * my.states_size : nullptr, my.channels, my.at);
    ChannelSums sums;
    sums.clear();
    sums.keep(shared);
    synchronize_block();
    Choice choice;
    choice.find(shared.zeros, shared.ones, my.at);

    float4(*tile_states)[WARPS][STATE_TILES][WARP] =
        reinterpret_cast<float4(*)[WARPS][STATE_TILES][WARP]>(&shared.tiles);
    int first = my.begin + (my.end - my.begin - 1) / INTERVAL * INTERVAL;
#pragma unroll 1
    for (; first >= my.begin && my.end > my.begin; first -= INTERVAL) {
        int64 checkpoint = my.sequence.first_checkpoint + first / INTERVAL;
        int last = first + INTERVAL < my.end ? first + INTERVAL : my.end;
        int n_tiles = (last - first + TILE - 1) / TILE;
        States h;
        load_states(h, call.checkpoints + checkpoint * my.states_size, my.channels, my.at);
#pragma unroll 1
        for (int k = 0; k + 1 < n_tiles; ++k) {
            Tile tile = {first + k * TILE, my.end};
            keep(tile_states[k][warp_of(my.at)], h, my.at);
            prepare<false>(shared, my.elements, call, my.sequence, my.channels, tile);
            synchronize_block();
            const float4* steps = steps_from(shared, my.at, 0);
            const float4* projections = projections_from(shared, my.at, 0);
#pragma unroll 4
            for (int step = 0; step < TILE; ++step) {
                float2 B[STATE_TILES];
                read_B(B, projections + step * HALF_STATES);
                advance(h, adjoint.a, steps[step * STEP_ROW], B);
            }
            synchronize_block();
        }
#pragma unroll 1
        for (int k = n_tiles - 1; k >= 0; --k) {
            Tile tile = {first + k * TILE, my.end};
            if (k < n_tiles - 1) recall(h, tile_states[k][warp_of(my.at)], my.at);
            prepare<true>(shared, my.elements, call, my.sequence, my.channels, tile);
            synchronize_block();
            prefetch(shared, call, my.sequence, {tile.first - TILE, my.end});
            run(shared, adjoint, h, my.at, choice);
            // Once more, which takes less than to keep them; all at once, before the barrier.
            Loads loads;
            load<true>(loads, shared, my.elements, call, my.sequence, my.channels, tile);
            synchronize_block();
            finish(shared, my.elements, loads, call, my.sequence, my.channels, tile);
            finish_projections(shared, call, my.sequence, my.block, my.n_blocks, tile, my.begin);
        }
    }
    if (call.dinitial != nullptr && my.begin == 0)
        store_states(call.dinitial + my.sequence.index * my.states_size, adjoint.g, my.channels, my.at);
    if (SLICED && call.first_step > 0)
        store_states(call.chunk_state + my.chunk_index * my.states_size, adjoint.g, my.channels, my.at);
    store_states(call.partial_a + my.chunk_index * my.states_size, adjoint.dA, my.channels, my.at);
    finish_channels(shared, call, my.channels, my.chunk_index, goes_on);
}

// What a chunk makes of a zero adjoint behind it, and the sum of its steps: from these the chunks are chained. The chunk
// is walked from its first step, each step's part decayed by the steps before it, until nothing of what follows is left.
KERNEL __launch_bounds__(THREADS, RESIDENT) scan_adjoint(const __grid_constant__ ScanCall call) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Block my;
    my.find(shared, call, false);
    States a, g;
    load_decays(a, call, my.channels, my.at);
    clear(g);
    float sums[2] = {0.0f, 0.0f};
    synchronize_block();
#pragma unroll 1
    for (Tile tile = {my.begin, my.end}; tile.first < tile.end; tile.first += TILE) {
        prepare<true>(shared, my.elements, call, my.sequence, my.channels, tile);
        synchronize_block();
        const float4* steps = steps_from(shared, my.at, 0);
        const float2* dys = dy_from(shared, my.at, 0);
        const float4* projections = projections_from(shared, my.at, 0);
#pragma unroll 8
        for (int j = 0; j < TILE; ++j) {
            float4 step = steps[j * STEP_ROW];
            float2 dy = dys[j * 2 * DY_ROW];
            sums[0] += step.x;
            sums[1] += step.z;
#pragma unroll
            for (int tile = 0; tile < STATE_TILES; ++tile) {
                float2 C = reinterpret_cast<const float2*>(&projections[j * HALF_STATES + 4 * tile])[1];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float left = exp2_fast(sums[i % 2] * a[tile][i]) * (i % 2 ? dy.y : dy.x);
                    g[tile][i] = fma(left, i / 2 ? C.y : C.x, g[tile][i]);
                }
            }
        }
        bool decayed = has_decayed(a, sums[0], sums[1], my.channels, my.at);
        if (my.at.lane == 0) shared.alive[thread_index() / WARP] = !decayed;
        synchronize_block();
        int alive = 0;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) alive |= shared.alive[warp];
        if (!alive) break;
    }
    store_states(call.chunk_state + my.chunk_index * my.states_size, g, my.channels, my.at);
    store_steps(call.chunk_delta + my.chunk_index * call.channels, sums, my.channels, my.at);
}
