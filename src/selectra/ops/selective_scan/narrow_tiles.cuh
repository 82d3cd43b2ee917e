// How the narrow scan moves activations: tiles of 16 steps of a warp's channels, several tiles ahead.
//
// Every warp has its own tiles in shared memory, so that no warp waits for another's.
#pragma once
#include "scan_call.cuh"

// Constants of a compilation beyond those of scan_call.cuh:
//   EACH     channels of a lane, 1 or 2
//   DEPTH    tiles of a warp in shared memory; all but one of them are on their way
//   WARPS    warps of a block, which take the tiles of the same channels in turn
#ifndef EACH
#define EACH 2
#endif
#ifndef DEPTH
#define DEPTH 3
#endif
#ifndef WARPS
#define WARPS 1
#endif

constexpr int WARP = 32;
// Channels of a warp.
constexpr int WIDTH = WARP * EACH;
// Steps of a tile, and between two checkpoints.
constexpr int STEPS = 16;
static_assert(STATES >= 1 && STATES <= 4, "scan_forward.cu and scan_backward.cu have the rest");

// What a block works on: the tiles of one chunk of a sequence, of which each warp has every WARPS-th.
struct Work {
    Sequence sequence;
    Channels channels;
    int lane, warp, first_tile, n_tiles;
    // How often all warps take a tile. At the last turn some find none: theirs has no rows.
    int n_turns;
    bool last_chunk;
    // Among the chunks of all sequences.
    int64 chunk;
    // Number of the block of channels, and of these blocks.
    int block, n_blocks;
};

DEVICE int smaller(int a, int b) { return a < b ? a : b; }

DEVICE Work find_work(const ScanCall& call) {
    int per_group = int(call.channels / call.groups);
    Work work;
    work.lane = thread_index() % WARP;
    work.warp = thread_index() / WARP;
    work.n_blocks = int(call.groups) * ((per_group + WIDTH - 1) / WIDTH);
    work.block = block_x() % work.n_blocks;
    work.channels = find_channels<WIDTH>(call, work.block);
    work.sequence = find_sequence(call, block_x() / work.n_blocks, work.channels.group);
    work.chunk = int64(work.sequence.index) * call.n_chunks + block_y();
    int end = (work.sequence.length + STEPS - 1) / STEPS;
    int tiles_of_chunk = call.n_chunks > 1 ? int(call.chunk) / STEPS : end;
    work.first_tile = block_y() * tiles_of_chunk;
    work.n_tiles = smaller(work.first_tile + tiles_of_chunk, end) - work.first_tile;
    work.n_turns = (work.n_tiles + WARPS - 1) / WARPS;
    // A sequence without steps has its end in its first chunk.
    work.last_chunk = end == 0 ? block_y() == 0 : work.n_tiles > 0 && work.first_tile + work.n_tiles == end;
    return work;
}

// N bytes of numbers that are moved together; filled with a word.
template <int BYTES>
struct Bytes;
template <>
struct Bytes<2> {
    typedef uint16 Type;
    static MEMBER Type filled(uint32 word) { return uint16(word); }
};
template <>
struct Bytes<4> {
    typedef uint32 Type;
    static MEMBER Type filled(uint32 word) { return word; }
};
template <>
struct Bytes<8> {
    typedef uint2 Type;
    static MEMBER Type filled(uint32 word) { return {word, word}; }
};
template <>
struct Bytes<16> {
    typedef uint4 Type;
    static MEMBER Type filled(uint32 word) { return {word, word, word, word}; }
};

// Activations of a tile begin with these.
enum { U, DELTA };

// What an absent place of a tensor holds: 0, but in delta the lowest number, whose softplus is 0 and so is its slope.
DEVICE uint32 absent_word(int tensor) {
    if (!SOFTPLUS || tensor != DELTA) return 0;
    return TYPE == FLOAT32 ? 0xff7fffffu : TYPE == BFLOAT16 ? 0xff7fff7fu : 0xfbfffbffu;
}

