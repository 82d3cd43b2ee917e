// The forward scan for five states and more of few channels, in bfloat16. README.md, "CUDA", derives the layout.
//
// Constants beyond those of scan_call.cuh and scan_tiles.cuh:
//   THIN          states of a lane, 2
//   TILE_STEPS    steps of a tile
//   INTERVAL      steps between two checkpoints
//   RESIDENT      blocks of a multiprocessor that the registers must suffice for
#include "scan_thin_steps.cuh"

// Saves the state every INTERVAL steps, a multiple of CHECKED; asked every CHECKED steps.
struct Checkpoints {
    float* next;
    int64 size;
    int phase;

    MEMBER Checkpoints(const ScanCall& call, const Sequence& sequence) {
        phase = 0;
        size = call.channels * STATES;
        next = call.checkpoints == nullptr ? nullptr : call.checkpoints + sequence.first_checkpoint * size;
    }

    MEMBER void save(const States& h, const Channels& channels, const Lane& at) {
        if (next != nullptr && phase == 0) {
            store_states(next, h, channels, at);
            next += size;
        }
        phase = (phase + CHECKED) % INTERVAL;
    }
};

// What a block starts with.
struct Block {
    Lane at;
    Sequence sequence;
    Channels channels;
    Elements elements;
    Places places;
    int64 states_size;

    MEMBER void find(Shared& shared, const ScanCall& call) {
        int n_blocks = count_blocks<WIDTH>(call);
        at = find_lane();
        channels = find_channels<WIDTH>(call, block_x() % n_blocks);
        sequence = find_sequence(call, block_x() / n_blocks, channels.group);
        elements.find();
        states_size = call.channels * STATES;
        for (int i = thread_index(); i < WIDTH; i += THREADS) {
            bool there = channels.first + i < channels.end;
            shared.bias[i] = there && call.delta_bias != nullptr ? call.delta_bias[channels.first + i] : 0.0f;
            shared.skip[i] = there && call.D != nullptr ? call.D[channels.first + i] * (1.0f / WHOLE) : 0.0f;
        }
    }
};

// The work on a tile's neighbours is spread over it: where an eighth of it starts.
DEVICE constexpr int from_eighth(int eighth) { return eighth * STRETCHES / 8; }

// Between two barriers the warps run a tile's steps and, among these, finish the tile before and prepare the next one:
// so the units for exponentials and for arithmetic are busy at the same time.
KERNEL __launch_bounds__(THREADS, RESIDENT) scan_forward(const __grid_constant__ ScanCall call) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Block my;
    my.find(shared, call);
    States a, h;
    load_decays(a, call, my.channels, my.at);
    const float* before =
        call.initial_state == nullptr ? nullptr : call.initial_state + my.sequence.index * my.states_size;
    load_states(h, before, my.channels, my.at);
    Checkpoints checkpoints(call, my.sequence);
    Loads loads;
    Packed u_before[Elements::EACH], u[Elements::EACH], z[Elements::EACH];
    Results results;
    Tile tile = {0, my.sequence.length};
    my.places.find(call, my.sequence, my.channels, my.elements, 0);
    my.places.load(loads, my.elements, tile);
    synchronize_block();
#pragma unroll
    for (int part = 0; part < UNIT / PART; ++part) prepare(shared.stages[0], shared, my.elements, loads, part);
    store_projections(shared.stages[0], loads);
#pragma unroll
    for (int i = 0; i < Elements::EACH; ++i) {
        u_before[i] = z[i] = zeros();
        u[i] = loads.u[i];
    }
    synchronize_block();

    int turn = 0;
#pragma unroll 1
    for (; tile.first < tile.end; tile.first += TILE) {
        Stage &here = shared.stages[turn], &there = shared.stages[1 - turn];
        Tile next = {tile.first + TILE, tile.end};
        // Before the first tile is none.
        Tile last = {tile.first - TILE, tile.first > 0 ? tile.end : -TILE};
        Feed feed;
        feed.read(here, my.at, 0);
        feed.read_C(here, my.at, 0);
        my.places.load(loads, my.elements, next);
#pragma unroll
        for (int stretch = 0; stretch < STRETCHES; ++stretch) {
            if (stretch * STRETCH % CHECKED == 0 && (stretch == 0 || tile.first + stretch * STRETCH < tile.end))
                checkpoints.save(h, my.channels, my.at);
            Outputs outputs;
            run(outputs, h, a, feed, my.at);
            if (stretch == from_eighth(0)) results.find(there, shared, my.elements, u_before, z, 0);
            if (stretch == from_eighth(1)) results.find(there, shared, my.elements, u_before, z, 1);
            if (stretch == from_eighth(2)) my.places.store(results.y, my.elements, last);
            if (stretch == from_eighth(3)) my.places.load_gate(z, my.elements, tile);
            if (stretch == from_eighth(5)) prepare(there, shared, my.elements, loads, 0);
            if (stretch == from_eighth(6)) prepare(there, shared, my.elements, loads, 1);
            if (stretch == STRETCHES - 1) store_projections(there, loads);
            // Read before what is written, for the compiler keeps that order.
            if (stretch + 1 < STRETCHES) feed.read(here, my.at, stretch + 1);
            if (stretch + 1 < STRETCHES) feed.read_C(here, my.at, stretch + 1);
            outputs.store(here, my.at, stretch);
        }
#pragma unroll
        for (int i = 0; i < Elements::EACH; ++i) {
            u_before[i] = u[i];
            u[i] = loads.u[i];
        }
        turn = 1 - turn;
        synchronize_block();
    }
    Tile last = {tile.first - TILE, tile.first > 0 ? tile.end : -TILE};
#pragma unroll
    for (int part = 0; part < UNIT / PART; ++part)
        results.find(shared.stages[1 - turn], shared, my.elements, u_before, z, part);
    my.places.store(results.y, my.elements, last);
    if (!ROUTES && call.final_state != nullptr)
        store_states(call.final_state + my.sequence.index * my.states_size, h, my.channels, my.at);
}
