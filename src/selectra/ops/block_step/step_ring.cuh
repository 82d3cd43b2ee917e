// How a thread block's weights come into its shared memory: tile after tile, in the order in which they are used.
#pragma once
#include "step_call.cuh"

DEVICE int lane_index() { return thread_index() % LANES; }
DEVICE int warp_index() { return thread_index() / LANES; }

// Number `index` of `count` equal parts of `size`.
DEVICE void share(int size, int index, int count, int& first, int& end) {
    first = int(int64(index) * size / count);
    end = int(int64(index + 1) * size / count);
}

// The least power of two of warps with a lane for each of so many pieces, and the largest one of rows that, with so many
// pieces of each, make a tile.
DEVICE constexpr int warps_for(int pieces) {
    int warps = 1;
    while (warps < WARPS && warps * LANES < pieces) warps *= 2;
    return warps;
}

DEVICE constexpr int rows_for(int pieces) {
    int rows = 1;
    while (2 * rows * pieces <= PIECES) rows *= 2;
    return rows;
}

// How the warps of a thread block divide rows of COLUMNS numbers: so many side by side in a row, in so many groups; the
// pieces of a row that a thread has, and the rows of a warp's tile and of all groups' tiles, one behind the other.
template <int COLUMNS>
struct Layout {
    static constexpr int COUNT = COLUMNS / VECTOR;
    static constexpr int BESIDE = warps_for(COUNT), GROUPS = WARPS / BESIDE;
    static constexpr int OWN = (COUNT + BESIDE * LANES - 1) / (BESIDE * LANES), TILE_ROWS = rows_for(OWN);
    static constexpr int ALL_ROWS = TILE_ROWS * GROUPS;

    static MEMBER int group() { return warp_index() / BESIDE; }
    // The thread's piece number i of a row, which there is or not.
    static MEMBER int piece(int i) { return (i * BESIDE + warp_index() % BESIDE) * LANES + lane_index(); }
    static MEMBER bool exists(int i) { return (i + 1) * BESIDE * LANES <= COUNT || piece(i) < COUNT; }
    // The rows of this thread block.
    static MEMBER void rows(int count, int& first, int& end) { share(count, block_x(), grid_x(), first, end); }
};

// The matrix of a part, which may have none, and its rows.
DEVICE const unsigned char* matrix_of(const Call& call, int part, int& rows) {
    const Block& block = call.blocks[part / PARTS];
    int kind = part % PARTS;
    rows = kind == IN ? 2 * INNER : kind == SELECT ? SELECTED : kind == OUT ? MODEL : 0;
    return static_cast<const unsigned char*>(kind == IN ? block.in_weight : kind == OUT ? block.out_weight : block.x_weight);
}

#if BULK

// One thread asks for whole tiles of all warps; barriers in shared memory say when a tile is there and when it is free.
// These copies do not stand in the way of the loads that the other warps wait for.
struct Ring {
    static constexpr int BARRIER_BYTES = 256, ALL_BYTES = WARPS * TILE_BYTES;
    unsigned char* slots;
    uint64 *full, *empty;
    int slot;
    uint32 turn;

    MEMBER Ring(const Call& call, unsigned char* memory) {
        full = reinterpret_cast<uint64*>(memory), empty = full + TILES;
        slots = memory + BARRIER_BYTES;
        slot = 0, turn = 0;
        if (thread_index() == 0) {
            for (int i = 0; i < TILES; ++i) make_barrier(full + i, 1), make_barrier(empty + i, WARPS);
            show_barriers();
        }
        synchronize_block();
    }

    // Whether this warp brings weights for the others; then it has done so.
    MEMBER bool is_at_work_for_others(const Call& call) {
        if (warp_index() <= WARPS) return false;
        if (lane_index() == 0) {
            // All slots are free at first.
            turn = 1;
            for (int part = int(call.first); part < call.last; ++part) {
                int rows;
                const unsigned char* matrix = matrix_of(call, part, rows);
                if (part % PARTS == IN) {
                    bring<MODEL>(matrix, rows);
                } else {
                    bring<INNER>(matrix, rows);
                }
            }
        }
        return true;
    }

