// The scan's backward over all sequences and channels: how it falls into tasks, and the sums over them.
//
// The cut into tasks follows from the shapes alone, and the tasks' shares of a sum are added in their order, so that
// the result does not depend on the number of threads.
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
  Real* part(int64_t index) const { return data ? data + index * size : nullptr; }
};

struct BackwardShares {
  Shares dA, dskip, dbias, dB, dC;

  BackwardShares(Arena& arena, const ScanBackwardCall& call, const BackwardPlan& plan) {
    const ScanCall& forward = call.forward;
    const int64_t rows = (forward.borders.data ? 1 : forward.sequences) * forward.length;
    take(arena, dA, call.dA, forward.channels * forward.states, plan.ranges);
    take(arena, dskip, call.dD, forward.channels, plan.ranges);
    take(arena, dbias, call.dbias, forward.channels, plan.ranges);
    take(arena, dB, call.dB, rows * forward.groups * forward.states, plan.slots);
    take(arena, dC, call.dC, rows * forward.groups * forward.states, plan.slots);
  }

 private:
  // A single share is the output itself.
  static void take(Arena& arena, Shares& shares, const Operand& output, int64_t size, int64_t parts) {
    shares.size = size;
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

static void scan_range_backward(const ScanBackwardCall& call, const Layout& layout, const Sequences& sequences,
                                int64_t first_sequence, int64_t last_sequence, const BlockRange& range,
                                const BackwardShares& shares, int64_t part, int64_t slot) {
  const ScanCall& forward = call.forward;
  const int states = (int)forward.states;
  const BackwardWorkspace work = lay_out_workspace<BackwardWorkspace>((int64_t)range.count(), forward.states);
  clear_gradients(work, range.count(), states);
  for (int index = 0; index < range.count(); ++index) {
    const Block block = layout.block(range.group, range.first + index);
    Vector* const A = work.A + index * states;
    load_rates(forward.A, block, states, A);
    for (int n = 0; n < states; ++n) work.rates[index * states + n] = A[n] * kLog2E;
    work.skip[index] = load_channels(forward.D, block.channel, block.lanes);
    work.bias[index] = load_channels(forward.bias, block.channel, block.lanes);
  }
  Operand dB = call.dB, dC = call.dC;
  dB.data = shares.dB.part(slot);
  dC.data = shares.dC.part(slot);
  for (int64_t s = first_sequence; s < last_sequence; ++s) {
    for (int index = 0; index < range.count(); ++index) {
      const Block block = layout.block(range.group, range.first + index);
      load_state(call.dfinal, s, block.channel, block.lanes, states, work.dstate + index * states);
    }
    sequence_backward(call, layout, sequences[s], range, dB, dC, work);
    for (int index = 0; call.dinitial.data && index < range.count(); ++index) {
      const Block block = layout.block(range.group, range.first + index);
      store_state(call.dinitial, s, block.channel, block.lanes, states, work.dstate + index * states);
    }
  }
  const Operand dA = {shares.dA.part(part), {0, states, 1}, kWhole};
  for (int index = 0; index < range.count(); ++index) {
    const Block block = layout.block(range.group, range.first + index);
    store_state(dA, 0, block.channel, block.lanes, states, work.dA + index * states);
    if (shares.dskip.data) store_some(shares.dskip.part(part) + block.channel, work.dskip[index], block.lanes);
    if (shares.dbias.data) store_some(shares.dbias.part(part) + block.channel, work.dbias[index], block.lanes);
  }
}

// Adds the shares up in their order.
SELECTRA_INLINE void sum_shares(const Shares& shares, int64_t parts, const Operand& output, int64_t threads) {
  if (!output.data || shares.data == output.data) return;
  constexpr int64_t kPiece = 4096;
  for_each_task(ceil_divide(shares.size, kPiece), threads_for(threads, parts * shares.size / kLanes),
                [&](int64_t piece) {
                  const int64_t end = smaller(shares.size, (piece + 1) * kPiece);
                  Real* const sum = shares.data;
                  for (int64_t part = 1; part < parts; ++part) {
                    const Real* share = shares.part(part);
                    for (int64_t i = piece * kPiece; i < end; ++i) sum[i] += share[i];
                  }
                  with_storage(output, [&](auto storage) {
                    auto* const out = (typename decltype(storage)::Number*)output.data;
                    for (int64_t i = piece * kPiece; i < end; ++i) out[i] = storage.narrow(sum[i]);
                  });
                });
}

static int scan_backward(const ScanBackwardCall& call) {
  const ScanCall& forward = call.forward;
  const Layout layout(forward.channels, forward.groups);
  const BackwardPlan plan(forward, layout);
  Sequences sequences(forward.sequences, forward.length, forward.reverse != 0, forward.borders);
  if (!sequences.borders_are_sound()) return kBadBorders;
  if (forward.mask.data && !sequences.leave_out_absent(forward.mask)) return kOutOfMemory;
  if (plan.ranges == 0) return kDone;

  Arena measure;
  BackwardShares(measure, call, plan);
  // Zeros: no task writes the shares of absent positions.
  void* const memory = calloc((size_t)measure.used() + 64, 1);
  if (!memory) return kOutOfMemory;
  Arena arena((char*)(((uintptr_t)memory + 63) / 64 * 64));
  const BackwardShares shares(arena, call, plan);

  // A backward step is about three forward steps.
  const int64_t threads = threads_for(forward.threads, 3 * scan_work(forward, layout));
  for_each_task(plan.ranges * forward.groups * plan.slots, threads, [&](int64_t task) {
    const int64_t slot = task % plan.slots, group = task / plan.slots % forward.groups;
    const int64_t part = task / plan.slots / forward.groups;
    const BlockRange range = {group, part_begin(layout.blocks_per_group, slot, plan.slots),
                              part_begin(layout.blocks_per_group, slot + 1, plan.slots)};
    scan_range_backward(call, layout, sequences, part_begin(forward.sequences, part, plan.ranges),
                        part_begin(forward.sequences, part + 1, plan.ranges), range, shares, part, slot);
  });
  sum_shares(shares.dA, plan.ranges, call.dA, forward.threads);
  sum_shares(shares.dskip, plan.ranges, call.dD, forward.threads);
  sum_shares(shares.dbias, plan.ranges, call.dbias, forward.threads);
  sum_shares(shares.dB, plan.slots, call.dB, forward.threads);
  sum_shares(shares.dC, plan.slots, call.dC, forward.threads);
  free(memory);
  return kDone;
}

}  // namespace
}  // namespace selectra
