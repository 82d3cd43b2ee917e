// How fast this machine does what the kernels are made of, in the instructions that they are made of: what
// `selectra bench scan` computes a scan's least time from. The caller times the calls.
#pragma once

#include "parallel.h"

namespace selectra {
namespace {

#if defined(__AVX512F__)
#define SELECTRA_REGISTER "v"
#elif defined(__SSE2__)
#define SELECTRA_REGISTER "x"
#elif defined(__aarch64__)
#define SELECTRA_REGISTER "w"
#else
#define SELECTRA_REGISTER "m"
#endif

// The compiler takes the vector for another one from here on: nothing that it is used for is done ahead, or once for
// several.
SELECTRA_INLINE void change(Vector& v) { asm volatile("" : "+" SELECTRA_REGISTER(v)); }

// The compiler computes the vector, although nobody reads it.
SELECTRA_INLINE void use(Vector v) { asm volatile("" : : SELECTRA_REGISTER(v)); }

#undef SELECTRA_REGISTER

// Calls a function of one vector; no call waits for another one's result.
template <typename Function>
SELECTRA_INLINE void repeat(int64_t rounds, const Function& function) {
  // As many as the registers of the narrowest machines hold beside what the function needs.
  constexpr int kArguments = 4;
  Vector x[kArguments];
  for (int i = 0; i < kArguments; ++i) x[i] = broadcast(Real(i) - Real(1.5));
  for (int64_t call = 0; call < rounds * (kRoundVectors / kArguments); ++call) {
#pragma GCC unroll 4
    for (int i = 0; i < kArguments; ++i) {
      change(x[i]);
      function(x[i]);
    }
  }
}

// Chains of sums, as many as hide how long an instruction takes.
SELECTRA_INLINE void multiply_and_add(int64_t rounds) {
  constexpr int kChains = kVectorRegisters >= 32 ? 24 : 12;
  static_assert(kRoundVectors % kChains == 0, "");
  Vector sum[kChains] = {}, factor = broadcast(Real(0.5)), more = broadcast(1);
  change(factor);
  change(more);
  for (int64_t step = 0; step < rounds * (kRoundVectors / kChains); ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * factor + more;
  }
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) use(sum[i]);
}

SELECTRA_INLINE void copy_vectors(const Real* from, Real* to, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    Vector v = load(from + i * kLanes);
    // Else the compiler calls memcpy, which stores past the caches as no kernel does.
    change(v);
    store(to + i * kLanes, v);
  }
}

static void do_work(const RateCall& call, int64_t thread) {
  Vector rate = broadcast(kLog2E);
  change(rate);
  switch (call.work) {
    case kExponentials: return repeat(call.rounds, [&](Vector x) { use(exp2_of_product(x, rate)); });
    case kMultiplyAdds: return multiply_and_add(call.rounds);
    case kSoftplus: return repeat(call.rounds, [](Vector x) { use(softplus(x).value); });
    case kSoftplusAndSlope:
      return repeat(call.rounds, [](Vector x) {
        const Softplus soft = softplus(x);
        use(soft.value);
        use(soft.slope);
      });
    case kSigmoid: return repeat(call.rounds, [](Vector x) { use(sigmoid(x)); });
    default: {
      const int64_t vectors = call.bytes / (int64_t)sizeof(Vector);
      for (int64_t round = 0; round < call.rounds; ++round) {
        copy_vectors((const Real*)call.from, (Real*)call.to, part_begin(vectors, thread, call.threads),
                     part_begin(vectors, thread + 1, call.threads));
      }
    }
  }
}

static int rate(const RateCall& call) {
  for_each_task(call.threads, call.threads, [&](int64_t thread) { do_work(call, thread); });
  return kDone;
}

}  // namespace
}  // namespace selectra
