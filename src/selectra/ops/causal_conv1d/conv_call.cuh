// The arguments of the convolution's CUDA kernels, and how a thread finds its channels, its positions and its numbers.
//
// cuda.py fills the structs word by word in this order: every member has 64 bits. Strides count elements.
#pragma once
#include "warp.cuh"

#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2

// Constants of one compilation:
//   TYPE          of x, y, dy and dx
//   TAPS          of a filter, k
//   VECTOR        neighbouring channels of a thread; more than one only where they lie side by side, aligned
//   GROUP         steps whose inputs are loaded before the first of them is used
//   SILU          whether the activation follows
//   MASKED        whether there is a mask
//   PACKED        whether sequences are packed along the length
//   X_ALONG_TIME, DY_ALONG_TIME   whether positions lie side by side in x (dy), 16 bytes of them aligned
//   RESIDENT      blocks of a multiprocessor that the registers must suffice for

#if TYPE == FLOAT32
typedef float Number;
#else
typedef uint16 Number;
#endif

constexpr int THREADS = 128;
constexpr int PAST = TAPS - 1;
// The window of the past, which an array cannot be without.
constexpr int WINDOW = PAST > 0 ? PAST : 1;
// Positions in 16 bytes.
constexpr int RUN = 16 / int(sizeof(Number));

struct Activation {
    const Number* data;
    int64 batch, time, channel;
};

struct ConvCall {
    int64 n_states, length, channels;
    // 1, or -1 from the last position to the first.
    int64 direction;
    Activation x;
    const float* weight;
    int64 weight_channel, weight_tap;
    // Each of the rest may be null.
    const float* bias;
    int64 bias_channel;
    const float* initial;
    int64 initial_state, initial_channel, initial_tap;
    const unsigned char* mask;
    int64 mask_batch, mask_time;
    const int* borders;
    // A row of threads takes `steps` neighbouring positions; `chunks` rows make a length. A block is `lanes` threads
    // along the channels by `rows`; `tiles` blocks do the positions, further ones the states.
    int64 steps, chunks, all_rows, lanes, rows, channel_tiles, tiles;
};

struct ForwardCall {
    ConvCall in;
    // Contiguous: (b, l, d); (n_states, d, k).
    Number* y;
    float* final_state;
};

struct BackwardCall {
    ConvCall in;
    Activation dy;
    const float* dfinal;
    int64 dfinal_state, dfinal_channel, dfinal_tap;
    // Contiguous: (b, l, d); (n_states, d, k) or null.
    Number* dx;
    float* dinitial;
    // Sums of a row of blocks, or all there is to sum.
    float* dweight;
    int64 dweight_row, dweight_channel, dweight_tap;
    float* dbias;
    int64 dbias_row;
};

DEVICE float number(Number x) {
#if TYPE == FLOAT32
    return x;
#elif TYPE == BFLOAT16
    return from_bfloat16(x);
#else
    return from_float16(x);
#endif
}

DEVICE Number rounded(float x) {
#if TYPE == FLOAT32
    return x;
#elif TYPE == BFLOAT16
    return to_bfloat16(x);
#else
    return to_float16(x);
#endif
}

constexpr int VECTOR_BYTES = VECTOR * int(sizeof(Number));
// The numbers of a thread's channels at one position, as they lie in memory.
#if TYPE != FLOAT32 && VECTOR > 1
constexpr int WORDS = VECTOR / 2;
typedef uint32 Word;
#else
constexpr int WORDS = VECTOR;
typedef Number Word;
#endif
struct alignas(VECTOR_BYTES) Line {
    Word words[WORDS];
};
struct alignas(16) Run {
    Number at[RUN];
};

DEVICE void unpack(const Line& line, float (&x)[VECTOR]) {
#if TYPE != FLOAT32 && VECTOR > 1
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) x[c] = number(uint16(line.words[c / 2] >> c % 2 * 16));
#else
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) x[c] = number(line.words[c]);
#endif
}

DEVICE Line pack(const float (&x)[VECTOR]) {
    Line line;
#if TYPE == BFLOAT16 && VECTOR > 1
#pragma unroll
    for (int c = 0; c < WORDS; ++c) line.words[c] = pack_bfloat16(x[2 * c], x[2 * c + 1]);
#elif TYPE == FLOAT16 && VECTOR > 1
#pragma unroll
    for (int c = 0; c < WORDS; ++c) line.words[c] = pack_float16(x[2 * c], x[2 * c + 1]);
#else
#pragma unroll
    for (int c = 0; c < WORDS; ++c) line.words[c] = rounded(x[c]);
#endif
    return line;
}

DEVICE Line nothing() {
    Line line;
#pragma unroll
    for (int c = 0; c < WORDS; ++c) line.words[c] = Word(0);
    return line;
}

constexpr float LOG2_E = 1.4426950408889634f;
constexpr uint32 NOT_A_NUMBER = 0x7fc00000u;

DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-x * LOG2_E)); }

// One sequence, or a thread's part of it: steps [first, last) of `length`; step t lies at `origin` + t * direction.
struct Steps {
    int state, batch;
    int origin, direction;
    int first, last, length;
};

DEVICE int position(const Steps& steps, int t) { return steps.origin + steps.direction * t; }

// The borders of a packed sequence, inside the memory whatever they hold.
DEVICE int border(const ConvCall& call, int index) {
    int found = call.borders[index];
    return found < 0 ? 0 : found > int(call.length) ? int(call.length) : found;
}

// The steps of sequence `state` that lie in the positions [low, high).
DEVICE Steps steps_between(const ConvCall& call, int state, int batch, int low, int high) {
    Steps steps;
    steps.state = state;
    steps.batch = batch;
    int start = 0, end = int(call.length);
#if PACKED
    start = border(call, state);
    end = border(call, state + 1);
    low = low > start ? low : start;
    high = high < end ? high : end;
#endif
    bool reversed = call.direction < 0;
    steps.direction = reversed ? -1 : 1;
    steps.origin = reversed ? end - 1 : start;
    steps.first = reversed ? end - high : low - start;
    steps.last = reversed ? end - low : high - start;
    steps.length = end > start ? end - start : 0;
    return steps;
}

// The last sequence that begins at or before a position.
DEVICE int sequence_at(const ConvCall& call, int place) {
    int low = 0, high = int(call.n_states);
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (call.borders[middle] <= place) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

DEVICE bool present(const ConvCall& call, int batch, int place) {
#if MASKED
    return call.mask[batch * call.mask_batch + place * call.mask_time] != 0;
#else
    return true;
#endif
}

// What stands in the filter's window at a step before, in or after a thread's part, for one channel.
DEVICE float input(const ConvCall& call, const Steps& steps, int channel, int t) {
    if (t >= 0) {
        int place = position(steps, t);
        if (!present(call, steps.batch, place)) return 0.0f;
        return number(call.x.data[steps.batch * call.x.batch + place * call.x.time + channel * call.x.channel]);
    }
    if (t < -TAPS || call.initial == nullptr) return 0.0f;
    return call.initial[steps.state * call.initial_state + channel * call.initial_channel +
                        (TAPS + t) * call.initial_tap];
}
