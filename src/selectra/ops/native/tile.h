// Tiles: kLanes neighbouring channels of up to kChunk steps, one vector a step, read and written through strides.
#pragma once

#include "sequence.h"

namespace selectra {
namespace {

// How the numbers of a tensor are stored: as the kernels compute, or as bfloat16, the upper half of a float.
struct Whole {
  using Number = Real;
  SELECTRA_INLINE Vector load(const Number* from) { return selectra::load(from); }
  SELECTRA_INLINE Vector load_some(const Number* from, int count) { return selectra::load_some(from, count); }
  SELECTRA_INLINE void store(Number* to, Vector v) { selectra::store(to, v); }
  SELECTRA_INLINE void store_some(Number* to, Vector v, int count) { selectra::store_some(to, v, count); }
  SELECTRA_INLINE Real widen(Number x) { return x; }
  SELECTRA_INLINE Number narrow(Real x) { return x; }
};

struct Halved {
  using Number = uint16_t;
  SELECTRA_INLINE Vector load(const Number* from) {
    HalfVector half;
    memcpy(&half, from, sizeof half);
    return widen_lanes(half);
  }
  SELECTRA_INLINE Vector load_some(const Number* from, int count) {
    HalfVector half = {};
    memcpy(&half, from, sizeof(Number) * count);
    return widen_lanes(half);
  }
  SELECTRA_INLINE void store(Number* to, Vector v) {
    const HalfVector half = narrow_lanes(v);
    memcpy(to, &half, sizeof half);
  }
  SELECTRA_INLINE void store_some(Number* to, Vector v, int count) {
    const HalfVector half = narrow_lanes(v);
    memcpy(to, &half, sizeof(Number) * count);
  }
  SELECTRA_INLINE Real widen(Number x) { return load_some(&x, 1)[0]; }
  SELECTRA_INLINE Number narrow(Real x) { return narrow_lanes(broadcast(x))[0]; }
};

// Calls body with the storage of a tensor's numbers.
template <typename Body>
SELECTRA_INLINE void with_storage(const Operand& tensor, const Body& body) {
  if constexpr (kIsFloat) {
    if (tensor.storage == kHalved) return body(Halved{});
  }
  body(Whole{});
}

// A block of channels of one batch row of a (b, l, d) tensor.
template <typename Storage>
struct Strip {
  typename Storage::Number* base;
  int64_t step_stride, channel_stride;
  int lanes;
};

template <typename Storage>
SELECTRA_INLINE Strip<Storage> strip_of(const Operand& tensor, int64_t batch, int64_t channel, int lanes) {
  auto* base = (typename Storage::Number*)tensor.data + batch * tensor.stride[0] + channel * tensor.stride[2];
  return {base, tensor.stride[1], tensor.stride[2], lanes};
}

// A block of channels of one sequence's state (sequences, d, n): its "steps" are the n states.
SELECTRA_INLINE Strip<Whole> strip_of_state(const Operand& tensor, int64_t sequence, int64_t channel, int lanes) {
  Real* base = (Real*)tensor.data + sequence * tensor.stride[0] + channel * tensor.stride[1];
  return {base, tensor.stride[2], tensor.stride[1], lanes};
}

template <typename Storage>
SELECTRA_INLINE bool is_transposed(const Strip<Storage>& strip, const Steps& steps) {
  return strip.step_stride == 1 && steps.direction != 0;
}

// The lowest of the positions of steps t ... t + count - 1, which are neighbours.
SELECTRA_INLINE int64_t lowest_position(const Steps& steps, int t, int count) {
  return steps.direction > 0 ? steps.position[t] : steps.position[t + count - 1];
}

template <typename Storage>
SELECTRA_APART void load_transposed(const Strip<Storage>& strip, const Steps& steps, Vector* tile) {
  for (int t = 0; t < steps.count; t += kLanes) {
    const int count = smaller(kLanes, steps.count - t);
    const auto* from = strip.base + lowest_position(steps, t, count);
    Vector rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = i >= strip.lanes ? Vector{}
                : count == kLanes ? Storage::load(from + i * strip.channel_stride)
                                  : Storage::load_some(from + i * strip.channel_stride, count);
    }
    transpose(rows);
    for (int i = 0; i < count; ++i) tile[t + (steps.direction > 0 ? i : count - 1 - i)] = rows[i];
  }
}

template <typename Storage>
SELECTRA_APART void store_transposed(const Strip<Storage>& strip, const Steps& steps, const Vector* tile) {
  for (int t = 0; t < steps.count; t += kLanes) {
    const int count = smaller(kLanes, steps.count - t);
    auto* to = strip.base + lowest_position(steps, t, count);
    Vector rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = i < count ? tile[t + (steps.direction > 0 ? i : count - 1 - i)] : Vector{};
    }
    transpose(rows);
    for (int i = 0; i < strip.lanes; ++i) {
      if (count == kLanes) {
        Storage::store(to + i * strip.channel_stride, rows[i]);
      } else {
        Storage::store_some(to + i * strip.channel_stride, rows[i], count);
      }
    }
  }
}

