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
  // Numbers that lie side by side in the output, and elements from one row of them to the next; in the shares all do.
  int64_t row = 0, stride = 0;
  Real* part(int64_t index) const { return data ? data + index * size : nullptr; }

  // A part as the (b, l, g, n) tensor `output`.
  Operand rows_of_part(int64_t index, const Operand& output, int64_t length, int64_t states) const {
    Operand tensor = output;
    tensor.data = part(index);
    if (data != output.data) {
      tensor = {tensor.data, {length * row, row, states, 1}, kWhole};
    }
    return tensor;
  }
};

struct BackwardShares {
  Shares dA, dskip, dbias, dB, dC;

  BackwardShares(Arena& arena, const ScanBackwardCall& call, const BackwardPlan& plan) {
    const ScanCall& forward = call.forward;
    const int64_t rows = (forward.borders.data ? 1 : forward.sequences) * forward.length;
    take(arena, dA, call.dA, forward.channels * forward.states, plan.ranges);
    take(arena, dskip, call.dD, forward.channels, plan.ranges);
    take(arena, dbias, call.dbias, forward.channels, plan.ranges);
    const int64_t row = forward.groups * forward.states;
    take(arena, dB, call.dB, rows * row, plan.slots, row, call.dB.stride[1]);
    take(arena, dC, call.dC, rows * row, plan.slots, row, call.dC.stride[1]);
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

template <typename AnySteps = Steps>
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
  const Operand dB = shares.dB.rows_of_part(slot, call.dB, forward.length, forward.states);
  const Operand dC = shares.dC.rows_of_part(slot, call.dC, forward.length, forward.states);
  for (int64_t s = first_sequence; s < last_sequence; ++s) {
    for (int index = 0; index < range.count(); ++index) {
      const Block block = layout.block(range.group, range.first + index);
      load_state(call.dfinal, s, block.channel, block.lanes, states, work.dstate + index * states);
    }
    sequence_backward<AnySteps>(call, layout, sequences[s], range, dB, dC, work);
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

SELECTRA_INLINE void sum_all_shares(const ScanBackwardCall& call, const BackwardShares& shares,
                                    const BackwardPlan& plan) {
  const int64_t threads = call.forward.threads;
  sum_shares(shares.dA, plan.ranges, call.dA, threads);
  sum_shares(shares.dskip, plan.ranges, call.dD, threads);
  sum_shares(shares.dbias, plan.ranges, call.dbias, threads);
  sum_shares(shares.dB, plan.slots, call.dB, threads);
  sum_shares(shares.dC, plan.slots, call.dC, threads);
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
  sum_all_shares(call, shares, plan);
  free(memory);
  return kDone;
}

}  // namespace
}  // namespace selectra
