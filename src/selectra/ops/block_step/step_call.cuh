// The arguments of the kernel of whole Mamba blocks for one position, and how numbers lie in memory.
//
// cuda.py fills the structs word by word in this order: every member has 64 bits. Everything is contiguous.
#pragma once
#include "warp.cuh"

#define NONE -1
#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2

// Constants of one compilation:
//   TYPE      of x, y, the convolution's state and the weights but A_log (RATE) and D (SKIP), which may be wider
//   RESIDUAL  of the incoming stream, or NONE
//   STREAM    of the outgoing stream
//   ROWS      of the batch
//   MODEL     width of the stream
//   INNER     channels
//   STATES    states of a channel
//   WIDTH     of the convolution
//   RANK      of the step's projection
//   DEPTH     blocks
//   WARPS     of a thread block that read weights, a power of two; one more sees to the meetings
//   PIECES    of 16 bytes that a lane reads for a tile of weights, at most
//   TILES     that a warp has on their way at once
//   TOGETHER  channels whose recurrence a warp steps at once

constexpr int LANES = 32, THREADS = (WARPS + 1) * LANES, SELECTED = RANK + 2 * STATES;
// Numbers in 16 bytes.
constexpr int VECTOR = TYPE == FLOAT32 ? 4 : 8, PIECE_BYTES = 16, TILE_BYTES = LANES * PIECES * PIECE_BYTES;
// Rows of weights after which a thread block adds up its warps' sums, and the room of these.
constexpr int BATCH = 64, SUM_BYTES = ROWS * WARPS * BATCH * 4;
constexpr float LOG2_E = 1.4426950408889634f;

// The parts of a block; between two of them all thread blocks have to meet.
//   IN: sum, norm, in_proj, convolution   SELECT: x_proj   SCAN: dt_proj, recurrence, gate   OUT: out_proj
enum { IN, SELECT, SCAN, OUT, PARTS };

struct Block {
    const void *norm_weight, *in_weight, *in_bias, *conv_weight, *conv_bias, *x_weight, *dt_weight, *dt_bias;
    const void *A_log, *D, *out_weight, *out_bias;
    // States: (ROWS, INNER, WIDTH) in TYPE, (ROWS, INNER, STATES) in float32.
    void* conv;
    float* ssm;
};

struct Call {
    // Parts to run, counted through all blocks.
    int64 first, last;
    // (ROWS, MODEL).
    const void *x, *residual;
    void *y, *stream;
    // What is handed from part to part; to which meeting each thread block has come, 0 at first.
    float* work;
    int* met;
    double eps;
    Block blocks[DEPTH];
};

// Places in the workspace: the stream, twice; what a block gives; u behind the convolution; the gate; the step's low
// rank, B and C; the gated output.
constexpr int64 SUM = 0, GIVEN = 2 * ROWS * MODEL, MIXED = GIVEN + ROWS * MODEL, GATE = MIXED + ROWS * INNER;
constexpr int64 LOW = GATE + ROWS * INNER, GATED = LOW + ROWS * SELECTED + (-ROWS * SELECTED & 3);

template <int KIND>
DEVICE float number(const void* data, int64 place) {
    if constexpr (KIND == FLOAT32) return static_cast<const float*>(data)[place];
    if constexpr (KIND == BFLOAT16) return from_bfloat16(static_cast<const uint16*>(data)[place]);
    if constexpr (KIND == FLOAT16) return from_float16(static_cast<const uint16*>(data)[place]);
    return 0.0f;
}

// A weight, or 0 without weights.
DEVICE float weight(const void* data, int64 place) { return data ? number<TYPE>(data, place) : 0.0f; }

template <int KIND>
DEVICE void put(void* data, int64 place, float x) {
    if constexpr (KIND == FLOAT32) static_cast<float*>(data)[place] = x;
    if constexpr (KIND == BFLOAT16) static_cast<uint16*>(data)[place] = to_bfloat16(x);
    if constexpr (KIND == FLOAT16) static_cast<uint16*>(data)[place] = to_float16(x);
}

// As it will be read again.
template <int KIND>
DEVICE float rounded(float x) {
    if constexpr (KIND == BFLOAT16) return from_bfloat16(to_bfloat16(x));
    if constexpr (KIND == FLOAT16) return from_float16(to_float16(x));
    return x;
}

DEVICE void unpack(float& first, float& second, uint32 word) {
    if constexpr (TYPE == BFLOAT16) {
        first = from_bits(word << 16);
        second = from_bits(word & 0xffff0000u);
    } else {
        first = from_float16(uint16(word));
        second = from_float16(uint16(word >> 16));
    }
}

// The numbers of a piece.
DEVICE void unpack(float (&to)[VECTOR], uint4 piece) {
    if constexpr (TYPE == FLOAT32) {
        to[0] = from_bits(piece.x), to[1] = from_bits(piece.y), to[2] = from_bits(piece.z), to[3] = from_bits(piece.w);
    } else {
        unpack(to[0], to[1], piece.x);
        unpack(to[2], to[3], piece.y);
        unpack(to[4], to[5], piece.z);
        unpack(to[6], to[7], piece.w);
    }
}

// log(1 + e^x) = max(x, 0) + e p(e) with e = e^-|x|, as in the scan.
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

DEVICE float silu(float x) { return x * reciprocal(1.0f + exp2_fast(-x * LOG2_E)); }

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
    return x;
}
