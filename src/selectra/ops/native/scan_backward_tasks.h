// The scan's backward over all sequences and channels: how it falls into tasks, and the sums over them.
//
// The cut of channels and sequences follows from the shapes alone, and the tasks' shares of a sum are added in their
// order, so that the result does not depend on the number of threads, unless these are so many that time is cut too.
#pragma once

#include "scan_backward.h"

namespace selectra {
namespace {

struct BackwardPlan {
  // The sequences fall into `ranges`; the blocks of a group into `slots`.
  int64_t ranges, slots;

  BackwardPlan(const ScanCall& call, const Layout& layout) {
    // More ranges would keep more cores busy, and each costs a copy of the gradient of A.
    constexpr int64_t kMostRanges = 32;
    constexpr int64_t kTasksWanted = 8;
    // Fewer blocks a slot would not pay for the sums over the lanes that each slot does.
    constexpr int64_t kLeastBlocks = 12;
    ranges = smaller(call.sequences, kMostRanges);
    const int64_t wanted = ceil_divide(kTasksWanted, larger<int64_t>(1, ranges * call.groups));
    slots = larger<int64_t>(1, smaller(wanted, layout.blocks_per_group / kLeastBlocks));
  }
};

// The tasks' shares of gradients that are sums over tasks: one copy of the output for each part, side by side.
struct Shares {
  Real* data = nullptr;
  int64_t size = 0;
  // Numbers that lie side by side in the output, and elements from one row of them to the next; in the shares all do.
  int64_t row = 0, stride = 0;
  Real* part(int64_t index) const { return data ? data + index * size : nullptr; }

  // A part as the (b, l, g, n) tensor `output`.
  Operand rows_of_part(int64_t index, const Operand& output, int64_t length, int64_t states) const {
    if (data == output.data) return output;
    return {part(index), {length * row, row, states, 1}, kWhole};
  }
};

struct BackwardShares {
  Shares dA, dskip, dbias, dB, dC;

  BackwardShares(Arena& arena, const ScanBackwardCall& call, int64_t pieces, int64_t slots) {
    const ScanCall& forward = call.forward;
    const int64_t rows = (forward.borders.data ? 1 : forward.sequences) * forward.length;
    take(arena, dA, call.dA, forward.channels * forward.states, pieces);
    take(arena, dskip, call.dD, forward.channels, pieces);
    take(arena, dbias, call.dbias, forward.channels, pieces);
    const int64_t row = forward.groups * forward.states;
    take(arena, dB, call.dB, rows * row, slots, row, call.dB.stride[1]);
    take(arena, dC, call.dC, rows * row, slots, row, call.dC.stride[1]);
  }

