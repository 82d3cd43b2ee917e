// The selective scan, backward: every chunk, last first, reruns its steps from the checkpoint before it and then
// carries the state's gradient back through them.
//
// With g_t the gradient of h_t: g_t = C_t dy_t + a_{t+1} g_{t+1}, a_t = exp(dt_t A). The gradient of dt u B is g, that
// of dt A is g a h_{t-1}. The derivation is in ops/selective_scan/README.md.
#pragma once

#include <initializer_list>

#include "scan_time.h"

namespace selectra {
namespace {

// Blocks of channels that go through a chunk together, and states of each in registers at once. B and C are shared by
// channels: a pair of blocks halves the traffic on the sums of their gradients.
constexpr int kPair = kVectorRegisters >= 32 ? 2 : 1;
constexpr int kBackwardStates = 4;

// States in registers at once where a stretch's effect is wanted.
constexpr int kEffectStates = kVectorRegisters >= 32 ? 16 : 8;

// The time that a stretch's effect takes over that of its gradients.
constexpr double kBackwardEffect = 0.2;

// One block's tiles of a chunk, one vector a step.
struct BlockTiles {
  // delta, u, z, and in their place their gradients; the gradient of the output before the gate.
  Vector *delta, *u, *gate, *dy;
  // dt; its slope with respect to delta; dt u; the output before the gate.
  Vector *dt, *slope, *input, *y;
  // Sums over the states: g B, and g a h A.
  Vector *dinput, *dexponent;

  explicit BlockTiles(Arena& arena)
      : delta(arena.take<Vector>(kChunk)),
        u(arena.take<Vector>(kChunk)),
        gate(arena.take<Vector>(kChunk)),
        dy(arena.take<Vector>(kChunk)),
        dt(delta),
        slope(arena.take<Vector>(kChunk)),
        input(arena.take<Vector>(kChunk)),
        y(arena.take<Vector>(kChunk)),
        dinput(arena.take<Vector>(kChunk)),
        dexponent(arena.take<Vector>(kChunk)) {}
};

struct BackwardWorkspace {
  // Of every block: A, A log2(e), the gradient of the state, of A; D and the bias and their gradients.
  Vector *A, *rates, *dstate, *dA, *skip, *bias, *dskip, *dbias;
  // Of kPair blocks and kBackwardStates states: of every step its decay and the decayed state before it.
  Vector *decay, *decayed;
  // The gradients of B and C by lane, summed over blocks: by register block of states, then [step][B or C][state].
  Vector* lane_sums;
  // Of every block: the sum of dt, where a stretch's effect is wanted.
  LongSum* stretch;
  // B and C of a chunk; one row of their gradients by register block.
  Real *rows, *sums;
  BlockTiles tiles[2];

