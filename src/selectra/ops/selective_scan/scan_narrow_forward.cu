// The selective scan for one to four states a channel. README.md has the derivation.
//
// Memory is the limit here, not arithmetic: a warp owns the neighbouring channels of a group, each lane one or two of
// them with all their states in registers, and walks the length in tiles of 16 steps that were asked for long before.
// Warps share nothing. A block is one warp; grid (blocks of channels * sequences, chunks, 1), channels first.
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
    Tile slots[DEPTH];
#if Y_APART
    Output y[Pieces<Output>::TILE];
#endif
};

// Run one step of a lane's channels; y becomes the output.
DEVICE void advance(PerState& h, PerChannel& y, const Tile& tile, int place, const Rows& rows, int j,
                    const Parameters& own) {
    PerChannel u, delta;
    read(tile.tiles[U] + place, u);
    read(tile.tiles[DELTA] + place, delta);
#if GATED
    PerChannel z;
    read(tile.tiles[Z] + place, z);
#endif
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        float dt = rows.step_size(delta[e] + own.bias[e], j), x = dt * u[e];
        y[e] = own.skip[e] * u[e];
#pragma unroll
        for (int n = 0; n < STATES; ++n) {
            h[e][n] = fma(exp2_fast(dt * own.rate[e][n]), h[e][n], x * rows.B[j * STATES + n]);
            y[e] = fma(rows.C[j * STATES + n], h[e][n], y[e]);
        }
#if GATED
        y[e] *= z[e] * sigmoid(z[e]);
#endif
    }
}

// Run a tile from the state h, which becomes the state after it.
DEVICE void run_tile(PerState& h, const Tile& tile, Output* out, const Work& work, const Parameters& own) {
#pragma unroll
    for (int group = 0; group < STEPS; group += AT_ONCE) {
        Rows rows;
        rows.read(tile, group);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            int step = group + j;
            PerChannel y;
            advance(h, y, tile, step * Tile::Cut::PITCH + work.lane * EACH, rows, j, own);
            write<OUT_TYPE>(out + step * Pieces<Output>::PITCH + work.lane * EACH, y);
        }
    }
}

KERNEL __launch_bounds__(WARP) scan_forward(const __grid_constant__ ScanCall call) {
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
    tiles.begin(shared.slots, call, work);

    Parameters own;
    PerState h;
    own.load(call, work);
    load_states(h, first_states(call.initial_state, call, work), own);
    float* checkpoint = states_at(call.checkpoints, call, work.sequence.first_checkpoint + work.first_tile);
#pragma unroll 1
    for (int turn = 0; turn < work.n_tiles; ++turn) {
        Tile& tile = tiles.take(shared.slots, call, work, turn);
        if (checkpoint != nullptr) {
            store_states(checkpoint, h, own);
            checkpoint += call.channels * STATES;
        }
#if Y_APART
        Output* out_tile = shared.y;
#else
        Output* out_tile = tile.tiles[U];
#endif
        run_tile(h, tile, out_tile, work, own);
        synchronize_warp();
        int t = tiles.tile_at(work, turn);
        Presence there = tiles.presence(work, t, tile.presence[work.lane % STEPS]);
        store_tile(out_tile, out, t * STEPS, there, work);
        synchronize_warp();
    }
    if (!ROUTES && work.last_chunk) store_states(states_at(call.final_state, call, work.sequence.index), h, own);
}

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
            int place = t * StatesTile::Cut::PITCH + work.lane * EACH;
            PerChannel u, delta;
            read(tile.tiles[U] + place, u);
            read(tile.tiles[DELTA] + place, delta);
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                float dt = rows.step_size(delta[e] + own.bias[e], t % AT_ONCE), x = dt * u[e];
                sums[e] += dt;
#pragma unroll
                for (int n = 0; n < STATES; ++n)
                    h[e][n] = fma(exp2_fast(dt * own.rate[e][n]), h[e][n], x * rows.B[t % AT_ONCE * STATES + n]);
            }
        }
        synchronize_warp();
    }
    store_chunk(h, sums, call, work, own);
}

KERNEL __launch_bounds__(CHAIN_THREADS) scan_chain(const __grid_constant__ ScanCall call) {
    chain(call, call.initial_state, false);
}
