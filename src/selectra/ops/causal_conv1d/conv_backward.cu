// The causal depthwise convolution backward: gradients of x, of the filters and biases, of the initial state.
//
// A thread walks a chunk of the length for VECTOR neighbouring channels, with the last k - 1 inputs and gradients of
// the filter's sums in registers; the sums themselves are computed again. x_t is reached by the gradients of steps
// t ... t + k - 1, so that a thread goes on k - 1 steps beyond its chunk. No atomics: every row of blocks writes its
// sums over positions, and conv_sum adds the rows in their order.
#include "conv_tile.cuh"

// The gradient of the filter's sum at one step.
DEVICE float through_activation(float dy, float sum) {
    if (!SILU) return dy;
    float gate = sigmoid(sum);
    return dy * gate * fma(sum, 1.0f - gate, 1.0f);
}

// The gradient of the initial state; one thread a state and channel. The oldest input reaches no output.
DEVICE void write_initial_gradient(const BackwardCall& call, bool bad) {
    const ConvCall& in = call.in;
    int64 index = int64(block_x() - int(in.tiles)) * THREADS + thread_index();
    int64 state = index / in.channels;
    if (state >= in.n_states) return;
    int channel = int(index % in.channels);
    Steps steps = steps_between(in, int(state), PACKED ? 0 : int(state), 0, int(in.length));
    const float* weight = in.weight + channel * in.weight_channel;
    float sums[TAPS];
#pragma unroll
    for (int i = 0; i < TAPS; ++i) {
        sums[i] = 0.0f;
        if (call.dfinal != nullptr && i >= steps.length) {
            sums[i] = call.dfinal[state * call.dfinal_state + channel * call.dfinal_channel +
                                  (i - steps.length) * call.dfinal_tap];
        }
    }
#pragma unroll 1
    for (int t = 0; t < PAST && t < steps.length; ++t) {
        int place = position(steps, t);
        if (!present(in, steps.batch, place)) continue;
        float sum = in.bias == nullptr ? 0.0f : in.bias[channel * in.bias_channel];
        for (int i = 0; i < TAPS; ++i) {
            sum = fma(weight[i * in.weight_tap], input(in, steps, channel, t - PAST + i), sum);
        }
        float dy = number(call.dy.data[steps.batch * call.dy.batch + place * call.dy.time + channel * call.dy.channel]);
        float grad = through_activation(dy, sum);
#pragma unroll
        for (int i = 1; i < TAPS; ++i) {
            if (i > t) sums[i] = fma(weight[(i - 1 - t) * in.weight_tap], grad, sums[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < TAPS; ++i) call.dinitial[index * TAPS + i] = bad ? from_bits(NOT_A_NUMBER) : sums[i];
}

// What a thread carries along the length, and what it sums.
struct Carried {
    // Inputs and gradients of the filter's sums at the last k - 1 steps, oldest first.
    float past[WINDOW][VECTOR], grads[WINDOW][VECTOR];
    float dweight[TAPS][VECTOR], dbias[VECTOR];
};

// What the gradient of the final state adds to that of x at step t, one of the last k.
DEVICE void add_state_gradient(const BackwardCall& call, const Steps& steps, int channel, int t, float (&dx)[VECTOR]) {
    if (call.dfinal == nullptr || t < steps.length - TAPS) return;
    const float* dfinal = call.dfinal + steps.state * call.dfinal_state + channel * call.dfinal_channel +
                          (t - steps.length + TAPS) * call.dfinal_tap;
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) dx[c] += dfinal[c * call.dfinal_channel];
}

// COUNT steps; what is not WHOLE may go beyond the thread's part, by the k - 1 steps that its last inputs reach, and
// beyond the sequence, where nothing is.
template <int COUNT, bool WHOLE>
DEVICE void walk_backward(const BackwardCall& call, const Steps& steps, const Filters& filters, int channel, int from,
                          Carried& carried) {
    const ConvCall& in = call.in;
    int reached = steps.last + PAST;
    int end = reached < steps.length ? reached : steps.length;
    Line lines[COUNT], dlines[COUNT];
    load_lines<COUNT, WHOLE, X_ALONG_TIME>(in.x, steps, channel, from, end, lines);
    load_lines<COUNT, WHOLE, DY_ALONG_TIME>(call.dy, steps, channel, from, end, dlines);
    uint32 there = MASKED ? load_present<COUNT>(in, steps, from, end) : ~0u;
    uint32 there_before = MASKED ? load_present<COUNT>(in, steps, from - PAST, end) : ~0u;
    // The gradient of x at a step is complete with that of the filter's sum k - 1 steps later.
    Number* done = call.dx + (steps.batch * in.length + position(steps, from - PAST)) * in.channels + channel;
    int64 step = steps.direction * in.channels;
#pragma unroll
    for (int u = 0; u < COUNT; ++u) {
        int t = from + u;
        if (!WHOLE && t >= reached) continue;
        float now[VECTOR], grad[VECTOR], dx[VECTOR];
        unpack(lines[u], now);
        unpack(dlines[u], grad);
        bool absent = (MASKED && !(there >> u & 1)) || (!WHOLE && t >= end);
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            if (absent) now[c] = 0.0f;
            float sum = SILU ? filtered(filters, carried.past, now[c], c) : 0.0f;
            grad[c] = through_activation(grad[c], sum);
            if (absent) grad[c] = 0.0f;
            if (WHOLE || t < steps.last) {
                carried.dbias[c] += grad[c];
#pragma unroll
                for (int i = 0; i < PAST; ++i) {
                    carried.dweight[i][c] = fma(grad[c], carried.past[i][c], carried.dweight[i][c]);
                }
                carried.dweight[PAST][c] = fma(grad[c], now[c], carried.dweight[PAST][c]);
            }
            dx[c] = filters.taps[0][c] * grad[c];
#pragma unroll
            for (int i = 0; i < PAST; ++i) dx[c] = fma(filters.taps[PAST - i][c], carried.grads[i][c], dx[c]);
        }
        advance(carried.past, now);
        advance(carried.grads, grad);
        // Known for most steps when this is compiled.
        if (!(WHOLE && u >= PAST) && t - PAST < steps.first) continue;
        if (!WHOLE) add_state_gradient(call, steps, channel, t - PAST, dx);
        bool was_absent = MASKED && !(there_before >> u & 1);
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            if (was_absent) dx[c] = 0.0f;
        }
        *reinterpret_cast<Line*>(done + u * step) = pack(dx);
    }
}

