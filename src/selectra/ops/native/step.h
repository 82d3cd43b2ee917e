// One position through whole Mamba blocks: norm, projections, convolution step, scan step and gate in one call.
//
// It is bound by the reading of the weights: every matrix is read once for all rows of the batch, kLanes of its rows
// side by side, and the rows that follow are asked for meanwhile. All between the projections stays in a workspace.
#pragma once

#include "parallel.h"
#include "tile.h"

namespace selectra {
namespace {

struct StepWorkspace {
  // (batch, ...) each: the normalised input, u and z, u behind the convolution, dt's low rank with B and C, the step,
  // and the gated output.
  Real *normed, *halves, *mixed, *selected, *dt, *gated;

  StepWorkspace(Arena& arena, const StepCall* call) {
    const int64_t batch = call->batch;
    normed = arena.take<Real>(batch * call->model);
    halves = arena.take<Real>(batch * 2 * call->channels);
    mixed = arena.take<Real>(batch * call->channels);
    selected = arena.take<Real>(batch * (call->rank + 2 * call->states));
    dt = arena.take<Real>(batch * call->channels);
    gated = arena.take<Real>(batch * call->channels);
  }
};

template <typename Body>
SELECTRA_INLINE void with_storage(const Rows& rows, const Body& body) {
  with_storage(Operand{rows.data, {}, rows.storage}, body);
}

// Lanes i ... i + count - 1 of a vector of numbers; zeros without data.
SELECTRA_INLINE Vector load_part(const Rows& of, int64_t i, int count) {
  if (!of.data) return Vector{};
  Vector v;
  with_storage(of, [&](auto storage) {
    using Storage = decltype(storage);
    const auto* from = (const typename Storage::Number*)of.data + i;
    v = count == kLanes ? Storage::load(from) : Storage::load_some(from, count);
  });
  return v;
}

SELECTRA_INLINE void store_part(const Rows& to, int64_t i, Vector v, int count) {
  with_storage(to, [&](auto storage) {
    using Storage = decltype(storage);
    auto* at = (typename Storage::Number*)to.data + i;
    if (count == kLanes) {
      Storage::store(at, v);
    } else {
      Storage::store_some(at, v, count);
    }
  });
}

SELECTRA_INLINE Vector load_numbers(const Real* from, int count) {
  return count == kLanes ? load(from) : load_some(from, count);
}

SELECTRA_INLINE void store_numbers(Real* to, Vector v, int count) {
  if (count == kLanes) {
    store(to, v);
  } else {
    store_some(to, v, count);
  }
}

// Calls body(i, count) for pieces of kLanes of 0 ... size - 1, the last with what is left.
template <typename Body>
SELECTRA_INLINE void for_each_piece(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, (int)(size - i));
}

SELECTRA_INLINE Real sum_of(Vector v) {
  Real sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// The products of `count` rows of a matrix from row `first` on with a vector of `size` numbers, a lane each.
template <typename Storage>
SELECTRA_APART Vector rows_times(const Rows& matrix, int64_t first, int count, int64_t size, const Real* x) {
  const int64_t pitch = matrix.pitch;
  const auto* base = (const typename Storage::Number*)matrix.data + first * pitch;
  Vector sums[kLanes] = {};
  for (int64_t k = 0; k < size; k += kLanes) {
    const int left = (int)smaller<int64_t>(kLanes, size - k);
    const Vector v = load_numbers(x + k, left);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      // Beyond the last row it is read again.
      const auto* row = base + smaller(i, count - 1) * pitch + k;
      // A line holds as many numbers as the widest vector or more; asking twice costs less than asking whether to.
      __builtin_prefetch(row + kLanes * pitch);
      sums[i] += v * (left == kLanes ? Storage::load(row) : Storage::load_some(row, left));
    }
  }
  return sum_lanes(sums);
}

// y = W x + bias for rows first ... last - 1 of W and every row of the batch; `store` takes (batch, row, values, count).
template <typename Store>
SELECTRA_INLINE void product(const Rows& matrix, const Rows& bias, int64_t first, int64_t last, int64_t size,
                             const Real* x, int64_t x_pitch, int64_t batch, const Store& store) {
  with_storage(matrix, [&](auto storage) {
    for (int64_t row = first; row < last; row += kLanes) {
      const int count = (int)smaller<int64_t>(kLanes, last - row);
      const Vector offset = load_part(bias, row, count);
      for (int64_t b = 0; b < batch; ++b) {
        store(b, row, offset + rows_times<decltype(storage)>(matrix, row, count, size, x + b * x_pitch), count);
      }
    }
  });
}

SELECTRA_INLINE Rows row_of(const Rows& tensor, int64_t b) {
  Rows row = tensor;
  const int64_t bytes = tensor.storage == kHalved ? 2 : (int64_t)sizeof(Real);
  if (row.data) row.data = (char*)tensor.data + b * tensor.pitch * bytes;
  return row;
}

// x, or with a norm's weight the sum of x and the residual stream, written to `stream` and normalised.
SELECTRA_INLINE void step_norm(const StepCall& call, Real* normed) {
  for (int64_t b = 0; b < call.batch; ++b) {
    const Rows x = row_of(call.x, b), residual = row_of(call.residual, b), stream = row_of(call.stream, b);
    Real* to = normed + b * call.model;
    Vector squares = {};
    for_each_piece(call.model, [&](int64_t i, int count) {
      Vector v = load_part(x, i, count);
      if (call.norm_weight.data) {
        // The sum counts as it is stored.
        store_part(stream, i, v + load_part(residual, i, count), count);
        v = load_part(stream, i, count);
        squares += v * v;
      }
      store_numbers(to + i, v, count);
    });
    if (!call.norm_weight.data) continue;
    const Real scale = 1 / __builtin_sqrt(sum_of(squares) / (Real)call.model + (Real)call.eps);
    for_each_piece(call.model, [&](int64_t i, int count) {
      store_numbers(to + i, load_numbers(to + i, count) * scale * load_part(call.norm_weight, i, count), count);
    });
  }
}

// Takes the channel's window a position further and gives the convolution's output of it.
template <typename Storage, int kWidth>
SELECTRA_INLINE Vector shift_windows(typename Storage::Number* windows, int64_t width, const Real* weight, Vector u,
                                     int count) {
  Vector sums = {};
  for (int i = 0; i < count; ++i) {
    auto* window = windows + i * width;
    Real sum = 0;
    for (int64_t k = 0; k + 1 < (kWidth ? kWidth : width); ++k) {
      window[k] = window[k + 1];
      sum += Storage::widen(window[k]) * weight[i * width + k];
    }
    window[width - 1] = Storage::narrow(u[i]);
    // As the next position will read it.
    sums[i] = sum + Storage::widen(window[width - 1]) * weight[i * width + width - 1];
  }
  return sums;
}

SELECTRA_INLINE Vector silu(Vector x) { return x * sigmoid(x); }

// Convolution and SiLU of channels first ... last - 1.
SELECTRA_INLINE void step_conv(const StepCall& call, const StepWorkspace& work, int64_t first, int64_t last) {
  constexpr int kUsualWidth = 4, kLargestWidth = 64;
  const int64_t width = call.width;
  Real weights[kLanes * kLargestWidth];
  for_each_piece(last - first, [&](int64_t offset, int count) {
    const int64_t channel = first + offset;
    for_each_piece(count * width, [&](int64_t i, int part) {
      store_numbers(weights + i, load_part(call.conv_weight, channel * width + i, part), part);
    });
    for (int64_t b = 0; b < call.batch; ++b) {
      const Vector u = load_numbers(work.halves + b * 2 * call.channels + channel, count);
      Vector y;
      with_storage(call.conv, [&](auto storage) {
        using Storage = decltype(storage);
        auto* windows = (typename Storage::Number*)call.conv.data + b * call.conv.pitch + channel * width;
        y = width == kUsualWidth ? shift_windows<Storage, kUsualWidth>(windows, kUsualWidth, weights, u, count)
                                 : shift_windows<Storage, 0>(windows, width, weights, u, count);
      });
      store_numbers(work.mixed + b * call.channels + channel, silu(y + load_part(call.conv_bias, channel, count)),
                    count);
    }
  });
}

// The recurrence's step of up to kLanes channels: a vector holds kLanes states of one channel. Gives C . h.
SELECTRA_INLINE Vector step_states(const StepCall& call, int64_t channel, int count, Real* states, const Real* dt,
                                   const Real* u, const Real* B, const Real* C) {
  Vector sums[kLanes] = {};
  for (int i = 0; i < count; ++i) {
    Real* h = states + i * call.states;
    const Vector step = broadcast(dt[i] * -kLog2E), input = broadcast(dt[i] * u[i]);
    for (int64_t n = 0; n < call.states; n += kLanes) {
      const int part = (int)smaller<int64_t>(kLanes, call.states - n);
      const Vector log_rate = load_part(call.A_log, (channel + i) * call.states + n, part);
      const Vector decay = exp2_of_product(step, exp2_of_product(log_rate, broadcast(kLog2E)));
      const Vector state = decay * load_numbers(h + n, part) + input * load_numbers(B + n, part);
      store_numbers(h + n, state, part);
      sums[i] += state * load_numbers(C + n, part);
    }
  }
  return sum_lanes(sums);
}

// Asks for the part of a matrix of so many rows that belongs to elements first ... last - 1 of `size`: its product comes
// later, and memory has nothing to do meanwhile.
SELECTRA_INLINE void ask_for_part(const Rows& matrix, int64_t rows, int64_t first, int64_t last, int64_t size) {
  constexpr int64_t kLine = 64;
  const int64_t bytes = rows * matrix.pitch * (matrix.storage == kHalved ? 2 : (int64_t)sizeof(Real));
  const char* from = (const char*)matrix.data;
  for (int64_t i = bytes * first / size; i < bytes * last / size; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

// Step size, recurrence, skip and gate of channels first ... last - 1.
SELECTRA_INLINE void step_scan(const StepCall& call, const StepWorkspace& work, int64_t first, int64_t last) {
  const int64_t selected = call.rank + 2 * call.states;
  product(call.dt_weight, call.dt_bias, first, last, call.rank, work.selected, selected, call.batch,
          [&](int64_t b, int64_t row, Vector v, int count) {
            store_numbers(work.dt + b * call.channels + row, softplus(v).value, count);
          });
  for (int64_t b = 0; b < call.batch; ++b) {
    const Real *B = work.selected + b * selected + call.rank, *C = B + call.states;
    for_each_piece(last - first, [&](int64_t offset, int count) {
      const int64_t channel = first + offset, at = b * call.channels + channel;
      Real* states = (Real*)call.ssm.data + b * call.ssm.pitch + channel * call.states;
      const Vector u = load_numbers(work.mixed + at, count);
      if (b == 0) ask_for_part(call.out_weight, call.model, channel, channel + count, call.channels);
      const Vector z = load_numbers(work.halves + (2 * b + 1) * call.channels + channel, count);
      const Vector y = step_states(call, channel, count, states, work.dt + at, work.mixed + at, B, C);
      store_numbers(work.gated + at, (y + load_part(call.D, channel, count) * u) * silu(z), count);
    });
  }
}

static void step_block(const StepCall& call) {
  const auto work = lay_out_workspace<StepWorkspace>(&call);
  const int64_t channels = call.channels, selected = call.rank + 2 * call.states;
  step_norm(call, work.normed);
  product(call.in_weight, call.in_bias, 0, 2 * channels, call.model, work.normed, call.model, call.batch,
          [&](int64_t b, int64_t row, Vector v, int count) {
            store_numbers(work.halves + b * 2 * channels + row, v, count);
          });
  step_conv(call, work, 0, channels);
  product(call.x_weight, Rows{}, 0, selected, channels, work.mixed, channels, call.batch,
          [&](int64_t b, int64_t row, Vector v, int count) {
            store_numbers(work.selected + b * selected + row, v, count);
          });
  step_scan(call, work, 0, channels);
  product(call.out_weight, call.out_bias, 0, call.model, channels, work.gated, channels, call.batch,
          [&](int64_t b, int64_t row, Vector v, int count) { store_part(row_of(call.y, b), row, v, count); });
}

int step(const StepCall& call) {
  for (const StepCall* block = &call;; ++block) {
    step_block(*block);
    if (!block->following) return kDone;
  }
}

}  // namespace
}  // namespace selectra
