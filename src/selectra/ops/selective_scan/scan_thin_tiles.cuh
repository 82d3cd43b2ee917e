// The elementwise part of the thin forward: how tiles come from memory, become steps, and outputs go back.
#pragma once
#include "scan_tiles.cuh"

static_assert(THIN == 2 && TYPE == BFLOAT16 && OUT_TYPE == BFLOAT16, "");
// What the outputs' sums are multiplied with to give back what was cut off.
constexpr float WHOLE = CUT;

constexpr int WARPS = CHANNEL_WARPS * STATE_WARPS;
constexpr int THREADS = WARP * WARPS;
// Steps of a tile; steps whose inputs are read ahead; steps whose outputs one product finds; of the checkpoints.
constexpr int TILE = TILE_STEPS, STRETCH = 8, STRETCHES = TILE / STRETCH, GROUP = 8, CHECKED = 32;
// A unit is turned into steps, and sums into outputs, so many elements at a time.
constexpr int PART = UNIT / 2;
// A row of the partial outputs: four numbers more than channels, so that a warp's writes meet all banks.
constexpr int ROW = WIDTH + 4;
constexpr int HALF_STATES = PADDED_STATES / 2;
// Two pairs more than states, so that eight rows meet all banks.
constexpr int C_ROW = HALF_STATES + 2;
// (dt, dt u) of two steps, one channel: a row of two steps, with a place more for the banks.
constexpr int PLACES = TILE / 2 * (WIDTH + 1);

// What warps hand each other of one tile.
struct Stage {
    // (dt, dt u) of two steps, channel by channel.
    float4 steps[PLACES];
    // B of four neighbouring steps, state by state; C of pairs of neighbouring states.
    float2 B[TILE * HALF_STATES], C[TILE * C_ROW];
    float outputs[STATE_WARPS * TILE * ROW];
};

struct Shared {
    Stage stages[2];
    float bias[WIDTH], skip[WIDTH];
};

typedef Units<TILE, THREADS> Elements;

// The softplus of minus infinity is 0, a step that leaves the state unchanged: so delta is read where nothing takes part.
DEVICE float absent_delta() { return from_bits(0xff800000u); }

// A tile's activations on their way from memory.
struct Loads {
    Packed u[Elements::EACH], delta[Elements::EACH];
    // Which of a unit's elements take part, a bit each or one bit for all.
    int part[Elements::EACH];
    Projections<TILE, THREADS> projections;
};

// Where a block's tiles lie. A thread's pointers walk along with the tiles where all of these are alike; elsewhere each
// element's place is found anew.
#if VECTORS && PAIRS && !MASKED && !ROUTES
#define WALKING 1
#else
#define WALKING 0
#endif

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

    MEMBER void find(const ScanCall& call, const Sequence& sequence, const Channels& channels,
                     const Elements& elements, int start) {
        const Unit& unit = elements.units[0];
        inside = unit.inside && channels.first + unit.channel < channels.end;
        constexpr int ROWS = THREADS * UNIT / WIDTH, PROJECTION_ROWS = THREADS / HALF_STATES;
        Strip<const Number> strip = find_strip(call.u, sequence, channels);
        u.find(strip.data + unit.channel, strip.row, call, sequence, start + unit.step, ROWS);
        strip = find_strip(call.delta, sequence, channels);
        delta.find(strip.data + unit.channel, strip.row, call, sequence, start + unit.step, ROWS);
        strip = find_strip(call.z, sequence, channels);
        z.find(strip.data + unit.channel, strip.row, call, sequence, start + unit.step, ROWS);
        Strip<Output> out = find_strip(call.y, sequence, channels);
        // One tile behind.
        y.find(out.data + unit.channel, out.row, call, sequence, start - TILE + unit.step, ROWS);
        int step = thread_index() / HALF_STATES, state = 2 * (thread_index() % HALF_STATES);
        ProjectionStrip from = find_strip(call.B, sequence, channels);
        B.find(from.data + state, from.row, call, sequence, start + step, PROJECTION_ROWS);
        from = find_strip(call.C, sequence, channels);
        C.find(from.data + state, from.row, call, sequence, start + step, PROJECTION_ROWS);
    }

    MEMBER bool exists(const Unit& unit, const Tile& tile) const {
        return inside && (Elements::COUNT % THREADS == 0 || unit.inside) && tile.first + unit.step < tile.end;
    }

    // Of the tile that the pointers stand at; then they move to the next.
    MEMBER void load(Loads& loads, const Elements& elements, const Tile& tile) {
#pragma unroll
        for (int i = 0; i < Elements::EACH; ++i) {
            bool exists = this->exists(elements.units[i], tile);
            loads.part[i] = exists;
            loads.u[i] = zeros();
            loads.delta[i] = all_of(absent_delta());
            if (exists) loads.u[i] = *reinterpret_cast<const Packed*>(u.at + i * u.unit);
            if (exists) loads.delta[i] = *reinterpret_cast<const Packed*>(delta.at + i * delta.unit);
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
        u.at += u.tile;
        delta.at += delta.tile;
        B.at += B.tile;
        C.at += C.tile;
    }

    MEMBER void load_gate(Packed (&to)[Elements::EACH], const Elements& elements, const Tile& tile) {
#pragma unroll
        for (int i = 0; i < Elements::EACH; ++i) {
            to[i] = zeros();
            if (GATED && exists(elements.units[i], tile)) to[i] = *reinterpret_cast<const Packed*>(z.at + i * z.unit);
        }
        z.at += z.tile;
    }

    MEMBER void store(const float (&values)[Elements::EACH][UNIT], const Elements& elements, const Tile& tile) {
#pragma unroll
        for (int i = 0; i < Elements::EACH; ++i)
            if (exists(elements.units[i], tile)) store_eight(y.at + i * y.unit, values[i]);
        y.at += y.tile;
    }
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
                     const Elements& elements, int start) {
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

    MEMBER void load(Loads& loads, const Elements& elements, const Tile& tile) {
#pragma unroll
        for (int i = 0; i < Elements::EACH; ++i) {
            const Unit& unit = elements.units[i];
            Marks marks = find_marks(unit, *call, sequence, channels, tile);
            loads.part[i] = 0;
#pragma unroll
            for (int k = 0; k < UNIT; ++k) loads.part[i] |= int(marks.of(k).part) << k;
            loads.u[i] = load_unit(u, unit, marks);
            loads.delta[i] = load_unit(delta, unit, marks, absent_delta());
        }
        loads.projections.load(B, C, *call, sequence, tile);
    }

    MEMBER void load_gate(Packed (&to)[Elements::EACH], const Elements& elements, const Tile& tile) {
#pragma unroll
        for (int i = 0; i < Elements::EACH; ++i) {
            const Unit& unit = elements.units[i];
            to[i] = GATED ? load_unit(z, unit, find_marks(unit, *call, sequence, channels, tile)) : zeros();
        }
    }

    MEMBER void store(float (&values)[Elements::EACH][UNIT], const Elements& elements, const Tile& tile) {
#pragma unroll
        for (int i = 0; i < Elements::EACH; ++i) {
            const Unit& unit = elements.units[i];
            if (!unit.inside) continue;
            Marks marks = find_marks(unit, *call, sequence, channels, tile);
            // A state that is not finite would leave not-a-numbers where nothing is.
#pragma unroll
            for (int k = 0; k < UNIT; ++k)
                if (MASKED && !marks.of(k).part) values[i][k] = 0.0f;
            store_unit(y, values[i], unit, marks);
        }
    }
};
#endif