DEVICE void run_backward(const BackwardCall& call, const Steps& steps, const Filters& filters, int channel,
                         Carried& carried) {
    load_past(call.in, steps, channel, carried.past);
#pragma unroll
    for (int i = 0; i < WINDOW; ++i) {
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) carried.grads[i][c] = 0.0f;
    }
    // Filters longer than a group go step by step to the end: their windows are moved once a step.
    constexpr int LAST = GROUP > 1 ? GROUP + PAST : 1;
    int t = steps.first;
    // The gradient of the final state reaches the last k inputs alone.
#pragma unroll 1
    for (; t + GROUP <= steps.last && t + GROUP < steps.length; t += GROUP) {
        walk_backward<GROUP, true>(call, steps, filters, channel, t, carried);
    }
#pragma unroll 1
    for (; t < steps.last + PAST; t += LAST) {
        walk_backward<LAST, false>(call, steps, filters, channel, t, carried);
    }
}

// The block's sums over its rows, in the order of the rows.
DEVICE void reduce_rows(const BackwardCall& call, const Place& at, const Carried& carried, float* room) {
    int width = int(call.in.lanes) * VECTOR, rows = int(call.in.rows);
    float* mine = room + at.row * (TAPS + 1) * width + at.lane * VECTOR;
    if (at.row < rows) {
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap) write_pieces(mine + tap * width, carried.dweight[tap]);
        write_pieces(mine + TAPS * width, carried.dbias);
    }
    synchronize_block();
    int first = at.channel - at.lane * VECTOR;
    for (int i = thread_index(); i < (TAPS + 1) * width; i += THREADS) {
        int tap = i / width, channel = first + i % width;
        if (channel >= int(call.in.channels)) continue;
        float sum = 0.0f;
        for (int row = 0; row < rows; ++row) sum += room[row * (TAPS + 1) * width + i];
        if (tap < TAPS) {
            float* row = call.dweight + at.block_row * call.dweight_row;
            row[channel * call.dweight_channel + tap * call.dweight_tap] = sum;
        } else if (call.dbias != nullptr) {
            call.dbias[at.block_row * call.dbias_row + channel] = sum;
        }
    }
}

KERNEL __launch_bounds__(THREADS, RESIDENT) conv_backward(const __grid_constant__ BackwardCall call) {
    SHARED_MEMORY(shared);
    float* room = reinterpret_cast<float*>(shared);
    bool bad = bad_borders(call.in, room);
    if (block_x() >= int(call.in.tiles)) {
        write_initial_gradient(call, bad);
        return;
    }
    Place at = find_place(call.in);
    share_filters(call.in, at, room);
    synchronize_block();
    Filters filters;
    Carried carried;
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
        carried.dbias[c] = bad ? from_bits(NOT_A_NUMBER) : 0.0f;
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap) carried.dweight[tap][c] = carried.dbias[c];
    }
    if (at.used && bad) {
        write_nothing(call.in, at, call.dx);
    } else if (at.used) {
        read_filters(call.in, at, room, filters);
#if PACKED
        int state = sequence_at(call.in, at.low);
        for (int low = at.low; low < at.high && state < int(call.in.n_states); ++state) {
            Steps steps = steps_between(call.in, state, 0, low, at.high);
            if (steps.first < steps.last) run_backward(call, steps, filters, at.channel, carried);
            low = border(call.in, state + 1);
        }
#else
        Steps steps = steps_between(call.in, at.batch, at.batch, at.low, at.high);
        run_backward(call, steps, filters, at.channel, carried);
#endif
    }
    synchronize_block();
    reduce_rows(call, at, carried, room);
}
