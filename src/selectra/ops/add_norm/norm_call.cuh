// The arguments of the kernels of add_norm, and how a thread finds its row, its columns and their numbers.
//
// cuda.py fills the structs word by word in this order: every member has 64 bits. Rows lie one after another.
#pragma once
#include "warp.cuh"

#define NONE -1
#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2

// Constants of one compilation:
//   TYPE          of x, y and their gradients
//   RESIDUAL      of the incoming residual, or NONE
//   SUM           of the outgoing residual; the forward writes it where KEEP is 1
//   WEIGHT, BIAS  types, or NONE
//   CENTRED       whether the mean is taken off
//   VECTOR        neighbouring columns of a thread, 8 (aligned) or 1
//   CHUNKS        how many times so many columns a thread has
//   ROW_THREADS   threads of a row, a power of two; a block has one row where these are more than a warp
//   THREADS       of a block
//   RESIDENT      blocks of a multiprocessor that the registers must suffice for
// and of the backward
//   DSUM          whether the outgoing residual has a gradient
//   DRESIDUAL     whether the incoming residual's gradient is written beside that of x, which has another type

constexpr int ROWS = THREADS / ROW_THREADS;
constexpr int COLUMNS = CHUNKS * VECTOR * ROW_THREADS;

struct ForwardCall {
    int64 rows, width;
    const void *x, *residual, *weight, *bias;
    void *y, *sum;
    // (rows,): one over the root of the mean square; the mean.
    float *scale, *mean;
    // A double's bits.
    double eps;
};

struct BackwardCall {
    int64 rows, width;
    // What was normalised.
    const void *sum, *weight;
    const float *scale, *mean;
    const void *dy, *dsum;
    void *dx, *dresidual;
    // (blocks, width), each block's share, or null.
    float *dweight, *dbias;
};

template <int KIND>
DEVICE float number(const void* data, int64 place) {
    if constexpr (KIND == FLOAT32) return static_cast<const float*>(data)[place];
    if constexpr (KIND == BFLOAT16) return from_bfloat16(static_cast<const uint16*>(data)[place]);
    if constexpr (KIND == FLOAT16) return from_float16(static_cast<const uint16*>(data)[place]);
    return 0.0f;
}

template <int KIND>
DEVICE void unpack(float& first, float& second, uint32 word) {
    if constexpr (KIND == BFLOAT16) {
        first = from_bits(word << 16);
        second = from_bits(word & 0xffff0000u);
    } else {
        first = from_float16(uint16(word));
        second = from_float16(uint16(word >> 16));
    }
}

template <int KIND>
DEVICE uint32 pack(float first, float second) {
    if constexpr (KIND == BFLOAT16) return pack_bfloat16(first, second);
    return pack_float16(first, second);
}

// VECTOR numbers from `place` on, which VECTOR divides.
template <int KIND>
DEVICE void load(float (&to)[VECTOR], const void* data, int64 place) {
    if constexpr (VECTOR == 1) {
        to[0] = number<KIND>(data, place);
    } else if constexpr (KIND == FLOAT32) {
#pragma unroll
        for (int i = 0; i < VECTOR; i += 4) {
            float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + place + i);
            to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
        }
    } else {
        uint4 words = *reinterpret_cast<const uint4*>(static_cast<const uint16*>(data) + place);
        unpack<KIND>(to[0], to[1], words.x);
        unpack<KIND>(to[2], to[3], words.y);
        unpack<KIND>(to[4], to[5], words.z);
        unpack<KIND>(to[6], to[7], words.w);
    }
}

template <int KIND>
DEVICE void store(void* data, int64 place, const float (&from)[VECTOR]) {
    if constexpr (VECTOR == 1) {
        if constexpr (KIND == FLOAT32) static_cast<float*>(data)[place] = from[0];
        if constexpr (KIND == BFLOAT16) static_cast<uint16*>(data)[place] = to_bfloat16(from[0]);
        if constexpr (KIND == FLOAT16) static_cast<uint16*>(data)[place] = to_float16(from[0]);
    } else if constexpr (KIND == FLOAT32) {
#pragma unroll
        for (int i = 0; i < VECTOR; i += 4) {
            float4 four;
            four.x = from[i], four.y = from[i + 1], four.z = from[i + 2], four.w = from[i + 3];
            *reinterpret_cast<float4*>(static_cast<float*>(data) + place + i) = four;
        }
    } else {
        uint4 words;
        words.x = pack<KIND>(from[0], from[1]);
        words.y = pack<KIND>(from[2], from[3]);
        words.z = pack<KIND>(from[4], from[5]);
        words.w = pack<KIND>(from[6], from[7]);
        *reinterpret_cast<uint4*>(static_cast<uint16*>(data) + place) = words;
    }
}

// As it will be read again.
template <int KIND>
DEVICE float rounded(float x) {
    if constexpr (KIND == BFLOAT16) return from_bfloat16(to_bfloat16(x));
    if constexpr (KIND == FLOAT16) return from_float16(to_float16(x));
    return x;
}

DEVICE int first_column(int chunk) { return (chunk * ROW_THREADS + thread_index() % ROW_THREADS) * VECTOR; }

// The sum over a row's threads, the same bits in all of them. All threads of a block take part.
DEVICE float row_sum(float x, float* room) {
    constexpr int LANES = ROW_THREADS < 32 ? ROW_THREADS : 32;
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
    if constexpr (ROW_THREADS > 32) {
        constexpr int WARPS = ROW_THREADS / 32;
        // The last sum has been read by all.
        synchronize_block();
        if (thread_index() % 32 == 0) room[thread_index() / 32] = x;
        synchronize_block();
        x = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) x += room[warp];
    }
    return x;
}
