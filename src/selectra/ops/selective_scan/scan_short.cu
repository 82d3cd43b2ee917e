// Many short sequences of few channels: sixteen lanes take a group's channels of one sequence, each lane all states of
// its channel, and walk the sequence from end to end. Blocks take sequences until none is left.
//
// The backward keeps the states of a segment (`interval` steps) in shared memory, and those at the start of every
// segment but the last; nothing is kept from the forward. Sums over channels are made by transposing shuffles, each lane
// ends with one state's; sums over sequences stay in registers until the block is done, and scan_short_sum adds up the
// blocks' (`fold` of them) in a fixed order.
#include "scan_call.cuh"

constexpr int LANES = 16, THREADS = 128, ROWS = THREADS / LANES, QUADS = (STATES + 3) / 4, PADDED = 4 * QUADS;
static_assert(STATES <= LANES, "each lane takes one state of B and C");

typedef float States[PADDED];

// Bytes of shared memory: B and C of a segment, of every row of lanes; then the backward's states.
DEVICE float* shared_projections(unsigned char* memory, int row, int interval) {
    return reinterpret_cast<float*>(memory) + row * interval * 2 * PADDED;
}
DEVICE float4* shared_states(unsigned char* memory, int interval) {
    return reinterpret_cast<float4*>(memory) + ROWS * interval * 2 * QUADS + thread_index();
}

// The numbers of one channel of a sequence, step by step.
template <typename T>
struct Walk {
    T* first;
    int64 ahead;

    MEMBER void find(const Activation<T>& x, const ScanCall& call, int64 sequence, int channel) {
        first = x.data + sequence * x.batch + channel * x.channel + (call.reverse ? (call.length - 1) * x.row : 0);
        ahead = call.reverse ? -x.row : x.row;
    }
    MEMBER T* at(int step) const { return first + step * ahead; }
};

// What a lane has of all sequences, and of the one that is walked.
struct Lane {
    int lane, row, group, channel;
    bool of_group;
    States rate;
    float D, bias;
    Sequence sequence;
    bool here;
    Walk<const Number> u, delta, z;

    MEMBER void find(const ScanCall& call) {
        lane = thread_index() % LANES;
        row = thread_index() / LANES;
        group = block_y();
        int per_group = int(call.channels / call.groups);
        of_group = lane < per_group;
        channel = group * per_group + (of_group ? lane : 0);
#pragma unroll
        for (int n = 0; n < PADDED; ++n) {
            rate[n] = 0.0f;
            if (n >= STATES) continue;
            float value = call.A[channel * call.A_channel + n * call.A_state] * LOG2_E;
            if (!(absolute(value) <= LARGEST)) {
                *call.fault = 1;
                value = from_bits(NOT_A_NUMBER);
            }
            rate[n] = value;
        }
        D = call.D == nullptr ? 0.0f : call.D[channel];
        bias = call.delta_bias == nullptr ? 0.0f : call.delta_bias[channel];
    }

    MEMBER void take(const ScanCall& call, int64 index) {
        // A warp's two rows walk together, also where there is no second sequence.
        bool exists = index < call.n_seqs;
        here = exists && of_group;
        sequence = find_sequence(call, exists ? int(index) : 0, group);
        u.find(call.u, call, sequence.batch, channel);
        delta.find(call.delta, call, sequence.batch, channel);
        if (GATED) z.find(call.z, call, sequence.batch, channel);
    }

    MEMBER bool is_present(const ScanCall& call, int step) const {
        return here && present(call, sequence, position(call, sequence, step));
    }

    // Entry of this channel's states in many (d, n).
    MEMBER int64 states_at(const ScanCall& call) const {
        return (int64(sequence.index) * call.channels + channel) * STATES;
    }
};

// u and delta of a step, as they were read; of an absent one zeros.
struct Inputs {
    float x, delta;
    bool there;

    MEMBER void read(const ScanCall& call, const Lane& own, int step) {
        there = own.is_present(call, step);
        x = there ? number(*own.u.at(step)) : 0.0f;
        delta = (there ? number(*own.delta.at(step)) : 0.0f) + own.bias;
    }

    MEMBER float step_size() const {
        float dt = SOFTPLUS ? softplus(delta) : delta;
        return there ? dt : 0.0f;
    }
};

