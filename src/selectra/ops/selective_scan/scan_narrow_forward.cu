// The selective scan for one to four states a channel. README.md has the derivation.
//
// Memory is the limit here, not arithmetic: a warp owns the neighbouring channels of a group, each lane one or two of
// them with all their states in registers, and walks the length in tiles of 16 steps that were asked for long before.
// A block is one warp, and shares nothing; grid (blocks of channels * sequences, chunks, 1), channels first.
//
// Where warps are too few to hide the memory's latency, a block has several, which take the tiles in turn: each finds
// what its tile makes of a state of zero, tells the others, and with that knows the state that the tile starts from.
//
// Where channels are too few to fill the device, a sequence is cut into chunks: scan_states finds what each of them
// does to a state, scan_chain from that the true states at all starts, and then scan_forward runs all chunks side by
// side.
#include "narrow_channels.cuh"

// Activations of a tile, in the order of their streams.
enum { Z = DELTA + 1, TENSORS = Z + GATED };
// y takes u's place in the tile where it fits.
#define Y_APART ((TYPE == FLOAT32) != (OUT_TYPE == FLOAT32))

typedef Slot<TENSORS> Tile;

struct Shared {
    Tile slots[WARPS][DEPTH];
#if Y_APART
    Output y[WARPS][Pieces<Output>::TILE];
#endif
#if WARPS > 1
    Messages messages;
#endif
};

// What a step does to the state.
struct Step {
    PerChannel x;
    PerState decay;
};

// Find a step, and add it to the sums of dt.
template <typename AnyTile>
DEVICE void find(Step& step, PerChannel& sums, const AnyTile& tile, int place, const Rows& rows, int j,
                 const Parameters& own) {
    PerChannel u, delta;
    read(tile.tiles[U] + place, u);
    read(tile.tiles[DELTA] + place, delta);
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        float dt = rows.step_size(delta[e] + own.bias[e], j);
        step.x[e] = dt * u[e];
        sums[e] += dt;
#pragma unroll
        for (int n = 0; n < STATES; ++n) step.decay[e][n] = exp2_fast(dt * own.rate[e][n]);
    }
}

DEVICE void advance(PerState& h, const Step& step, const Rows& rows, int j) {
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
        for (int n = 0; n < STATES; ++n)
            h[e][n] = fma(step.decay[e][n], h[e][n], step.x[e] * rows.B[j * STATES + n]);
}

// The output of a step, given the state after it.
DEVICE void find_output(PerChannel& y, const PerState& h, const Tile& tile, int place, const Rows& rows, int j,
                        const Parameters& own) {
    PerChannel u;
    read(tile.tiles[U] + place, u);
#if GATED
    PerChannel z;
    read(tile.tiles[Z] + place, z);
#endif
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        y[e] = own.skip[e] * u[e];
#pragma unroll
        for (int n = 0; n < STATES; ++n) y[e] = fma(rows.C[j * STATES + n], h[e][n], y[e]);
#if GATED
        y[e] *= z[e] * sigmoid(z[e]);
#endif
    }
}

// A tile's steps; `made` and `sums` become what they make of a state of zero, and the sums of dt.
struct Steps {
    Step steps[STEPS];

    MEMBER void find_all(PerState& made, PerChannel& sums, const Tile& tile, int lane, const Parameters& own) {
#pragma unroll
        for (int group = 0; group < STEPS; group += AT_ONCE) {
            Rows rows;
            rows.read(tile, group);
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                find(steps[group + j], sums, tile, (group + j) * Tile::Cut::PITCH + lane * EACH, rows, j, own);
                advance(made, steps[group + j], rows, j);
            }
        }
    }
};

