// What Mamba-2's chunked form has beside its products of matrices: ../ssd/chunks.py has the letters and the sums.
//
// Constants of one compilation:
//   TYPE       of the products' factors: 0 float32, 1 bfloat16
//   STEPS      q, positions of a chunk: a multiple of 4
//   SEEN       whether there is a matrix of who sees whom
//   REVERSE    whether states are passed backwards
//   PIECE      numbers of a head that are moved at once: 4 or 1
//   OTHER      type of the second factors of dots, and of what is joined
#include "warp.cuh"

#if TYPE == 0
typedef float Number;
#else
typedef uint16 Number;
#endif

constexpr int SIZE = 4, GROUPS_OF_FOUR = STEPS / SIZE, THREADS = 256;
// A thread holds a part of a matrix: more threads for a larger one.
constexpr int BACK_THREADS = STEPS > 64 ? 2 * THREADS : THREADS;
constexpr float LOG2_E = 1.4426950408889634f;

struct alignas(16) Four {
    float at[SIZE];
};

struct alignas(SIZE * sizeof(Number)) Narrow {
    Number at[SIZE];
};

DEVICE void put(float& place, float x) { place = x; }
DEVICE void put(uint16& place, float x) { place = to_bfloat16(x); }

DEVICE void store(Number* to, const Four& from) {
    Narrow narrow;
#pragma unroll
    for (int k = 0; k < SIZE; ++k) put(narrow.at[k], from.at[k]);
    *reinterpret_cast<Narrow*>(to) = narrow;
}

DEVICE Four load(const float* from) { return *reinterpret_cast<const Four*>(from); }

struct PassCall {
    const float *added, *across, *first;
    Number* before;
    float* last;
    // Numbers of a state, of a head's part of it, and batch elements.
    int64 chunks, width, head_width, batch;
};

// The state before every chunk and that after the last: a thread walks four numbers of the state through the chunks.
KERNEL __launch_bounds__(THREADS) pass_states(const __grid_constant__ PassCall call) {
    int64 index = (int64(block_x()) * THREADS + thread_index()) * SIZE;
    if (index >= call.batch * call.width) return;
    int64 row = index / call.width, place = index % call.width, heads = call.width / call.head_width;
    int64 start = row * call.chunks, stride = call.width, head_stride = heads;
    if (REVERSE) {
        start += call.chunks - 1;
        stride = -stride;
        head_stride = -head_stride;
    }
    const float* added = call.added + start * call.width + place;
    const float* across = call.across + start * heads + place / call.head_width;
    Number* before = call.before + start * call.width + place;
    Four state = {};
    if (call.first != nullptr) state = load(call.first + index);
#pragma unroll 8
    for (int64 chunk = 0; chunk < call.chunks; ++chunk) {
        Four next = load(added);
        float kept = *across;
        store(before, state);
#pragma unroll
        for (int k = 0; k < SIZE; ++k) state.at[k] = fma(kept, state.at[k], next.at[k]);
        added += stride;
        before += stride;
        across += head_stride;
    }
    *reinterpret_cast<Four*>(call.last + index) = state;
}

// K of four neighbouring second indices.
DEVICE Four decay(const float* s, int i, int j, const unsigned char* seen) {
    Four decays = {};
    float own = s[i];
#pragma unroll
    for (int k = 0; k < SIZE; ++k)
        if (j + k <= i && (!SEEN || seen[i * STEPS + j + k])) decays.at[k] = exp2_fast((own - s[j + k]) * LOG2_E);
    return decays;
}

struct WeighCall {
    const float *scores, *s, *dt;
    const unsigned char* seen;
    Number* weights;
    int64 heads, groups;
};

// G K dt of one chunk and head.
KERNEL __launch_bounds__(THREADS) weigh(const __grid_constant__ WeighCall call) {
    int64 matrix = block_x(), chunk = matrix / call.heads;
    int64 group = matrix % call.heads / (call.heads / call.groups);
    const float* scores = call.scores + (chunk * call.groups + group) * STEPS * STEPS;
    const float *s = call.s + matrix * STEPS, *dt = call.dt + matrix * STEPS;
    const unsigned char* seen = SEEN ? call.seen + chunk * STEPS * STEPS : nullptr;
    Number* weights = call.weights + matrix * STEPS * STEPS;
    for (int piece = thread_index(); piece < STEPS * GROUPS_OF_FOUR; piece += THREADS) {
        int i = piece / GROUPS_OF_FOUR, j = piece % GROUPS_OF_FOUR * SIZE;
        Four found = {};
        if (j <= i) {
            Four decays = decay(s, i, j, seen), score = load(scores + piece * SIZE), step = load(dt + j);
            // What is not seen is 0, whatever its score.
#pragma unroll
            for (int k = 0; k < SIZE; ++k)
                if (decays.at[k] != 0.0f) found.at[k] = score.at[k] * (decays.at[k] * step.at[k]);
        }
        store(weights + piece * SIZE, found);
    }
}

struct WeighBackCall {
    const float *products, *scores, *s, *dt;
    const unsigned char* seen;
    Number* weights;
    // (r, g, parts, q, q), (r, h, q), (r, h, q)
    float *dscores, *rows, *columns;
    int64 heads, groups, parts;
};

