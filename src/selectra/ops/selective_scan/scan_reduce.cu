// What comes between and after the passes: states are handed from chunk to chunk, partial gradients are summed in a
// fixed order, which gives the same bits in every run. A warp's threads read neighbouring numbers.
#include "scan_call.cuh"

#if SLICED
// The row, and group, of B and C that a row of a slice's partial sums belongs to, or -1 if there is none.
DEVICE int64 find_row_group(const ScanCall& call, int64 row_group) {
    int64 row = row_group / call.groups, place = call.first_step + row % call.slice, chunk = row / call.slice;
    int64 step = chunk % call.n_chunks * call.span + place;
    if (place >= call.span || step >= call.length) return -1;
    int64 position = call.reverse ? call.length - 1 - step : step;
    return ((call.first_sequence + chunk / call.n_chunks) * call.length + position) * call.groups +
           row_group % call.groups;
}
#endif

// The gradients of B and of C: over the blocks of channels of a group.
DEVICE void reduce_projection(const ScanCall& call, int64 index, int blocks) {
    int state = int(index % STATES), which = int(index / STATES % 2);
    int64 row_group = index / (2 * STATES);
    const float* from = call.partial_bc + (row_group * blocks * 2 + which) * STATES + state;
#if SLICED
    row_group = find_row_group(call, row_group);
    if (row_group < 0) return;
#endif
    float sum = 0.0f;
    // A state that is not finite would leave not-a-numbers where nothing is.
    if (call.mask != nullptr && call.mask[row_group / call.groups] == 0) blocks = 0;
#pragma unroll 4
    for (int block = 0; block < blocks; ++block) sum += from[int64(block) * 2 * STATES];
    put((which == 0 ? call.dB : call.dC) + row_group * STATES + state, sum);
}

// A parameter's gradient: over the sequences and their chunks.
DEVICE float reduce_rows(const float* from, int64 rows, int64 stride) {
    float sum = 0.0f;
#pragma unroll 4
    for (int64 row = 0; row < rows; ++row) sum += from[row * stride];
    return sum;
}

// The partial sums of a parameter's gradient, for the columns of A, of D and of the step's bias, and the next row's.
DEVICE float* find_column(const ScanCall& call, int64 column, int64& stride) {
    int64 n_states = call.channels * STATES;
    stride = column < n_states ? n_states : call.channels;
    if (column < n_states) return call.partial_a + column;
    column -= n_states;
    return column < call.channels ? call.partial_d + column : call.partial_bias + column - call.channels;
}

// One thread for every column would be slow where sequences are many and channels few: pieces of rows come first.
KERNEL __launch_bounds__(256) scan_fold(const __grid_constant__ ScanCall call) {
    int64 columns = call.channels * (STATES + 2), rows = call.n_seqs * call.n_chunks, stride;
    int64 index = int64(block_x()) * 256 + thread_index(), first = index / columns * call.fold;
    if (first >= rows) return;
    float* from = find_column(call, index % columns, stride) + first * stride;
    *from = reduce_rows(from, rows - first < call.fold ? rows - first : call.fold, stride);
}

// call.chunk here: blocks of channels of a group.
KERNEL __launch_bounds__(256) scan_reduce(const __grid_constant__ ScanCall call) {
    int64 index = int64(block_x()) * 256 + thread_index();
    int64 batch = PACKED ? 1 : call.n_seqs, rows = call.n_seqs * call.n_chunks;
    int64 all_rows = SLICED ? call.slice_sequences * call.n_chunks * call.slice : batch * call.length;
    int64 n_projections = all_rows * call.groups * 2 * STATES, n_states = call.channels * STATES;
    if (index < n_projections) {
        reduce_projection(call, index, int(call.chunk));
        return;
    }
    // The parameters' come after all slices.
    if (SLICED && (call.first_step > 0 || call.first_sequence + call.slice_sequences < call.n_seqs)) return;
    index -= n_projections;
    if (index >= n_states + 2 * call.channels) return;
    int64 stride;
    const float* from = find_column(call, index, stride);
    float sum = reduce_rows(from, (rows + call.fold - 1) / call.fold, stride * call.fold);
    if (index < n_states) {
        call.dA[index] = sum;
    } else if (index < n_states + call.channels) {
        call.dD[index - n_states] = sum;
    } else {
        call.dbias[index - n_states - call.channels] = sum;
    }
}

// Hand the state, or the adjoint, through a sequence's chunks: chunk_state holds what each makes of zero, and gets what
// stands before it; before the first stands `begin`, which may be null.
DEVICE void chain(const ScanCall& call, const float* begin, bool back) {
    int64 index = int64(block_x()) * 256 + thread_index(), n_states = call.channels * STATES;
    if (index >= call.n_seqs * n_states) return;
    int64 sequence = index / n_states, place = index % n_states;
    int64 channel = place / STATES, state = place % STATES;
    float a = call.A[channel * call.A_channel + state * call.A_state] * LOG2_E;
    float h = begin == nullptr ? 0.0f : begin[index];
    for (int64 step = 0; step < call.n_chunks; ++step) {
        int64 chunk = sequence * call.n_chunks + (back ? call.n_chunks - 1 - step : step);
        // What the last one makes nobody asks for, and it may not be there.
        bool asked = step + 1 < call.n_chunks;
        float end = asked ? call.chunk_state[chunk * n_states + place] : 0.0f;
        call.chunk_state[chunk * n_states + place] = h;
        if (asked) h = fma(exp2_fast(a * call.chunk_delta[chunk * call.channels + channel]), h, end);
    }
}

KERNEL __launch_bounds__(256) scan_chain_forward(const __grid_constant__ ScanCall call) {
    chain(call, call.initial_state, false);
}

KERNEL __launch_bounds__(256) scan_chain_backward(const __grid_constant__ ScanCall call) {
    chain(call, call.dfinal, true);
}

// What all chunks together make of zero, into final_state; chunk_state stays.
DEVICE void add_up(const ScanCall& call, bool back) {
    int64 index = int64(block_x()) * 256 + thread_index(), n_states = call.channels * STATES;
    if (index >= call.n_seqs * n_states) return;
    int64 sequence = index / n_states, place = index % n_states;
    int64 channel = place / STATES, state = place % STATES;
    float a = call.A[channel * call.A_channel + state * call.A_state] * LOG2_E, h = 0.0f;
    for (int64 step = 0; step < call.n_chunks; ++step) {
        int64 chunk = sequence * call.n_chunks + (back ? call.n_chunks - 1 - step : step);
        float decay = exp2_fast(a * call.chunk_delta[chunk * call.channels + channel]);
        h = fma(decay, h, call.chunk_state[chunk * n_states + place]);
    }
    call.final_state[index] = h;
}

KERNEL __launch_bounds__(256) scan_effect(const __grid_constant__ ScanCall call) { add_up(call, false); }

KERNEL __launch_bounds__(256) scan_effect_back(const __grid_constant__ ScanCall call) { add_up(call, true); }