// How a tile of T is cut into pieces: in every round each lane moves one piece.
template <typename T>
struct Pieces {
    static constexpr int SIZE = VECTORS ? 16 / int(sizeof(T)) : 1;
    static constexpr int IN_ROW = WIDTH / SIZE;
    static constexpr int ROUNDS = STEPS * IN_ROW / WARP;
    // A row of the tile; along time lanes write down a column, which the odd number of words spreads over the banks.
    static constexpr int PITCH = WIDTH + (ALONG_TIME ? 2 : 0);
    static constexpr int TILE = STEPS * PITCH;
    typedef Bytes<SIZE * int(sizeof(T))> Unit;

    // Row and first channel of a lane's piece: the lane's own part and the round's part.
    static MEMBER int lane_row(int lane) { return ALONG_TIME ? lane % STEPS : IN_ROW < WARP ? lane / IN_ROW : 0; }
    static MEMBER int lane_channel(int lane) { return ALONG_TIME ? lane / STEPS : lane % IN_ROW * SIZE; }
    static MEMBER int round_row(int round) { return ALONG_TIME ? 0 : round * WARP / IN_ROW; }
    static MEMBER int round_channel(int round) {
        return ALONG_TIME ? round * (WARP / STEPS) : round * WARP % IN_ROW * SIZE;
    }
};

// A lane's places in an activation, of its sequence's steps in order.
template <typename T>
struct Stream {
    T* place;
    int64 step, channel;

    MEMBER void begin(const Activation<T>& from, const ScanCall& call, const Work& work) {
        typedef Pieces<T> Cut;
        channel = from.channel;
#if ROUTES
        step = from.row;
        place = from.data + work.sequence.batch * from.batch + first_of(from, work.channels) +
                Cut::lane_channel(work.lane) * channel;
#else
        step = call.reverse ? -from.row : from.row;
        place = from.data + work.sequence.batch * from.batch + position(call, work.sequence, 0) * from.row +
                Cut::lane_row(work.lane) * step + (work.channels.first + Cut::lane_channel(work.lane)) * channel;
#endif
    }

    // A step of the sequence, counted from the lane's own row.
    MEMBER T* at(const Work& work, int row, int column) const {
#if ROUTES
        row = work.sequence.route.position(work.sequence.length, row + Pieces<T>::lane_row(work.lane));
#endif
        return place + row * step + column * channel;
    }
};

// Which rows of a tile are there: neither beyond the end nor, with a mask, absent.
struct Presence {
    int count;
    // Of row lane % STEPS: 1 or 0.
    float mine;

    // To be asked by all lanes.
    MEMBER bool has(int row) const {
#if MASKED
        return shuffle_from(mine, row) != 0.0f;
#else
        return row < count;
#endif
    }

    // No row and no channel is missing.
    MEMBER bool whole(const Work& work) const {
        return !MASKED && count == STEPS && work.channels.end - work.channels.first >= WIDTH;
    }
};

// B, C and presence of one row of a tile, on their way from memory; half of the lanes hold B.
struct RowValues {
    // Of this lane's row in the first tile.
    const Number* place;
    int64 step, state;
    // Untouched until they are needed: a look at what is still on its way would wait for it.
    Number values[STATES];
    int mark;

    MEMBER bool there() const { return mark != 0; }

    MEMBER void begin(const ScanCall& call, const Work& work) {
        const Projection& from = work.lane < STEPS ? call.B : call.C;
        state = from.state;
#if ROUTES
        step = from.row;
        place = from.data + work.sequence.batch * from.batch + work.channels.group * from.group;
#else
        step = call.reverse ? -from.row : from.row;
        place = from.data + work.sequence.batch * from.batch + position(call, work.sequence, 0) * from.row +
                work.lane % STEPS * step + work.channels.group * from.group;
#endif
    }

    // From `place` to a tile's row.
    static MEMBER int steps_to(const Work& work, int tile, int row) {
#if ROUTES
        return work.sequence.route.position(work.sequence.length, row);
#else
        return tile * STEPS;
#endif
    }

    // `mark` is 0 before.
    MEMBER void fetch(const ScanCall& call, const Work& work, int tile) {
        int row = tile * STEPS + work.lane % STEPS;
        if (row >= work.sequence.length) return;
#pragma unroll
        for (int n = 0; n < STATES; ++n) values[n] = place[steps_to(work, tile, row) * step + n * state];
#if MASKED
        mark = call.mask[work.sequence.batch * call.length + position(call, work.sequence, row)];
#else
        mark = 1;
#endif
    }
};