// Of one chunk and a part of a group's heads: G K, their sum of P dt, and each one's sums of P G dt and of P G.
KERNEL __launch_bounds__(BACK_THREADS) weigh_back(const __grid_constant__ WeighBackCall call) {
    // Rows that are under way at once, and how many of them and of fours a thread has.
    constexpr int LANES = GROUPS_OF_FOUR < 32 ? GROUPS_OF_FOUR : 32, AT_ONCE = BACK_THREADS / LANES;
    constexpr int ROWS = (STEPS + AT_ONCE - 1) / AT_ONCE;
    SHARED_MEMORY(memory);
    float* sums = reinterpret_cast<float*>(memory);
    int64 each = call.heads / call.groups, of_part = each / call.parts;
    int64 part = block_x(), chunk = part / (call.groups * call.parts);
    int64 head = chunk * call.heads + part % (call.groups * call.parts) * of_part;
    const float* scores = call.scores + part / call.parts * STEPS * STEPS;
    const unsigned char* seen = SEEN ? call.seen + chunk * STEPS * STEPS : nullptr;
    int lane = thread_index() % LANES, first = thread_index() / LANES, j = lane * SIZE;
    Four dscores[ROWS] = {};
    for (int64 end = head + of_part; head < end; ++head) {
        const float *s = call.s + head * STEPS, *dt = call.dt + head * STEPS;
        Four step = load(dt + j), column = {};
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            int i = first + row * AT_ONCE;
            float sum = 0.0f;
            if (i < STEPS) {
                int64 place = head * STEPS * STEPS + i * STEPS + j;
                Four weight = {};
                if (j <= i) {
                    Four decays = decay(s, i, j, seen), score = load(scores + i * STEPS + j);
                    Four product = load(call.products + place);
#pragma unroll
                    for (int k = 0; k < SIZE; ++k)
                        if (decays.at[k] != 0.0f) {
                            float found = decays.at[k] * product.at[k], scored = found * score.at[k];
                            weight.at[k] = decays.at[k] * score.at[k];
                            dscores[row].at[k] = fma(found, step.at[k], dscores[row].at[k]);
                            column.at[k] += scored;
                            sum = fma(scored, step.at[k], sum);
                        }
                }
                store(call.weights + place, weight);
            }
#pragma unroll
            for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
            if (lane == 0 && i < STEPS) call.rows[head * STEPS + i] = sum;
        }
        synchronize_block();
        *reinterpret_cast<Four*>(sums + first * STEPS + j) = column;
        synchronize_block();
        for (int place = thread_index(); place < STEPS; place += BACK_THREADS) {
            float sum = 0.0f;
            for (int row = 0; row < AT_ONCE; ++row) sum += sums[row * STEPS + place];
            call.columns[head * STEPS + place] = sum;
        }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        int i = first + row * AT_ONCE;
        if (i < STEPS) *reinterpret_cast<Four*>(call.dscores + (part * STEPS + i) * STEPS + j) = dscores[row];
    }
}

#if OTHER == 0
typedef float Other;
#else
typedef uint16 Other;
#endif

template <typename T>
struct alignas(PIECE * sizeof(T)) Piece {
    T at[PIECE];
};

DEVICE float number(float x) { return x; }
DEVICE float number(uint16 x) { return from_bfloat16(x); }

struct DotCall {
    // (rows, h, p); numbers from a row of b to the next.
    const Number* a;
    const Other* b;
    float* dots;
    int64 rows, heads, p, b_row;
};

// a . b of every row's heads: sixteen lanes take one.
KERNEL __launch_bounds__(THREADS) dot_heads(const __grid_constant__ DotCall call) {
    constexpr int LANES = 16;
    int64 index = (int64(block_x()) * THREADS + thread_index()) / LANES;
    bool there = index < call.rows * call.heads;
    int64 row = there ? index / call.heads : 0, head = there ? index % call.heads : 0;
    const Number* a = call.a + (row * call.heads + head) * call.p;
    const Other* b = call.b + row * call.b_row + head * call.p;
    float sum = 0.0f;
    for (int64 place = thread_index() % LANES * PIECE; place < call.p; place += LANES * PIECE) {
        Piece<Number> left = *reinterpret_cast<const Piece<Number>*>(a + place);
        Piece<Other> right = *reinterpret_cast<const Piece<Other>*>(b + place);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) sum = fma(number(left.at[i]), number(right.at[i]), sum);
    }
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
    if (there && thread_index() % LANES == 0) call.dots[index] = sum;
}

struct JoinCall {
    // (r, q, h, p), (r, q, h), (r, h, q, p), (r, q, h) or null, (r, q, h, p).
    const float *a, *weights, *b, *scale;
    Other* joined;
    int64 numbers, steps, heads, p;
};

// (a times weights + b) times scale; `joined` may be a.
KERNEL __launch_bounds__(THREADS) join_heads(const __grid_constant__ JoinCall call) {
    int64 index = (int64(block_x()) * THREADS + thread_index()) * PIECE;
    if (index >= call.numbers) return;
    int64 head_row = index / call.p, place = index % call.p, head = head_row % call.heads, row = head_row / call.heads;
    int64 chunk = row / call.steps, step = row % call.steps;
    int64 other = ((chunk * call.heads + head) * call.steps + step) * call.p + place;
    Piece<float> a = *reinterpret_cast<const Piece<float>*>(call.a + index);
    Piece<float> b = *reinterpret_cast<const Piece<float>*>(call.b + other);
    float weight = call.weights[head_row], scale = call.scale == nullptr ? 1.0f : call.scale[head_row];
    Piece<Other> joined;
#pragma unroll
    for (int i = 0; i < PIECE; ++i) put(joined.at[i], scale * fma(a.at[i], weight, b.at[i]));
    *reinterpret_cast<Piece<Other>*>(call.joined + index) = joined;
}
