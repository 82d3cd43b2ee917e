// Sums over a warp's channels and over its states, by small products on the tensor cores. README.md, "CUDA", says why.
#pragma once
#include "scan_tiles.cuh"

// Steps that are taken together.
constexpr int GROUP = 4;
// Rows of sums for the gradients of B and of C, padded against bank conflicts.
constexpr int GATHERED_ROW = 2 * PADDED_STATES + 4;

// Ones and zeros that choose rows and columns of the small products. The tensor cores want them in neighbouring
// registers, and a compiler that knows constants builds them anew for every product: so they come from memory.
struct Choice {
    // Column i of eight is this lane's.
    float column[8];
    // Rows of a product that turns a matrix round: this lane's g is the first, the second of the two states that lane q
    // of another four holds; for even steps in the upper rows, for odd ones in the lower.
    float even[4], odd[4];

    MEMBER void find(const volatile float& zero, const volatile float& one, const Lane& at) {
#pragma unroll
        for (int i = 0; i < 8; ++i) column[i] = at.g == i ? one : zero;
        bool first = at.g == 2 * at.q, second = at.g == 2 * at.q + 1;
        even[0] = first ? one : zero;
        even[1] = zero;
        even[2] = second ? one : zero;
        even[3] = zero;
        odd[0] = zero;
        odd[1] = first ? one : zero;
        odd[2] = zero;
        odd[3] = second ? one : zero;
    }
};

// Sums over a warp's channels of two numbers a lane, (states 2q and 2q + 1), for the gradient of B or of C.
//
// bfloat16: a product with ones and zeros turns eight channels by eight states round, the even step of a pair in the
// upper rows and the odd one in the lower. Another sums the columns, whose pairs lie in one lane: of even channels into
// the upper rows, of odd ones into the lower, the even step into column 2j of eight and the odd one into column 2j + 1.
// Else: shuffles, which are exact.
#if !EXACT
struct Gather {
    float turned[STATE_TILES][4], sums[STATE_TILES][4];

    MEMBER void begin() {
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[tile][i] = 0.0f;
    }

    // The steps of a pair come in either order; j is the step's place in its group, pair that of the pair in eight.
    template <bool FIRST>
    MEMBER void add(const float (&v)[STATE_TILES][2], int j, float even, float odd, const Choice& choice) {
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile) {
            const float(&rows)[4] = j % 2 ? choice.odd : choice.even;
            if (FIRST) {
                multiply(turned[tile], rows[0], rows[1], rows[2], rows[3], v[tile][0], v[tile][1]);
                continue;
            }
            multiply_add(turned[tile], rows[0], rows[1], rows[2], rows[3], v[tile][0], v[tile][1]);
            multiply_add(sums[tile], turned[tile][0], turned[tile][1], turned[tile][2], turned[tile][3], even, odd);
        }
    }

    // After the first of two groups of steps: to is the row of its first step.
    MEMBER void end(float (*to)[GATHERED_ROW], int which, const Lane& at) {
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile) {
            int place = which * PADDED_STATES + 8 * (STATE_TILES * at.state_warp + tile) + at.g;
            to[2 * at.q][place] = sums[tile][0] + sums[tile][2];
            to[2 * at.q + 1][place] = sums[tile][1] + sums[tile][3];
        }
        begin();
    }
};
#else
// Lane g of every eight that differ in g ends with the sum of v[g].
DEVICE float sum_transposing(float (&v)[8], int g) {
#pragma unroll
    for (int half = 4; half > 0; half /= 2)
#pragma unroll
        for (int k = 0; k < half; ++k) {
            bool upper_half = g & half;
            float send = upper_half ? v[k] : v[k + half], stay = upper_half ? v[k + half] : v[k];
            v[k] = stay + shuffle_xor(send, 4 * half);
        }
    return v[0];
}

struct Gather {
    float values[STATE_TILES][8];

    MEMBER void begin() {}

    template <bool FIRST>
    MEMBER void add(const float (&v)[STATE_TILES][2], int j, float, float, const Choice&) {
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile) {
            values[tile][2 * j] = v[tile][0];
            values[tile][2 * j + 1] = v[tile][1];
        }
    }

    MEMBER void end(float (*to)[GATHERED_ROW], int which, const Lane& at) {
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile) {
            int state = 8 * (STATE_TILES * at.state_warp + tile) + 2 * at.q + (at.g & 1);
            to[at.g / 2][which * PADDED_STATES + state] = sum_transposing(values[tile], at.g);
        }
    }
};
#endif

// Sums over the states for a group of four steps, by products with columns of ones: of two numbers a channel (x, y)
// column 2j gathers x of step j and column 2j + 1 gathers y, so that lane (g, q) ends with step q of its channels:
// (x, y) of channel 2g, then of 2g + 1. Upper and lower digits go in one after the other: the sums are float32's.
struct Sums {
    float values[4];

    MEMBER void begin() {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = 0.0f;
    }

    MEMBER void add(float x0, float x1, float y0, float y1, int j, const Choice& choice) {
        float even = choice.column[2 * j], odd = choice.column[2 * j + 1];
        multiply_add(values, upper(x0), upper(x1), upper(y0), upper(y1), even, odd);
        multiply_add(values, x0 - upper(x0), x1 - upper(x1), y0 - upper(y0), y1 - upper(y1), even, odd);
    }

    // One number a channel, in the even columns.
    MEMBER void add(float x0, float x1, int j, const Choice& choice) {
        float even = choice.column[2 * j];
        multiply_add(values, upper(x0), upper(x1), x0 - upper(x0), x1 - upper(x1), even, even);
    }
};
