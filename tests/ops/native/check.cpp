// The library's kernels, called through its C interface, against plain loops in double: what a machine without Python
// can run, such as an emulated one. Says what is wrong and returns 1, or says how many comparisons held.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "call.h"

extern "C" {
int selectra_cpu_build_count(void);
const char* selectra_cpu_build_name(int build);
int selectra_cpu_build_runs(int build);
int selectra_cpu_chunk(void);
int selectra_cpu_lanes(int build, int is_double);
int selectra_cpu_scan_forward(int build, int is_double, const int64_t* call);
int selectra_cpu_scan_backward(int build, int is_double, const int64_t* call);
int selectra_cpu_conv_forward(int build, int is_double, const int64_t* call);
int selectra_cpu_conv_backward(int build, int is_double, const int64_t* call);
int selectra_cpu_step(int build, int is_double, const int64_t* call);
int selectra_cpu_cross_forward(int build, int is_double, const int64_t* call);
int selectra_cpu_cross_backward(int build, int is_double, const int64_t* call);
int selectra_cpu_rate(int build, int is_double, const int64_t* call);
}

using namespace selectra;
using Numbers = std::vector<double>;

static int failures = 0, comparisons = 0;
static unsigned seed = 1;

static double uniform() {
  seed = seed * 1664525u + 1013904223u;
  return (seed >> 8) / double(1 << 24);
}

static Numbers random_numbers(size_t count, double from, double to) {
  Numbers x(count);
  // Exact in bfloat16 too, so that every storage holds the same.
  for (double& v : x) {
    float rounded = (float)(from + (to - from) * uniform());
    uint32_t bits;
    memcpy(&bits, &rounded, 4);
    bits &= 0xffff0000u;
    memcpy(&rounded, &bits, 4);
    v = rounded;
  }
  return x;
}

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

// A contiguous tensor as the kernels see it, in one of three storages.
struct Tensor {
  enum Kind { kDouble, kFloat, kBfloat16 } kind;
  std::vector<char> bytes;
  int64_t stride[4];

  Tensor(Kind kind, const Numbers& values, std::vector<int64_t> shape) : kind(kind), stride{0, 0, 0, 0} {
    int64_t step = 1;
    for (int i = (int)shape.size() - 1; i >= 0; --i) stride[i] = step, step *= shape[i];
    // No byte more than the numbers take: a sanitizer sees who reads beyond.
    bytes.resize(values.size() * (kind == kDouble ? 8 : kind == kFloat ? 4 : 2));
    for (size_t i = 0; i < values.size(); ++i) {
      const float single = (float)values[i];
      if (kind == kDouble) memcpy(&bytes[8 * i], &values[i], 8);
      if (kind == kFloat) memcpy(&bytes[4 * i], &single, 4);
      if (kind == kBfloat16) memcpy(&bytes[2 * i], (const char*)&single + 2, 2);
    }
  }

  Operand operand() {
    return {bytes.data(), {stride[0], stride[1], stride[2], stride[3]}, kind == kBfloat16 ? kHalved : kWhole};
  }

  Rows rows() { return {bytes.data(), stride[0], kind == kBfloat16 ? kHalved : kWhole}; }

  double at(size_t i) const {
    double x = 0;
    float single = 0;
    if (kind == kDouble) memcpy(&x, &bytes[8 * i], 8);
    if (kind == kFloat) memcpy(&single, &bytes[4 * i], 4);
    if (kind == kBfloat16) memcpy((char*)&single + 2, &bytes[2 * i], 2);
    return kind == kDouble ? x : single;
  }

  Numbers numbers() const {
    Numbers all(bytes.size() / (kind == kDouble ? 8 : kind == kFloat ? 4 : 2));
    for (size_t i = 0; i < all.size(); ++i) all[i] = at(i);
    return all;
  }
};