// One tile of TENSORS activations.
template <int TENSORS>
struct Slot {
    typedef Pieces<Number> Cut;
    Number tiles[TENSORS][Cut::TILE];
    // B and C; all zero where absent.
    float projections[2][STEPS * STATES];
    // 1, or 0 where absent.
    float presence[STEPS];

    MEMBER void put_rows(const RowValues& rows, int lane) {
        int row = lane % STEPS;
#pragma unroll
        for (int n = 0; n < STATES; ++n)
            projections[lane / STEPS][row * STATES + n] = rows.there() ? number(rows.values[n]) : 0.0f;
        if (lane < STEPS) presence[row] = rows.there() ? 1.0f : 0.0f;
    }

    // Ask for a tile; absent rows and channels that the group lacks are filled. WHOLE: there are none.
    template <bool WHOLE>
    MEMBER void load(int tensor, const Stream<const Number>& from, int first_row, const Presence& rows,
                     const Work& work) {
        typedef typename Cut::Unit::Type Unit;
        Unit filled = Cut::Unit::filled(absent_word(tensor));
        int lane_row = Cut::lane_row(work.lane), lane_channel = Cut::lane_channel(work.lane);
        int n_channels = work.channels.end - work.channels.first;
        Number* tile = tiles[tensor] + lane_row * Cut::PITCH + lane_channel;
#if !VECTORS
        Unit scalars[Cut::ROUNDS];
#endif
#pragma unroll
        for (int i = 0; i < Cut::ROUNDS; ++i) {
            int row = Cut::round_row(i), channel = Cut::round_channel(i);
            bool there = WHOLE || (rows.has(lane_row + row) && lane_channel + channel < n_channels);
            const Number* place = from.at(work, first_row + row, channel);
#if VECTORS
            void* to = tile + row * Cut::PITCH + channel;
            if (there)
                copy_async<sizeof(Unit)>(to, place);
            else
                *reinterpret_cast<Unit*>(to) = filled;
#else
            scalars[i] = there ? *reinterpret_cast<const Unit*>(place) : filled;
#endif
        }
#if !VECTORS
#pragma unroll
        for (int i = 0; i < Cut::ROUNDS; ++i)
            *reinterpret_cast<Unit*>(tile + Cut::round_row(i) * Cut::PITCH + Cut::round_channel(i)) = scalars[i];
#endif
    }
};

// Write a tile; absent rows become zero.
template <bool WHOLE, typename T>
DEVICE void store_rows(const T* tile, const Stream<T>& to, int first_row, const Presence& rows, const Work& work) {
    typedef Pieces<T> Cut;
    typedef typename Cut::Unit::Type Unit;
    int lane_row = Cut::lane_row(work.lane), lane_channel = Cut::lane_channel(work.lane);
    int n_channels = work.channels.end - work.channels.first;
    tile += lane_row * Cut::PITCH + lane_channel;
#pragma unroll
    for (int i = 0; i < Cut::ROUNDS; ++i) {
        int row = Cut::round_row(i), channel = Cut::round_channel(i);
        Unit unit = *reinterpret_cast<const Unit*>(tile + row * Cut::PITCH + channel);
#if MASKED
        if (!rows.has(lane_row + row)) unit = Cut::Unit::filled(0);
#endif
        if (WHOLE || (lane_row + row < rows.count && lane_channel + channel < n_channels))
            *reinterpret_cast<Unit*>(to.at(work, first_row + row, channel)) = unit;
    }
}

template <typename T>
DEVICE void store_tile(const T* tile, const Stream<T>& to, int first_row, const Presence& rows, const Work& work) {
    if (rows.whole(work))
        store_rows<true>(tile, to, first_row, rows, work);
    else
        store_rows<false>(tile, to, first_row, rows, work);
}

