// Tiles: kLanes neighbouring channels of up to kChunk steps, one vector a step, read and written through strides.
#pragma once

#include "sequence.h"

namespace selectra {
namespace {

// A block of channels of one batch row of a (b, l, d) tensor.
struct Strip {
  Real* base;
  int64_t step_stride, channel_stride;
  int lanes;
};

SELECTRA_INLINE Strip strip_of(const Operand& tensor, int64_t batch, int64_t channel, int lanes) {
  Real* base = (Real*)tensor.data + batch * tensor.stride[0] + channel * tensor.stride[2];
  return {base, tensor.stride[1], tensor.stride[2], lanes};
}

// A block of channels of one sequence's state (sequences, d, n): its "steps" are the n states.
SELECTRA_INLINE Strip strip_of_state(const Operand& tensor, int64_t sequence, int64_t channel, int lanes) {
  Real* base = (Real*)tensor.data + sequence * tensor.stride[0] + channel * tensor.stride[1];
  return {base, tensor.stride[2], tensor.stride[1], lanes};
}

SELECTRA_INLINE bool is_transposed(const Strip& strip, const Steps& steps) {
  return strip.step_stride == 1 && steps.direction != 0;
}

// The lowest of the positions of steps t ... t + count - 1, which are neighbours.
SELECTRA_INLINE int64_t lowest_position(const Steps& steps, int t, int count) {
  return steps.direction > 0 ? steps.position[t] : steps.position[t + count - 1];
}

static void load_transposed(const Strip& strip, const Steps& steps, Vector* tile) {
  for (int t = 0; t < steps.count; t += kLanes) {
    const int count = smaller(kLanes, steps.count - t);
    const Real* from = strip.base + lowest_position(steps, t, count);
    Vector rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = i >= strip.lanes ? Vector{}
                : count == kLanes ? load(from + i * strip.channel_stride)
                                  : load_some(from + i * strip.channel_stride, count);
    }
    transpose(rows);
    for (int i = 0; i < count; ++i) tile[t + (steps.direction > 0 ? i : count - 1 - i)] = rows[i];
  }
}

static void store_transposed(const Strip& strip, const Steps& steps, const Vector* tile) {
  for (int t = 0; t < steps.count; t += kLanes) {
    const int count = smaller(kLanes, steps.count - t);
    Real* to = strip.base + lowest_position(steps, t, count);
    Vector rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = i < count ? tile[t + (steps.direction > 0 ? i : count - 1 - i)] : Vector{};
    }
    transpose(rows);
    for (int i = 0; i < strip.lanes; ++i) {
      if (count == kLanes) {
        store(to + i * strip.channel_stride, rows[i]);
      } else {
        store_some(to + i * strip.channel_stride, rows[i], count);
      }
    }
  }
}

static void load_scattered(const Strip& strip, const Steps& steps, Vector* tile) {
  for (int t = 0; t < steps.count; ++t) {
    const Real* from = strip.base + steps.position[t] * strip.step_stride;
    Vector v = {};
    for (int i = 0; i < strip.lanes; ++i) v[i] = from[i * strip.channel_stride];
    tile[t] = v;
  }
}

static void store_scattered(const Strip& strip, const Steps& steps, const Vector* tile) {
  for (int t = 0; t < steps.count; ++t) {
    Real* to = strip.base + steps.position[t] * strip.step_stride;
    const Vector v = tile[t];
    for (int i = 0; i < strip.lanes; ++i) to[i * strip.channel_stride] = v[i];
  }
}

// Lanes past the strip's are zero.
SELECTRA_INLINE void load_tile(const Strip& strip, const Steps& steps, Vector* tile) {
  if (strip.channel_stride == 1 && strip.lanes == kLanes) {
    for (int t = 0; t < steps.count; ++t) tile[t] = load(strip.base + steps.position[t] * strip.step_stride);
  } else if (strip.channel_stride == 1) {
    for (int t = 0; t < steps.count; ++t) {
      tile[t] = load_some(strip.base + steps.position[t] * strip.step_stride, strip.lanes);
    }
  } else if (is_transposed(strip, steps)) {
    load_transposed(strip, steps, tile);
  } else {
    load_scattered(strip, steps, tile);
  }
}

SELECTRA_INLINE void store_tile(const Strip& strip, const Steps& steps, const Vector* tile) {
  if (strip.channel_stride == 1 && strip.lanes == kLanes) {
    for (int t = 0; t < steps.count; ++t) store(strip.base + steps.position[t] * strip.step_stride, tile[t]);
  } else if (strip.channel_stride == 1) {
    for (int t = 0; t < steps.count; ++t) {
      store_some(strip.base + steps.position[t] * strip.step_stride, tile[t], strip.lanes);
    }
  } else if (is_transposed(strip, steps)) {
    store_transposed(strip, steps, tile);
  } else {
    store_scattered(strip, steps, tile);
  }
}

// Cache lines to ask for ahead of use, one row of several strips at a step: rows lie too far apart for the hardware to
// foresee them, and asking for all at once would fill the queue of outstanding loads.
struct Ahead {
  static constexpr int kMost = 16;
  const Steps* steps;
  int count;
  Strip strips[kMost];

  explicit Ahead(const Steps& of) : steps(&of), count(0) {}

  void add(const Strip& strip) {
    if (strip.channel_stride == 1) strips[count++] = strip;
  }

  void ask(int t) const {
    for (int i = 0; i < count; ++i) {
      __builtin_prefetch(strips[i].base + steps->position[t] * strips[i].step_stride, 0, 2);
    }
  }
};

// A block of channels of a state, one vector a state; absent states are zero.
static void load_state(const Operand& tensor, int64_t sequence, int64_t channel, int lanes, int states, Vector* out) {
  if (!tensor.data) {
    memset(out, 0, sizeof(Vector) * states);
    return;
  }
  Steps steps = {0, 1, {}};
  for (int n = 0; n < states; n += kChunk) {
    steps.count = smaller(kChunk, states - n);
    for (int i = 0; i < steps.count; ++i) steps.position[i] = n + i;
    load_tile(strip_of_state(tensor, sequence, channel, lanes), steps, out + n);
  }
}

static void store_state(const Operand& tensor, int64_t sequence, int64_t channel, int lanes, int states,
                        const Vector* in) {
  Steps steps = {0, 1, {}};
  for (int n = 0; n < states; n += kChunk) {
    steps.count = smaller(kChunk, states - n);
    for (int i = 0; i < steps.count; ++i) steps.position[i] = n + i;
    store_tile(strip_of_state(tensor, sequence, channel, lanes), steps, in + n);
  }
}

// A block of channels of a (d,) tensor; zero where it is absent.
SELECTRA_INLINE Vector load_channels(const Operand& tensor, int64_t channel, int lanes) {
  Vector v = {};
  if (tensor.data) {
    const Real* from = (const Real*)tensor.data + channel * tensor.stride[0];
    for (int i = 0; i < lanes; ++i) v[i] = from[i * tensor.stride[0]];
  }
  return v;
}

}  // namespace
}  // namespace selectra