static void compare(const char* what, const char* build, const Tensor& got, const Numbers& want) {
  const double tolerance[] = {1e-12, 3e-5, 8e-3};
  double largest = 0, error = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    largest = fmax(largest, fabs(want[i]));
    const double difference = fabs(got.at(i) - want[i]);
    // A NaN is no number to fmax, and stays.
    if (!isnan(error) && !(difference <= error)) error = difference;
  }
  ++comparisons;
  if (error <= tolerance[got.kind] * largest) return;
  printf("%s (%s, storage %d): off by %g of %g\n", what, build, got.kind, error, largest);
  ++failures;
}

static const int64_t b = 2, l = 71, d = 38, n = 7, groups = 2, width = 4;

static void check_scan(int build, Tensor::Kind kind, bool reverse) {
  const char* name = selectra_cpu_build_name(build);
  const bool is_double = kind == Tensor::kDouble;
  const Tensor::Kind own = is_double ? Tensor::kDouble : Tensor::kFloat;
  const Numbers u = random_numbers(b * l * d, -1, 1), delta = random_numbers(b * l * d, -2, 2),
                z = random_numbers(b * l * d, -2, 2), dy = random_numbers(b * l * d, -1, 1),
                A = random_numbers(d * n, -2, -.1), B = random_numbers(b * l * groups * n, -1, 1),
                C = random_numbers(b * l * groups * n, -1, 1), D = random_numbers(d, -1, 1),
                bias = random_numbers(d, -1, 1), h0 = random_numbers(b * d * n, -1, 1),
                dlast = random_numbers(b * d * n, -1, 1);
  Numbers y(b * l * d), last(b * d * n), du(y), ddelta(y), dz(y), dA(d * n), dB(B.size()), dC(B.size()), dD(d),
      dbias(d), dh0(b * d * n);
  for (int64_t s = 0; s < b; ++s) {
    for (int64_t c = 0; c < d; ++c) {
      const int64_t group = c / (d / groups);
      Numbers inner(l);
      for (int64_t k = 0; k < n; ++k) {
        Numbers h(l + 1);
        h[0] = h0[(s * d + c) * n + k];
        const double rate = A[c * n + k];
        auto at = [&](int64_t t) { return (s * l + (reverse ? l - 1 - t : t)) * d + c; };
        auto row = [&](int64_t t) { return ((s * l + (reverse ? l - 1 - t : t)) * groups + group) * n + k; };
        auto dt = [&](int64_t t) { return log1p(exp(delta[at(t)] + bias[c])); };
        for (int64_t t = 0; t < l; ++t) {
          h[t + 1] = exp(dt(t) * rate) * h[t] + dt(t) * B[row(t)] * u[at(t)];
          inner[t] += h[t + 1] * C[row(t)];
        }
        last[(s * d + c) * n + k] = h[l];
        double g = dlast[(s * d + c) * n + k];
        for (int64_t t = l - 1; t >= 0; --t) {
          const double dinner = dy[at(t)] * z[at(t)] * sigmoid(z[at(t)]), a = exp(dt(t) * rate);
          g += dinner * C[row(t)];
          dC[row(t)] += dinner * h[t + 1];
          dB[row(t)] += g * dt(t) * u[at(t)];
          du[at(t)] += g * dt(t) * B[row(t)];
          const double ddt = g * (a * h[t] * rate + B[row(t)] * u[at(t)]) * sigmoid(delta[at(t)] + bias[c]);
          ddelta[at(t)] += ddt;
          dbias[c] += ddt;
          dA[c * n + k] += g * a * h[t] * dt(t);
          g *= a;
        }
        dh0[(s * d + c) * n + k] = g;
      }
      for (int64_t t = 0; t < l; ++t) {
        const int64_t i = (s * l + (reverse ? l - 1 - t : t)) * d + c;
        const double before_gate = inner[t] + D[c] * u[i], open = sigmoid(z[i]);
        y[i] = before_gate * z[i] * open;
        dz[i] = dy[i] * before_gate * (open + z[i] * open * (1 - open));
        du[i] += dy[i] * z[i] * open * D[c];
        dD[c] += dy[i] * z[i] * open * u[i];
      }
    }
  }
  const int64_t lanes = selectra_cpu_lanes(build, is_double), chunk = selectra_cpu_chunk();
  const int64_t blocks = groups * ((d / groups + lanes - 1) / lanes);
  const std::vector<int64_t> wide = {b, l, d}, rows = {b, l, groups, n}, state = {b, d, n};
  Tensor tu(kind, u, wide), tdelta(kind, delta, wide), tz(kind, z, wide), tdy(kind, dy, wide), tA(own, A, {d, n}),
      tB(kind, B, rows), tC(kind, C, rows), tD(own, D, {d}), tbias(own, bias, {d}), th0(own, h0, state),
      tdlast(own, dlast, state), ty(kind, y, wide), tlast(own, last, state),
      saved(own, Numbers(b * ((l + chunk - 1) / chunk) * blocks * lanes * n), {1});
  Tensor tdu(kind, u, wide), tddelta(kind, u, wide), tdz(kind, u, wide), tdA(own, Numbers(d * n), {d, n}),
      tdB(kind, B, rows), tdC(kind, B, rows), tdD(own, Numbers(d), {d}), tdbias(own, Numbers(d), {d}),
      tdh0(own, h0, state);
  const Operand none = {nullptr, {0, 0, 0, 0}, kWhole};
  const int64_t rounds[][2] = {{1, 0}, {1, 2}, {3, 3}};
  for (const auto& [threads, pieces] : rounds) {
    ScanCall call = {b, l, d, n, groups, 1, reverse, threads, pieces, 0, 0, tu.operand(), tdelta.operand(), tA.operand(),
                     tB.operand(), tC.operand(), tD.operand(), tz.operand(), tbias.operand(), th0.operand(), none, none,
                     tlast.operand(), saved.operand(), ty.operand()};
    failures += selectra_cpu_scan_forward(build, is_double, (const int64_t*)&call) != 0;
    compare("y", name, ty, y);
    compare("final state", name, tlast, last);
    ScanBackwardCall back = {call, tdy.operand(), tdlast.operand(), tdu.operand(), tddelta.operand(), tdA.operand(),
                             tdB.operand(), tdC.operand(), tdD.operand(), tdz.operand(), tdbias.operand(),
                             tdh0.operand()};
    failures += selectra_cpu_scan_backward(build, is_double, (const int64_t*)&back) != 0;
    compare("gradient of u", name, tdu, du);
    compare("gradient of delta", name, tddelta, ddelta);
    compare("gradient of A", name, tdA, dA);
    compare("gradient of B", name, tdB, dB);
    compare("gradient of C", name, tdC, dC);
    compare("gradient of D", name, tdD, dD);
    compare("gradient of z", name, tdz, dz);
    compare("gradient of the bias", name, tdbias, dbias);
    compare("gradient of the initial state", name, tdh0, dh0);
  }
}