// Run a tile from the state h, which becomes the state after it; `known` are its steps if they were found before.
DEVICE void run_tile(PerState& h, const Tile& tile, Output* out, int lane, const Parameters& own, const Steps* known) {
#pragma unroll
    for (int group = 0; group < STEPS; group += AT_ONCE) {
        Rows rows;
        rows.read(tile, group);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            int t = group + j, place = t * Tile::Cut::PITCH + lane * EACH;
            Step step;
            PerChannel y, unused = {};
            if (known == nullptr) find(step, unused, tile, place, rows, j, own);
            advance(h, known == nullptr ? step : known->steps[t], rows, j);
            find_output(y, h, tile, place, rows, j, own);
            write<OUT_TYPE>(out + t * Pieces<Output>::PITCH + lane * EACH, y);
        }
    }
}

KERNEL __launch_bounds__(WARP * WARPS) scan_forward(const __grid_constant__ ScanCall call) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Work work = find_work(call);
    Pipeline<0, TENSORS, false> tiles;
    tiles.streams[U].begin(call.u, call, work);
    tiles.streams[DELTA].begin(call.delta, call, work);
#if GATED
    tiles.streams[Z].begin(call.z, call, work);
#endif
    Stream<Output> out;
    out.begin(call.y, call, work);
    Tile* slots = shared.slots[work.warp];
    tiles.begin(slots, call, work);

    Parameters own;
    PerState h;
    own.load(call, work);
    load_states(h, first_states(call.initial_state, call, work), own);
    float* checkpoints = states_at(call.checkpoints, call, work.sequence.first_checkpoint);
#pragma unroll 1
    for (int turn = 0; turn < work.n_turns; ++turn) {
        Tile& tile = tiles.take(slots, call, work, turn);
        const Steps* known = nullptr;
#if WARPS > 1
        PerState carried, made = {};
        PerChannel sums = {};
        Steps steps;
        copy_states(carried, h);
        steps.find_all(made, sums, tile, work.lane, own);
        hand_over(carried, h, made, sums, shared.messages[turn % 2], work, own);
        known = &steps;
#endif
        int t = tiles.tile_at(work, turn);
        if (checkpoints != nullptr && tiles.has(work, turn)) store_states(states_at(checkpoints, call, t), h, own);
#if Y_APART
        Output* out_tile = shared.y[work.warp];
#else
        Output* out_tile = tile.tiles[U];
#endif
        run_tile(h, tile, out_tile, work.lane, own, known);
        synchronize_warp();
        Presence there = tiles.presence(work, turn, tile.presence[work.lane % STEPS]);
        store_tile(out_tile, out, t * STEPS, there, work);
#if WARPS > 1
        copy_states(h, carried);
#endif
        synchronize_warp();
    }
    if (!ROUTES && call.final_state != nullptr && work.last_chunk && work.warp == 0)
        store_states(states_at(call.final_state, call, work.sequence.index), h, own);
}

#if WARPS == 1
// Every chunk's end state from a state of zero.
KERNEL __launch_bounds__(WARP) scan_states(const __grid_constant__ ScanCall call) {
    SHARED_MEMORY(memory);
    typedef Slot<DELTA + 1> StatesTile;
    StatesTile* slots = reinterpret_cast<StatesTile*>(memory);
    Work work = find_work(call);
    Pipeline<0, DELTA + 1, false> tiles;
    tiles.streams[U].begin(call.u, call, work);
    tiles.streams[DELTA].begin(call.delta, call, work);
    tiles.begin(slots, call, work);
    Parameters own;
    own.load(call, work);
    PerState h = {};
    PerChannel sums = {};
#pragma unroll 1
    for (int turn = 0; turn < work.n_tiles; ++turn) {
        const StatesTile& tile = tiles.take(slots, call, work, turn);
#pragma unroll
        for (int t = 0; t < STEPS; ++t) {
            Rows rows;
            rows.read(tile, t / AT_ONCE * AT_ONCE);
            Step step;
            find(step, sums, tile, t * StatesTile::Cut::PITCH + work.lane * EACH, rows, t % AT_ONCE, own);
            advance(h, step, rows, t % AT_ONCE);
        }
        synchronize_warp();
    }
    store_chunk(h, sums, call, work, own);
}

KERNEL __launch_bounds__(CHAIN_THREADS) scan_chain(const __grid_constant__ ScanCall call) {
    chain(call, call.initial_state, false);
}
#endif
