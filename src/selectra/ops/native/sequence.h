// Sequences in the order in which they are run through, whatever their order in memory.
#pragma once

#include <stdlib.h>

#include "call.h"
#include "simd.h"

namespace selectra {
namespace {

SELECTRA_INLINE int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Positions of up to kChunk steps, in the order of the run.
struct Steps {
  int count;
  // 1 or -1: each position is this far from the one before; 0: no such order.
  int direction;
  int64_t position[kChunk];

  // Elements from the first position of a tensor to that of step t.
  int64_t offset(const Operand& tensor, int t) const { return position[t] * tensor.stride[1]; }
};

// Steps on a grid. What is compiled for these takes rows that lie apart, and sums over the routes; what is compiled for
// a line pays for neither.
struct GridSteps : Steps {
  int32_t row[kChunk];

  int64_t offset(const Operand& tensor, int t) const {
    return position[t] * tensor.stride[1] + row[t] * tensor.jump;
  }
};

template <typename AnySteps>
constexpr bool kOnGrid = std::is_same<AnySteps, GridSteps>::value;

// A grid of `height` rows of `width` positions, walked row by row or column by column.
struct Grid {
  int64_t height, width;
  bool by_columns;
};

struct Sequence {
  int64_t batch;
  // Steps in the run, and the chunks of them that lie before this sequence in the checkpoints.
  int64_t count, chunk_offset;
  int64_t first;
  int direction;
  // Positions of the steps where they are not first, first + direction, ...
  const int32_t* positions;
  Grid grid;

  int64_t chunks() const { return ceil_divide(count, kChunk); }

  void steps(int64_t from, int64_t count_wanted, Steps& out) const {
    out.count = (int)count_wanted;
    for (int t = 0; t < out.count; ++t) {
      out.position[t] = positions ? positions[from + t] : first + direction * (from + t);
    }
    out.direction = direction;
    if (positions) {
      const int64_t reach = out.position[out.count - 1] - out.position[0];
      if (reach != (out.count - 1) * direction) out.direction = 0;
    }
  }

  // The rows of the steps' positions, and in a walk by columns the positions themselves.
  void steps(int64_t from, int64_t count_wanted, GridSteps& out) const {
    out.count = (int)count_wanted;
    // Along the walk: lines of `across` positions, the step's line and its place on it.
    const int64_t across = grid.by_columns ? grid.height : grid.width;
    const int64_t begin = first + direction * from;
    int64_t line = begin / across, place = begin % across;
    for (int t = 0; t < out.count; ++t) {
      out.row[t] = (int32_t)(grid.by_columns ? place : line);
      out.position[t] = grid.by_columns ? place * grid.width + line : begin + direction * t;
      place += direction;
      if (place == across) place = 0, ++line;
      if (place < 0) place = across - 1, --line;
    }
    out.direction = grid.by_columns ? 0 : direction;
  }

  template <typename AnySteps>
  void chunk(int64_t index, AnySteps& out) const {
    const int64_t from = index * kChunk;
    steps(from, smaller<int64_t>(kChunk, count - from), out);
  }
};

SELECTRA_INLINE bool present(const Operand& mask, int64_t batch, int64_t position) {
  return ((const uint8_t*)mask.data)[batch * mask.stride[0] + position * mask.stride[1]] != 0;
}

// All sequences of a call.
class Sequences {
 public:
  Sequences(int64_t sequences, int64_t length, bool reverse, const Operand& borders, Grid grid = {})
      : count(sequences),
        length_(length),
        direction_(reverse ? -1 : 1),
        borders_((const int32_t*)borders.data),
        grid_(grid) {}
  ~Sequences() {
    free(positions_);
    free(present_count_);
  }
  Sequences(const Sequences&) = delete;
  Sequences& operator=(const Sequences&) = delete;

  bool borders_are_sound() const {
    if (!borders_) return true;
    if (borders_[0] != 0 || borders_[count] != length_) return false;
    for (int64_t s = 0; s < count; ++s) {
      if (borders_[s + 1] < borders_[s]) return false;
    }
    return true;
  }

  // Leaves absent positions out of the runs. False when memory is short.
  bool leave_out_absent(const Operand& mask) {
    positions_ = (int32_t*)malloc(sizeof(int32_t) * (count * length_ + 1));
    present_count_ = (int64_t*)malloc(sizeof(int64_t) * (count + 1));
    if (!positions_ || !present_count_) return false;
    for (int64_t s = 0; s < count; ++s) {
      int32_t* run = positions_ + s * length_;
      int64_t found = 0;
      for (int64_t t = 0; t < length_; ++t) {
        const int64_t position = direction_ > 0 ? t : length_ - 1 - t;
        if (present(mask, s, position)) run[found++] = (int32_t)position;
      }
      present_count_[s] = found;
    }
    return true;
  }

  Sequence operator[](int64_t s) const {
    Sequence sequence = {};
    int64_t start = 0, end = length_;
    if (borders_) {
      start = borders_[s];
      end = borders_[s + 1];
      // An upper bound of the chunks before it that needs no sum over the sequences.
      sequence.chunk_offset = start / kChunk + s;
    } else {
      sequence.batch = s;
      sequence.chunk_offset = s * ceil_divide(length_, kChunk);
    }
    sequence.direction = direction_;
    sequence.grid = grid_;
    sequence.first = direction_ > 0 ? start : end - 1;
    sequence.count = end - start;
    if (positions_) {
      sequence.positions = positions_ + s * length_;
      sequence.count = present_count_[s];
    }
    return sequence;
  }

  const int64_t count;

 private:
  const int64_t length_;
  const int direction_;
  const int32_t* const borders_;
  const Grid grid_;
  int32_t* positions_ = nullptr;
  int64_t* present_count_ = nullptr;
};

}  // namespace
}  // namespace selectra
