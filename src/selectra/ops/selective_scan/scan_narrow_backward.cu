// The selective scan's gradients for one to four states a channel. README.md has the derivation.
//
// A warp walks its channels' length from the end, in tiles as in scan_narrow_forward.cu, which kept the state before
// each of them: it runs the tile forward once more, keeping states and decays in registers, and walks back through it.
// A block is one warp, or several that take the tiles in turn, as in the forward: here each finds what reaches its
// tile's first state when nothing reaches its last. Grid (blocks of channels * sequences, chunks, 1), channels first.
//
// Chunks as in the forward: scan_adjoints finds what reaches the state at every chunk's start from the chunk alone,
// scan_chain what reaches its end, and then scan_backward runs all chunks side by side.
#include "narrow_channels.cuh"

// Warps that a multiprocessor holds at once: the registers are theirs.
#ifndef RESIDENT
#define RESIDENT (STATES * EACH <= 2 ? 12 : 8)
#endif

// Activations of a tile, in the order of their streams.
enum { DY = DELTA + 1, Z, TENSORS = Z + GATED };

typedef Slot<TENSORS> Tile;

struct Shared {
    Tile slots[WARPS][DEPTH];
#if WARPS > 1
    Messages messages;
#endif
};

// A tile's steps, run forward once more.
struct Steps {
    PerChannel dt[STEPS];
    PerState decay[STEPS];
    // The state before every step, and after the last.
    PerState h[STEPS + 1];
#if GATED
    // The gradient of the output before the gate.
    PerChannel dy[STEPS];
#endif

    // h[0] is known. The gradient of z takes z's place in the tile.
    MEMBER void run(Tile& tile, int lane, const Parameters& own) {
#pragma unroll
        for (int group = 0; group < STEPS; group += AT_ONCE) {
            Rows rows;
            rows.read(tile, group);
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) advance(group + j, tile, lane, rows, j, own);
        }
    }

    MEMBER void advance(int t, Tile& tile, int lane, const Rows& rows, int j, const Parameters& own) {
        int place = t * Tile::Cut::PITCH + lane * EACH;
        PerChannel u, delta;
        read(tile.tiles[U] + place, u);
        read(tile.tiles[DELTA] + place, delta);
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            dt[t][e] = rows.step_size(delta[e] + own.bias[e], j);
            float x = dt[t][e] * u[e];
#pragma unroll
            for (int n = 0; n < STATES; ++n) {
                decay[t][e][n] = exp2_fast(dt[t][e] * own.rate[e][n]);
                h[t + 1][e][n] = fma(decay[t][e][n], h[t][e][n], x * rows.B[j * STATES + n]);
            }
        }
#if GATED
        read(tile.tiles[DY] + place, dy[t]);
        ungate(t, tile.tiles[Z] + place, rows.C + j * STATES, u, own);
#endif
    }

#if GATED
    // From the gradient of y to that of the output before the gate; the gradient of z takes z's place.
    MEMBER void ungate(int t, Number* place, const float* C, const PerChannel& u, const Parameters& own) {
        PerChannel z, dz;
        read(place, z);
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            float output = own.skip[e] * u[e], s = sigmoid(z[e]);
#pragma unroll
            for (int n = 0; n < STATES; ++n) output = fma(C[n], h[t + 1][e][n], output);
            dz[e] = dy[t][e] * output * s * fma(z[e], 1.0f - s, 1.0f);
            dy[t][e] *= z[e] * s;
        }
        write<TYPE>(place, dz);
    }
#endif

    MEMBER void output_gradient(PerChannel& x, int t, const Tile& tile, int lane) const {
#if GATED
#pragma unroll
        for (int e = 0; e < EACH; ++e) x[e] = dy[t][e];
#else
        read(tile.tiles[DY] + t * Tile::Cut::PITCH + lane * EACH, x);
#endif
    }

    // What reaches h[0] when nothing reaches the last state, and the sums of dt.
    MEMBER void reach(PerState& arriving, PerChannel& sums, const Tile& tile, int lane) const {
#pragma unroll
        for (int t = STEPS - 1; t >= 0; --t) {
            Rows rows;
            rows.read(tile, t / AT_ONCE * AT_ONCE);
            PerChannel from_output;
            output_gradient(from_output, t, tile, lane);
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                sums[e] += dt[t][e];
#pragma unroll
                for (int n = 0; n < STATES; ++n)
                    arriving[e][n] =
                        decay[t][e][n] * fma(rows.C[t % AT_ONCE * STATES + n], from_output[e], arriving[e][n]);
            }
        }
    }
};

