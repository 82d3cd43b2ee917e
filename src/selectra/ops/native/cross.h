// Scans along routes through one grid, forward and backward: what they share is added up while it is written.
//
// A task runs all routes over its sequences and channels, one after the other, so that each finds the sum of those
// before it where it writes. Which numbers a route reads is a matter of its steps alone: nothing is copied or flipped.
#pragma once

#include <new>

#include "scan_backward_tasks.h"
#include "scan_forward.h"

namespace selectra {
namespace {

SELECTRA_INLINE Sequences sequences_of_route(const ScanCall& call) {
  return Sequences(call.sequences, call.length, call.reverse != 0, call.borders, grid_of(call));
}

static int cross_forward(const ScanCall* routes, int64_t count) {
  const ScanCall& call = routes[0];
  const Layout layout(call.channels, 1);
  if (call.sequences == 0) return kDone;
  const int64_t threads = threads_for(call.threads, count * scan_work(call, layout));
  const int64_t wanted = threads > 1 ? 4 * threads : 1;
  const int64_t slots = larger<int64_t>(1, smaller(layout.blocks_per_group, ceil_divide(wanted, call.sequences)));
  for_each_task(call.sequences * slots, threads, [&](int64_t task) {
    const int64_t slot = task % slots, sequence = task / slots;
    const BlockRange range = {0, part_begin(layout.blocks_per_group, slot, slots),
                              part_begin(layout.blocks_per_group, slot + 1, slots)};
    for (int64_t i = 0; i < count; ++i) {
      const Sequences sequences = sequences_of_route(routes[i]);
      scan_range_forward<GridSteps>(routes[i], layout, sequences, sequence, sequence + 1, range);
    }
  });
  return kDone;
}

static int cross_backward(const ScanBackwardCall* routes, int64_t count) {
  const ScanCall& forward = routes[0].forward;
  const Layout layout(forward.channels, 1);
  const BackwardPlan plan(forward, layout);
  if (plan.ranges == 0) return kDone;

  Arena measure;
  for (int64_t i = 0; i < count; ++i) BackwardShares(measure, routes[i], plan);
  const uint64_t of_routes = ((uint64_t)measure.used() + 63) / 64 * 64;
  char* const memory = (char*)malloc(of_routes + count * sizeof(BackwardShares) + 64);
  if (!memory) return kOutOfMemory;
  char* const aligned = (char*)(((uintptr_t)memory + 63) / 64 * 64);
  Arena arena(aligned);
  BackwardShares* const shares = (BackwardShares*)(aligned + of_routes);
  for (int64_t i = 0; i < count; ++i) new (shares + i) BackwardShares(arena, routes[i], plan);

  const int64_t threads = threads_for(forward.threads, 3 * count * scan_work(forward, layout));
  for_each_task(plan.ranges * plan.slots, threads, [&](int64_t task) {
    const int64_t slot = task % plan.slots, part = task / plan.slots;
    const BlockRange range = {0, part_begin(layout.blocks_per_group, slot, plan.slots),
                              part_begin(layout.blocks_per_group, slot + 1, plan.slots)};
    for (int64_t i = 0; i < count; ++i) {
      const Sequences sequences = sequences_of_route(routes[i].forward);
      scan_range_backward<GridSteps>(routes[i], layout, sequences, part_begin(forward.sequences, part, plan.ranges),
                          part_begin(forward.sequences, part + 1, plan.ranges), range, shares[i], part, slot);
    }
  });
  for (int64_t i = 0; i < count; ++i) sum_all_shares(routes[i], shares[i], plan);
  free(memory);
  return kDone;
}

}  // namespace
}  // namespace selectra
