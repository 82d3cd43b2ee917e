// Adds the routes' results at every position: (rows, k, d) to (rows, d), in float32, in the order of the routes.
//
// Constants of one compilation:
//   TYPE       of the numbers: 0 float32, 1 bfloat16, 2 float16
//   VECTORS    whether 16 bytes of neighbouring numbers can be moved at once
//   ROUTES     k
#include "warp.cuh"

constexpr int THREADS = 256;

#if TYPE == 0
typedef float Number;
#else
typedef uint16 Number;
#endif

struct SumCall {
    const Number* from;
    Number* to;
    int64 rows, d;
};

constexpr int SIZE = VECTORS ? 16 / int(sizeof(Number)) : 1;

// Numbers that are moved together.
struct alignas(SIZE * sizeof(Number)) Piece {
    Number numbers[SIZE];
};

DEVICE float number(float x) { return x; }
DEVICE float number(uint16 x) { return TYPE == 1 ? from_bfloat16(x) : from_float16(x); }
DEVICE void put(float& place, float x) { place = x; }
DEVICE void put(uint16& place, float x) { place = TYPE == 1 ? to_bfloat16(x) : to_float16(x); }

KERNEL __launch_bounds__(THREADS) sum_routes(const __grid_constant__ SumCall call) {
    int64 index = int64(block_x()) * THREADS + thread_index(), in_row = call.d / SIZE;
    if (index >= call.rows * in_row) return;
    // A division of 64 bits takes a hundred instructions.
    int64 row = index >> 32 ? index / in_row : uint32(index) / uint32(in_row);
    const Piece* from = reinterpret_cast<const Piece*>(call.from) + row * (ROUTES - 1) * in_row + index;
    Piece pieces[ROUTES];
#pragma unroll
    for (int k = 0; k < ROUTES; ++k) pieces[k] = from[k * in_row];
    Piece sum;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
        float total = number(pieces[0].numbers[i]);
#pragma unroll
        for (int k = 1; k < ROUTES; ++k) total += number(pieces[k].numbers[i]);
        put(sum.numbers[i], total);
    }
    reinterpret_cast<Piece*>(call.to)[index] = sum;
}
