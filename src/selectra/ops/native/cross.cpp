// Scans along routes through one grid, forward and backward: what they share is added up while it is written.
//
// A task runs all routes over its sequences and channels, one after the other, so that each finds the sum of those
// before it where it writes. Which numbers a route reads is a matter of its steps alone: nothing is copied or flipped.
//
// A file of its own: what the compiler makes of the plain scan stays as it is without these.

// The plain scan's own entry points are not used here.
#pragma GCC diagnostic ignored "-Wunused-function"

#include <new>

#include "cross.h"
#include "scan_backward_tasks.h"
#include "scan_forward.h"

namespace selectra {
namespace {

SELECTRA_INLINE Sequences sequences_of_route(const ScanCall& call) {
  return Sequences(call.sequences, call.length, call.reverse != 0, call.borders, grid_of(call));
}

// The blocks of a task that takes slot `slot` of `slots`.
SELECTRA_INLINE BlockRange slot_range(const Layout& layout, int64_t slot, int64_t slots) {
  return {0, part_begin(layout.blocks_per_group, slot, slots), part_begin(layout.blocks_per_group, slot + 1, slots)};
}

}  // namespace

int SELECTRA_CROSS(forward)(const ScanCall* routes, int64_t count) {
  const ScanCall& call = routes[0];
  const Layout layout(call.channels, 1);
  if (call.sequences == 0) return kDone;
  const int64_t threads = threads_for(call.threads, count * scan_work(call, layout));
  const int64_t wanted = threads > 1 ? 4 * threads : 1;
  const int64_t slots = larger<int64_t>(1, smaller(layout.blocks_per_group, ceil_divide(wanted, call.sequences)));
  // One sequence a task: what its routes share stays in the second cache.
  for_each_task(call.sequences * slots, threads, [&](int64_t task) {
    const BlockRange range = slot_range(layout, task % slots, slots);
    const ForwardWorkspace work = lay_out_workspace<ForwardWorkspace>((int64_t)range.count(), call.states);
    for (int64_t i = 0; i < count; ++i) {
      const Sequences sequences = sequences_of_route(routes[i]);
      const Sequence sequence = sequences[task / slots];
      load_parameters(routes[i], layout, range, work);
      memset(work.state, 0, sizeof(Vector) * range.count() * call.states);
      scan_chunks<GridSteps>(routes[i], layout, sequence, range, work, 0, sequence.chunks());
    }
  });
  return kDone;
}

namespace {

static void route_backward(const ScanBackwardCall& call, const Layout& layout, int64_t first, int64_t last,
                           const BlockRange& range, int64_t slot, int64_t share, const BackwardShares& shares,
                           const BackwardWorkspace& work) {
  const ScanCall& forward = call.forward;
  const int64_t states = forward.states;
  const Sequences sequences = sequences_of_route(forward);
  const Operand dB = shares.dB.rows_of_part(slot, call.dB, forward.length, states);
  const Operand dC = shares.dC.rows_of_part(slot, call.dC, forward.length, states);
  load_parameters(forward, layout, range, work);
  clear_gradients(work, range.count(), states);
  for (int64_t s = first; s < last; ++s) {
    const Sequence sequence = sequences[s];
    memset(work.dstate, 0, sizeof(Vector) * range.count() * states);
    chunks_backward<GridSteps>(call, layout, sequence, range, dB, dC, work, 0, sequence.chunks());
  }
  store_shares(shares, share, layout, range, (int)states, work);
}

}  // namespace

int SELECTRA_CROSS(backward)(const ScanBackwardCall* routes, int64_t count) {
  const ScanCall& forward = routes[0].forward;
  const Layout layout(forward.channels, 1);
  BackwardPlan plan(forward, layout);
  if (plan.ranges == 0) return kDone;
  // A single sequence would be a single task: its time is not cut.
  constexpr int64_t kLeastBlocks = 4, kTasks = 8;
  if (plan.ranges == 1) plan.slots = larger(plan.slots, smaller(kTasks, layout.blocks_per_group / kLeastBlocks));

  Arena measure;
  for (int64_t i = 0; i < count; ++i) BackwardShares(measure, routes[i], plan.ranges, plan.slots);
  const uint64_t of_routes = (uint64_t)measure.used();
  char* const memory = (char*)malloc(of_routes + count * sizeof(BackwardShares) + 64);
  if (!memory) return kOutOfMemory;
  char* const aligned = (char*)(((uintptr_t)memory + 63) / 64 * 64);
  Arena arena(aligned);
  BackwardShares* const shares = (BackwardShares*)(aligned + of_routes);
  for (int64_t i = 0; i < count; ++i) new (shares + i) BackwardShares(arena, routes[i], plan.ranges, plan.slots);

  const int64_t threads = threads_for(forward.threads, 3 * count * scan_work(forward, layout));
  for_each_task(plan.ranges * plan.slots, threads, [&](int64_t task) {
    const int64_t slot = task % plan.slots, part = task / plan.slots;
    const BlockRange range = slot_range(layout, slot, plan.slots);
    const BackwardWorkspace work = lay_out_workspace<BackwardWorkspace>((int64_t)range.count(), forward.states);
    for (int64_t i = 0; i < count; ++i) {
      route_backward(routes[i], layout, part_begin(forward.sequences, part, plan.ranges),
                     part_begin(forward.sequences, part + 1, plan.ranges), range, slot, part, shares[i], work);
    }
  });
  for (int64_t i = 0; i < count; ++i) sum_all_shares(routes[i], shares[i], plan.ranges, plan.slots);
  free(memory);
  return kDone;
}

}  // namespace selectra