// B and C of a segment's steps into shared memory, by lane n state n. Both rows of a warp take part.
DEVICE void stage(float* to, const ScanCall& call, const Lane& own, int start, int steps) {
    synchronize_warp();
    bool exists = own.lane < STATES;
    int64 head_b = own.sequence.batch * call.B.batch + own.group * call.B.group + own.lane * call.B.state;
    int64 head_c = own.sequence.batch * call.C.batch + own.group * call.C.group + own.lane * call.C.state;
    if (own.lane < PADDED) {
#pragma unroll 4
        for (int step = 0; step < steps; ++step) {
            int row = position(call, own.sequence, start + step);
            bool there = exists && present(call, own.sequence, row);
            to[step * 2 * PADDED + own.lane] = there ? number(call.B.data[head_b + row * call.B.row]) : 0.0f;
            to[step * 2 * PADDED + PADDED + own.lane] = there ? number(call.C.data[head_c + row * call.C.row]) : 0.0f;
        }
    }
    synchronize_warp();
}

DEVICE float4 four(const float* from) { return *reinterpret_cast<const float4*>(from); }

// h -> exp(dt A) h + dt x B.
DEVICE void advance(States& h, const Lane& own, const float* B, float dt, float dtx) {
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) {
        float4 b = four(B + 4 * quad);
        float part[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int n = 4 * quad + i;
            h[n] = fma(exp2_fast(dt * own.rate[n]), h[n], dtx * part[i]);
        }
    }
}

// C . h, and what else has one number a state.
DEVICE float output(const States& h, const float* C) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) {
        float4 c = four(C + 4 * quad);
        float part[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = fma(part[i], h[4 * quad + i], sums[i]);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

DEVICE void load_states(States& h, const float* from, const ScanCall& call, const Lane& own) {
#pragma unroll
    for (int n = 0; n < PADDED; ++n)
        h[n] = from != nullptr && own.here && n < STATES ? from[own.states_at(call) + n] : 0.0f;
}

DEVICE void store_states(float* to, const States& h, const ScanCall& call, const Lane& own) {
    if (to == nullptr || !own.here) return;
#pragma unroll
    for (int n = 0; n < STATES; ++n) to[own.states_at(call) + n] = h[n];
}

DEVICE int smaller(int a, int b) { return a < b ? a : b; }

KERNEL __launch_bounds__(THREADS) scan_short_forward(const __grid_constant__ ScanCall call) {
    SHARED_MEMORY(memory);
    Lane own;
    own.find(call);
    int interval = int(call.interval), length = int(call.length);
    float* projections = shared_projections(memory, own.row, interval);
    for (int64 first = int64(block_x()) * ROWS; first < call.n_seqs; first += int64(grid_x()) * ROWS) {
        own.take(call, first + own.row);
        Walk<Output> y;
        y.find(call.y, call, own.sequence.batch, own.channel);
        States h;
        load_states(h, call.initial_state, call, own);
        Inputs next;
        next.read(call, own, 0);
        for (int start = 0; start < length; start += interval) {
            int steps = smaller(interval, length - start);
            stage(projections, call, own, start, steps);
            for (int step = 0; step < steps; ++step) {
                Inputs now = next;
                float gate = GATED && now.there ? number(*own.z.at(start + step)) : 0.0f;
                if (start + step + 1 < length) next.read(call, own, start + step + 1);
                const float* B = projections + step * 2 * PADDED;
                float dt = now.step_size();
                advance(h, own, B, dt, dt * now.x);
                float found = fma(own.D, now.x, output(h, B + PADDED));
                if (GATED) found *= gate * sigmoid(gate);
                if (own.here) put(y.at(start + step), now.there ? found : 0.0f);
            }
        }
        store_states(call.final_state, h, call, own);
    }
}

// Two lanes exchange halves of their numbers and each adds up one half.
template <int HALF>
DEVICE void fold_half(float (&x)[LANES], int lane) {
    bool upper = lane & HALF;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        float kept = upper ? x[i + HALF] : x[i], sent = upper ? x[i] : x[i + HALF];
        x[i] = kept + shuffle_xor(sent, HALF);
    }
}

// The sum over a row's lanes of each of sixteen numbers; lane n gets that of number n.
DEVICE float sum_over_lanes(float (&x)[LANES], int lane) {
    fold_half<8>(x, lane);
    fold_half<4>(x, lane);
    fold_half<2>(x, lane);
    fold_half<1>(x, lane);
    return x[0];
}

// A thread's states in shared memory.
DEVICE void keep(float4* place, const States& h) {
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad)
        place[quad * THREADS] = {h[4 * quad], h[4 * quad + 1], h[4 * quad + 2], h[4 * quad + 3]};
}