// Routes through a grid against the plain scan, which is checked above, on copies in the routes' orders.
struct Route {
  Numbers delta, A, B, C, D, bias;
};

// A call of several routes as the library takes it.
template <typename Call>
static int run_routes(int (*run)(int, int, const int64_t*), int build, bool is_double, const std::vector<Call>& calls) {
  std::vector<int64_t> words(1 + calls.size() * sizeof(Call) / 8);
  words[0] = (int64_t)calls.size();
  memcpy(&words[1], calls.data(), calls.size() * sizeof(Call));
  return run(build, is_double, words.data());
}

static void check_cross(int build, Tensor::Kind kind, int64_t height, int64_t width, int64_t threads) {
  const char* name = selectra_cpu_build_name(build);
  const bool is_double = kind == Tensor::kDouble;
  const Tensor::Kind own = is_double ? Tensor::kDouble : Tensor::kFloat;
  const int64_t length = height * width, chunk = selectra_cpu_chunk(), lanes = selectra_cpu_lanes(build, is_double);
  const int64_t saved_size = b * ((length + chunk - 1) / chunk) * ((d + lanes - 1) / lanes) * lanes * n;
  const Operand none = {nullptr, {0, 0, 0, 0}, kWhole};
  const std::vector<int64_t> wide = {b, length, d}, rows = {b, length, 1, n};
  const Numbers u = random_numbers(b * length * d, -1, 1), z = random_numbers(b * length * d, -2, 2),
                dy = random_numbers(b * length * d, -1, 1);
  // u is a part of a grid with two more columns.
  Numbers around(b * height * (width + 2) * d, NAN);
  for (int64_t i = 0; i < b * length * d; ++i) {
    const int64_t row = i / (width * d);
    around[(row * (width + 2) + 1) * d + i % (width * d)] = u[i];
  }
  Tensor taround(kind, around, {b, height, width + 2, d}), tz(kind, z, wide), tdy(kind, dy, wide);
  const int64_t pitch = (width + 2) * d;
  const Operand tu = {taround.bytes.data() + d * (kind == Tensor::kDouble ? 8 : kind == Tensor::kFloat ? 4 : 2),
                      {height * pitch, d, 1, 0},
                      kind == Tensor::kBfloat16 ? kHalved : kWhole,
                      pitch - width * d};
  Tensor ty(kind, u, wide), ty_sum(own, u, wide), tdu(kind, u, wide), tdu_sum(own, u, wide), tdz(kind, u, wide),
      tdz_sum(own, u, wide);
  Numbers y(u.size()), du(y), dz(y);
  struct Tensors {
    Tensor delta, A, B, C, D, bias, saved, ddelta, dA, dB, dC, dD, dbias;
  };
  std::vector<Tensors> held;
  std::vector<Tensors> plain;
  const int64_t routes = 4;
  for (int64_t i = 0; i < routes; ++i) {
    const Route route = {random_numbers(b * length * d, -2, 2), random_numbers(d * n, -2, -.1),
                         random_numbers(b * length * n, -1, 1), random_numbers(b * length * n, -1, 1),
                         random_numbers(d, -1, 1),              random_numbers(d, -1, 1)};
    // The position of a step.
    auto at = [&](int64_t t) {
      const int64_t s = i % 2 ? length - 1 - t : t;
      return i < 2 ? s : s % height * width + s / height;
    };
    auto walked = [&](const Numbers& x, int64_t size, bool back) {
      Numbers out(x.size());
      for (int64_t r = 0; r < b * length; ++r) {
        const int64_t there = (r / length * length + at(r % length)) * size, here = r * size;
        for (int64_t c = 0; c < size; ++c) (back ? out[there + c] : out[here + c]) = x[(back ? here : there) + c];
      }
      return out;
    };
    auto tensors = [&](Tensor::Kind kind, bool walk) {
      auto order = [&](const Numbers& x, int64_t size) { return walk ? walked(x, size, false) : x; };
      return Tensors{{kind, order(route.delta, d), wide}, {own, route.A, {d, n}},
                     {kind, order(route.B, n), rows},     {kind, order(route.C, n), rows},
                     {own, route.D, {d}},                 {own, route.bias, {d}},
                     {own, Numbers(saved_size), {1}},     {kind, route.delta, wide},
                     {own, Numbers(d * n), {d, n}},       {kind, route.B, rows},
                     {kind, route.B, rows},               {own, Numbers(d), {d}},
                     {own, Numbers(d), {d}}};
    };
    held.push_back(tensors(kind, false));
    Tensors t = tensors(own, true);
    Tensor wu(own, walked(u, d, false), wide), wz(own, walked(z, d, false), wide), wdy(own, walked(dy, d, false), wide),
        wy(own, u, wide), wdu(own, u, wide), wdz(own, u, wide), last(own, Numbers(b * d * n), {b, d, n});
    const ScanCall call = {b, length, d, n, 1, 1, 0, 1, 0, 0, 0, wu.operand(), t.delta.operand(), t.A.operand(),
                           t.B.operand(), t.C.operand(), t.D.operand(), wz.operand(), t.bias.operand(), none, none, none,
                           last.operand(), t.saved.operand(), wy.operand(), none};
    const ScanBackwardCall back = {call, wdy.operand(), none, wdu.operand(), t.ddelta.operand(), t.dA.operand(),
                                   t.dB.operand(), t.dC.operand(), t.dD.operand(), wdz.operand(), t.dbias.operand(),
                                   none, none, none};
    failures += selectra_cpu_scan_forward(build, is_double, (const int64_t*)&call) != 0;
    failures += selectra_cpu_scan_backward(build, is_double, (const int64_t*)&back) != 0;
    const Numbers of_y = walked(wy.numbers(), d, true), of_u = walked(wdu.numbers(), d, true),
                  of_z = walked(wdz.numbers(), d, true);
    for (size_t j = 0; j < y.size(); ++j) y[j] += of_y[j], du[j] += of_u[j], dz[j] += of_z[j];
    t.ddelta = Tensor(own, walked(t.ddelta.numbers(), d, true), wide);
    t.dB = Tensor(own, walked(t.dB.numbers(), n, true), rows);
    t.dC = Tensor(own, walked(t.dC.numbers(), n, true), rows);
    plain.push_back(t);
  }
  std::vector<ScanCall> calls;
  std::vector<ScanBackwardCall> backs;
  for (int64_t i = 0; i < routes; ++i) {
    Tensors& t = held[i];
    const bool first = i == 0, last = i == routes - 1;
    calls.push_back({b, length, d, n, 1, 1, i % 2, threads, 0, width, i > 1, tu, t.delta.operand(), t.A.operand(),
                     t.B.operand(), t.C.operand(), t.D.operand(), tz.operand(), t.bias.operand(), none, none, none, none,
                     t.saved.operand(), (last ? ty : ty_sum).operand(), first ? none : ty_sum.operand()});
    backs.push_back({calls.back(), tdy.operand(), none, (last ? tdu : tdu_sum).operand(), t.ddelta.operand(),
                     t.dA.operand(), t.dB.operand(), t.dC.operand(), t.dD.operand(), (last ? tdz : tdz_sum).operand(),
                     t.dbias.operand(), none, first ? none : tdu_sum.operand(), first ? none : tdz_sum.operand()});
  }
  failures += run_routes(selectra_cpu_cross_forward, build, is_double, calls) != 0;
  failures += run_routes(selectra_cpu_cross_backward, build, is_double, backs) != 0;
  compare("sum over routes", name, ty, y);
  compare("routes' gradient of u", name, tdu, du);
  compare("routes' gradient of z", name, tdz, dz);
  for (int64_t i = 0; i < routes; ++i) {
    compare("a route's gradient of delta", name, held[i].ddelta, plain[i].ddelta.numbers());
    compare("a route's gradient of A", name, held[i].dA, plain[i].dA.numbers());
    compare("a route's gradient of B", name, held[i].dB, plain[i].dB.numbers());
    compare("a route's gradient of C", name, held[i].dC, plain[i].dC.numbers());
    compare("a route's gradient of D", name, held[i].dD, plain[i].dD.numbers());
    compare("a route's gradient of the bias", name, held[i].dbias, plain[i].dbias.numbers());
  }
}

