// The selective scan, forward: h = exp(dt A) h + dt B u and y = (C . h + D u) silu(z).
//
// A vector holds kLanes channels; the states of a block of channels stay in registers for a chunk of steps. The
// derivation is in ops/selective_scan/README.md.
#pragma once

#include <initializer_list>

#include "scan_time.h"

namespace selectra {
namespace {

// States in registers at once: with more, the registers run out.
constexpr int kForwardStates = kVectorRegisters >= 32 ? 16 : 8;

// The time that a stretch's effect takes over that of its outputs.
constexpr double kForwardEffect = 0.75;

struct ForwardWorkspace {
  // Of every block: A log2(e), the running state; D and the bias of delta.
  Vector *rates, *state, *skip, *bias;
  // Of one block and chunk.
  Vector *dt, *input, *y, *gate;
  // Of every block: the sum of dt, where a stretch's effect is wanted.
  LongSum* sums;
  // B and C of a chunk.
  Real* rows;

  ForwardWorkspace(Arena& arena, int64_t blocks, int64_t states)
      : rates(arena.take<Vector>(blocks * states)),
        state(arena.take<Vector>(blocks * states)),
        skip(arena.take<Vector>(blocks)),
        bias(arena.take<Vector>(blocks)),
        dt(arena.take<Vector>(kChunk)),
        input(arena.take<Vector>(kChunk)),
        y(arena.take<Vector>(kChunk)),
        gate(arena.take<Vector>(kChunk)),
        sums(arena.take<LongSum>(blocks)),
        rows(arena.take<Real>(kChunk * 2 * states)) {}
};

// Runs `States` states of one block through a chunk and, with `Output`, adds C . h to y.
template <int States, bool Output>
SELECTRA_INLINE void advance_states(int count, const Vector* dt, const Vector* input, const Vector* rates,
                                    const Real* rows, int64_t states, Vector* state, Vector* y, Ahead& ahead) {
  Vector h[States];
#pragma GCC unroll 16
  for (int n = 0; n < States; ++n) h[n] = state[n];
  for (int t = 0; t < count; ++t) {
    const Real* B = rows + t * 2 * states;
    const Real* C = B + states;
    const Vector step = dt[t], x = input[t];
    // Two sums: one alone is a chain of additions as long as the states.
    Vector even = Output ? y[t] : Vector{}, odd = {};
#pragma GCC unroll 16
    for (int n = 0; n < States; ++n) {
      h[n] = exp2_of_product(step, rates[n]) * h[n] + x * B[n];
      if (Output) (n % 2 ? odd : even) += h[n] * C[n];
    }
    if (Output) y[t] = even + odd;
    ahead.ask();
  }
#pragma GCC unroll 16
  for (int n = 0; n < States; ++n) state[n] = h[n];
}

// What the next band will read and write, asked for while the one before it runs.
template <bool Output, typename AnySteps>
SELECTRA_INLINE void look_ahead(const ScanCall& call, const Layout& layout, const Sequence& sequence,
                                const BlockRange& range, BandStep now, Ahead& ahead) {
  ahead.clear();
  BandStep next = now;
  next.advance(range, false);
  if (next.chunk >= sequence.chunks()) return;
  AnySteps steps;
  sequence.chunk(next.chunk, steps);
  const Block first = layout.block(range.group, range.first + next.index);
  const int64_t channels = (int64_t)next.blocks(range) * kLanes;
  for (const Operand* tensor : {&call.delta, &call.u, &call.z, &call.y}) {
    ahead.add_rows(*tensor, sequence.batch, first.channel, channels, steps);
    if (!Output && tensor == &call.u) break;
  }
  if (kOnGrid<AnySteps> && call.onto.data != call.y.data) {
    ahead.add_rows(call.onto, sequence.batch, first.channel, channels, steps);
  }
  ahead.spread(kChunk * now.blocks(range) * ceil_divide(call.states, kForwardStates));
}

// dt and dt u of one block and chunk; D u in the place of y.
template <typename AnySteps>
SELECTRA_INLINE void prepare_forward(const ScanCall& call, const Sequence& sequence, const AnySteps& steps,
                                     Block block, int index, const ForwardWorkspace& work) {
  const Vector bias = work.bias[index], skip = work.skip[index];
  load_block(call.delta, sequence.batch, block.channel, block.lanes, steps, work.dt);
  load_block(call.u, sequence.batch, block.channel, block.lanes, steps, work.y);
  if (call.softplus) {
    for (int t = 0; t < steps.count; ++t) work.dt[t] = softplus(work.dt[t] + bias).value;
  } else {
    for (int t = 0; t < steps.count; ++t) work.dt[t] += bias;
  }
  for (int t = 0; t < steps.count; ++t) {
    work.input[t] = work.dt[t] * work.y[t];
    work.y[t] *= skip;
  }
}

template <typename AnySteps>
SELECTRA_INLINE void scan_block(const ScanCall& call, const Sequence& sequence, const AnySteps& steps, Block block,
                                int index, const ForwardWorkspace& work, Ahead& ahead) {
  const int states = (int)call.states;
  prepare_forward(call, sequence, steps, block, index, work);
  Vector* const state = work.state + index * states;
  const Vector* const rates = work.rates + index * states;
  for_state_blocks<kForwardStates>(states, [&](auto size, int n) {
    advance_states<decltype(size)::value, true>(steps.count, work.dt, work.input, rates + n, work.rows + n, states,
                                                state + n, work.y, ahead);
  });
  if (call.z.data) {
    load_block(call.z, sequence.batch, block.channel, block.lanes, steps, work.gate);
    for (int t = 0; t < steps.count; ++t) work.y[t] *= work.gate[t] * sigmoid(work.gate[t]);
  }
  add_onto(call.onto, sequence, block, steps, work.gate, work.y);
  store_block(call.y, sequence.batch, block.channel, block.lanes, steps, work.y);
}

// Runs a range through some chunks.
template <typename AnySteps = Steps>
static void scan_chunks(const ScanCall& call, const Layout& layout, const Sequence& sequence, const BlockRange& range,
                        const ForwardWorkspace& work, int64_t begin, int64_t end) {
  const int64_t states = call.states;
  const int band = range.band();
  AnySteps steps;
  Ahead ahead;
  for (int64_t c = begin; c < end; ++c) {
    sequence.chunk(c, steps);
    pack_input_output_rows(call, sequence, range.group, steps, work.rows);
    if (call.checkpoints.data) {
      memcpy(checkpoint_of(call, layout, sequence.chunk_offset + c, range.group, range.first), work.state,
             sizeof(Vector) * range.count() * states);
    }
    for (int index = 0; index < range.count(); ++index) {
      if (index % band == 0) look_ahead<true, AnySteps>(call, layout, sequence, range, {c, index}, ahead);
      scan_block(call, sequence, steps, layout.block(range.group, range.first + index), index, work, ahead);
    }
  }
}

// What some chunks make of a state of zero, and the sums of their steps.
static void sum_up_chunks(const ScanCall& call, const Layout& layout, const Sequence& sequence,
                          const BlockRange& range, const ForwardWorkspace& work, int64_t begin, int64_t end) {
  const int states = (int)call.states;
  const int band = range.band();
  memset(work.state, 0, sizeof(Vector) * range.count() * states);
  memset(work.sums, 0, sizeof(LongSum) * range.count());
  Steps steps;
  Ahead ahead;
  for (int64_t c = begin; c < end; ++c) {
    sequence.chunk(c, steps);
    pack_rows(call.B, sequence, range.group, steps, states, work.rows);
    for (int index = 0; index < range.count(); ++index) {
      if (index % band == 0) look_ahead<false, Steps>(call, layout, sequence, range, {c, index}, ahead);
      prepare_forward(call, sequence, steps, layout.block(range.group, range.first + index), index, work);
      Vector sum = {};
      for (int t = 0; t < steps.count; ++t) sum += work.dt[t];
      LongSum::add(work.sums[index], sum);
      for_state_blocks<kForwardStates>(states, [&](auto size, int n) {
        advance_states<decltype(size)::value, false>(steps.count, work.dt, work.input, work.rates + index * states + n,
                                                     work.rows + n, states, work.state + index * states + n, work.y,
                                                     ahead);
      });
    }
  }
}

// Of every block A log2(e), D and the bias.
SELECTRA_INLINE void load_parameters(const ScanCall& call, const Layout& layout, const BlockRange& range,
                                     const ForwardWorkspace& work) {
  const int states = (int)call.states;
  for (int index = 0; index < range.count(); ++index) {
    const Block block = layout.block(range.group, range.first + index);
    load_rates(call.A, block, states, work.rates + index * states);
    for (int n = 0; n < states; ++n) work.rates[index * states + n] *= kLog2E;
    work.skip[index] = load_channels(call.D, block.channel, block.lanes);
    work.bias[index] = load_channels(call.bias, block.channel, block.lanes);
  }
}

// One piece of a sequence.
static void scan_piece(const ScanCall& call, const Layout& layout, const Sequences& sequences, int64_t s,
                       const BlockRange& range, const ForwardWorkspace& work, const TimeCuts& cuts, const Job& job) {
  const int states = (int)call.states;
  const Sequence sequence = sequences[s];
  const TimeCut cut = cuts.cut(job.part, sequence);
  int64_t begin = cut.begin(job.piece);
  if (job.piece > 0) {
    cuts.chain(job, layout, range, work.rates, states, work.state);
  } else {
    for (int index = 0; index < range.count(); ++index) {
      const Block block = layout.block(range.group, range.first + index);
      load_state(call.initial, s, block.channel, block.lanes, states, work.state + index * states);
    }
    if (cut.pieces > 1) {
      scan_chunks(call, layout, sequence, range, work, begin, cut.border(0));
      cuts.keep(job, layout, range, nullptr, states, work.state);
      begin = cut.border(0);
    }
  }
  scan_chunks(call, layout, sequence, range, work, begin, cut.end(job.piece));
  if (job.piece + 1 < cut.pieces) return;
  for (int index = 0; index < range.count(); ++index) {
    const Block block = layout.block(range.group, range.first + index);
    store_state(call.final, s, block.channel, block.lanes, states, work.state + index * states);
  }
}

static void run_forward_job(const ScanCall& call, const Layout& layout, const Sequences& sequences, int64_t first,
                            int64_t last, const BlockRange& range, const TimeCuts& cuts, const Job& job) {
  const ForwardWorkspace work = lay_out_workspace<ForwardWorkspace>((int64_t)range.count(), call.states);
  load_parameters(call, layout, range, work);
  if (job.kind == Job::kEffect) {
    const Sequence sequence = sequences[first];
    const TimeCut cut = cuts.cut(job.part, sequence);
    sum_up_chunks(call, layout, sequence, range, work, cut.border(job.piece - 1), cut.border(job.piece));
    cuts.keep(job, layout, range, work.sums, (int)call.states, work.state);
    return;
  }
  for (int64_t s = first; s < last; ++s) scan_piece(call, layout, sequences, s, range, work, cuts, job);
}

// Parts of a group's blocks: a task for every thread, and up to `wanted` of them where that leaves each enough blocks.
SELECTRA_INLINE int64_t forward_slots(const Layout& layout, int64_t tasks, int64_t threads, int64_t wanted) {
  // With fewer, what each task does once a chunk shows: two blocks a task took a quarter longer.
  constexpr int64_t kLeastBlocks = 8;
  const int64_t least = ceil_divide(threads, tasks), more = ceil_divide(wanted, tasks * least);
  const int64_t times = larger<int64_t>(1, smaller(more, layout.blocks_per_group / (kLeastBlocks * least)));
  return larger<int64_t>(1, smaller(layout.blocks_per_group, least * times));
}

static int scan_forward(const ScanCall& call) {
  const Layout layout(call.channels, call.groups);
  Sequences sequences(call.sequences, call.length, call.reverse != 0, call.borders);
  if (!sequences.borders_are_sound()) return kBadBorders;
  if (call.mask.data && !sequences.leave_out_absent(call.mask)) return kOutOfMemory;

  // Enough tasks to keep the threads evenly busy, sequences first: the blocks of a task share B and C.
  const int64_t threads = threads_for(call.threads, scan_work(call, layout));
  const int64_t wanted = threads > 1 ? 4 * threads : 1;
  // Time is cut in sequences that are a task of their own.
  const int64_t ranges = call.pieces > 0 ? call.sequences : smaller(call.sequences, wanted);
  if (ranges == 0) return kDone;
  const int64_t slots = forward_slots(layout, ranges * call.groups, threads, wanted);
  const TimeCuts cuts(call, layout, sequences, ranges, slots * call.groups, threads, kForwardEffect);
  for_each_job(cuts, threads, [&](const Job& job) {
    const int64_t group = job.slot / slots, slot = job.slot % slots;
    const BlockRange range = {group, part_begin(layout.blocks_per_group, slot, slots),
                              part_begin(layout.blocks_per_group, slot + 1, slots)};
    run_forward_job(call, layout, sequences, part_begin(call.sequences, job.part, ranges),
                    part_begin(call.sequences, job.part + 1, ranges), range, cuts, job);
  });
  return kDone;
}

}  // namespace
}  // namespace selectra