DEVICE void recall(States& h, const float4* place) {
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) {
        float4 x = place[quad * THREADS];
        h[4 * quad] = x.x;
        h[4 * quad + 1] = x.y;
        h[4 * quad + 2] = x.z;
        h[4 * quad + 3] = x.w;
    }
}

// Sums over sequences of a lane.
struct Totals {
    States A;
    float D, bias;
};

// The gradients of one sequence's activations and of its states.
struct Gradients {
    Walk<const Number> dy;
    Walk<Number> du, ddelta, dz;
    Number *dB, *dC;

    MEMBER void find(const ScanCall& call, const Lane& own) {
        int64 batch = own.sequence.batch;
        dy.find(call.dy, call, batch, own.channel);
        du.find(call.du, call, batch, own.channel);
        ddelta.find(call.ddelta, call, batch, own.channel);
        if (GATED) dz.find(call.dz, call, batch, own.channel);
        int64 place = (batch * call.length * call.groups + own.group) * STATES + own.lane;
        dB = call.dB + place;
        dC = call.dC + place;
    }

    // One step back: h is the state after the step and becomes that before it, g the adjoint likewise.
    MEMBER void step_back(States& h, States& g, Totals& totals, const ScanCall& call, const Lane& own, int step,
                          const Inputs& now, float gate, float dout, const float* B, const float4* before) const {
        const float* C = B + PADDED;
        float dt = now.step_size(), dtx = dt * now.x, dgate = 0.0f;
        if (GATED) {
            float open = sigmoid(gate), out = fma(own.D, now.x, output(h, C));
            dgate = dout * out * open * fma(gate, 1.0f - open, 1.0f);
            dout *= gate * open;
        }
        float row[LANES];
#pragma unroll
        for (int n = 0; n < LANES; ++n) row[n] = n < STATES ? dout * h[n < PADDED ? n : 0] : 0.0f;
        float sum_c = sum_over_lanes(row, own.lane);
        recall(h, before);
        float reached[2] = {0.0f, 0.0f}, rates[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < LANES; ++n) row[n] = 0.0f;
#pragma unroll
        for (int quad = 0; quad < QUADS; ++quad) {
            float4 b = four(B + 4 * quad), c = four(C + 4 * quad);
            float of_b[4] = {b.x, b.y, b.z, b.w}, of_c[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int n = 4 * quad + i;
                float a = exp2_fast(dt * own.rate[n]), adjoint = fma(of_c[i], dout, g[n]);
                row[n] = dtx * adjoint;
                reached[i % 2] = fma(of_b[i], adjoint, reached[i % 2]);
                g[n] = a * adjoint;
                float w = g[n] * h[n];
                rates[i % 2] = fma(own.rate[n], w, rates[i % 2]);
                totals.A[n] = fma(dt, w, totals.A[n]);
            }
        }
        float sum_b = sum_over_lanes(row, own.lane), p = reached[0] + reached[1];
        float dstep = fma(now.x, p, LN_2 * (rates[0] + rates[1]));
        if (SOFTPLUS) dstep *= exp2_fast((now.delta - dt) * LOG2_E);
        if (now.there) {
            totals.D = fma(dout, now.x, totals.D);
            totals.bias += dstep;
        }
        if (own.here) {
            put(du.at(step), now.there ? fma(dt, p, own.D * dout) : 0.0f);
            put(ddelta.at(step), now.there ? dstep : 0.0f);
            if (GATED) put(dz.at(step), now.there ? dgate : 0.0f);
        }
        int at = position_in(call, own.sequence, step);
        // Of a sequence that exists; lanes beyond the channels have states too.
        if (own.lane < STATES && exists) {
            bool there = present(call, own.sequence, at);
            put(dB + int64(at) * call.groups * STATES, there ? sum_b : 0.0f);
            put(dC + int64(at) * call.groups * STATES, there ? sum_c : 0.0f);
        }
    }

    bool exists;
};

// The parameters' gradients of a block: over its rows of lanes.
DEVICE void store_totals(float* memory, const Totals& totals, const ScanCall& call, const Lane& own) {
    constexpr int NUMBERS = PADDED + 2;
    synchronize_block();
    float* mine = memory + thread_index() * NUMBERS;
#pragma unroll
    for (int n = 0; n < PADDED; ++n) mine[n] = totals.A[n];
    mine[PADDED] = totals.D;
    mine[PADDED + 1] = totals.bias;
    synchronize_block();
    if (!own.of_group) return;
    int64 place = int64(block_x()) * call.channels + own.channel;
    for (int number = own.row; number < NUMBERS; number += ROWS) {
        float sum = 0.0f;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) sum += memory[(row * LANES + own.lane) * NUMBERS + number];
        if (number < STATES) call.partial_a[place * STATES + number] = sum;
        if (number == PADDED) call.partial_d[place] = sum;
        if (number == PADDED + 1) call.partial_bias[place] = sum;
    }
}

