// What the scan's forward and backward share: how channels fall into blocks, and what a chunk of steps reads.
#pragma once

#include "parallel.h"
#include "tile.h"

namespace selectra {
namespace {

// kLanes neighbouring channels of one group, or fewer at the group's end.
struct Block {
  int64_t channel;
  int lanes;
};

// How the channels of a call fall into groups and blocks.
struct Layout {
  int64_t channels_per_group, blocks_per_group;

  Layout(int64_t channels, int64_t groups)
      : channels_per_group(channels / groups), blocks_per_group(ceil_divide(channels_per_group, kLanes)) {}

  Block block(int64_t group, int64_t index) const {
    const int64_t within = index * kLanes;
    return {group * channels_per_group + within, (int)smaller<int64_t>(kLanes, channels_per_group - within)};
  }
};

// Calls body(size, n) for register blocks of `size` states, the size a compile-time constant, that make up all states.
template <int Largest, typename Body>
SELECTRA_INLINE void for_state_blocks(int states, const Body& body) {
  int n = 0;
  for (; n + Largest <= states; n += Largest) body(std::integral_constant<int, Largest>{}, n);
  if constexpr (Largest > 1) {
    if (n < states) for_state_blocks<Largest / 2>(states - n, [&](auto size, int m) { body(size, n + m); });
  }
}

// B and C of a chunk, one row a step in the order of the run: states numbers of B, then states numbers of C.
template <typename AnySteps>
SELECTRA_APART void pack_rows(const Operand& tensor, const Sequence& sequence, int64_t group, const AnySteps& steps,
                              int states, Real* rows) {
  with_storage(tensor, [&](auto storage) {
    using Storage = decltype(storage);
    const auto* base =
        (const typename Storage::Number*)tensor.data + sequence.batch * tensor.stride[0] + group * tensor.stride[2];
    const int64_t stride = tensor.stride[3];
    for (int t = 0; t < steps.count; ++t) {
      const auto* from = base + steps.offset(tensor, t);
      Real* row = rows + (int64_t)t * 2 * states;
      int n = 0;
      if (stride == 1) {
        for (; n + kLanes <= states; n += kLanes) store(row + n, Storage::load(from + n));
      }
      for (; n < states; ++n) row[n] = Storage::widen(from[n * stride]);
    }
  });
}

template <typename AnySteps>
SELECTRA_INLINE void pack_input_output_rows(const ScanCall& call, const Sequence& sequence, int64_t group,
                                            const AnySteps& steps, Real* rows) {
  pack_rows(call.B, sequence, group, steps, (int)call.states, rows);
  pack_rows(call.C, sequence, group, steps, (int)call.states, rows + call.states);
}

// A of a block, one vector a state.
SELECTRA_INLINE void load_rates(const Operand& A, Block block, int states, Vector* rates) {
  const Operand as_state = {A.data, {0, A.stride[0], A.stride[1]}, kWhole};
  load_state(as_state, 0, block.channel, block.lanes, states, rates);
}

// The checkpoint of a block: the state before a chunk, kLanes numbers a state. A chunk's blocks lie side by side.
SELECTRA_INLINE Real* checkpoint_of(const ScanCall& call, const Layout& layout, int64_t chunk, int64_t group,
                                      int64_t block) {
  const int64_t row = (chunk * call.groups + group) * layout.blocks_per_group + block;
  return (Real*)call.checkpoints.data + row * call.states * kLanes;
}

// The grid that a call's positions lie on.
SELECTRA_INLINE Grid grid_of(const ScanCall& call) {
  return {call.length / call.width, call.width, call.by_columns != 0};
}

// Adds to a tile what lies in a tensor, if it is there: the sum over the routes so far. `free_tile` is overwritten.
template <typename AnySteps>
SELECTRA_INLINE void add_onto(const Operand& tensor, const Sequence& sequence, Block block, const AnySteps& steps,
                              Vector* free_tile, Vector* tile) {
  if constexpr (kOnGrid<AnySteps>) {
    if (!tensor.data) return;
    load_block(tensor, sequence.batch, block.channel, block.lanes, steps, free_tile);
    for (int t = 0; t < steps.count; ++t) tile[t] += free_tile[t];
  }
}

// Vector operations in a call, as `threads_for` counts them.
SELECTRA_INLINE int64_t scan_work(const ScanCall& call, const Layout& layout) {
  // The exponential of a state update alone takes as long as these.
  constexpr int64_t kOperations = 6;
  const int64_t batch = call.borders.data ? 1 : call.sequences;
  return kOperations * batch * call.length * call.groups * layout.blocks_per_group * (call.states + 2);
}

}  // namespace
}  // namespace selectra
