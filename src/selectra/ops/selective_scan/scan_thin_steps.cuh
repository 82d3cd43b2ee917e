// The recurrence of the thin forward: what warps read of shared memory, run, and leave there.
#pragma once
#include "scan_thin_tiles.cuh"

// What a stretch of eight steps reads of shared memory, ahead of it.
struct Feed {
    float4 steps[STRETCH / 2];
    // Of four steps each.
    float4 B[STRETCH / 4][THIN];
    // Of step g.
    float C[THIN];

    MEMBER void read(const Stage& stage, const Lane& at, int stretch) {
#pragma unroll
        for (int j = 0; j < STRETCH / 2; ++j)
            steps[j] = stage.steps[(STRETCH / 2 * stretch + j) * (WIDTH + 1) + at.channel];
        const float4* Bs = reinterpret_cast<const float4*>(stage.B) + STRETCH / 4 * stretch * PADDED_STATES + at.state;
#pragma unroll
        for (int j = 0; j < STRETCH / 4; ++j)
#pragma unroll
            for (int i = 0; i < THIN; ++i) B[j][i] = Bs[j * PADDED_STATES + 4 * i];
    }

    MEMBER void read_C(const Stage& stage, const Lane& at, int stretch) {
        const float* Cs = reinterpret_cast<const float*>(stage.C) + (STRETCH * stretch + at.g) * 2 * C_ROW + at.state;
#pragma unroll
        for (int i = 0; i < THIN; ++i) C[i] = Cs[4 * i];
    }

    MEMBER float dt(int j) const { return j % 2 ? steps[j / 2].z : steps[j / 2].x; }
    MEMBER float du(int j) const { return j % 2 ? steps[j / 2].w : steps[j / 2].y; }
    MEMBER float B_of(int j, int i) const {
        const float4& four = B[j / 4][i];
        return j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w;
    }
};

// Outputs of eight steps: rows 0 to 7 of a product's left side are one step's states, rows 8 to 15 the next one's; column
// j of the right side is C of step j. Lane q takes steps 2q and 2q + 1 of its channel.
struct Outputs {
    float products[STRETCH / 2][4];

    MEMBER void store(Stage& stage, const Lane& at, int stretch) const {
        float* to = &stage.outputs[(at.state_warp * TILE + STRETCH * stretch + 2 * at.q) * ROW + at.channel];
        to[0] = at.q == 0 ? products[0][0] : at.q == 1 ? products[1][0] : at.q == 2 ? products[2][0] : products[3][0];
        to[ROW] = at.q == 0 ? products[0][3] : at.q == 1 ? products[1][3] : at.q == 2 ? products[2][3] : products[3][3];
    }
};

DEVICE void run(Outputs& outputs, States& h, const States& a, const Feed& feed, const Lane& at) {
    float states[STRETCH][THIN];
#pragma unroll
    for (int j = 0; j < STRETCH; ++j)
#pragma unroll
        for (int i = 0; i < THIN; ++i)
            states[j][i] = h[0][i] = fma(find_decay(feed.dt(j), a[0][i]), h[0][i], feed.du(j) * feed.B_of(j, i));
#pragma unroll
    for (int pair = 0; pair < STRETCH / 2; ++pair)
        multiply(outputs.products[pair], states[2 * pair][0], states[2 * pair + 1][0], states[2 * pair][1],
                 states[2 * pair + 1][1], feed.C[0], feed.C[1]);
}
