// The causal depthwise convolution forward: y_t = act(bias + sum_j w_j x_{t - k + 1 + j}).
//
// A thread walks a chunk of the length for VECTOR neighbouring channels with the last k - 1 inputs in registers, so
// that every number is read once but for k - 1 steps before a chunk, which lie in the caches.
#include "conv_tile.cuh"

// The last k inputs of every sequence, states and positions alike; one thread a state and channel.
DEVICE void write_final_state(const ForwardCall& call, bool bad) {
    int64 index = int64(block_x() - int(call.in.tiles)) * THREADS + thread_index();
    int64 state = index / call.in.channels;
    if (state >= call.in.n_states) return;
    int channel = int(index % call.in.channels);
    Steps steps = steps_between(call.in, int(state), PACKED ? 0 : int(state), 0, int(call.in.length));
    for (int i = 0; i < TAPS; ++i) {
        float last = input(call.in, steps, channel, steps.length - TAPS + i);
        call.final_state[index * TAPS + i] = bad ? from_bits(NOT_A_NUMBER) : last;
    }
}

template <int COUNT, bool WHOLE>
DEVICE void walk_forward(const ForwardCall& call, const Steps& steps, const Filters& filters, int channel, int from,
                         float (&past)[WINDOW][VECTOR]) {
    Line lines[COUNT];
    load_lines<COUNT, WHOLE, X_ALONG_TIME>(call.in.x, steps, channel, from, steps.last, lines);
    uint32 there = MASKED ? load_present<COUNT>(call.in, steps, from, steps.last) : ~0u;
    Number* y = call.y + (steps.batch * call.in.length + position(steps, from)) * call.in.channels + channel;
    int64 step = steps.direction * call.in.channels;
#pragma unroll
    for (int u = 0; u < COUNT; ++u) {
        if (!WHOLE && from + u >= steps.last) continue;
        float now[VECTOR], out[VECTOR];
        unpack(lines[u], now);
        bool absent = MASKED && !(there >> u & 1);
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            if (absent) now[c] = 0.0f;
            float sum = filtered(filters, past, now[c], c);
            out[c] = SILU ? sum * sigmoid(sum) : sum;
            if (absent) out[c] = 0.0f;
        }
        advance(past, now);
        *reinterpret_cast<Line*>(y + u * step) = pack(out);
    }
}

DEVICE void run_forward(const ForwardCall& call, const Steps& steps, const Filters& filters, int channel) {
    float past[WINDOW][VECTOR];
    load_past(call.in, steps, channel, past);
    int t = steps.first;
#pragma unroll 1
    for (; t + GROUP <= steps.last; t += GROUP) {
        walk_forward<GROUP, true>(call, steps, filters, channel, t, past);
    }
    if (t < steps.last) walk_forward<GROUP, false>(call, steps, filters, channel, t, past);
}

KERNEL __launch_bounds__(THREADS, RESIDENT) conv_forward(const __grid_constant__ ForwardCall call) {
    SHARED_MEMORY(shared);
    float* room = reinterpret_cast<float*>(shared);
    bool bad = bad_borders(call.in, room);
    if (block_x() >= int(call.in.tiles)) {
        write_final_state(call, bad);
        return;
    }
    Place at = find_place(call.in);
    share_filters(call.in, at, room);
    synchronize_block();
    if (!at.used) return;
    if (bad) {
        write_nothing(call.in, at, call.y);
        return;
    }
    Filters filters;
    read_filters(call.in, at, room, filters);
#if PACKED
    int state = sequence_at(call.in, at.low);
    for (int low = at.low; low < at.high && state < int(call.in.n_states); ++state) {
        Steps steps = steps_between(call.in, state, 0, low, at.high);
        if (steps.first < steps.last) run_forward(call, steps, filters, at.channel);
        low = border(call.in, state + 1);
    }
#else
    run_forward(call, steps_between(call.in, at.batch, at.batch, at.low, at.high), filters, at.channel);
#endif
}
