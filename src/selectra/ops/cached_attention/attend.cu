// Attention of one query a row to the positions in its cache: every key and value is read once for all queries that
// share it, by as many thread blocks side by side as the device holds, whose results a second kernel joins.
//
// Eight lanes read a key together, four keys a warp. Sums are float32; the softmax is the running one of Milakov and
// Gimelshein 2018, arXiv:1805.02867, in powers of two.
#include "warp.cuh"

#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2

// Constants of one compilation:
//   TYPE   of queries, keys, values and y
//   GROUP  queries that share a key
//   HEAD   width of a head; a head's bytes are a multiple of 128
//   WARPS  of a thread block

constexpr int LANES = 32, KEY_LANES = 8, KEYS = LANES / KEY_LANES, TOGETHER = 2;
constexpr int VECTOR = TYPE == FLOAT32 ? 4 : 8, OWN = HEAD / KEY_LANES, PIECES = OWN / VECTOR;
constexpr float LOG2_E = 1.4426950408889634f, LEAST = -3.4028234e38f;

// Every member has 64 bits.
struct Call {
    // (rows, heads, GROUP, HEAD); (rows, room, heads, HEAD), contiguous; (rows,).
    const void *queries, *keys, *values;
    const int64* counts;
    // (rows, heads, parts, GROUP, HEAD + 2): unnormalised sums of values, the largest score, the sum of weights.
    float* joined;
    // Like queries.
    void* y;
    int64 room, heads, parts;
    double scale;
};

DEVICE void read(float (&to)[VECTOR], const void* data, int64 place) {
    if constexpr (TYPE == FLOAT32) {
        float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + place);
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else {
        uint4 piece = *reinterpret_cast<const uint4*>(static_cast<const uint16*>(data) + place);
        uint32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (TYPE == BFLOAT16) {
                to[2 * i] = from_bits(words[i] << 16), to[2 * i + 1] = from_bits(words[i] & 0xffff0000u);
            } else {
                to[2 * i] = from_float16(uint16(words[i])), to[2 * i + 1] = from_float16(uint16(words[i] >> 16));
            }
        }
    }
}

DEVICE void put(void* data, int64 place, float x) {
    if constexpr (TYPE == FLOAT32) static_cast<float*>(data)[place] = x;
    if constexpr (TYPE == BFLOAT16) static_cast<uint16*>(data)[place] = to_bfloat16(x);
    if constexpr (TYPE == FLOAT16) static_cast<uint16*>(data)[place] = to_float16(x);
}

// This lane's numbers of a head.
DEVICE void read_own(float (&to)[OWN], const void* data, int64 start) {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        float piece[VECTOR];
        read(piece, data, start + (i * KEY_LANES + thread_index() % KEY_LANES) * VECTOR);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) to[i * VECTOR + j] = piece[j];
    }
}

// What a query has seen so far.
struct Seen {
    float most, weight, sum[OWN];
};

DEVICE void rescale(Seen& seen, float most) {
    float factor = exp2_fast(seen.most - most);
    seen.most = most, seen.weight *= factor;
#pragma unroll
    for (int i = 0; i < OWN; ++i) seen.sum[i] *= factor;
}

// Joins what `lanes` away has been seen.
DEVICE void join(Seen& seen, int lanes) {
    rescale(seen, larger(seen.most, shuffle_xor(seen.most, lanes)));
    seen.weight += shuffle_xor(seen.weight, lanes);
#pragma unroll
    for (int i = 0; i < OWN; ++i) seen.sum[i] += shuffle_xor(seen.sum[i], lanes);
}