static void check_conv(int build, Tensor::Kind kind) {
  const char* name = selectra_cpu_build_name(build);
  const bool is_double = kind == Tensor::kDouble;
  const Tensor::Kind own = is_double ? Tensor::kDouble : Tensor::kFloat;
  const Numbers x = random_numbers(b * l * d, -1, 1), dy = random_numbers(b * l * d, -1, 1),
                w = random_numbers(d * width, -1, 1), bias = random_numbers(d, -1, 1);
  Numbers y(b * l * d), dx(b * l * d), dw(d * width), dbias(d), last(b * d * width);
  for (int64_t s = 0; s < b; ++s) {
    for (int64_t t = 0; t < l; ++t) {
      for (int64_t c = 0; c < d; ++c) {
        double sum = bias[c];
        for (int64_t j = 0; j < width; ++j) {
          if (t - width + 1 + j >= 0) sum += w[c * width + j] * x[(s * l + t - width + 1 + j) * d + c];
        }
        const double open = sigmoid(sum), g = dy[(s * l + t) * d + c] * (open + sum * open * (1 - open));
        y[(s * l + t) * d + c] = sum * open;
        dbias[c] += g;
        for (int64_t j = 0; j < width; ++j) {
          const int64_t from = (s * l + t - width + 1 + j) * d + c;
          if (t - width + 1 + j < 0) continue;
          dw[c * width + j] += g * x[from];
          dx[from] += g * w[c * width + j];
        }
        if (t >= l - width) last[(s * d + c) * width + t - l + width] = x[(s * l + t) * d + c];
      }
    }
  }
  Tensor tx(kind, x, {b, l, d}), tdy(kind, dy, {b, l, d}), ty(kind, y, {b, l, d}), tdx(kind, x, {b, l, d}),
      tw(own, w, {d, width}), tbias(own, bias, {d}), tlast(own, last, {b, d, width}),
      tdw(own, Numbers(d * width), {d, width}), tdbias(own, Numbers(d), {d});
  const Operand none = {nullptr, {0, 0, 0, 0}, kWhole};
  ConvCall call = {b, l, d, width, 1, 0, 2, tx.operand(), tw.operand(), tbias.operand(), none, none, none,
                   tlast.operand(), ty.operand()};
  failures += selectra_cpu_conv_forward(build, is_double, (const int64_t*)&call) != 0;
  ConvBackwardCall back = {call, tdy.operand(), none, tdx.operand(), tdw.operand(), tdbias.operand(), none};
  failures += selectra_cpu_conv_backward(build, is_double, (const int64_t*)&back) != 0;
  compare("convolution", name, ty, y);
  compare("convolution's final state", name, tlast, last);
  compare("gradient of x", name, tdx, dx);
  compare("gradient of the weight", name, tdw, dw);
  compare("gradient of the convolution's bias", name, tdbias, dbias);
}

