// The causal depthwise convolution, backward: chunks last first; the outputs are computed again, not stored.
//
// With g_t the gradient before the activation: the gradient of the input at p is sum_j w_j g_{p + k - 1 - j}, and of
// w_j it is sum_t g_t x_{t - k + 1 + j}. Inputs -k ... -1 are the initial state's.
#pragma once

#include <initializer_list>

#include "conv.h"

namespace selectra {
namespace {

struct ConvBackwardWorkspace {
  // Of every block: w, its gradient, the bias and its gradient; g of the k steps after the chunk.
  Vector *weight, *dweight, *bias, *dbias, *later;
  // Of one block: initial and final state and the gradients of both.
  Vector *initial, *dfinal;
  // The k inputs before a chunk and the chunk's own; g of the chunk and of the k steps after it; a tile.
  Vector *window, *gradient, *tile;

  ConvBackwardWorkspace(Arena& arena, int64_t blocks, int64_t width)
      : weight(arena.take<Vector>(blocks * width)),
        dweight(arena.take<Vector>(blocks * width)),
        bias(arena.take<Vector>(blocks)),
        dbias(arena.take<Vector>(blocks)),
        later(arena.take<Vector>(blocks * width)),
        initial(arena.take<Vector>(blocks * width)),
        dfinal(arena.take<Vector>(blocks * width)),
        window(arena.take<Vector>(width + kChunk)),
        gradient(arena.take<Vector>(width + kChunk)),
        tile(arena.take<Vector>(kChunk)) {}
};

// Inputs from ... from + width - 1 of a sequence, where from may be as low as -width: the window before a chunk.
SELECTRA_INLINE void load_inputs_before(const ConvCall& call, const Sequence& sequence, ConvBlock block, int64_t from,
                                        const Vector* initial, Vector* out) {
  const int64_t width = call.width;
  const int64_t from_initial = smaller(width, larger<int64_t>(0, -from));
  for (int64_t j = 0; j < from_initial; ++j) out[j] = initial[width + from + j];
  Steps steps;
  for (int64_t j = from_initial; j < width; j += kChunk) {
    sequence.steps(from + j, smaller<int64_t>(kChunk, width - j), steps);
    load_present(call.x, call.mask, sequence, steps, block, out + j);
  }
}

// dw_j += sum_t g_t window_{t + 1 + j}; Width 0 means `width`.
template <int Width>
SELECTRA_INLINE void add_weight_gradient(int count, int width, const Vector* gradient, const Vector* window,
                                         Vector* dweight) {
  if constexpr (Width > 0) {
    Vector sum[Width];
#pragma GCC unroll 4
    for (int j = 0; j < Width; ++j) sum[j] = dweight[j];
    for (int t = 0; t < count; ++t) {
#pragma GCC unroll 4
      for (int j = 0; j < Width; ++j) sum[j] += gradient[t] * window[t + 1 + j];
    }
#pragma GCC unroll 4
    for (int j = 0; j < Width; ++j) dweight[j] = sum[j];
  } else {
    for (int j = 0; j < width; ++j) {
      Vector sum = dweight[j];
      for (int t = 0; t < count; ++t) sum += gradient[t] * window[t + 1 + j];
      dweight[j] = sum;
    }
  }
}

// out_p = sum_j w_j gradient_{p + k - 1 - j}; Width 0 means `width`.
template <int Width>
SELECTRA_INLINE void convolve_back(int count, int width, const Vector* weight, const Vector* gradient, Vector* out) {
  const int taps = Width ? Width : width;
  for (int p = 0; p < count; ++p) {
    Vector sum = {};
#pragma GCC unroll 4
    for (int j = 0; j < taps; ++j) sum += weight[j] * gradient[p + taps - 1 - j];
    out[p] = sum;
  }
}

// What the next band of a task will read and write, asked for while the one before it runs.
SELECTRA_INLINE void look_ahead(const ConvBackwardCall& call, const Sequence& sequence, const BlockRange& range,
                                BandStep now, Ahead& ahead) {
  ahead.clear();
  BandStep next = now;
  next.advance(range, true);
  if (next.chunk < 0) return;
  Steps steps;
  sequence.chunk(next.chunk, steps);
  const int64_t channel = (range.first + next.index) * kLanes, channels = (int64_t)next.blocks(range) * kLanes;
  for (const Operand* tensor : {&call.forward.x, &call.dy, &call.dx}) {
    ahead.add_rows(*tensor, sequence.batch, channel, channels, steps);
  }
  ahead.spread(kChunk * now.blocks(range));
}

// The rows of one tensor at a chunk's steps.
struct ConvRows {
  Real* first;
  int64_t step;
  static ConvRows of(const Operand& tensor, const Sequence& sequence, const Steps& steps, ConvBlock block) {
    Real* const base = (Real*)tensor.data + sequence.batch * tensor.stride[0] + block.channel;
    return {base + steps.position[0] * tensor.stride[1], steps.direction * tensor.stride[1]};
  }
  Real* at(int t) const { return first + t * step; }
};

// A chunk in one walk back, from memory to memory: what neighbouring steps share stays in registers.
template <int Width, bool Silu>
SELECTRA_INLINE void walk_back(int count, ConvRows x, ConvRows dy, ConvRows dx, const Vector* weight, Vector bias,
                               Vector* dweight, Vector& dbias, Vector* later, Ahead& ahead) {
  // Inputs t - k + 1 ... t and gradients t ... t + k - 1.
  Vector taps[Width], inputs[Width], gradients[Width], sums[Width], bias_sum = dbias;
#pragma GCC unroll 4
  for (int j = 0; j < Width; ++j) {
    taps[j] = weight[j], gradients[j] = later[j], sums[j] = dweight[j];
    inputs[j] = j + 1 < Width ? load(x.at(count - Width + 1 + j)) : Vector{};
  }
  for (int t = count - 1; t >= 0; --t) {
#pragma GCC unroll 4
    for (int j = Width - 1; j > 0; --j) inputs[j] = inputs[j - 1], gradients[j] = gradients[j - 1];
    inputs[0] = load(x.at(t - Width + 1));
    Vector gradient = load(dy.at(t));
    if (Silu) {
      Vector sum = bias;
#pragma GCC unroll 4
      for (int j = 0; j < Width; ++j) sum += taps[j] * inputs[j];
      const Vector s = sigmoid(sum);
      gradient *= s + sum * s * (1 - s);
    }
    gradients[0] = gradient;
    bias_sum += gradient;
    Vector back = {};
#pragma GCC unroll 4
    for (int j = 0; j < Width; ++j) {
      sums[j] += gradient * inputs[j];
      back += taps[j] * gradients[Width - 1 - j];
    }
    store(dx.at(t), back);
    ahead.ask();
  }
#pragma GCC unroll 4
  for (int j = 0; j < Width; ++j) later[j] = gradients[j], dweight[j] = sums[j];
  dbias = bias_sum;
}

// One block through a chunk, if its tensors lie as the kernels compute, nothing is absent, and neither the initial nor
// the final state is within reach: whether that is so.
SELECTRA_INLINE bool conv_rows_backward(const ConvBackwardCall& call, const Sequence& sequence, const Steps& steps,
                                        int64_t from, ConvBlock block, int64_t index,
                                        const ConvBackwardWorkspace& work, Ahead& ahead) {
  const ConvCall& forward = call.forward;
  const int64_t width = forward.width;
  if (forward.mask.data || from < width || steps.count < width || from + steps.count > sequence.count - width) {
    return false;
  }
  for (const Operand* tensor : {&forward.x, &call.dy, &call.dx}) {
    if (!is_plain<Steps>(*tensor, block.lanes)) return false;
  }
  const ConvRows x = ConvRows::of(forward.x, sequence, steps, block);
  const ConvRows dy = ConvRows::of(call.dy, sequence, steps, block);
  const ConvRows dx = ConvRows::of(call.dx, sequence, steps, block);
  const Vector* const weight = work.weight + index * width;
  Vector *const dweight = work.dweight + index * width, *const later = work.later + index * width;
  bool done = false;
  with_width(width, [&](auto taps) {
    constexpr int kWidth = decltype(taps)::value;
    if constexpr (kWidth > 0) {
      const Vector bias = work.bias[index];
      if (forward.silu) {
        walk_back<kWidth, true>(steps.count, x, dy, dx, weight, bias, dweight, work.dbias[index], later, ahead);
      } else {
        walk_back<kWidth, false>(steps.count, x, dy, dx, weight, bias, dweight, work.dbias[index], later, ahead);
      }
      done = true;
    }
  });
  return done;
}

SELECTRA_INLINE void conv_chunk_backward(const ConvBackwardCall& call, const Sequence& sequence, const Steps& steps,
                                         int64_t from, ConvBlock block, int64_t index,
                                         const ConvBackwardWorkspace& work, Ahead& ahead) {
  if (conv_rows_backward(call, sequence, steps, from, block, index, work, ahead)) return;
  const ConvCall& forward = call.forward;
  const int width = (int)forward.width, count = steps.count;
  const Vector* const weight = work.weight + index * width;
  load_inputs_before(forward, sequence, block, from - width, work.initial + index * width, work.window);
  load_present(forward.x, forward.mask, sequence, steps, block, work.window + width);
  load_present(call.dy, forward.mask, sequence, steps, block, work.gradient);
  with_width(width, [&](auto taps) {
    constexpr int kWidth = decltype(taps)::value;
    if (forward.silu) {
      convolve<kWidth>(count, width, weight, work.bias[index], work.window, work.tile);
      for (int t = 0; t < count; ++t) {
        const Vector x = work.tile[t], s = sigmoid(x);
        work.gradient[t] *= s + x * s * (1 - s);
      }
    }
    add_weight_gradient<kWidth>(count, width, work.gradient, work.window, work.dweight + index * width);
    Vector* const later = work.later + index * width;
    for (int j = 0; j < width; ++j) work.gradient[count + j] = later[j];
    convolve_back<kWidth>(count, width, weight, work.gradient, work.tile);
    for (int j = 0; j < width; ++j) later[j] = work.gradient[j];
  });
  Vector bias_sum = work.dbias[index];
  for (int t = 0; t < count; ++t) {
    ahead.ask();
    bias_sum += work.gradient[t];
  }
  work.dbias[index] = bias_sum;
  // The final state's column j is the input count - k + j of the sequence.
  const int64_t first_column = width - sequence.count + from;
  for (int64_t t = larger<int64_t>(0, -first_column); t < count; ++t) {
    work.tile[t] += work.dfinal[index * width + first_column + t];
  }
  clear_absent(forward.mask, sequence.batch, steps, work.tile);
  store_block(call.dx, sequence.batch, block.channel, block.lanes, steps, work.tile);
}

// The initial state's column i is the input i - k: read by the steps before i, and final where the sequence is short.
SELECTRA_INLINE void conv_initial_backward(const ConvBackwardCall& call, int64_t sequence_index,
                                           const Sequence& sequence, ConvBlock block, int64_t index,
                                           const ConvBackwardWorkspace& work) {
  const int width = (int)call.forward.width;
  const Vector* const weight = work.weight + index * width;
  const Vector* const gradient = work.later + index * width;
  Vector* const dinitial = work.initial + index * width;
  for (int i = 0; i < width; ++i) {
    Vector sum = i >= sequence.count ? work.dfinal[index * width + i - sequence.count] : Vector{};
    for (int j = 0; j < i; ++j) sum += weight[j] * gradient[i - 1 - j];
    dinitial[i] = sum;
  }
  store_state(call.dinitial, sequence_index, block.channel, block.lanes, width, dinitial);
}

SELECTRA_INLINE void conv_sequence_backward(const ConvBackwardCall& call, int64_t s, const Sequence& sequence,
                                            const ConvTask& task, const ConvBackwardWorkspace& work) {
  const ConvCall& forward = call.forward;
  const int64_t blocks = task.last - task.first, width = forward.width;
  for (int64_t index = 0; index < blocks; ++index) {
    const ConvBlock block = conv_block(forward.channels, task.first + index);
    load_state(forward.initial, s, block.channel, block.lanes, (int)width, work.initial + index * width);
    load_state(call.dfinal, s, block.channel, block.lanes, (int)width, work.dfinal + index * width);
  }
  memset(work.later, 0, sizeof(Vector) * blocks * width);
  Steps steps;
  Ahead ahead;
  const BlockRange range = {0, task.first, task.last};
  const int band = range.band();
  for (int64_t c = sequence.chunks() - 1; c >= 0; --c) {
    sequence.chunk(c, steps);
    for (int64_t index = 0; index < blocks; ++index) {
      if (index % band == 0) {
        look_ahead(call, sequence, range, {c, (int)index}, ahead);
      }
      conv_chunk_backward(call, sequence, steps, c * kChunk, conv_block(forward.channels, task.first + index), index,
                          work, ahead);
    }
  }
  for (int64_t index = 0; call.dinitial.data && index < blocks; ++index) {
    conv_initial_backward(call, s, sequence, conv_block(forward.channels, task.first + index), index, work);
  }
}

static void conv_task_backward(const ConvBackwardCall& call, const Sequences& sequences, const ConvTask& task,
                               Real* dweight, Real* dbias) {
  const ConvCall& forward = call.forward;
  const int64_t blocks = task.last - task.first, width = forward.width;
  const ConvBackwardWorkspace work = lay_out_workspace<ConvBackwardWorkspace>(blocks, width);
  memset(work.dweight, 0, sizeof(Vector) * blocks * width);
  memset(work.dbias, 0, sizeof(Vector) * blocks);
  for (int64_t index = 0; index < blocks; ++index) {
    const ConvBlock block = conv_block(forward.channels, task.first + index);
    load_weight(forward, block, work.weight + index * width);
    work.bias[index] = load_channels(forward.bias, block.channel, block.lanes);
  }
  for (int64_t s = task.first_sequence; s < task.last_sequence; ++s) {
    conv_sequence_backward(call, s, sequences[s], task, work);
  }
  const Operand weight_share = {dweight, {0, width, 1}, kWhole};
  for (int64_t index = 0; index < blocks; ++index) {
    const ConvBlock block = conv_block(forward.channels, task.first + index);
    store_state(weight_share, 0, block.channel, block.lanes, (int)width, work.dweight + index * width);
    if (dbias) store_some(dbias + block.channel, work.dbias[index], block.lanes);
  }
}

// Adds the ranges' shares up in their order, so that the sum does not depend on the number of threads.
SELECTRA_INLINE void sum_ranges(const Real* shares, int64_t ranges, int64_t size, const Operand& output) {
  if (!output.data) return;
  Real* const out = (Real*)output.data;
  for (int64_t range = 0; range < ranges; ++range) {
    for (int64_t i = 0; i < size; ++i) out[i] = shares[range * size + i] + (range ? out[i] : 0);
  }
}

static int conv_backward(const ConvBackwardCall& call) {
  // Enough for the cores of a large machine; each range costs a copy of the weight's gradient.
  constexpr int64_t kMostRanges = 32;
  const ConvCall& forward = call.forward;
  Sequences sequences(forward.sequences, forward.length, forward.reverse != 0, forward.borders);
  if (!sequences.borders_are_sound()) return kBadBorders;
  const int64_t ranges = smaller(forward.sequences, kMostRanges);
  if (ranges == 0) return kDone;
  const int64_t threads = threads_for(forward.threads, 3 * conv_work(forward));
  // Sums over positions are sums of a channel, whatever the cut of channels. Blocks side by side share lines and pages.
  const int64_t slots = conv_slots(forward, threads > 1 ? 4 * threads : 1, ranges);
  const int64_t weights = forward.channels * forward.width;
  Real* const shares = (Real*)malloc(sizeof(Real) * (ranges * (weights + forward.channels) + 1));
  if (!shares) return kOutOfMemory;
  Real* const bias_shares = shares + ranges * weights;
  for_each_conv_task(forward, ranges, slots, threads,
                     [&](const ConvTask& task, int64_t range) {
                       conv_task_backward(call, sequences, task, shares + range * weights,
                                          bias_shares + range * forward.channels);
                     });
  sum_ranges(shares, ranges, weights, call.dweight);
  sum_ranges(bias_shares, ranges, forward.channels, call.dbias);
  free(shares);
  return kDone;
}

}  // namespace
}  // namespace selectra