    template <int COLUMNS>
    MEMBER void bring(const unsigned char* matrix, int rows) {
        using L = Layout<COLUMNS>;
        int row, end;
        L::rows(rows, row, end);
        for (; row < end; row += L::ALL_ROWS) {
            int count = end - row < L::ALL_ROWS ? end - row : L::ALL_ROWS;
            wait_at_barrier(empty + slot, turn);
            copy_bulk(slots + slot * ALL_BYTES, matrix + int64(row) * (L::COUNT * PIECE_BYTES),
                      count * (L::COUNT * PIECE_BYTES), full + slot);
            next();
        }
    }

    MEMBER void next() {
        if (++slot == TILES) slot = 0, turn ^= 1;
    }

    // The oldest tile.
    MEMBER const unsigned char* take() {
        wait_at_barrier(full + slot, turn);
        return slots + slot * ALL_BYTES;
    }

    // Where the thread's piece number i of row r of its tile lies.
    template <int COLUMNS>
    MEMBER int place(int r, int i) {
        using L = Layout<COLUMNS>;
        return ((L::group() * L::TILE_ROWS + r) * L::COUNT + L::piece(i)) * PIECE_BYTES;
    }

    // Whoever has read the tile says so.
    MEMBER void give_back(const Call&) {
        synchronize_warp();
        if (lane_index() == 0) arrive_at_barrier(empty + slot);
        next();
    }
};

#else

// Every lane asks for what it reads back itself, so that no barrier is needed.
struct Ring {
    unsigned char* slots;
    const unsigned char* matrix;
    int part, last, row, end, asked, taken;

    MEMBER Ring(const Call& call, unsigned char* memory) {
        slots = memory + warp_index() * (TILES * TILE_BYTES) + lane_index() * PIECE_BYTES;
        part = int(call.first) - 1, last = int(call.last);
        row = end = asked = taken = 0;
        matrix = nullptr;
        // The warp of the meetings has no rows.
        if (warp_index() == WARPS) part = last;
        seek(call);
#pragma unroll 1
        for (int i = 0; i < TILES; ++i) ask(call);
    }

    MEMBER bool is_at_work_for_others(const Call&) { return false; }

    // The next part in which this thread block has rows, or `last`.
    MEMBER void seek(const Call& call) {
        while (row >= end && part < last && ++part < last) {
            int rows;
            matrix = matrix_of(call, part, rows);
            share(rows, block_x(), grid_x(), row, end);
        }
    }

    template <int COLUMNS>
    MEMBER void ask_tile() {
        using L = Layout<COLUMNS>;
        unsigned char* to = slots + asked * TILE_BYTES;
        int first = row + L::group() * L::TILE_ROWS;
        const unsigned char* from = matrix + int64(first) * (L::COUNT * PIECE_BYTES);
#pragma unroll
        for (int r = 0; r < L::TILE_ROWS; ++r) {
#pragma unroll
            for (int i = 0; i < L::OWN; ++i) {
                if (first + r < end && L::exists(i)) {
                    copy_async<PIECE_BYTES>(to + place<COLUMNS>(r, i), from + (r * L::COUNT + L::piece(i)) * PIECE_BYTES);
                }
            }
        }
        row += L::ALL_ROWS;
    }

    // Asks for one more tile, if there is one.
    MEMBER void ask(const Call& call) {
        if (part < last) {
            if (part % PARTS == IN) {
                ask_tile<MODEL>();
            } else {
                ask_tile<INNER>();
            }
            asked = asked + 1 == TILES ? 0 : asked + 1;
            seek(call);
        }
        commit_copies();
    }

    // The oldest tile.
    MEMBER const unsigned char* take() {
        wait_for_copies<TILES - 1>();
        const unsigned char* from = slots + taken * TILE_BYTES;
        taken = taken + 1 == TILES ? 0 : taken + 1;
        return from;
    }

    // Where the thread's piece number i of row r of its tile lies.
    template <int COLUMNS>
    MEMBER int place(int r, int i) {
        return (r * Layout<COLUMNS>::OWN + i) * (LANES * PIECE_BYTES);
    }

    // Whoever has read the tile asks for another.
    MEMBER void give_back(const Call& call) { ask(call); }
};

#endif