// Put dt and dt u of a part of every unit where the warps read them.
DEVICE void prepare(Stage& stage, const Shared& shared, const Elements& elements, const Loads& loads, int part) {
#pragma unroll
    for (int i = 0; i < Elements::EACH; ++i) {
        const Unit& unit = elements.units[i];
        if (!unit.inside) continue;
        float u[UNIT], delta[UNIT], bias[UNIT];
        unpack(loads.u[i], u);
        unpack(loads.delta[i], delta);
        int first = part * PART, last = first + PART;
        read_unit(bias, shared.bias + unit.channel, 0, first, last);
#pragma unroll
        for (int k = first; k < last; ++k) {
            delta[k] = find_step(delta[k], bias[k], SOFTPLUS || loads.part[i] >> (WALKING ? 0 : k) & 1);
            u[k] *= delta[k];
        }
#pragma unroll
        for (int k = first; k < last; ++k) {
            int step = unit.step_of(k);
            float4* row = &stage.steps[step / 2 * (WIDTH + 1) + unit.channel_of(k)];
            reinterpret_cast<float2*>(row)[step % 2] = {delta[k], u[k]};
        }
    }
}

// The same for B and C.
DEVICE void store_projections(Stage& stage, const Loads& loads) {
    typedef ProjectionUnits<TILE, THREADS> All;
#pragma unroll
    for (int i = 0; i < All::EACH; ++i) {
        int index = thread_index() + i * THREADS;
        if (All::COUNT % THREADS != 0 && index >= All::COUNT) continue;
        float2 B = unpack(loads.projections.B[i]);
        int step = index / HALF_STATES, state = 2 * (index % HALF_STATES);
        float* to = reinterpret_cast<float*>(stage.B) + (step / 4 * PADDED_STATES + state) * 4 + step % 4;
        to[0] = B.x;
        to[4] = B.y;
        stage.C[index / HALF_STATES * C_ROW + index % HALF_STATES] = unpack(loads.projections.C[i]);
    }
}

// A tile's outputs in registers, made in two parts.
struct Results {
    float y[Elements::EACH][UNIT];

    // Add the states' parts and the skip, and gate. What takes no part has zeros in u, z and C: y is 0 there.
    MEMBER void find(const Stage& stage, const Shared& shared, const Elements& elements, const Packed* us,
                     const Packed* zs, int part) {
        int first = part * PART, last = first + PART;
#pragma unroll
        for (int i = 0; i < Elements::EACH; ++i) {
            const Unit& unit = elements.units[i];
            if (!unit.inside) continue;
            float u[UNIT], z[UNIT], skip[UNIT];
            const float* from = &stage.outputs[unit.step * ROW + unit.channel];
            read_unit(y[i], from, ROW, first, last);
#pragma unroll
            for (int warp = 1; warp < STATE_WARPS; ++warp) {
                float more[UNIT];
                read_unit(more, from + warp * TILE * ROW, ROW, first, last);
#pragma unroll
                for (int k = first; k < last; ++k) y[i][k] += more[k];
            }
            read_unit(skip, shared.skip + unit.channel, 0, first, last);
            unpack(us[i], u);
            if (GATED) unpack(zs[i], z);
#pragma unroll
            for (int k = first; k < last; ++k) {
                y[i][k] = fma(skip[k], u[k], y[i][k]);
                // WHOLE / (1 + e^-z)
                if (GATED)
                    y[i][k] *= z[k] * reciprocal(fma(exp2_fast(-z[k] * LOG2_E), 1.0f / WHOLE, 1.0f / WHOLE));
                else
                    y[i][k] *= WHOLE;
            }
        }
    }
};