  BackwardWorkspace(Arena& arena, int64_t blocks, int64_t states)
      : A(arena.take<Vector>(blocks * states)),
        rates(arena.take<Vector>(blocks * states)),
        dstate(arena.take<Vector>(blocks * states)),
        dA(arena.take<Vector>(blocks * states)),
        skip(arena.take<Vector>(blocks)),
        bias(arena.take<Vector>(blocks)),
        dskip(arena.take<Vector>(blocks)),
        dbias(arena.take<Vector>(blocks)),
        decay(arena.take<Vector>(kPair * kChunk * kBackwardStates)),
        decayed(arena.take<Vector>(kPair * kChunk * kBackwardStates)),
        lane_sums(arena.take<Vector>(kChunk * 2 * states)),
        stretch(arena.take<LongSum>(blocks)),
        rows(arena.take<Real>(kChunk * 2 * states)),
        sums(arena.take<Real>(kChunk * 2 * kBackwardStates)),
        tiles{BlockTiles(arena), BlockTiles(arena)} {}
};

// Runs the states forward again and keeps every decay and decayed state; adds dy h to the gradient of C, and C . h to y
// where the gate needs it.
template <int Blocks, int States, bool Gated>
SELECTRA_INLINE void rerun(int count, const BlockTiles* tiles, const Vector* const* rates,
                           const Real* const* checkpoint, const Real* rows, int64_t states, Vector* __restrict decay,
                           Vector* __restrict decayed, Vector* __restrict lane_sums, Ahead& ahead) {
  Vector h[Blocks][States];
#pragma GCC unroll 2
  for (int p = 0; p < Blocks; ++p) {
#pragma GCC unroll 8
    for (int n = 0; n < States; ++n) h[p][n] = load(checkpoint[p] + n * kLanes);
  }
  for (int t = 0; t < count; ++t) {
    const Real* B = rows + t * 2 * states;
    const Real* C = B + states;
    Vector* const decay_now = decay + t * Blocks * States;
    Vector* const decayed_now = decayed + t * Blocks * States;
    Vector* const sums = lane_sums + (2 * t + 1) * States;
    ahead.ask();
    Vector y[Blocks];
#pragma GCC unroll 2
    for (int p = 0; p < Blocks; ++p) y[p] = Gated ? tiles[p].y[t] : Vector{};
#pragma GCC unroll 8
    for (int n = 0; n < States; ++n) {
      Vector dC = sums[n];
#pragma GCC unroll 2
      for (int p = 0; p < Blocks; ++p) {
        const Vector a = exp2_of_product(tiles[p].dt[t], rates[p][n]);
        const Vector before = a * h[p][n];
        decay_now[p * States + n] = a;
        decayed_now[p * States + n] = before;
        h[p][n] = before + tiles[p].input[t] * B[n];
        dC += tiles[p].dy[t] * h[p][n];
        if (Gated) y[p] += h[p][n] * C[n];
      }
      sums[n] = dC;
    }
#pragma GCC unroll 2
    for (int p = 0; Gated && p < Blocks; ++p) tiles[p].y[t] = y[p];
  }
}

// Carries the gradient of the states back through a chunk.
template <int Blocks, int States>
SELECTRA_INLINE void carry_back(int count, const BlockTiles* tiles, const Vector* const* A, const Real* rows,
                                int64_t states, const Vector* __restrict decay, const Vector* __restrict decayed,
                                Vector* const* dstate, Vector* const* dA, Vector* __restrict lane_sums,
                                Ahead& ahead) {
  Vector g[Blocks][States], rate_sum[Blocks][States];
#pragma GCC unroll 2
  for (int p = 0; p < Blocks; ++p) {
#pragma GCC unroll 8
    for (int n = 0; n < States; ++n) {
      g[p][n] = dstate[p][n];
      rate_sum[p][n] = dA[p][n];
    }
  }
  for (int t = count - 1; t >= 0; --t) {
    const Real* B = rows + t * 2 * states;
    const Real* C = B + states;
    const Vector* a = decay + t * Blocks * States;
    const Vector* before = decayed + t * Blocks * States;
    Vector* const sums = lane_sums + 2 * t * States;
    ahead.ask();
    Vector dinput[Blocks], dexponent[Blocks];
#pragma GCC unroll 2
    for (int p = 0; p < Blocks; ++p) {
      dinput[p] = tiles[p].dinput[t];
      dexponent[p] = tiles[p].dexponent[t];
    }
#pragma GCC unroll 8
    for (int n = 0; n < States; ++n) {
      Vector dB = sums[n];
#pragma GCC unroll 2
      for (int p = 0; p < Blocks; ++p) {
        const Vector gradient = g[p][n] + tiles[p].dy[t] * C[n];
        dB += gradient * tiles[p].input[t];
        dinput[p] += gradient * B[n];
        g[p][n] = gradient * a[p * States + n];
        const Vector through_exponent = gradient * before[p * States + n];
        dexponent[p] += through_exponent * A[p][n];
        rate_sum[p][n] += through_exponent * tiles[p].dt[t];
      }
      sums[n] = dB;
    }
#pragma GCC unroll 2
    for (int p = 0; p < Blocks; ++p) {
      tiles[p].dinput[t] = dinput[p];
      tiles[p].dexponent[t] = dexponent[p];
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < Blocks; ++p) {
#pragma GCC unroll 8
    for (int n = 0; n < States; ++n) {
      dstate[p][n] = g[p][n];
      dA[p][n] = rate_sum[p][n];
    }
  }
}

// Loads a block's tiles and takes the gradient of y back through the gate.
template <typename AnySteps>
SELECTRA_INLINE void prepare_backward(const ScanBackwardCall& call, const Sequence& sequence, const AnySteps& steps,
                                      Block block, Vector bias, Vector skip, const BlockTiles& tiles) {
  const ScanCall& forward = call.forward;
  load_block(forward.delta, sequence.batch, block.channel, block.lanes, steps, tiles.delta);
  load_block(forward.u, sequence.batch, block.channel, block.lanes, steps, tiles.u);
  load_block(call.dy, sequence.batch, block.channel, block.lanes, steps, tiles.dy);
  for (int t = 0; t < steps.count; ++t) {
    const Vector delta = tiles.delta[t] + bias;
    const Softplus soft = forward.softplus ? softplus(delta) : Softplus{delta, broadcast(1)};
    tiles.dt[t] = soft.value;
    tiles.slope[t] = soft.slope;
    tiles.input[t] = soft.value * tiles.u[t];
    tiles.dinput[t] = tiles.dexponent[t] = Vector{};
  }
  if (!forward.z.data) return;
  load_block(forward.z, sequence.batch, block.channel, block.lanes, steps, tiles.gate);
  for (int t = 0; t < steps.count; ++t) {
    const Vector z = tiles.gate[t], dy = tiles.dy[t], s = sigmoid(z);
    tiles.gate[t] = dy * (s + z * s * (1 - s));
    tiles.dy[t] = dy * (z * s);
    tiles.y[t] = skip * tiles.u[t];
  }
}

// From the sums over the states to the gradients of u, delta, z, D and the bias.
template <typename AnySteps>
SELECTRA_INLINE void finish_backward(const ScanBackwardCall& call, const Sequence& sequence, const AnySteps& steps,
                                     Block block, Vector skip, Vector& dskip, Vector& dbias, const BlockTiles& tiles) {
  Vector skip_sum = dskip, bias_sum = dbias;
  for (int t = 0; t < steps.count; ++t) {
    const Vector dinput = tiles.dinput[t], u = tiles.u[t], dy = tiles.dy[t];
    const Vector ddelta = (tiles.dexponent[t] + u * dinput) * tiles.slope[t];
    tiles.u[t] = tiles.dt[t] * dinput + skip * dy;
    tiles.delta[t] = ddelta;
    skip_sum += dy * u;
    bias_sum += ddelta;
  }
  dskip = skip_sum;
  dbias = bias_sum;
  add_onto(call.du_onto, sequence, block, steps, tiles.dinput, tiles.u);
  store_block(call.du, sequence.batch, block.channel, block.lanes, steps, tiles.u);
  store_block(call.ddelta, sequence.batch, block.channel, block.lanes, steps, tiles.delta);
  if (!call.forward.z.data) return;
  for (int t = 0; t < steps.count; ++t) tiles.gate[t] *= tiles.y[t];
  add_onto(call.dz_onto, sequence, block, steps, tiles.y, tiles.gate);
  store_block(call.dz, sequence.batch, block.channel, block.lanes, steps, tiles.gate);
}

// What the next band will read and write, asked for while the one before it runs; without `Whole` what an effect needs.
template <bool Whole, typename AnySteps>
SELECTRA_INLINE void look_ahead(const ScanBackwardCall& call, const Layout& layout, const Sequence& sequence,
                                const BlockRange& range, BandStep now, Ahead& ahead) {
  const ScanCall& forward = call.forward;
  ahead.clear();
  BandStep next = now;
  next.advance(range, true);
  if (next.chunk < 0) return;
  AnySteps steps;
  sequence.chunk(next.chunk, steps);
  const int64_t first = range.first + next.index, blocks = next.blocks(range);
  const int64_t channel = layout.block(range.group, first).channel;
  for (const Operand* tensor : {&forward.delta, &call.dy, &forward.z, &forward.u, &call.du, &call.ddelta, &call.dz}) {
    if (!Whole && tensor == &forward.u) break;
    ahead.add_rows(*tensor, sequence.batch, channel, blocks * kLanes, steps);
  }
  if (!Whole) return ahead.spread(kChunk * now.blocks(range) * ceil_divide(forward.states, kEffectStates));
  ahead.add(checkpoint_of(forward, layout, sequence.chunk_offset + next.chunk, range.group, first),
            blocks * forward.states * (int64_t)sizeof(Vector));
  ahead.spread(2 * kChunk * ceil_divide(now.blocks(range), kPair) * ceil_divide(forward.states, kBackwardStates));
}

// `Blocks` neighbouring blocks of the range, from `index` on, through one chunk.
template <int Blocks, typename AnySteps>
static void blocks_backward(const ScanBackwardCall& call, const Layout& layout, const Sequence& sequence,
                            const AnySteps& steps, int64_t chunk, const BlockRange& range, int index,
                            const BackwardWorkspace& work, Ahead& ahead) {
  const ScanCall& forward = call.forward;
  const int states = (int)forward.states;
  for (int p = 0; p < Blocks; ++p) {
    prepare_backward(call, sequence, steps, layout.block(range.group, range.first + index + p), work.bias[index + p],
                     work.skip[index + p], work.tiles[p]);
  }
  for_state_blocks<kBackwardStates>(states, [&](auto size, int n) {
    constexpr int kStates = decltype(size)::value;
    const Real* checkpoint[Blocks];
    const Vector *rates[Blocks], *A[Blocks];
    Vector *dstate[Blocks], *dA[Blocks];
    for (int p = 0; p < Blocks; ++p) {
      const int64_t offset = (int64_t)(index + p) * states + n;
      checkpoint[p] = checkpoint_of(forward, layout, chunk, range.group, range.first + index + p) + n * kLanes;
      rates[p] = work.rates + offset;
      A[p] = work.A + offset;
      dstate[p] = work.dstate + offset;
      dA[p] = work.dA + offset;
    }
    const Real* rows = work.rows + n;
    Vector* const lane_sums = work.lane_sums + (int64_t)n * 2 * kChunk;
    if (forward.z.data) {
      rerun<Blocks, kStates, true>(steps.count, work.tiles, rates, checkpoint, rows, states, work.decay, work.decayed,
                                   lane_sums, ahead);
    } else {
      rerun<Blocks, kStates, false>(steps.count, work.tiles, rates, checkpoint, rows, states, work.decay, work.decayed,
                                    lane_sums, ahead);
    }
    carry_back<Blocks, kStates>(steps.count, work.tiles, A, rows, states, work.decay, work.decayed, dstate, dA,
                                lane_sums, ahead);
  });
  for (int p = 0; p < Blocks; ++p) {
    finish_backward(call, sequence, steps, layout.block(range.group, range.first + index + p), work.skip[index + p],
                    work.dskip[index + p], work.dbias[index + p], work.tiles[p]);
  }
}

// Sums the gradients of B and C over the lanes and writes them to the slot's (b, l, g, n) tensors.
SELECTRA_INLINE void write_row_gradients(const ScanCall& forward, const Operand& dB, const Operand& dC,
                                         const Sequence& sequence, const Steps& steps, int64_t group,
                                         const BackwardWorkspace& work) {
  Real* const to_B = (Real*)dB.data + sequence.batch * dB.stride[0] + group * dB.stride[2];
  Real* const to_C = (Real*)dC.data + sequence.batch * dC.stride[0] + group * dC.stride[2];
  for_state_blocks<kBackwardStates>((int)forward.states, [&](auto size, int n) {
    constexpr int kStates = decltype(size)::value;
    const Vector* lanes = work.lane_sums + (int64_t)n * 2 * kChunk;
    for (int i = 0; i < steps.count * 2 * kStates; i += kLanes) store(work.sums + i, sum_lanes(lanes + i));
    for (int t = 0; t < steps.count; ++t) {
      const Real* const sums = work.sums + 2 * t * kStates;
      memcpy(to_B + steps.position[t] * dB.stride[1] + n, sums, sizeof(Real) * kStates);
      memcpy(to_C + steps.position[t] * dC.stride[1] + n, sums + kStates, sizeof(Real) * kStates);
    }
  });
}

// Walks back through some chunks, from the last to the first.
template <typename AnySteps = Steps>
static void chunks_backward(const ScanBackwardCall& call, const Layout& layout, const Sequence& sequence,
                            const BlockRange& range, const Operand& dB, const Operand& dC,
                            const BackwardWorkspace& work, int64_t first, int64_t end) {
  AnySteps steps;
  Ahead ahead;
  const int band = range.band();
  for (int64_t c = end - 1; c >= first; --c) {
    const int64_t chunk = sequence.chunk_offset + c;
    sequence.chunk(c, steps);
    pack_input_output_rows(call.forward, sequence, range.group, steps, work.rows);
    memset(work.lane_sums, 0, sizeof(Vector) * kChunk * 2 * call.forward.states);
    int index = 0;
    for (; index + kPair <= range.count(); index += kPair) {
      if (index % band == 0) look_ahead<true, AnySteps>(call, layout, sequence, range, {c, index}, ahead);
      blocks_backward<kPair>(call, layout, sequence, steps, chunk, range, index, work, ahead);
    }
    if (index < range.count()) blocks_backward<1>(call, layout, sequence, steps, chunk, range, index, work, ahead);
    write_row_gradients(call.forward, dB, dC, sequence, steps, range.group, work);
  }
}

}  // namespace
}  // namespace selectra
