// The arguments of the scan's CUDA kernels, and how a block finds its sequence, its channels and their numbers.
//
// cuda.py fills the structs word by word in this order: every member has 64 bits. Strides count elements.
#pragma once
#include "warp.cuh"

#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2

// Constants of one compilation:
//   STATES        states of a channel, n
//   TYPE          of u, delta, z, B, C, dy and their gradients
//   OUT_TYPE      of y
//   GATED         whether there is z
//   SOFTPLUS      whether delta goes through softplus
//   MASKED        whether there is a mask
//   PACKED        whether sequences are packed along the length
//   ALONG_TIME    whether neighbouring lanes read neighbouring positions rather than channels
//   VECTORS       whether four neighbouring channels lie side by side, aligned, in all activations
//   ROUTES        whether positions are a grid, of which every group of channels walks its own route; then activations
//                 are (b, l, g, d / g), and there are neither initial nor final states. 0 where it is not given
//   SLICED        whether a launch of the backward takes a part of the sequences and of every chunk's steps. 0 likewise
#ifndef ROUTES
#define ROUTES 0
#endif
#ifndef SLICED
#define SLICED 0
#endif

// Whether sums keep float32's digits. bfloat16 has so few that what the tensor cores cut off is lost in its rounding.
#define EXACT (TYPE != BFLOAT16)

#if TYPE == FLOAT32
typedef float Number;
#else
typedef uint16 Number;
#endif
#if OUT_TYPE == FLOAT32
typedef float Output;
#else
typedef uint16 Output;
#endif

// u, delta, z, y and their gradients: (b, l, d).
template <typename T>
struct Activation {
    T* data;
#if ROUTES
    int64 batch, row, group, channel;
#else
    int64 batch, row, channel;
#endif
};

// B and C: (b, l, g, n).
struct Projection {
    const Number* data;
    int64 batch, row, group, state;
};

struct ScanCall {
    int64 n_seqs, length, channels, groups, reverse;
    // Positions between two checkpoints; positions of a chunk, a multiple of it; chunks of the longest sequence.
    int64 interval, chunk, n_chunks;
    // With SLICED, of one launch: its first sequence and how many it takes; its first step in every chunk and how many it
    // takes, a multiple of the interval; steps of a chunk, or of the only one.
    int64 first_sequence, slice_sequences, first_step, slice, span;
    // Rows of the parameters' partial sums that scan_fold adds up into the first of them; 1 where it is not launched.
    int64 fold;
    Activation<const Number> u, delta, z;
    Projection B, C;
    const float* A;
    int64 A_channel, A_state;
    // Each may be null.
    const float *D, *delta_bias, *initial_state;
    const unsigned char* mask;
    const int* cu_seqlens;
    Activation<Output> y;
    // (n_seqs, d, n) or null; (checkpoints, d, n) or null; state at the start of every chunk (n_seqs, n_chunks, d, n) or null.
    float *final_state, *checkpoints, *chunk_state;
    // Sum of delta over every chunk (n_seqs, n_chunks, d), beside chunk_state.
    float* chunk_delta;
    // Set to 1 where A is not finite; lies in the host's memory.
    volatile int* fault;
    // What the backward has beyond that.
    Activation<const Number> dy;
    Activation<Number> du, ddelta, dz;
    const float* dfinal;
    float* dinitial;
    // (rows, blocks of channels, 2, n); (n_seqs * n_chunks, d, n); twice (n_seqs * n_chunks, d).
    float *partial_bc, *partial_a, *partial_d, *partial_bias;
    // Sums of the partial results, contiguous: (b, l, g, n) twice, (d, n), (d,), (d,).
    Number *dB, *dC;
    float *dA, *dD, *dbias;
#if ROUTES
    // Four bits a group, see Route; positions of a row of the grid; x / (rows of the grid) is x magic / 2^(32 + shift).
    int64 routes, width, magic, shift;
#endif
};

#if ROUTES
// The order in which a group of channels walks the grid: row by row or, DOWN, column by column, from the first position
// or, BACK, from the last.
enum { BACK = 1, DOWN = 2 };

struct Route {
    bool back;
    // From one step to the next; how much less it is from the end of a column to the start of the next.
    int ahead, less;
    uint32 magic;
    int shift;

    MEMBER void find(int64 length, int64 width, int64 call_magic, int64 call_shift, int kind) {
        back = kind & BACK;
        ahead = kind & DOWN ? int(width) : 1;
        less = kind & DOWN ? int(length) - 1 : 0;
        magic = uint32(call_magic);
        shift = int(call_shift);
    }

    // Step s of a walk by columns is in column s / height and row s % height: position s width - s / height (l - 1).
    MEMBER int position(int length, int step) const {
        uint32 s = back ? length - 1 - step : step;
        uint32 column = uint32(uint64(s) * magic >> 32) >> shift;
        return int(s * ahead - column * less);
    }
};
#endif

// One sequence: a row of the batch, or a part of the only row.
struct Sequence {
    int index, batch, start, length;
    int first_checkpoint;
#if ROUTES
    Route route;
#endif
};

// As the channels of `group` walk it.
DEVICE Sequence find_sequence(const ScanCall& call, int index, int group) {
    Sequence sequence;
    sequence.index = index;
#if ROUTES
    sequence.route.find(call.length, call.width, call.magic, call.shift, int(call.routes >> (4 * group)));
#endif
#if PACKED
    sequence.batch = 0;
    sequence.start = call.cu_seqlens[index];
    sequence.length = call.cu_seqlens[index + 1] - sequence.start;
    sequence.first_checkpoint = sequence.start / int(call.interval) + index;
#else
    sequence.batch = index;
    sequence.start = 0;
    sequence.length = int(call.length);
    sequence.first_checkpoint = index * ((int(call.length) + int(call.interval) - 1) / int(call.interval));
#endif
    return sequence;
}

