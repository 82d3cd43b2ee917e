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
    // A product that turns a matrix round, into the upper or the lower rows: this lane's g is the first, the second of
    // the two states that lane q of another four holds.
    float upper_rows[4], lower_rows[4];

    // Numbers at an address that differs from lane to lane: those of a whole warp would be kept where products cannot
    // read them.
    MEMBER void find(const volatile float (&zeros)[2], const volatile float (&ones)[2], const Lane& at) {
        const volatile float &zero = zeros[at.q % 2], &one = ones[at.q % 2];
#pragma unroll
        for (int i = 0; i < 8; ++i) column[i] = at.g == i ? one : zero;
        bool first = at.g == 2 * at.q, second = at.g == 2 * at.q + 1;
        // Read one by one: equal numbers would be one register, copied before every product.
        upper_rows[0] = first ? one : zero;
        upper_rows[1] = zero;
        upper_rows[2] = second ? one : zero;
        upper_rows[3] = zero;
        lower_rows[0] = zero;
        lower_rows[1] = first ? one : zero;
        lower_rows[2] = zero;
        lower_rows[3] = second ? one : zero;
    }
};

// Sums over a warp's channels of two numbers a lane, (states 2q and 2q + 1), for the gradients of B and of C.
//
// bfloat16: a product with ones and zeros turns eight channels by eight states round. Another sums the columns, whose
// pairs lie in one lane: of even channels into the upper rows, of odd ones into the lower, into a column of eight. Two
// tiles of states are turned into the upper and the lower rows and fill two columns a step, four steps fill all. Of a
// tile alone two steps are turned so; C's gradient goes into the first four columns, B's into the last.
// Else: shuffles, which are exact.
enum { OF_B, OF_C };

#if !EXACT
struct Gather {
    static constexpr bool ALONE = STATE_TILES == 1;
    static constexpr int PRODUCTS = ALONE ? 1 : STATE_TILES / 2;
    static_assert(ALONE || STATE_TILES % 2 == 0, "");
    float sums[PRODUCTS][4], turned[4];

    template <int WHICH>
    MEMBER void begin() {
        if (ALONE && WHICH == OF_B) return;
#pragma unroll
        for (int k = 0; k < PRODUCTS; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[k][i] = 0.0f;
    }

    // j is the step's place in its group; steps come in order for C, and from the last for B.
    template <int WHICH>
    MEMBER void add(const float (&v)[STATE_TILES][2], int j, const Choice& choice) {
        const float(&up)[4] = choice.upper_rows, (&low)[4] = choice.lower_rows;
        if (ALONE) {
            const float(&rows)[4] = j % 2 ? low : up;
            if ((WHICH == OF_C) == (j % 2 == 0)) {
                multiply(turned, rows[0], rows[1], rows[2], rows[3], v[0][0], v[0][1]);
                return;
            }
            const float* columns = &choice.column[(WHICH == OF_C ? 0 : GROUP) + j / 2 * 2];
            multiply_add(turned, rows[0], rows[1], rows[2], rows[3], v[0][0], v[0][1]);
            multiply_add(sums[0], turned[0], turned[1], turned[2], turned[3], columns[0], columns[1]);
            return;
        }
        constexpr int OTHER = ALONE ? 0 : 1;
#pragma unroll
        for (int k = 0; k < PRODUCTS; ++k) {
            const float(&first)[2] = v[2 * k * OTHER], (&second)[2] = v[(2 * k + 1) * OTHER];
            multiply(turned, up[0], up[1], up[2], up[3], first[0], first[1]);
            multiply_add(turned, low[0], low[1], low[2], low[3], second[0], second[1]);
            multiply_add(sums[k], turned[0], turned[1], turned[2], turned[3], choice.column[2 * j],
                         choice.column[2 * j + 1]);
        }
    }

    // A group's sums that a lane ends with.
    static constexpr int ENDS = 2 * PRODUCTS;

    template <int WHICH>
    MEMBER void end(float (&x)[ENDS], const Lane&) const {
        if (ALONE && WHICH == OF_C) return;
#pragma unroll
        for (int k = 0; k < PRODUCTS; ++k) {
            x[2 * k] = sums[k][0] + sums[k][2];
            x[2 * k + 1] = sums[k][1] + sums[k][3];
        }
    }

    // rows: from the group's first step on.
    template <int WHICH>
    static MEMBER void put(float (*rows)[GATHERED_ROW], const float (&x)[ENDS], const Lane& at) {
        if (ALONE) {
            if (WHICH == OF_C) return;
            int place = (at.q < 2 ? OF_C : OF_B) * PADDED_STATES + 8 * at.state_warp + at.g;
            rows[at.q % 2 * 2][place] = x[0];
            rows[at.q % 2 * 2 + 1][place] = x[1];
            return;
        }
#pragma unroll
        for (int i = 0; i < ENDS; ++i)
            rows[at.q][WHICH * PADDED_STATES + 8 * (STATE_TILES * at.state_warp + i) + at.g] = x[i];
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

    template <int WHICH>
    MEMBER void begin() {}

    template <int WHICH>
    MEMBER void add(const float (&v)[STATE_TILES][2], int j, const Choice&) {
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile) {
            values[tile][2 * j] = v[tile][0];
            values[tile][2 * j + 1] = v[tile][1];
        }
    }

    static constexpr int ENDS = STATE_TILES;

    template <int WHICH>
    MEMBER void end(float (&x)[ENDS], const Lane& at) {
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile) x[tile] = sum_transposing(values[tile], at.g);
    }

    template <int WHICH>
    static MEMBER void put(float (*rows)[GATHERED_ROW], const float (&x)[ENDS], const Lane& at) {
#pragma unroll
        for (int tile = 0; tile < STATE_TILES; ++tile) {
            int state = 8 * (STATE_TILES * at.state_warp + tile) + 2 * at.q + (at.g & 1);
            rows[at.g / 2][WHICH * PADDED_STATES + state] = x[tile];
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

    // One number a channel: upper digits in the even columns, lower ones in the odd.
    MEMBER void add(float x0, float x1, int j, const Choice& choice) {
        float even = choice.column[2 * j], odd = choice.column[2 * j + 1];
        multiply_add(values, upper(x0), upper(x1), x0 - upper(x0), x1 - upper(x1), even, odd);
    }
};