 private:
  // A single share is the output itself.
  static void take(Arena& arena, Shares& shares, const Operand& output, int64_t size, int64_t parts, int64_t row = 1,
                   int64_t stride = 1) {
    shares.size = size;
    shares.row = row;
    shares.stride = stride;
    if (!output.data) return;
    shares.data = parts > 1 || output.storage != kWhole ? arena.take<Real>(size * parts) : (Real*)output.data;
  }
};

SELECTRA_INLINE void clear_gradients(const BackwardWorkspace& work, int64_t blocks, int64_t states) {
  memset(work.dA, 0, sizeof(Vector) * blocks * states);
  memset(work.dskip, 0, sizeof(Vector) * blocks);
  memset(work.dbias, 0, sizeof(Vector) * blocks);
  // The sums over lanes read whole vectors of steps, past the last of a short chunk too.
  memset(work.lane_sums, 0, sizeof(Vector) * kChunk * 2 * states);
}

// Of every block A, A log2(e), D and the bias.
SELECTRA_INLINE void load_parameters(const ScanCall& call, const Layout& layout, const BlockRange& range,
                                     const BackwardWorkspace& work) {
  const int states = (int)call.states;
  for (int index = 0; index < range.count(); ++index) {
    const Block block = layout.block(range.group, range.first + index);
    Vector* const A = work.A + index * states;
    load_rates(call.A, block, states, A);
    for (int n = 0; n < states; ++n) work.rates[index * states + n] = A[n] * kLog2E;
    work.skip[index] = load_channels(call.D, block.channel, block.lanes);
    work.bias[index] = load_channels(call.bias, block.channel, block.lanes);
  }
}

// Carries the gradient of `States` states back through a chunk, and nothing else.
template <int States>
SELECTRA_INLINE void carry_states_back(int count, const BlockTiles& tiles, const Vector* rates, const Real* rows,
                                       int64_t states, Vector* dstate, Ahead& ahead) {
  Vector g[States];
#pragma GCC unroll 16
  for (int n = 0; n < States; ++n) g[n] = dstate[n];
  for (int t = count - 1; t >= 0; --t) {
    const Real* C = rows + (2 * t + 1) * states;
    const Vector dt = tiles.dt[t], dy = tiles.dy[t];
    ahead.ask();
#pragma GCC unroll 16
    for (int n = 0; n < States; ++n) g[n] = (g[n] + dy * C[n]) * exp2_of_product(dt, rates[n]);
  }
#pragma GCC unroll 16
  for (int n = 0; n < States; ++n) dstate[n] = g[n];
}

// What some chunks make of a gradient of zero behind them, and the sums of their steps.
static void sum_up_backward(const ScanBackwardCall& call, const Layout& layout, const Sequence& sequence,
                            const BlockRange& range, const BackwardWorkspace& work, int64_t first, int64_t end) {
  const ScanCall& forward = call.forward;
  const int states = (int)forward.states;
  const int band = range.band();
  const BlockTiles& tiles = work.tiles[0];
  memset(work.dstate, 0, sizeof(Vector) * range.count() * states);
  memset(work.stretch, 0, sizeof(LongSum) * range.count());
  Steps steps;
  Ahead ahead;
  for (int64_t c = end - 1; c >= first; --c) {
    sequence.chunk(c, steps);
    pack_rows(forward.C, sequence, range.group, steps, states, work.rows + states);
    for (int index = 0; index < range.count(); ++index) {
      if (index % band == 0) look_ahead<false, Steps>(call, layout, sequence, range, {c, index}, ahead);
      const Block block = layout.block(range.group, range.first + index);
      load_block(forward.delta, sequence.batch, block.channel, block.lanes, steps, tiles.dt);
      load_block(call.dy, sequence.batch, block.channel, block.lanes, steps, tiles.dy);
      Vector sum = {};
      for (int t = 0; t < steps.count; ++t) {
        const Vector delta = tiles.dt[t] + work.bias[index];
        tiles.dt[t] = forward.softplus ? softplus(delta).value : delta;
        sum += tiles.dt[t];
      }
      LongSum::add(work.stretch[index], sum);
      if (forward.z.data) {
        load_block(forward.z, sequence.batch, block.channel, block.lanes, steps, tiles.gate);
        for (int t = 0; t < steps.count; ++t) tiles.dy[t] *= tiles.gate[t] * sigmoid(tiles.gate[t]);
      }
      for_state_blocks<kEffectStates>(states, [&](auto size, int n) {
        carry_states_back<decltype(size)::value>(steps.count, tiles, work.rates + index * states + n, work.rows + n,
                                                 states, work.dstate + index * states + n, ahead);
      });
    }
  }
}

// What all jobs of a call share.
struct BackwardRun {
  const ScanBackwardCall& call;
  const Layout& layout;
  const Sequences& sequences;
  const BackwardShares& shares;
  const TimeCuts& cuts;
};

// One piece of a sequence, from its last chunk to its first; pieces count from the sequence's end.
static void piece_backward(const BackwardRun& run, int64_t s, const BlockRange& range, const Operand& dB,
                           const Operand& dC, const BackwardWorkspace& work, const Job& job) {
  const ScanBackwardCall& call = run.call;
  const int states = (int)call.forward.states;
  const Sequence sequence = run.sequences[s];
  const TimeCut cut = run.cuts.cut(job.part, sequence);
  int64_t begin = cut.begin(job.piece);
  if (job.piece > 0) {
    run.cuts.chain(job, run.layout, range, work.rates, states, work.dstate);
  } else {
    for (int index = 0; index < range.count(); ++index) {
      const Block block = run.layout.block(range.group, range.first + index);
      load_state(call.dfinal, s, block.channel, block.lanes, states, work.dstate + index * states);
    }
    if (cut.pieces > 1) {
      begin = cut.border(0);
      chunks_backward(call, run.layout, sequence, range, dB, dC, work, cut.chunks - begin, cut.chunks);
      run.cuts.keep(job, run.layout, range, nullptr, states, work.dstate);
    }
  }
  chunks_backward(call, run.layout, sequence, range, dB, dC, work, cut.chunks - cut.end(job.piece),
                  cut.chunks - begin);
  if (job.piece + 1 < cut.pieces) return;
  for (int index = 0; call.dinitial.data && index < range.count(); ++index) {
    const Block block = run.layout.block(range.group, range.first + index);
    store_state(call.dinitial, s, block.channel, block.lanes, states, work.dstate + index * states);
  }
}

// A task's gradients of A, D and the bias as the share of that number.
SELECTRA_INLINE void store_shares(const BackwardShares& shares, int64_t share, const Layout& layout,
                                  const BlockRange& range, int states, const BackwardWorkspace& work) {
  const Operand dA = {shares.dA.part(share), {0, states, 1}, kWhole};
  for (int index = 0; index < range.count(); ++index) {
    const Block block = layout.block(range.group, range.first + index);
    store_state(dA, 0, block.channel, block.lanes, states, work.dA + index * states);
    if (shares.dskip.data) store_some(shares.dskip.part(share) + block.channel, work.dskip[index], block.lanes);
    if (shares.dbias.data) store_some(shares.dbias.part(share) + block.channel, work.dbias[index], block.lanes);
  }
}

static void run_backward_job(const BackwardRun& run, int64_t first, int64_t last, const BlockRange& range,
                             int64_t slot, const Job& job) {
  const ScanCall& forward = run.call.forward;
  const int states = (int)forward.states;
  const BackwardWorkspace work = lay_out_workspace<BackwardWorkspace>((int64_t)range.count(), forward.states);
  load_parameters(forward, run.layout, range, work);
  if (job.kind == Job::kEffect) {
    const Sequence sequence = run.sequences[first];
    const TimeCut cut = run.cuts.cut(job.part, sequence);
    sum_up_backward(run.call, run.layout, sequence, range, work, cut.chunks - cut.border(job.piece),
                    cut.chunks - cut.border(job.piece - 1));
    run.cuts.keep(job, run.layout, range, work.stretch, states, work.dstate);
    return;
  }
  clear_gradients(work, range.count(), states);
  const int64_t length = forward.length;
  const Operand dB = run.shares.dB.rows_of_part(slot, run.call.dB, length, states);
  const Operand dC = run.shares.dC.rows_of_part(slot, run.call.dC, length, states);
  for (int64_t s = first; s < last; ++s) piece_backward(run, s, range, dB, dC, work, job);
  store_shares(run.shares, run.cuts.first_piece(job.part) + job.piece, run.layout, range, states, work);
}

// Adds the shares up in their order.
SELECTRA_INLINE void sum_shares(const Shares& shares, int64_t parts, const Operand& output, int64_t threads) {
  if (!output.data || shares.data == output.data) return;
  // Whole rows.
  const int64_t piece_size = ceil_divide(4096, shares.row) * shares.row;
  for_each_task(ceil_divide(shares.size, piece_size), threads_for(threads, parts * shares.size / kLanes),
                [&](int64_t piece) {
                  const int64_t begin = piece * piece_size, end = smaller(shares.size, begin + piece_size);
                  Real* const sum = shares.data;
                  for (int64_t part = 1; part < parts; ++part) {
                    const Real* share = shares.part(part);
                    for (int64_t i = begin; i < end; ++i) sum[i] += share[i];
                  }
                  with_storage(output, [&](auto storage) {
                    auto* const out = (typename decltype(storage)::Number*)output.data;
                    const int64_t length = shares.row == shares.stride ? end - begin : shares.row;
                    int64_t to = begin / shares.row * shares.stride;
                    for (int64_t from = begin; from < end; from += length, to += shares.stride) {
                      for (int64_t i = 0; i < length; ++i) out[to + i] = storage.narrow(sum[from + i]);
                    }
                  });
                });
}

SELECTRA_INLINE void sum_all_shares(const ScanBackwardCall& call, const BackwardShares& shares, int64_t pieces,
                                    int64_t slots) {
  const int64_t threads = call.forward.threads;
  sum_shares(shares.dA, pieces, call.dA, threads);
  sum_shares(shares.dskip, pieces, call.dD, threads);
  sum_shares(shares.dbias, pieces, call.dbias, threads);
  sum_shares(shares.dB, slots, call.dB, threads);
  sum_shares(shares.dC, slots, call.dC, threads);
}

static int scan_backward(const ScanBackwardCall& call) {
  const ScanCall& forward = call.forward;
  const Layout layout(forward.channels, forward.groups);
  const BackwardPlan plan(forward, layout);
  Sequences sequences(forward.sequences, forward.length, forward.reverse != 0, forward.borders);
  if (!sequences.borders_are_sound()) return kBadBorders;
  if (forward.mask.data && !sequences.leave_out_absent(forward.mask)) return kOutOfMemory;
  if (plan.ranges == 0) return kDone;
  // A backward step is about three forward steps.
  const int64_t threads = threads_for(forward.threads, 3 * scan_work(forward, layout));
  const TimeCuts cuts(forward, layout, sequences, plan.ranges, plan.slots * forward.groups, threads, kBackwardEffect);
  const int64_t pieces = cuts.pieces();

  Arena measure;
  BackwardShares(measure, call, pieces, plan.slots);
  // Zeros: no task writes the shares of absent positions.
  void* const memory = calloc((size_t)measure.used() + 64, 1);
  if (!memory) return kOutOfMemory;
  Arena arena((char*)(((uintptr_t)memory + 63) / 64 * 64));
  const BackwardShares shares(arena, call, pieces, plan.slots);
  const BackwardRun run = {call, layout, sequences, shares, cuts};

  for_each_job(cuts, threads, [&](const Job& job) {
    const int64_t group = job.slot / plan.slots, slot = job.slot % plan.slots;
    const BlockRange range = {group, part_begin(layout.blocks_per_group, slot, plan.slots),
                              part_begin(layout.blocks_per_group, slot + 1, plan.slots)};
    run_backward_job(run, part_begin(forward.sequences, job.part, plan.ranges),
                     part_begin(forward.sequences, job.part + 1, plan.ranges), range, slot, job);
  });
  sum_all_shares(call, shares, pieces, plan.slots);
  free(memory);
  return kDone;
}

}  // namespace
}  // namespace selectra