// A Mamba block for the step: its tensors as the kernel sees them, and its state as the plain loops do.
struct Block {
  static constexpr int64_t model = 13, channels = 26;
  int64_t batch, states, width, rank;
  // Without: no norm, and none of the parameters that may be absent.
  bool whole;
  Tensor norm, in, in_bias, filter, filter_bias, select, dt, dt_bias, A_log, D, out, out_bias, conv, ssm, stream, y;
  Numbers window, h;

  static Tensor made(Tensor::Kind kind, int64_t rows, int64_t columns, double from, double to) {
    return Tensor(kind, random_numbers(rows * columns, from, to), {rows, columns});
  }

  // `kind` is that of x, y and the matrices, `vectors` of A_log, D, biases and residual stream, `own` of the state.
  Block(Tensor::Kind kind, Tensor::Kind vectors, Tensor::Kind own, int64_t batch, int64_t states, int64_t width,
        int64_t rank, bool whole)
      : batch(batch), states(states), width(width), rank(rank), whole(whole), norm(made(vectors, 1, model, .5, 1.5)),
        in(made(kind, 2 * channels, model, -.5, .5)), in_bias(made(vectors, 1, 2 * channels, -1, 1)),
        filter(made(kind, channels, width, -1, 1)), filter_bias(made(vectors, 1, channels, -1, 1)),
        select(made(kind, rank + 2 * states, channels, -.5, .5)), dt(made(kind, channels, rank, -1, 1)),
        dt_bias(made(vectors, 1, channels, -3, 1)), A_log(made(vectors, channels, states, -1, 2)),
        D(made(vectors, 1, channels, -1, 1)), out(made(kind, model, channels, -.5, .5)),
        out_bias(made(vectors, 1, model, -1, 1)), conv(made(kind, batch, channels * width, -1, 1)),
        ssm(made(own, batch, channels * states, -1, 1)), stream(made(vectors, batch, model, -1, 1)),
        y(made(kind, batch, model, -1, 1)), window(conv.numbers()), h(ssm.numbers()) {}