template <typename Storage>
SELECTRA_APART void load_scattered(const Strip<Storage>& strip, const Steps& steps, Vector* tile) {
  for (int t = 0; t < steps.count; ++t) {
    const auto* from = strip.base + steps.position[t] * strip.step_stride;
    Vector v = {};
    for (int i = 0; i < strip.lanes; ++i) v[i] = Storage::widen(from[i * strip.channel_stride]);
    tile[t] = v;
  }
}

template <typename Storage>
SELECTRA_APART void store_scattered(const Strip<Storage>& strip, const Steps& steps, const Vector* tile) {
  for (int t = 0; t < steps.count; ++t) {
    auto* to = strip.base + steps.position[t] * strip.step_stride;
    const Vector v = tile[t];
    for (int i = 0; i < strip.lanes; ++i) to[i * strip.channel_stride] = Storage::narrow(v[i]);
  }
}

// Lanes past the strip's are zero.
template <typename Storage>
SELECTRA_INLINE void load_tile(const Strip<Storage>& strip, const Steps& steps, Vector* tile) {
  if (strip.channel_stride == 1 && strip.lanes == kLanes) {
    for (int t = 0; t < steps.count; ++t) {
      tile[t] = Storage::load(strip.base + steps.position[t] * strip.step_stride);
    }
  } else if (strip.channel_stride == 1) {
    for (int t = 0; t < steps.count; ++t) {
      tile[t] = Storage::load_some(strip.base + steps.position[t] * strip.step_stride, strip.lanes);
    }
  } else if (is_transposed(strip, steps)) {
    load_transposed(strip, steps, tile);
  } else {
    load_scattered(strip, steps, tile);
  }
}

template <typename Storage>
SELECTRA_INLINE void store_tile(const Strip<Storage>& strip, const Steps& steps, const Vector* tile) {
  if (strip.channel_stride == 1 && strip.lanes == kLanes) {
    for (int t = 0; t < steps.count; ++t) {
      Storage::store(strip.base + steps.position[t] * strip.step_stride, tile[t]);
    }
  } else if (strip.channel_stride == 1) {
    for (int t = 0; t < steps.count; ++t) {
      Storage::store_some(strip.base + steps.position[t] * strip.step_stride, tile[t], strip.lanes);
    }
  } else if (is_transposed(strip, steps)) {
    store_transposed(strip, steps, tile);
  } else {
    store_scattered(strip, steps, tile);
  }
}

// The offsets of the steps in the place of their positions, for a tensor of another stride from row to row.
SELECTRA_INLINE Steps offsets(const Operand& tensor, const GridSteps& steps) {
  Steps out = {steps.count, 0, {}};
  for (int t = 0; t < steps.count; ++t) out.position[t] = steps.offset(tensor, t);
  return out;
}

// Whether a block's steps lie as the kernels compute: whole vectors of neighbouring channels, no rows apart.
template <typename AnySteps>
SELECTRA_INLINE bool is_plain(const Operand& tensor, int lanes) {
  return tensor.stride[2] == 1 && lanes == kLanes && (!kIsFloat || tensor.storage == kWhole) &&
         !(kOnGrid<AnySteps> && tensor.jump);
}

template <typename AnySteps>
SELECTRA_APART void load_any_block(const Operand& tensor, int64_t batch, int64_t channel, int lanes,
                                   const AnySteps& steps, Vector* tile) {
  with_storage(tensor, [&](auto storage) {
    auto strip = strip_of<decltype(storage)>(tensor, batch, channel, lanes);
    if constexpr (kOnGrid<AnySteps>) {
      if (tensor.jump) {
        strip.step_stride = 1;
        return load_tile(strip, offsets(tensor, steps), tile);
      }
    }
    load_tile(strip, steps, tile);
  });
}

template <typename AnySteps>
SELECTRA_APART void store_any_block(const Operand& tensor, int64_t batch, int64_t channel, int lanes,
                                    const AnySteps& steps, const Vector* tile) {
  with_storage(tensor, [&](auto storage) {
    auto strip = strip_of<decltype(storage)>(tensor, batch, channel, lanes);
    if constexpr (kOnGrid<AnySteps>) {
      if (tensor.jump) {
        strip.step_stride = 1;
        return store_tile(strip, offsets(tensor, steps), tile);
      }
    }
    store_tile(strip, steps, tile);
  });
}

// A tile of a (b, l, d) tensor, whatever its storage: the usual one in place, the others in a function of their own,
// which keeps what is compiled small.
template <typename AnySteps>
SELECTRA_INLINE void load_block(const Operand& tensor, int64_t batch, int64_t channel, int lanes, const AnySteps& steps,
                                Vector* tile) {
  if (!is_plain<AnySteps>(tensor, lanes)) return load_any_block(tensor, batch, channel, lanes, steps, tile);
  const Real* const base = (const Real*)tensor.data + batch * tensor.stride[0] + channel;
  for (int t = 0; t < steps.count; ++t) tile[t] = load(base + steps.position[t] * tensor.stride[1]);
}