// The chunk that holds a sequence's end; an empty sequence has one chunk.
DEVICE int last_chunk(const ScanCall& call, const Sequence& sequence) {
    return call.n_chunks == 1 || sequence.length == 0 ? 0 : (sequence.length - 1) / int(call.chunk);
}

// The position of a sequence's step, from the sequence's start.
DEVICE int position_in(const ScanCall& call, const Sequence& sequence, int step) {
#if ROUTES
    return sequence.route.position(sequence.length, step);
#else
    return call.reverse ? sequence.length - 1 - step : step;
#endif
}

// The position in memory of a sequence's step.
DEVICE int position(const ScanCall& call, const Sequence& sequence, int step) {
    return sequence.start + position_in(call, sequence, step);
}

// A block's channels: all of one group.
struct Channels {
    int first, end, group;
#if ROUTES
    // The first one's place in its group.
    int within;
#endif
};

// From the start of an activation to the first of the channels.
template <typename T>
DEVICE int64 first_of(const Activation<T>& x, const Channels& channels) {
#if ROUTES
    return channels.group * x.group + channels.within * x.channel;
#else
    return channels.first * x.channel;
#endif
}

// Blocks of WIDTH channels, over all groups.
template <int WIDTH>
DEVICE int count_blocks(const ScanCall& call) {
    int per_group = int(call.channels / call.groups);
    return int(call.groups) * ((per_group + WIDTH - 1) / WIDTH);
}

template <int WIDTH>
DEVICE Channels find_channels(const ScanCall& call, int block) {
    int per_group = int(call.channels / call.groups);
    int blocks = (per_group + WIDTH - 1) / WIDTH;
    Channels channels;
    channels.group = block / blocks;
    channels.first = channels.group * per_group + (block % blocks) * WIDTH;
#if ROUTES
    channels.within = (block % blocks) * WIDTH;
#endif
    channels.end = (channels.group + 1) * per_group;
    return channels;
}

DEVICE bool present(const ScanCall& call, const Sequence& sequence, int row) {
#if MASKED
    return call.mask[int64(sequence.batch) * call.length + row] != 0;
#else
    return true;
#endif
}

DEVICE float number(float x) { return x; }
DEVICE float number(uint16 x) {
#if TYPE == BFLOAT16
    return from_bfloat16(x);
#else
    return from_float16(x);
#endif
}

DEVICE void put(float* place, float x) { *place = x; }
DEVICE void put(uint16* place, float x) {
#if TYPE == BFLOAT16
    *place = to_bfloat16(x);
#else
    *place = to_float16(x);
#endif
}

// Four numbers of one activation, as they lie in memory.
struct Quad {
#if TYPE == FLOAT32
    uint4 words;
#else
    uint2 words;
#endif
};

DEVICE void unpack(const Quad& quad, float (&x)[4]) {
#if TYPE == FLOAT32
    x[0] = from_bits(quad.words.x);
    x[1] = from_bits(quad.words.y);
    x[2] = from_bits(quad.words.z);
    x[3] = from_bits(quad.words.w);
#else
    x[0] = number(uint16(quad.words.x));
    x[1] = number(uint16(quad.words.x >> 16));
    x[2] = number(uint16(quad.words.y));
    x[3] = number(uint16(quad.words.y >> 16));
#endif
}

DEVICE Quad pack(const float (&x)[4]) {
    Quad quad;
#if TYPE == FLOAT32
    quad.words = {bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3])};
#elif TYPE == BFLOAT16
    quad.words = {pack_bfloat16(x[0], x[1]), pack_bfloat16(x[2], x[3])};
#else
    quad.words = {pack_float16(x[0], x[1]), pack_float16(x[2], x[3])};
#endif
    return quad;
}

DEVICE Quad nothing() {
    Quad quad;
#if TYPE == FLOAT32
    quad.words = {0, 0, 0, 0};
#else
    quad.words = {0, 0};
#endif
    return quad;
}

DEVICE void store_four(Number* place, const float (&x)[4]) { *reinterpret_cast<Quad*>(place) = pack(x); }
#if TYPE != FLOAT32 && OUT_TYPE == FLOAT32
DEVICE void store_four(float* place, const float (&x)[4]) {
    *reinterpret_cast<float4*>(place) = {x[0], x[1], x[2], x[3]};
}
#endif

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float LARGEST = 3.4028234e38f;
constexpr uint32 NOT_A_NUMBER = 0x7fc00000u;

// log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^-|x|; log(1 + e) = e p(e), p within 3e-8 on [0, 1]. One exponential,
// and accurate for small steps, which 1 + e would round.
DEVICE float softplus(float x) {
    float e = exp2_fast(-absolute(x) * LOG2_E);
    float p = 0.00541919144f;
    p = fma(p, e, -0.0302208401f);
    p = fma(p, e, 0.0793320388f);
    p = fma(p, e, -0.137516066f);
    p = fma(p, e, 0.191450521f);
    p = fma(p, e, -0.248525485f);
    p = fma(p, e, 0.333203673f);
    p = fma(p, e, -0.499995828f);
    p = fma(p, e, 1.0f);
    return fma(p, e, larger(x, 0.0f));
}

DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-x * LOG2_E)); }