  StepCall call(int64_t following, Tensor& x, Tensor* residual) {
    const Rows none = {nullptr, 0, kWhole};
    auto perhaps = [&](Tensor& tensor) { return whole ? tensor.rows() : none; };
    return {batch, following, x.rows(), residual ? residual->rows() : none, perhaps(stream), y.rows(), conv.rows(),
            ssm.rows(), model, channels, states, width, rank, 1e-5, perhaps(norm), in.rows(), perhaps(in_bias),
            filter.rows(), perhaps(filter_bias), select.rows(), dt.rows(), perhaps(dt_bias), A_log.rows(), perhaps(D),
            out.rows(), perhaps(out_bias)};
  }
};

// matrix x + bias, without a bias where there is none.
static Numbers plain_product(const Tensor& matrix, const Tensor* bias, const Numbers& x) {
  Numbers y(matrix.numbers().size() / x.size());
  for (size_t i = 0; i < y.size(); ++i) {
    y[i] = bias ? bias->at(i) : 0;
    for (size_t k = 0; k < x.size(); ++k) y[i] += matrix.at(i * x.size() + k) * x[k];
  }
  return y;
}

// What the kernel wrote, compared; the plain loops go on with it where it is rounded to bfloat16, else with theirs.
static void settle(const char* what, const char* build, const Tensor& got, Numbers& want) {
  compare(what, build, got, want);
  if (got.kind == Tensor::kBfloat16) want = got.numbers();
}