template <typename AnySteps>
SELECTRA_INLINE void store_block(const Operand& tensor, int64_t batch, int64_t channel, int lanes,
                                 const AnySteps& steps, const Vector* tile) {
  if (!is_plain<AnySteps>(tensor, lanes)) return store_any_block(tensor, batch, channel, lanes, steps, tile);
  Real* const base = (Real*)tensor.data + batch * tensor.stride[0] + channel;
  for (int t = 0; t < steps.count; ++t) store(base + steps.position[t] * tensor.stride[1], tile[t]);
}

// Blocks at most whose rows are asked for together: their tensors fit into the second cache twice.
constexpr int kBandBlocks = 32;

// Blocks first ... last - 1 of one group: what one task runs through.
struct BlockRange {
  int64_t group, first, last;
  int count() const { return (int)(last - first); }
  // Blocks of a band, an even number: bands of one size, so that each asks for about as much as it is large.
  int band() const {
    // No blocks are one empty band.
    const int64_t bands = larger<int64_t>(1, ceil_divide(count(), kBandBlocks));
    return larger(2, 2 * (int)ceil_divide(count(), 2 * bands));
  }
};

// A band of a range at a chunk, in the order of a run: `backward` from the last chunk to the first.
struct BandStep {
  int64_t chunk;
  int index;

  int blocks(const BlockRange& range) const { return smaller(range.band(), range.count() - index); }

  void advance(const BlockRange& range, bool backward) {
    index += range.band();
    if (index >= range.count()) index = 0, chunk += backward ? -1 : 1;
  }
};

// Memory to ask for ahead of use, a few cache lines at every step: while one band of blocks runs, the rows of the next.
//
// Row by row, since the hardware foresees the next line of a row and not the next row of a block: it takes half the
// time. A few at a time, since a full queue of outstanding loads makes the kernel wait.
class Ahead {
 public:
  void clear() { count_ = each_ = 0, lines_ = 0; }

  void add(const void* first, int64_t bytes) {
    if (count_ == kMost || bytes <= 0) return;
    const int64_t lines = (bytes + kLine - 1) / kLine;
    runs_[count_++] = {(const char*)first, lines};
    lines_ += lines;
  }

  // Rows of some channels of a (b, l, d) tensor.
  template <typename AnySteps>
  void add_rows(const Operand& tensor, int64_t batch, int64_t channel, int64_t channels, const AnySteps& steps) {
    if (!tensor.data || tensor.stride[2] != 1) return;
    const int64_t size = tensor.storage == kHalved ? 2 : sizeof(Real);
    const char* base = (const char*)tensor.data + (batch * tensor.stride[0] + channel) * size;
    for (int t = 0; t < steps.count; ++t) add(base + steps.offset(tensor, t) * size, channels * size);
  }

  // Spreads the lines over so many calls of ask.
  void spread(int64_t calls) {
    each_ = (int)((lines_ + calls - 1) / larger<int64_t>(1, calls));
    run_ = -1;
    next_run();
  }

  void ask() {
    for (int i = 0; i < each_; ++i) {
      __builtin_prefetch(at_, 0, 2);
      at_ += kLine;
      if (__builtin_expect(at_ >= end_, 0)) next_run();
    }
  }

 private:
  // The last run is followed by none: nothing is left to ask for.
  void next_run() {
    if (++run_ >= count_) {
      each_ = 0;
      return;
    }
    at_ = runs_[run_].first;
    end_ = at_ + kLine * runs_[run_].lines;
  }

  static constexpr int64_t kLine = 64;
  static constexpr int kMost = 8 * kChunk;
  struct Run {
    const char* first;
    int64_t lines;
  };
  Run runs_[kMost];
  int count_ = 0, run_ = 0, each_ = 0;
  int64_t lines_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

// A block of channels of a state, one vector a state; absent states are zero.
SELECTRA_APART void load_state(const Operand& tensor, int64_t sequence, int64_t channel, int lanes, int states,
                               Vector* out) {
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

SELECTRA_APART void store_state(const Operand& tensor, int64_t sequence, int64_t channel, int lanes, int states,
                                const Vector* in) {
  Steps steps = {0, 1, {}};
  for (int n = 0; n < states; n += kChunk) {
    steps.count = smaller(kChunk, states - n);
    for (int i = 0; i < steps.count; ++i) steps.position[i] = n + i;
    store_tile(strip_of_state(tensor, sequence, channel, lanes), steps, in + n);
  }
}

// A block of channels of a (d,) tensor; zero where it is absent.
SELECTRA_APART Vector load_channels(const Operand& tensor, int64_t channel, int lanes) {
  Vector v = {};
  if (tensor.data) {
    const Real* from = (const Real*)tensor.data + channel * tensor.stride[0];
    for (int i = 0; i < lanes; ++i) v[i] = from[i * tensor.stride[0]];
  }
  return v;
}

}  // namespace
}  // namespace selectra
