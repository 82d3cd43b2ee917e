// Tiles of the forward scan: what shared memory holds, how a tile comes from memory and is made ready, how y is written.
#pragma once
#include "scan_tiles.cuh"

// A float32 output keeps its digits whatever comes in.
#define EXACT_OUTPUT (EXACT || OUT_TYPE == FLOAT32)
// What the outputs' sums are multiplied with to give back what was cut off.
constexpr float WHOLE = EXACT_OUTPUT ? 1.0f : CUT;

constexpr int WARPS = CHANNEL_WARPS * STATE_WARPS;
constexpr int THREADS = WARP * WARPS;
constexpr int TILE = 32;
constexpr int GROUP = 8;
// A row of the partial outputs: four numbers more than channels, so that a warp's writes meet all banks.
constexpr int ROW = WIDTH + 4;
constexpr int HALF_STATES = PADDED_STATES / 2;
// Four pairs more than states, so that eight rows meet all banks.
constexpr int C_ROW = HALF_STATES + 4;

struct Shared {
    // (dt, dt u) of every step and channel: see step_place.
    float4 steps[TILE * STEP_ROW];
    // Pairs of neighbouring states; of B see B_place.
    float2 B[TILE * HALF_STATES], C[TILE * C_ROW];
    float outputs[STATE_WARPS * TILE * ROW];
    float bias[WIDTH], skip[WIDTH];
    // Whether a warp's states need what lies further back.
    int alive[WARPS + 4 - WARPS % 4];
};

typedef Units<TILE, THREADS> Elements;

// A tile's activations on their way from memory.
struct Loads {
    Packed u[Elements::EACH], delta[Elements::EACH];
#if GATED
    Packed z[Elements::EACH];
#endif
    // Which of a unit's elements take part, a bit each or one bit for all.
    int part[Elements::EACH];
    Projections<TILE, THREADS> projections;
};

// Where a block's tiles lie. A thread's pointers walk along with the tiles where all of its elements' places are alike;
// elsewhere each element's place is found anew.
#if VECTORS && PAIRS && !MASKED && !ROUTES && !defined(NO_WALK)
#define WALKING 1
#else
#define WALKING 0
#endif

// The softplus of minus infinity is 0, a step that leaves the state unchanged: so delta is read where nothing takes part.
DEVICE float absent_delta() { return SOFTPLUS ? from_bits(0xff800000u) : 0.0f; }

#if WALKING
template <typename T>
struct Walk {
    T* at;
    // Elements from a unit of the thread to its next one, from a tile to the next.
    int64 unit, tile;

    MEMBER void find(T* data, int64 row, const ScanCall& call, const Sequence& sequence, int step, int units) {
        at = global_pointer(data + int64(call.reverse ? sequence.length - 1 - step : step) * row);
        row = call.reverse ? -row : row;
        unit = units * row;
        tile = TILE * row;
    }
};

struct Places {
    Walk<const Number> u, delta, z, B, C;
    Walk<Output> y;
    bool inside;

    typedef ProjectionUnits<TILE, THREADS> All;
    static_assert(THREADS % (WIDTH / UNIT) == 0 && THREADS % HALF_STATES == 0, "a thread's units lie in one column");

    MEMBER void find(const ScanCall& call, const Sequence& sequence, const Channels& channels,
                     const Elements& elements, int start) {
        const Unit& unit = elements.units[0];
        inside = channels.first + unit.channel < channels.end;
        constexpr int ROWS = THREADS * UNIT / WIDTH, PROJECTION_ROWS = THREADS / HALF_STATES;
        Strip<const Number> strip = find_strip(call.u, sequence, channels);
        u.find(strip.data + unit.channel, strip.row, call, sequence, start + unit.step, ROWS);
        strip = find_strip(call.delta, sequence, channels);
        delta.find(strip.data + unit.channel, strip.row, call, sequence, start + unit.step, ROWS);
        strip = find_strip(call.z, sequence, channels);
        z.find(strip.data + unit.channel, strip.row, call, sequence, start + unit.step, ROWS);
        Strip<Output> out = find_strip(call.y, sequence, channels);
        y.find(out.data + unit.channel, out.row, call, sequence, start + unit.step, ROWS);
        int step = thread_index() / HALF_STATES, state = 2 * (thread_index() % HALF_STATES);
        ProjectionStrip from = find_strip(call.B, sequence, channels);
        B.find(from.data + state, from.row, call, sequence, start + step, PROJECTION_ROWS);
        from = find_strip(call.C, sequence, channels);
        C.find(from.data + state, from.row, call, sequence, start + step, PROJECTION_ROWS);
    }

    MEMBER bool exists(const Unit& unit, const Tile& tile) const {
        return inside && (Elements::COUNT % THREADS == 0 || unit.inside) && tile.first + unit.step < tile.end;
    }