// The norm of x + residual, which becomes the residual stream, row by row.
static Numbers plain_norm(const char* build, const Block& block, const Numbers& x, Numbers& residual) {
  if (!block.whole) return x;
  for (size_t i = 0; i < x.size(); ++i) residual[i] += x[i];
  settle("step's residual stream", build, block.stream, residual);
  Numbers normed(residual);
  for (int64_t s = 0; s < block.batch; ++s) {
    double squares = 0;
    for (int64_t i = 0; i < Block::model; ++i) squares += pow(residual[s * Block::model + i], 2);
    for (int64_t i = 0; i < Block::model; ++i)
      normed[s * Block::model + i] *= block.norm.at(i) / sqrt(squares / Block::model + 1e-5);
  }
  return normed;
}

// Convolution and what follows it for one row of the batch, given u and z side by side.
static Numbers plain_row(Block& block, int64_t s, const Numbers& halves) {
  const int64_t channels = Block::channels, states = block.states, width = block.width;
  auto perhaps = [&](Tensor& tensor) { return block.whole ? &tensor : nullptr; };
  Numbers u(channels), gated(channels);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = block.whole ? block.filter_bias.at(c) : 0;
    const double* window = &block.window[(s * channels + c) * width];
    for (int64_t j = 0; j < width; ++j) sum += block.filter.at(c * width + j) * window[j];
    u[c] = sum * sigmoid(sum);
  }
  const Numbers selected = plain_product(block.select, nullptr, u);
  const Numbers low(selected.begin(), selected.begin() + block.rank);
  const Numbers dt = plain_product(block.dt, perhaps(block.dt_bias), low);
  for (int64_t c = 0; c < channels; ++c) {
    const double step = log1p(exp(dt[c])), z = halves[channels + c];
    double sum = block.whole ? block.D.at(c) * u[c] : 0;
    for (int64_t k = 0; k < states; ++k) {
      double& h = block.h[(s * channels + c) * states + k];
      h = exp(-step * exp(block.A_log.at(c * states + k))) * h + step * selected[block.rank + k] * u[c];
      sum += h * selected[block.rank + states + k];
    }
    gated[c] = sum * z * sigmoid(z);
  }
  return plain_product(block.out, perhaps(block.out_bias), gated);
}

