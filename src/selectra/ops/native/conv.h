// The causal depthwise convolution, forward and backward: y_t = act(bias + sum_j w_j x_{t - k + 1 + j}).
//
// A sequence is thought to begin with the k inputs of its initial state, so that step t reads the inputs
// t + 1 ... t + k of a window that starts k inputs before it, and the final state is the window's last k inputs.
#pragma once

#include "parallel.h"
#include "tile.h"

namespace selectra {
namespace {

// A block of channels of every sequence in a range.
struct ConvBlock {
  int64_t channel;
  int lanes;
};

SELECTRA_INLINE ConvBlock conv_block(int64_t channels, int64_t index) {
  return {index * kLanes, (int)smaller<int64_t>(kLanes, channels - index * kLanes)};
}

// Calls body with the width as a compile-time constant where it is a usual one, else with 0.
template <typename Body>
SELECTRA_INLINE void with_width(int64_t width, const Body& body) {
  switch (width) {
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    default: return body(std::integral_constant<int, 0>{});
  }
}

// Sets the rows of absent positions to zero, whatever stands in them.
SELECTRA_INLINE void clear_absent(const Operand& mask, int64_t batch, const Steps& steps, Vector* tile) {
  if (!mask.data) return;
  for (int t = 0; t < steps.count; ++t) {
    if (!present(mask, batch, steps.position[t])) tile[t] = Vector{};
  }
}

SELECTRA_INLINE void load_present(const Operand& tensor, const Operand& mask, const Sequence& sequence,
                                  const Steps& steps, ConvBlock block, Vector* tile) {
  load_block(tensor, sequence.batch, block.channel, block.lanes, steps, tile);
  clear_absent(mask, sequence.batch, steps, tile);
}

// w of a block, one vector a tap.
SELECTRA_INLINE void load_weight(const ConvCall& call, ConvBlock block, Vector* weight) {
  const Operand as_state = {call.weight.data, {0, call.weight.stride[0], call.weight.stride[1]}, kWhole};
  load_state(as_state, 0, block.channel, block.lanes, (int)call.width, weight);
}

// out_t = act(bias + sum_j w_j window_{t + 1 + j}); Width 0 means `width`.
template <int Width, bool Silu = false>
SELECTRA_INLINE void convolve(int count, int width, const Vector* weight, Vector bias, const Vector* window,
                              Vector* out) {
  const int taps = Width ? Width : width;
  for (int t = 0; t < count; ++t) {
    Vector sum = bias;
#pragma GCC unroll 4
    for (int j = 0; j < taps; ++j) sum += weight[j] * window[t + 1 + j];
    out[t] = Silu ? sum * sigmoid(sum) : sum;
  }
}

// As `convolve`, from memory to memory: the inputs that a step shares with those before it stay in registers.
template <int Width, bool Silu>
SELECTRA_INLINE void convolve_rows(const Steps& steps, const Real* x, int64_t x_stride, Real* y, int64_t y_stride,
                                   const Vector* weight, Vector bias, Vector* last, Ahead& ahead) {
  Vector taps[Width], inputs[Width];
#pragma GCC unroll 4
  for (int j = 0; j < Width; ++j) taps[j] = weight[j], inputs[j] = last[j];
  for (int t = 0; t < steps.count; ++t) {
#pragma GCC unroll 4
    for (int j = 1; j < Width; ++j) inputs[j - 1] = inputs[j];
    inputs[Width - 1] = load(x + steps.position[t] * x_stride);
    Vector sum = bias;
#pragma GCC unroll 4
    for (int j = 0; j < Width; ++j) sum += taps[j] * inputs[j];
    store(y + steps.position[t] * y_stride, Silu ? sum * sigmoid(sum) : sum);
    ahead.ask();
  }
#pragma GCC unroll 4
  for (int j = 0; j < Width; ++j) last[j] = inputs[j];
}

// What the next band will read and write, asked for while the one before it runs.
SELECTRA_INLINE void look_ahead(const ConvCall& call, const Sequence& sequence, const BlockRange& range, BandStep now,
                                Ahead& ahead) {
  ahead.clear();
  BandStep next = now;
  next.advance(range, false);
  if (next.chunk >= sequence.chunks()) return;
  Steps steps;
  sequence.chunk(next.chunk, steps);
  const int64_t channel = (range.first + next.index) * kLanes, channels = (int64_t)next.blocks(range) * kLanes;
  ahead.add_rows(call.x, sequence.batch, channel, channels, steps);
  ahead.add_rows(call.y, sequence.batch, channel, channels, steps);
  ahead.spread(kChunk * now.blocks(range));
}

struct ConvForwardWorkspace {
  // Of every block: w, the bias, the last k inputs.
  Vector *weight, *bias, *last;
  // k inputs before a chunk and the chunk's own; the outputs.
  Vector *window, *out;

