// The library's C interface: which builds there are, which of them this machine runs, and a call of one of them.
#include <stdlib.h>

#include "call.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#ifdef _WIN32
#define SELECTRA_EXPORT extern "C" __declspec(dllexport)
#else
#define SELECTRA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace selectra {

extern const Kernels baseline_float, baseline_double;
#if defined(SELECTRA_X86)
extern const Kernels avx2_float, avx2_double, avx512_float, avx512_double;
#endif

namespace {

struct Build {
  const char* name;
  const Kernels* of_float;
  const Kernels* of_double;
};

// From the narrowest to the widest.
const Build kBuilds[] = {
    {"baseline", &baseline_float, &baseline_double},
#if defined(SELECTRA_X86)
    {"avx2", &avx2_float, &avx2_double},
    {"avx512", &avx512_float, &avx512_double},
#endif
};
constexpr int kBuildCount = sizeof kBuilds / sizeof kBuilds[0];

bool processor_runs(int build) {
#if defined(SELECTRA_X86)
  // The processor's word and the operating system's: both must save the wide registers.
  __builtin_cpu_init();
  if (build == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (build == 2) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
  }
#endif
  return build == 0;
}

const Kernels& kernels_of(int build, int is_double) {
  return is_double ? *kBuilds[build].of_double : *kBuilds[build].of_float;
}

// Memory that grows and goes with its thread.
class ThreadMemory {
 public:
  ~ThreadMemory() { free(memory_); }

  void* at_least(uint64_t bytes) {
    if (bytes > size_) {
      free(memory_);
      size_ = bytes + bytes / 4 + kAlignment;
      memory_ = malloc(size_);
      // A kernel in the middle of a parallel region has no way to report this.
      if (!memory_) abort();
    }
    return (void*)(((uintptr_t)memory_ + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  // A cache line, and the widest vector.
  static constexpr uint64_t kAlignment = 64;
  void* memory_ = nullptr;
  uint64_t size_ = 0;
};

thread_local ThreadMemory thread_memory;

}  // namespace

void* thread_workspace(uint64_t bytes) { return thread_memory.at_least(bytes + 64); }

}  // namespace selectra

// Asks for pages of 2 MiB, of those that lie wholly in the memory: a wish that the system may refuse.
SELECTRA_EXPORT void selectra_cpu_large_pages(void* memory, uint64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = ((uintptr_t)memory + kPage - 1) / kPage * kPage;
  const uintptr_t end = ((uintptr_t)memory + bytes) / kPage * kPage;
  if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

SELECTRA_EXPORT int selectra_cpu_abi_version(void) { return selectra::kAbiVersion; }

SELECTRA_EXPORT int selectra_cpu_build_count(void) { return selectra::kBuildCount; }

SELECTRA_EXPORT const char* selectra_cpu_build_name(int build) { return selectra::kBuilds[build].name; }

SELECTRA_EXPORT int selectra_cpu_build_runs(int build) { return selectra::processor_runs(build); }

SELECTRA_EXPORT int selectra_cpu_chunk(void) { return selectra::kChunk; }

SELECTRA_EXPORT int selectra_cpu_lanes(int build, int is_double) {
  return selectra::kernels_of(build, is_double).lanes;
}

SELECTRA_EXPORT int selectra_cpu_scan_forward(int build, int is_double, const int64_t* call) {
  return selectra::kernels_of(build, is_double).scan_forward(*(const selectra::ScanCall*)call);
}

SELECTRA_EXPORT int selectra_cpu_scan_backward(int build, int is_double, const int64_t* call) {
  return selectra::kernels_of(build, is_double).scan_backward(*(const selectra::ScanBackwardCall*)call);
}

SELECTRA_EXPORT int selectra_cpu_conv_forward(int build, int is_double, const int64_t* call) {
  return selectra::kernels_of(build, is_double).conv_forward(*(const selectra::ConvCall*)call);
}

SELECTRA_EXPORT int selectra_cpu_conv_backward(int build, int is_double, const int64_t* call) {
  return selectra::kernels_of(build, is_double).conv_backward(*(const selectra::ConvBackwardCall*)call);
}

SELECTRA_EXPORT int selectra_cpu_step(int build, int is_double, const int64_t* call) {
  return selectra::kernels_of(build, is_double).step(*(const selectra::StepCall*)call);
}

// The number of routes, then one call each.
SELECTRA_EXPORT int selectra_cpu_cross_forward(int build, int is_double, const int64_t* call) {
  return selectra::kernels_of(build, is_double).cross_forward((const selectra::ScanCall*)(call + 1), call[0]);
}

SELECTRA_EXPORT int selectra_cpu_cross_backward(int build, int is_double, const int64_t* call) {
  return selectra::kernels_of(build, is_double).cross_backward((const selectra::ScanBackwardCall*)(call + 1), call[0]);
}

// Vectors of work in a round, a copy aside.
SELECTRA_EXPORT int selectra_cpu_round_vectors(void) { return selectra::kRoundVectors; }

SELECTRA_EXPORT int selectra_cpu_rate(int build, int is_double, const int64_t* call) {
  return selectra::kernels_of(build, is_double).rate(*(const selectra::RateCall*)call);
}