// Sums of 32 values over the lanes, of which lane i ends with the i-th: values come in pairs, and two sums that are
// half done become one as soon as both are there. 31 shuffles for all.
struct LaneSums {
    float pending[4], sum;

    // Lanes with this bit go on with `second`, the others with `first`.
    static MEMBER float merge(float first, float second, int bit, int lane) {
        bool upper_half = lane & bit;
        return (upper_half ? second : first) + shuffle_xor(upper_half ? first : second, bit);
    }

    // Pair i of 16: `first` ends in lane i, `second` in lane i + 16.
    MEMBER void add(int i, float first, float second, int lane) {
        sum = merge(first, second, 16, lane);
#pragma unroll
        for (int level = 0; level < 4; ++level) {
            if ((i >> level & 1) == 0) {
                pending[level] = sum;
                return;
            }
            sum = merge(pending[level], sum, 1 << level, lane);
        }
    }
};

// States in a lane sum, a power of two, and steps whose gradients of B and C are summed at once.
constexpr int PADDED_STATES = STATES == 3 ? 4 : STATES;
constexpr int SUMMED = WARP / 2 / PADDED_STATES;

// The walk back through the length: what arrives from the later steps, and sums over the steps.
struct Adjoint {
    // What the state before the last step walked receives.
    PerState arriving;
    PerState dA;
    PerChannel dD, dbias;

    MEMBER void clear_sums() {
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            dD[e] = dbias[e] = 0.0f;
#pragma unroll
            for (int n = 0; n < STATES; ++n) dA[e][n] = 0.0f;
        }
    }

    MEMBER void add_sums(const Adjoint& other) {
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            dD[e] += other.dD[e];
            dbias[e] += other.dbias[e];
#pragma unroll
            for (int n = 0; n < STATES; ++n) dA[e][n] += other.dA[e][n];
        }
    }

    // Walk step t back. The gradients of u and delta take their places in the tile; dB and dC are the lane's parts.
    MEMBER void step(int t, const Steps& steps, Tile& tile, int lane, const Rows& rows, int j, const Parameters& own,
                     float (&dB)[STATES], float (&dC)[STATES]) {
        int place = t * Tile::Cut::PITCH + lane * EACH;
        const float *B = rows.B + j * STATES, *C = rows.C + j * STATES;
        PerChannel u, delta, dy, du, ddelta;
        steps.output_gradient(dy, t, tile, lane);
        read(tile.tiles[U] + place, u);
        read(tile.tiles[DELTA] + place, delta);
#pragma unroll
        for (int n = 0; n < STATES; ++n) dB[n] = dC[n] = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            float dt = steps.dt[t][e], x = dt * u[e], to_x = 0.0f, to_dt = 0.0f;
#pragma unroll
            for (int n = 0; n < STATES; ++n) {
                float g = fma(C[n], dy[e], arriving[e][n]);
                dC[n] = fma(dy[e], steps.h[t + 1][e][n], dC[n]);
                dB[n] = fma(x, g, dB[n]);
                to_x = fma(B[n], g, to_x);
                arriving[e][n] = steps.decay[t][e][n] * g;
                float to_exponent = arriving[e][n] * steps.h[t][e][n];
                to_dt = fma(own.A[e][n], to_exponent, to_dt);
                dA[e][n] = fma(dt, to_exponent, dA[e][n]);
            }
            du[e] = fma(dt, to_x, own.skip[e] * dy[e]);
            ddelta[e] = fma(u[e], to_x, to_dt) * rows.slope(delta[e] + own.bias[e], dt, j);
            dD[e] = fma(dy[e], u[e], dD[e]);
            dbias[e] += ddelta[e];
        }
        write<TYPE>(tile.tiles[U] + place, du);
        write<TYPE>(tile.tiles[DELTA] + place, ddelta);
    }
};