  ConvForwardWorkspace(Arena& arena, int64_t blocks, int64_t width)
      : weight(arena.take<Vector>(blocks * width)),
        bias(arena.take<Vector>(blocks)),
        last(arena.take<Vector>(blocks * width)),
        window(arena.take<Vector>(width + kChunk)),
        out(arena.take<Vector>(kChunk)) {}
};

// One block through a chunk, if its tensors lie as the kernels compute and nothing is absent: whether they do.
SELECTRA_INLINE bool conv_rows_forward(const ConvCall& call, const Sequence& sequence, const Steps& steps,
                                       ConvBlock block, int64_t index, const ConvForwardWorkspace& work,
                                       Ahead& ahead) {
  if (call.mask.data || !is_plain<Steps>(call.x, block.lanes) || !is_plain<Steps>(call.y, block.lanes)) return false;
  const Real* const x = (const Real*)call.x.data + sequence.batch * call.x.stride[0] + block.channel;
  Real* const y = (Real*)call.y.data + sequence.batch * call.y.stride[0] + block.channel;
  const Vector* const weight = work.weight + index * call.width;
  Vector* const last = work.last + index * call.width;
  bool done = false;
  with_width(call.width, [&](auto taps) {
    constexpr int kWidth = decltype(taps)::value;
    if constexpr (kWidth > 0) {
      if (call.silu) {
        convolve_rows<kWidth, true>(steps, x, call.x.stride[1], y, call.y.stride[1], weight, work.bias[index], last,
                                    ahead);
      } else {
        convolve_rows<kWidth, false>(steps, x, call.x.stride[1], y, call.y.stride[1], weight, work.bias[index], last,
                                     ahead);
      }
      done = true;
    }
  });
  return done;
}

SELECTRA_INLINE void conv_chunk_forward(const ConvCall& call, const Sequence& sequence, const Steps& steps,
                                        ConvBlock block, int64_t index, const ConvForwardWorkspace& work,
                                        Ahead& ahead) {
  if (conv_rows_forward(call, sequence, steps, block, index, work, ahead)) return;
  const int width = (int)call.width;
  Vector* const last = work.last + index * width;
  for (int j = 0; j < width; ++j) work.window[j] = last[j];
  load_present(call.x, call.mask, sequence, steps, block, work.window + width);
  with_width(width, [&](auto taps) {
    const auto apply = call.silu ? convolve<decltype(taps)::value, true> : convolve<decltype(taps)::value>;
    apply(steps.count, width, work.weight + index * width, work.bias[index], work.window, work.out);
  });
  for (int j = 0; j < width; ++j) last[j] = work.window[steps.count + j];
  clear_absent(call.mask, sequence.batch, steps, work.out);
  store_block(call.y, sequence.batch, block.channel, block.lanes, steps, work.out);
}

// Sequences first_sequence ... last_sequence - 1 of blocks first ... last - 1.
struct ConvTask {
  int64_t first_sequence, last_sequence, first, last;
};

static void conv_task_forward(const ConvCall& call, const Sequences& sequences, const ConvTask& task) {
  const int64_t blocks = task.last - task.first, width = call.width;
  const ConvForwardWorkspace work = lay_out_workspace<ConvForwardWorkspace>(blocks, width);
  for (int64_t index = 0; index < blocks; ++index) {
    const ConvBlock block = conv_block(call.channels, task.first + index);
    load_weight(call, block, work.weight + index * width);
    work.bias[index] = load_channels(call.bias, block.channel, block.lanes);
  }
  Steps steps;
  Ahead ahead;
  const BlockRange range = {0, task.first, task.last};
  const int band = range.band();
  for (int64_t s = task.first_sequence; s < task.last_sequence; ++s) {
    const Sequence sequence = sequences[s];
    for (int64_t index = 0; index < blocks; ++index) {
      const ConvBlock block = conv_block(call.channels, task.first + index);
      load_state(call.initial, s, block.channel, block.lanes, (int)width, work.last + index * width);
    }
    for (int64_t c = 0; c < sequence.chunks(); ++c) {
      sequence.chunk(c, steps);
      for (int64_t index = 0; index < blocks; ++index) {
        if (index % band == 0) look_ahead(call, sequence, range, {c, (int)index}, ahead);
        conv_chunk_forward(call, sequence, steps, conv_block(call.channels, task.first + index), index, work, ahead);
      }
    }
    for (int64_t index = 0; index < blocks; ++index) {
      const ConvBlock block = conv_block(call.channels, task.first + index);
      store_state(call.final, s, block.channel, block.lanes, (int)width, work.last + index * width);
    }
  }
}

// Calls body(task) for a cut of the call into `ranges` of sequences times `slots` of blocks.
template <typename Body>
SELECTRA_INLINE void for_each_conv_task(const ConvCall& call, int64_t ranges, int64_t slots, int64_t threads,
                                        const Body& body) {
  const int64_t blocks = ceil_divide(call.channels, kLanes);
  for_each_task(ranges * slots, threads, [&](int64_t task) {
    const int64_t slot = task % slots, range = task / slots;
    body(ConvTask{part_begin(call.sequences, range, ranges), part_begin(call.sequences, range + 1, ranges),
                  part_begin(blocks, slot, slots), part_begin(blocks, slot + 1, slots)},
         range);
  });
}

SELECTRA_INLINE int64_t conv_work(const ConvCall& call) {
  const int64_t batch = call.borders.data ? 1 : call.sequences;
  return batch * call.length * ceil_divide(call.channels, kLanes) * (call.width + 4) / 4;
}

// Parts of the blocks: together with the ranges of sequences about as many tasks as are wanted.
SELECTRA_INLINE int64_t conv_slots(const ConvCall& call, int64_t wanted, int64_t ranges) {
  return larger<int64_t>(1, smaller(ceil_divide(call.channels, kLanes), ceil_divide(wanted, ranges)));
}

static int conv_forward(const ConvCall& call) {
  Sequences sequences(call.sequences, call.length, call.reverse != 0, call.borders);
  if (!sequences.borders_are_sound()) return kBadBorders;
  const int64_t threads = threads_for(call.threads, conv_work(call));
  const int64_t wanted = threads > 1 ? 4 * threads : 1;
  const int64_t ranges = smaller(call.sequences, wanted);
  if (ranges == 0) return kDone;
  const int64_t slots = conv_slots(call, wanted, ranges);
  for_each_conv_task(call, ranges, slots, threads,
                     [&](const ConvTask& task, int64_t) { conv_task_forward(call, sequences, task); });
  return kDone;
}

}  // namespace
}  // namespace selectra