// What the kernel must have made of x, block by block: y, the residual stream and both states.
static Numbers plain_step(const char* build, Block& block, const Numbers& x, Numbers& residual) {
  const int64_t channels = Block::channels, model = Block::model, width = block.width;
  const Numbers normed = plain_norm(build, block, x, residual);
  std::vector<Numbers> halves;
  for (int64_t s = 0; s < block.batch; ++s) {
    const Numbers row(normed.begin() + s * model, normed.begin() + (s + 1) * model);
    halves.push_back(plain_product(block.in, block.whole ? &block.in_bias : nullptr, row));
    for (int64_t c = 0; c < channels; ++c) {
      double* window = &block.window[(s * channels + c) * width];
      for (int64_t j = 0; j + 1 < width; ++j) window[j] = window[j + 1];
      window[width - 1] = halves[s][c];
    }
  }
  settle("step's window", build, block.conv, block.window);
  Numbers y;
  for (int64_t s = 0; s < block.batch; ++s) {
    const Numbers row = plain_row(block, s, halves[s]);
    y.insert(y.end(), row.begin(), row.end());
  }
  compare("step's state", build, block.ssm, block.h);
  settle("step", build, block.y, y);
  return y;
}

// Two blocks in one call, two positions in a row: the first block writes over what it reads, the second elsewhere.
static void check_step(int build, Tensor::Kind kind, int64_t batch, int64_t states, int64_t width, int64_t rank,
                       bool whole) {
  const Tensor::Kind own = kind == Tensor::kDouble ? Tensor::kDouble : Tensor::kFloat;
  // As without residual_in_fp32 and with it.
  const Tensor::Kind vectors = width == 4 ? kind : own;
  Block first(kind, vectors, own, batch, states, width, rank, whole);
  Block second(kind, vectors, own, batch, states, width, rank, whole);
  for (int position = 0; position < 2; ++position) {
    const bool has_residual = whole && position == 1;
    const Numbers x = first.y.numbers();
    Numbers residual = has_residual ? first.stream.numbers() : Numbers(x.size());
    const StepCall calls[] = {first.call(1, first.y, has_residual ? &first.stream : nullptr),
                              second.call(0, first.y, whole ? &first.stream : nullptr)};
    failures += selectra_cpu_step(build, kind == Tensor::kDouble, (const int64_t*)calls) != 0;
    const char* name = selectra_cpu_build_name(build);
    plain_step(name, second, plain_step(name, first, x, residual), residual);
  }
}

static void check_steps(int build, Tensor::Kind kind) {
  for (int64_t batch : {1, 3})
    for (int64_t states : {3, 16})
      for (int64_t width : {2, 4})
        for (int64_t rank : {1, 5})
          for (bool whole : {false, true}) check_step(build, kind, batch, states, width, rank, whole);
}

// What rates are measured of: all of it returns, and the copy is one.
static void check_rates(int build, Tensor::Kind kind) {
  Tensor from(kind, random_numbers(640, -1, 1), {640}), to(kind, Numbers(640), {640});
  for (int64_t work = kExponentials; work <= kCopy; ++work) {
    const RateCall call = {work, 2, 3, from.bytes.data(), to.bytes.data(), (int64_t)from.bytes.size()};
    failures += selectra_cpu_rate(build, kind == Tensor::kDouble, (const int64_t*)&call) != 0;
  }
  compare("copy", selectra_cpu_build_name(build), to, from.numbers());
}

int main() {
  for (int build = 0; build < selectra_cpu_build_count(); ++build) {
    if (!selectra_cpu_build_runs(build)) continue;
    for (Tensor::Kind kind : {Tensor::kDouble, Tensor::kFloat, Tensor::kBfloat16}) {
      check_scan(build, kind, false);
      check_scan(build, kind, true);
      check_conv(build, kind);
      check_cross(build, kind, 5, 7, 1);
      check_cross(build, kind, 17, 3, 3);
      check_cross(build, kind, 1, 33, 2);
      check_steps(build, kind);
      check_rates(build, kind);
    }
    printf("%s\n", selectra_cpu_build_name(build));
  }
  printf("%d comparisons, %d failures\n", comparisons, failures);
  return failures != 0;
}