// Write the sums over the block's channels that this lane holds of SUMMED steps, walked from `last` down; there are
// none from step `end` on.
DEVICE void store_projection_sums(float sum, int last, int end, const ScanCall& call, const Work& work) {
    int pair = work.lane % 16, n = pair % PADDED_STATES, step = last - pair / PADDED_STATES;
    if (n >= STATES || step >= end) return;
    int64 row = work.sequence.batch * call.length + position(call, work.sequence, step);
    call.partial_bc[((row * work.n_blocks + work.block) * 2 + work.lane / 16) * STATES + n] = sum;
}

// Walk a tile of the steps from `first_step` to `end` back.
DEVICE void walk_back(Adjoint& adjoint, const Steps& steps, Tile& tile, int first_step, int end, const ScanCall& call,
                      const Work& work, const Parameters& own) {
    // Sums over the length by tiles: rounding grows with the number of tiles, not of steps.
    Adjoint here = adjoint;
    here.clear_sums();
    LaneSums sums;
#pragma unroll
    for (int group = STEPS - AT_ONCE; group >= 0; group -= AT_ONCE) {
        Rows rows;
        rows.read(tile, group);
#pragma unroll
        for (int j = AT_ONCE - 1; j >= 0; --j) {
            int t = group + j, walked = STEPS - 1 - t;
            float dB[STATES], dC[STATES];
            here.step(t, steps, tile, work.lane, rows, j, own, dB, dC);
#pragma unroll
            for (int n = 0; n < PADDED_STATES; ++n)
                sums.add(walked % SUMMED * PADDED_STATES + n, n < STATES ? dB[n] : 0.0f, n < STATES ? dC[n] : 0.0f,
                         work.lane);
            if (walked % SUMMED == SUMMED - 1)
                store_projection_sums(sums.sum, first_step + t + SUMMED - 1, end, call, work);
        }
    }
    here.add_sums(adjoint);
    adjoint = here;
}

#if WARPS > 1
// The sums of all warps' tiles, in warp 0.
DEVICE void gather_sums(Adjoint& adjoint, Message* messages, const Work& work) {
    Message& mine = messages[work.warp];
    // Other warps may still read the last turn's.
    synchronize_block();
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        mine.numbers[e * (STATES + 2)][work.lane] = adjoint.dD[e];
        mine.numbers[e * (STATES + 2) + 1][work.lane] = adjoint.dbias[e];
#pragma unroll
        for (int n = 0; n < STATES; ++n) mine.numbers[e * (STATES + 2) + 2 + n][work.lane] = adjoint.dA[e][n];
    }
    synchronize_block();
    if (work.warp != 0) return;
    for (int warp = 1; warp < WARPS; ++warp)
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            const float(*from)[WARP] = messages[warp].numbers + e * (STATES + 2);
            adjoint.dD[e] += from[0][work.lane];
            adjoint.dbias[e] += from[1][work.lane];
#pragma unroll
            for (int n = 0; n < STATES; ++n) adjoint.dA[e][n] += from[2 + n][work.lane];
        }
}
#endif

DEVICE void store_sums(const Adjoint& adjoint, const ScanCall& call, const Work& work, const Parameters& own) {
    if (work.warp != 0) return;
    if (call.dinitial != nullptr && block_y() == 0)
        store_states(states_at(call.dinitial, call, work.sequence.index), adjoint.arriving, own);
    store_states(states_at(call.partial_a, call, work.chunk), adjoint.dA, own);
    store_channels(call.partial_d + work.chunk * call.channels, adjoint.dD, own);
    store_channels(call.partial_bias + work.chunk * call.channels, adjoint.dbias, own);
}

KERNEL __launch_bounds__(WARP * WARPS, (RESIDENT) / WARPS) scan_backward(const __grid_constant__ ScanCall call) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Work work = find_work(call);
    Tile* slots = shared.slots[work.warp];
    Pipeline<0, TENSORS, true> tiles;
    tiles.streams[U].begin(call.u, call, work);
    tiles.streams[DELTA].begin(call.delta, call, work);
    tiles.streams[DY].begin(call.dy, call, work);
#if GATED
    tiles.streams[Z].begin(call.z, call, work);
    Stream<Number> to_dz;
    to_dz.begin(call.dz, call, work);