// Three blocks find registers on a multiprocessor.
KERNEL __launch_bounds__(THREADS, 3) scan_short_backward(const __grid_constant__ ScanCall call) {
    SHARED_MEMORY(memory);
    Lane own;
    own.find(call);
    Totals totals = {};
    int interval = int(call.interval), length = int(call.length), segments = (length + interval - 1) / interval;
    float* projections = shared_projections(memory, own.row, interval);
    // Of a segment's steps, then of the segments' starts.
    float4* kept = shared_states(memory, interval);
    float4* starts = kept + interval * QUADS * THREADS;
    for (int64 first = int64(block_x()) * ROWS; first < call.n_seqs; first += int64(grid_x()) * ROWS) {
        own.take(call, first + own.row);
        Gradients gradients;
        gradients.exists = first + own.row < call.n_seqs;
        gradients.find(call, own);
        States h, g;
        load_states(h, call.initial_state, call, own);
        load_states(g, call.dfinal, call, own);
        // Once forwards over all segments; the last one's states, and on the way back each one's, are kept.
        for (int pass = 0; pass < 2 * segments - 1; ++pass) {
            bool back = pass >= segments - 1;
            int segment = back ? 2 * (segments - 1) - pass : pass, start = segment * interval;
            int steps = smaller(interval, length - start);
            if (!back) keep(starts + segment * QUADS * THREADS, h);
            if (pass >= segments) recall(h, starts + segment * QUADS * THREADS);
            stage(projections, call, own, start, steps);
            Inputs next;
            next.read(call, own, start);
            for (int step = 0; step < steps; ++step) {
                Inputs now = next;
                if (step + 1 < steps) next.read(call, own, start + step + 1);
                if (back) keep(kept + step * QUADS * THREADS, h);
                float dt = now.step_size();
                advance(h, own, projections + step * 2 * PADDED, dt, dt * now.x);
            }
            if (!back) continue;
            float gate = 0.0f, dout = 0.0f;
            for (int step = steps - 1; step >= 0; --step) {
                Inputs now = next;
                gate = GATED && now.there ? number(*own.z.at(start + step)) : 0.0f;
                dout = now.there ? number(*gradients.dy.at(start + step)) : 0.0f;
                if (step > 0) next.read(call, own, start + step - 1);
                gradients.step_back(h, g, totals, call, own, start + step, now, gate, dout,
                                    projections + step * 2 * PADDED, kept + step * QUADS * THREADS);
            }
        }
        store_states(call.dinitial, g, call, own);
    }
    store_totals(reinterpret_cast<float*>(memory), totals, call, own);
}

// The parameters' gradients: over `fold` blocks. Neighbouring threads have neighbouring columns.
KERNEL __launch_bounds__(256) scan_short_sum(const __grid_constant__ ScanCall call) {
    constexpr int COLUMNS = 32, PIECES = 8;
    SHARED_MEMORY(memory);
    float* sums = reinterpret_cast<float*>(memory);
    int64 column = int64(block_x()) * COLUMNS + thread_index() % COLUMNS, n_states = call.channels * STATES;
    int piece = thread_index() / COLUMNS;
    bool of_a = column < n_states, there = column < n_states + 2 * call.channels;
    int64 stride = of_a ? n_states : call.channels, place = of_a ? column : column - n_states;
    const float* from = of_a ? call.partial_a + place
                             : (place < call.channels ? call.partial_d + place
                                                      : call.partial_bias + (place - call.channels));
    float sum = 0.0f;
    if (there) {
#pragma unroll 4
        for (int64 row = piece; row < call.fold; row += PIECES) sum += from[row * stride];
    }
    sums[thread_index()] = sum;
    synchronize_block();
    if (piece > 0 || !there) return;
    for (int other = 1; other < PIECES; ++other) sum += sums[other * COLUMNS + thread_index()];
    if (of_a) {
        call.dA[column] = sum;
    } else if (place < call.channels) {
        call.dD[place] = sum;
    } else {
        call.dbias[place - call.channels] = sum;
    }
}