// A warp's tiles in the order in which they are used: from the first to the last, or backwards. Of TENSORS activations
// those from FIRST on are read.
template <int FIRST, int TENSORS, bool BACKWARDS>
struct Pipeline {
    Stream<const Number> streams[TENSORS];
    // Of the tile that is asked for next.
    RowValues rows;

    MEMBER bool has(const Work& work, int turn) const { return turn * WARPS + work.warp < work.n_tiles; }

    MEMBER int tile_at(const Work& work, int turn) const {
        int index = turn * WARPS + work.warp;
        return work.first_tile + (BACKWARDS ? work.n_tiles - 1 - index : index);
    }

    // Rows of a turn's tile, given this lane's.
    MEMBER Presence presence(const Work& work, int turn, float mine) const {
        int left = work.sequence.length - tile_at(work, turn) * STEPS;
        return {WARPS == 1 || has(work, turn) ? smaller(left, STEPS) : 0, mine};
    }

    MEMBER void fetch(const ScanCall& call, const Work& work, int turn) {
        rows.mark = 0;
        if (has(work, turn)) rows.fetch(call, work, tile_at(work, turn));
    }

    MEMBER void ask(Slot<TENSORS>* slots, const ScanCall& call, const Work& work, int turn) {
        if (turn < work.n_turns) {
            Slot<TENSORS>& slot = slots[turn % DEPTH];
            int tile = tile_at(work, turn);
            Presence there = presence(work, turn, rows.there() ? 1.0f : 0.0f);
            slot.put_rows(rows, work.lane);
            if (there.whole(work))
                load<true>(slot, tile, there, work);
            else
                load<false>(slot, tile, there, work);
            fetch(call, work, turn + 1);
        }
        commit_copies();
    }

    template <bool WHOLE>
    MEMBER void load(Slot<TENSORS>& slot, int tile, const Presence& there, const Work& work) const {
#pragma unroll
        for (int i = FIRST; i < TENSORS; ++i) slot.template load<WHOLE>(i, streams[i], tile * STEPS, there, work);
    }

    MEMBER void begin(Slot<TENSORS>* slots, const ScanCall& call, const Work& work) {
        rows.begin(call, work);
        fetch(call, work, 0);
#pragma unroll
        for (int turn = 0; turn < DEPTH - 1; ++turn) ask(slots, call, work, turn);
    }

    // The tile of this turn, once it is there; all other tiles are on their way.
    MEMBER Slot<TENSORS>& take(Slot<TENSORS>* slots, const ScanCall& call, const Work& work, int turn) {
        ask(slots, call, work, turn + DEPTH - 1);
        wait_for_copies<DEPTH - 1>();
        synchronize_warp();
        return slots[turn % DEPTH];
    }
};

DEVICE void split(uint2 pair, float (&x)[2]) {
    x[0] = from_bits(pair.x);
    x[1] = from_bits(pair.y);
}

DEVICE void split(uint32 pair, float (&x)[2]) {
#if TYPE == BFLOAT16
    x[0] = from_bits(pair << 16);
    x[1] = from_bits(pair & 0xffff0000u);
#else
    x[0] = from_float16(uint16(pair));
    x[1] = from_float16(uint16(pair >> 16));
#endif
}

// A lane's neighbouring numbers of a tile.
DEVICE void read(const Number* place, float (&x)[1]) { x[0] = number(*place); }
DEVICE void read(const Number* place, float (&x)[2]) {
    split(*reinterpret_cast<const Bytes<2 * int(sizeof(Number))>::Type*>(place), x);
}

template <int FORMAT>
DEVICE void write(float* place, const float (&x)[1]) {
    *place = x[0];
}
template <int FORMAT>
DEVICE void write(float* place, const float (&x)[2]) {
    *reinterpret_cast<float2*>(place) = {x[0], x[1]};
}
template <int FORMAT>
DEVICE void write(uint16* place, const float (&x)[1]) {
    *place = FORMAT == BFLOAT16 ? to_bfloat16(x[0]) : to_float16(x[0]);
}
template <int FORMAT>
DEVICE void write(uint16* place, const float (&x)[2]) {
    *reinterpret_cast<uint32*>(place) = FORMAT == BFLOAT16 ? pack_bfloat16(x[0], x[1]) : pack_float16(x[0], x[1]);
}