#endif
    Stream<Number> to_du, to_ddelta;
    to_du.begin(call.du, call, work);
    to_ddelta.begin(call.ddelta, call, work);
    tiles.begin(slots, call, work);

    Parameters own;
    Adjoint adjoint;
    // The state before the next tile to be walked.
    PerState checkpoint;
    own.load(call, work);
    adjoint.clear_sums();
    load_states(adjoint.arriving, first_states(call.dfinal, call, work), own);
    const float* checkpoints = states_at(call.checkpoints, call, work.sequence.first_checkpoint);
    // Zero where this warp has no tile.
    auto load_checkpoint = [&](int turn) {
        const float* from = tiles.has(work, turn) ? states_at(checkpoints, call, tiles.tile_at(work, turn)) : nullptr;
        load_states(checkpoint, from, own);
    };
    load_checkpoint(0);
#pragma unroll 1
    for (int turn = 0; turn < work.n_turns; ++turn) {
        Tile& tile = tiles.take(slots, call, work, turn);
        Presence there = tiles.presence(work, turn, tile.presence[work.lane % STEPS]);
        int first_step = tiles.tile_at(work, turn) * STEPS;
        Steps steps;
        copy_states(steps.h[0], checkpoint);
        load_checkpoint(turn + 1);
        steps.run(tile, work.lane, own);
#if WARPS > 1
        PerState carried, made = {};
        PerChannel sums = {};
        copy_states(carried, adjoint.arriving);
        steps.reach(made, sums, tile, work.lane);
        hand_over(carried, adjoint.arriving, made, sums, shared.messages[turn % 2], work, own);
#endif
        walk_back(adjoint, steps, tile, first_step, first_step + there.count, call, work, own);
        synchronize_warp();
        store_tile(tile.tiles[U], to_du, first_step, there, work);
        store_tile(tile.tiles[DELTA], to_ddelta, first_step, there, work);
#if GATED
        store_tile(tile.tiles[Z], to_dz, first_step, there, work);
#endif
#if WARPS > 1
        copy_states(adjoint.arriving, carried);
#endif
        synchronize_warp();
    }
#if WARPS > 1
    gather_sums(adjoint, shared.messages[0], work);
#endif
    store_sums(adjoint, call, work, own);
}

#if WARPS == 1
// What reaches the states at all chunks' starts when nothing reaches their ends.
KERNEL __launch_bounds__(WARP) scan_adjoints(const __grid_constant__ ScanCall call) {
    SHARED_MEMORY(memory);
    Tile* slots = reinterpret_cast<Tile*>(memory);
    Work work = find_work(call);
    Pipeline<DELTA, TENSORS, true> tiles;
    tiles.streams[DELTA].begin(call.delta, call, work);
    tiles.streams[DY].begin(call.dy, call, work);
#if GATED
    tiles.streams[Z].begin(call.z, call, work);
#endif
    tiles.begin(slots, call, work);
    Parameters own;
    own.load(call, work);
    PerState arriving = {};
    PerChannel sums = {};
#pragma unroll 1
    for (int turn = 0; turn < work.n_tiles; ++turn) {
        const Tile& tile = tiles.take(slots, call, work, turn);
#pragma unroll
        for (int t = STEPS - 1; t >= 0; --t) {
            Rows rows;
            rows.read(tile, t / AT_ONCE * AT_ONCE);
            int place = t * Tile::Cut::PITCH + work.lane * EACH;
            PerChannel delta, dy;
            read(tile.tiles[DELTA] + place, delta);
            read(tile.tiles[DY] + place, dy);
#if GATED
            PerChannel z;
            read(tile.tiles[Z] + place, z);
#pragma unroll
            for (int e = 0; e < EACH; ++e) dy[e] *= z[e] * sigmoid(z[e]);
#endif
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                float dt = rows.step_size(delta[e] + own.bias[e], t % AT_ONCE);
                sums[e] += dt;
#pragma unroll
                for (int n = 0; n < STATES; ++n)
                    arriving[e][n] = exp2_fast(dt * own.rate[e][n]) *
                                     fma(rows.C[t % AT_ONCE * STATES + n], dy[e], arriving[e][n]);
            }
        }
        synchronize_warp();
    }
    store_chunk(arriving, sums, call, work, own);
}

KERNEL __launch_bounds__(CHAIN_THREADS) scan_chain(const __grid_constant__ ScanCall call) {
    chain(call, call.dfinal, true);
}
#endif
