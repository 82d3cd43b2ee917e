// y + D x, gated by SiLU of z, over the root of its mean square in every group of channels: what follows Mamba-2's scan.
//
// A block takes a group of a row at a time and holds it in registers from its first read to its last write.
//
// Constants of one compilation:
//   TYPE       of x, z, the result and their gradients: 0 float32, 1 bfloat16, 2 float16; y is float32
//   VECTOR     numbers that are moved at once
//   CHUNKS     of them a thread holds so many times
//   THREADS    of a block
//   SKIP       whether there are D and x
#include "warp.cuh"

#if TYPE == 0
typedef float Number;
#else
typedef uint16 Number;
#endif

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int WARPS = THREADS / 32;

struct NormCall {
    // Rows of all groups, channels of a group, groups, channels of a head.
    int64 rows, width, groups, head_width;
    const float* y;
    const Number *z, *x;
    // Numbers from a row of them to the next.
    int64 z_row, x_row;
    const float *D, *weight;
    Number* out;
    // One over the root, (rows, groups).
    float* scale;
    // The bits of a float.
    int64 eps;
    // What the backward has beyond that; the last two (blocks, channels).
    const Number* dout;
    float* dy;
    Number *dz, *dx;
    float *dweight, *dD;
};

template <typename T>
struct alignas(VECTOR * sizeof(T)) Piece {
    T at[VECTOR];
};
typedef float Values[CHUNKS][VECTOR];

DEVICE float number(float x) { return x; }
DEVICE float number(uint16 x) { return TYPE == 1 ? from_bfloat16(x) : from_float16(x); }
DEVICE void put(float& place, float x) { place = x; }
DEVICE void put(uint16& place, float x) { place = TYPE == 1 ? to_bfloat16(x) : to_float16(x); }

DEVICE int place_of(int chunk) { return (chunk * THREADS + thread_index()) * VECTOR; }

template <typename T>
DEVICE void load(Values& x, const T* from, int64 width) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        Piece<T> piece = {};
        if (place_of(chunk) < width) piece = *reinterpret_cast<const Piece<T>*>(from + place_of(chunk));
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) x[chunk][i] = number(piece.at[i]);
    }
}

template <typename T>
DEVICE void store(T* to, const Values& x, int64 width) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        if (place_of(chunk) >= width) continue;
        Piece<T> piece;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) put(piece.at[i], x[chunk][i]);
        *reinterpret_cast<Piece<T>*>(to + place_of(chunk)) = piece;
    }
}

DEVICE float sum_of_block(float x, float* memory) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
    synchronize_block();
    if (thread_index() % 32 == 0) memory[thread_index() / 32] = x;
    synchronize_block();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += memory[warp];
    return sum;
}

DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-x * LOG2_E)); }

// One row: what is gated, and the gate.
struct Row {
    Values v, z, x;

    MEMBER void read(const NormCall& call, int64 row, int64 first) {
        load(v, call.y + row * call.groups * call.width + first, call.width);
        load(z, call.z + row * call.z_row + first, call.width);
#if SKIP
        load(x, call.x + row * call.x_row + first, call.width);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
            for (int i = 0; i < VECTOR; ++i)
                if (place_of(chunk) < call.width)
                    v[chunk][i] = fma(call.D[(first + place_of(chunk) + i) / call.head_width], x[chunk][i], v[chunk][i]);
#endif
    }
};

KERNEL __launch_bounds__(THREADS) gated_norm_forward(const __grid_constant__ NormCall call) {
    SHARED_MEMORY(memory);
    int64 row = block_x(), first = block_y() * call.width;
    Row own;
    own.read(call, row, first);
    float sum = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            float z = own.z[chunk][i], gated = own.v[chunk][i] * z * sigmoid(z);
            own.v[chunk][i] = gated;
            sum = fma(gated, gated, sum);
        }
    float mean = sum_of_block(sum, reinterpret_cast<float*>(memory)) / float(call.width);
    float scale = 1.0f / square_root(mean + from_bits(uint32(call.eps)));
    Values weight;
    load(weight, call.weight + first, call.width);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) own.v[chunk][i] *= scale * weight[chunk][i];
    store(call.out + row * call.groups * call.width + first, own.v, call.width);
    if (thread_index() == 0) call.scale[row * call.groups + block_y()] = scale;
}

KERNEL __launch_bounds__(THREADS) gated_norm_backward(const __grid_constant__ NormCall call) {
    SHARED_MEMORY(memory);
    int64 first = block_y() * call.width, all = call.groups * call.width;
    Values weight, dweight = {}, dD = {};
    load(weight, call.weight + first, call.width);
    for (int64 row = block_x(); row < call.rows; row += grid_x()) {
        Row own;
        own.read(call, row, first);
        Values d, opens;
        load(d, call.dout + row * all + first, call.width);
        float scale = call.scale[row * call.groups + block_y()], sum = 0.0f;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                float z = own.z[chunk][i], open = sigmoid(z), normal = own.v[chunk][i] * z * open * scale;
                opens[chunk][i] = open;
                dweight[chunk][i] = fma(d[chunk][i], normal, dweight[chunk][i]);
                d[chunk][i] *= weight[chunk][i];
                sum = fma(d[chunk][i], normal, sum);
            }
        float mean = sum_of_block(sum, reinterpret_cast<float*>(memory)) / float(call.width);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                float z = own.z[chunk][i], open = opens[chunk][i], v = own.v[chunk][i];
                float dgated = scale * (d[chunk][i] - v * z * open * scale * mean);
                own.v[chunk][i] = dgated * z * open;
                own.z[chunk][i] = dgated * v * open * fma(z, 1.0f - open, 1.0f);
            }
        store(call.dy + row * all + first, own.v, call.width);
        store(call.dz + row * all + first, own.z, call.width);
#if SKIP
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
            for (int i = 0; i < VECTOR; ++i)
                if (place_of(chunk) < call.width) {
                    dD[chunk][i] = fma(own.v[chunk][i], own.x[chunk][i], dD[chunk][i]);
                    own.x[chunk][i] = own.v[chunk][i] * call.D[(first + place_of(chunk) + i) / call.head_width];
                }
        store(call.dx + row * all + first, own.x, call.width);
#endif
    }
    store(call.dweight + block_x() * all + first, dweight, call.width);
#if SKIP
    store(call.dD + block_x() * all + first, dD, call.width);
#endif
}