KERNEL __launch_bounds__(WARPS * LANES) attend(const __grid_constant__ Call call) {
    SHARED_MEMORY(shared);
    int warp = thread_index() / LANES, lane = thread_index() % LANES;
    int64 part = block_x(), head = block_y(), row = block_z(), heads = call.heads;
    int64 n = call.counts[row], each = (n + call.parts - 1) / call.parts;
    int64 first = part * each, last = first + each < n ? first + each : n;
    Seen seen[GROUP];
    float query[GROUP][OWN];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        read_own(query[g], call.queries, ((row * heads + head) * GROUP + g) * HEAD);
        seen[g].most = LEAST, seen[g].weight = 0.0f;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            query[g][i] *= float(call.scale) * LOG2_E;
            seen[g].sum[i] = 0.0f;
        }
    }
    constexpr int STEP = WARPS * KEYS;
    for (int64 start = first + warp * KEYS; start < last; start += STEP * TOGETHER) {
        float key[TOGETHER][OWN], value[TOGETHER][OWN];
#pragma unroll
        for (int t = 0; t < TOGETHER; ++t) {
            // Beyond the last position it is read again.
            int64 position = start + t * STEP + lane / KEY_LANES;
            int64 place = ((row * call.room + (position < last ? position : last - 1)) * heads + head) * HEAD;
            read_own(key[t], call.keys, place);
            read_own(value[t], call.values, place);
        }
#pragma unroll
        for (int t = 0; t < TOGETHER; ++t) {
            bool present = start + t * STEP + lane / KEY_LANES < last;
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                float score = 0.0f;
#pragma unroll
                for (int i = 0; i < OWN; ++i) score = fma(query[g][i], key[t][i], score);
#pragma unroll
                for (int lanes = 1; lanes < KEY_LANES; lanes *= 2) score += shuffle_xor(score, lanes);
                if (!present) continue;
                if (score > seen[g].most) rescale(seen[g], score);
                float weight = exp2_fast(score - seen[g].most);
                seen[g].weight += weight;
#pragma unroll
                for (int i = 0; i < OWN; ++i) seen[g].sum[i] = fma(weight, value[t][i], seen[g].sum[i]);
            }
        }
    }
    // The warp's results, then the thread block's.
    constexpr int PITCH = HEAD + 2;
    float* room = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
#pragma unroll
        for (int lanes = KEY_LANES; lanes < LANES; lanes *= 2) join(seen[g], lanes);
        float* to = room + (warp * GROUP + g) * PITCH;
        if (lane < KEY_LANES) {
#pragma unroll
            for (int i = 0; i < OWN; ++i) to[(i / VECTOR * KEY_LANES + lane) * VECTOR + i % VECTOR] = seen[g].sum[i];
            if (lane == 0) to[HEAD] = seen[g].most, to[HEAD + 1] = seen[g].weight;
        }
    }
    synchronize_block();
    float* joined = call.joined + ((row * heads + head) * call.parts + part) * (GROUP * PITCH);
    for (int i = thread_index(); i < GROUP * PITCH; i += WARPS * LANES) {
        const float* from = room + i / PITCH * PITCH;
        float most = LEAST, sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) most = larger(most, from[w * GROUP * PITCH + HEAD]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float* other = from + w * GROUP * PITCH;
            sum = fma(other[i % PITCH], exp2_fast(other[HEAD] - most), sum);
        }
        joined[i] = i % PITCH == HEAD ? most : sum;
    }
}

// One thread block for each query, in the order of y.
KERNEL __launch_bounds__(WARPS * LANES) join_parts(const __grid_constant__ Call call) {
    constexpr int PITCH = HEAD + 2;
    int64 head = block_x() / GROUP, query = block_x();
    const float* from = call.joined + (head * call.parts * GROUP + block_x() % GROUP) * PITCH;
    float most = LEAST, weight = 0.0f;
    for (int64 part = 0; part < call.parts; ++part) most = larger(most, from[part * GROUP * PITCH + HEAD]);
    for (int64 part = 0; part < call.parts; ++part) {
        const float* other = from + part * GROUP * PITCH;
        weight = fma(other[HEAD + 1], exp2_fast(other[HEAD] - most), weight);
    }
    for (int i = thread_index(); i < HEAD; i += WARPS * LANES) {
        float sum = 0.0f;
        for (int64 part = 0; part < call.parts; ++part) {
            const float* other = from + part * GROUP * PITCH;
            sum = fma(other[i], exp2_fast(other[HEAD] - most), sum);
        }
        put(call.y, query * HEAD + i, sum / weight);
    }
}