    // Of the tile that the pointers stand at; then they move to the next, or back.
    MEMBER void load(Loads& loads, const Elements& elements, const Tile& tile, bool back = false) {
#pragma unroll
        for (int i = 0; i < Elements::EACH; ++i) {
            bool exists = this->exists(elements.units[i], tile);
            loads.part[i] = exists;
            loads.u[i] = zeros();
            loads.delta[i] = all_of(absent_delta());
            if (exists) loads.u[i] = *reinterpret_cast<const Packed*>(u.at + i * u.unit);
            if (exists) loads.delta[i] = *reinterpret_cast<const Packed*>(delta.at + i * delta.unit);
#if GATED
            loads.z[i] = zeros();
            if (exists) loads.z[i] = *reinterpret_cast<const Packed*>(z.at + i * z.unit);
#endif
        }
#pragma unroll
        for (int i = 0; i < All::EACH; ++i) {
            int index = thread_index() + i * THREADS;
            bool wanted = (All::COUNT % THREADS == 0 || index < All::COUNT) &&
                          tile.first + index / HALF_STATES < tile.end &&
                          (PADDED_STATES == STATES || 2 * (index % HALF_STATES) < STATES);
            loads.projections.B[i] = loads.projections.C[i] = Pair();
            if (wanted) loads.projections.B[i] = *reinterpret_cast<const Pair*>(B.at + i * B.unit);
            if (wanted) loads.projections.C[i] = *reinterpret_cast<const Pair*>(C.at + i * C.unit);
        }
        u.at += back ? -u.tile : u.tile;
        delta.at += back ? -delta.tile : delta.tile;
        z.at += back ? -z.tile : z.tile;
        B.at += back ? -B.tile : B.tile;
        C.at += back ? -C.tile : C.tile;
    }

    // y of a unit of the tile that its pointer stands at.
    MEMBER void store(const float (&values)[UNIT], const Elements& elements, int i, const Tile& tile) const {
        if (exists(elements.units[i], tile)) store_eight(y.at + i * y.unit, values);
    }

    MEMBER void step_y() { y.at += y.tile; }
};
#else
struct Places {
    const ScanCall* call;
    Sequence sequence;
    Channels channels;
    Strip<const Number> u, delta, z;
    ProjectionStrip B, C;
    Strip<Output> y;

    MEMBER void find(const ScanCall& the_call, const Sequence& the_sequence, const Channels& the_channels,
                     const Elements&, int) {
        call = &the_call;
        sequence = the_sequence;
        channels = the_channels;
        u = find_strip(call->u, sequence, channels);
        delta = find_strip(call->delta, sequence, channels);
        z = find_strip(call->z, sequence, channels);
        B = find_strip(call->B, sequence, channels);
        C = find_strip(call->C, sequence, channels);
        y = find_strip(call->y, sequence, channels);
    }

    MEMBER void load(Loads& loads, const Elements& elements, const Tile& tile, bool = false) const {
#pragma unroll
        for (int i = 0; i < Elements::EACH; ++i) {
            const Unit& unit = elements.units[i];
            Marks marks = find_marks(unit, *call, sequence, channels, tile);
            loads.part[i] = 0;
#pragma unroll
            for (int k = 0; k < UNIT; ++k) loads.part[i] |= int(marks.of(k).part) << k;
            loads.u[i] = load_unit(u, unit, marks);
            loads.delta[i] = load_unit(delta, unit, marks, absent_delta());
#if GATED
            loads.z[i] = load_unit(z, unit, marks);
#endif
        }
        loads.projections.load(B, C, *call, sequence, tile);
    }

    MEMBER void store(float (&values)[UNIT], const Elements& elements, int i, const Tile& tile) const {
        const Unit& unit = elements.units[i];
        Marks marks = find_marks(unit, *call, sequence, channels, tile);
        // A state that is not finite would leave not-a-numbers where nothing is.
#pragma unroll
        for (int k = 0; k < UNIT; ++k)
            if (MASKED && !marks.of(k).part) values[k] = 0.0f;
        store_unit(y, values, unit, marks);
    }

    MEMBER void step_y() {}
};
#endif

// Put dt, dt u, B and C where the warps read them.
DEVICE void prepare(Shared& shared, const Elements& elements, const Loads& loads) {
#pragma unroll
    for (int i = 0; i < Elements::EACH; ++i) {
        const Unit& unit = elements.units[i];
        if (!unit.inside) continue;
        float u[UNIT], delta[UNIT], bias[UNIT];
        unpack(loads.u[i], u);
        unpack(loads.delta[i], delta);
        read_channels(bias, shared.bias, unit);
#pragma unroll
        for (int k = 0; k < UNIT; ++k) {
            delta[k] = find_step(delta[k], bias[k], SOFTPLUS || loads.part[i] >> (WALKING ? 0 : k) & 1);
            u[k] *= delta[k];
        }
        write_steps(shared.steps, delta, u, unit);
    }
    loads.projections.store(shared.B, shared.C, C_ROW);
}

// Add the states' parts and the skip, gate, and write y. What takes no part has zeros in u, z and C: y is 0 there.
DEVICE void finish(const Shared& shared, const Elements& elements, const Packed* us, const Packed* zs,
                   Places& places, const Tile& tile) {
#pragma unroll
    for (int i = 0; i < Elements::EACH; ++i) {
        const Unit& unit = elements.units[i];
        if (!unit.inside) continue;
        float u[UNIT], z[UNIT], y[UNIT], skip[UNIT];
        const float* from = &shared.outputs[unit.step * ROW + unit.channel];
        read_unit(y, from, ROW);
#pragma unroll
        for (int warp = 1; warp < STATE_WARPS; ++warp) {
            float more[UNIT];
            read_unit(more, from + warp * TILE * ROW, ROW);
#pragma unroll
            for (int k = 0; k < UNIT; ++k) y[k] += more[k];
        }
        read_channels(skip, shared.skip, unit);
        unpack(us[i], u);
        if (GATED) unpack(zs[i], z);
#pragma unroll
        for (int k = 0; k < UNIT; ++k) {
            y[k] = fma(skip[k], u[k], y[k]);
            // WHOLE / (1 + e^-z)
            if (GATED)
                y[k] *= z[k] * reciprocal(fma(exp2_fast(-z[k] * LOG2_E), 1.0f / WHOLE, 1.0f / WHOLE));
            else if (!EXACT_OUTPUT)
                y[k] *= WHOLE;
        }
        places.store(y, elements, i, tile);
    }
    places.step_y();
}
