// The machine primitives of warp.cuh, by the same names, on the emulator's machine.
//
// To add one: if threads do not meet in it, write the function. If a warp does, write a struct of what a lane brings
// and takes, a function that does the operation given all lanes' structs, and a function that calls `meet_warp`.
#pragma once

#include "machine.h"

#define DEVICE static inline
#define MEMBER inline
#define KERNEL extern "C" emulator::Kernel
#define SHARED_MEMORY(name) static unsigned char* const name = emulator::shared_memory
#define __launch_bounds__(...)
#define __grid_constant__

// As the last parameter of a primitive: the line that calls it.
#define EMULATOR_SITE \
  emulator::Site site = { __builtin_FILE(), __builtin_LINE() }

// The vectors that CUDA has built in; a load of one that is not aligned fails on the hardware.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32 x, y;
};
struct alignas(16) uint4 {
  uint32 x, y, z, w;
};

// An operation works for a whole warp: its accesses are not those of the thread that happens to run.
#define EMULATOR_UNWATCHED __attribute__((no_sanitize_thread))

namespace emulator {

template <typename Operands>
void meet_warp(const char* name, const Site& site, WarpOperation operation, Operands& mine) {
  meet(Meeting{name, site, false, operation, &mine});
}

struct Shuffle {
  float value;
  int from;
  float result;
};

EMULATOR_UNWATCHED inline void shuffle(void* const (&operands)[kLanes]) {
  for (void* each : operands) {
    Shuffle& lane = *static_cast<Shuffle*>(each);
    lane.result = static_cast<Shuffle*>(operands[lane.from % kLanes])->value;
  }
}

struct Product {
  float* d;
  float a[4], b[2];
};

// What the tensor cores read of a float32.
inline float tensor_float(float x) {
  return __builtin_bit_cast(float, __builtin_bit_cast(unsigned, x) & 0xffffe000u);
}

EMULATOR_UNWATCHED inline void multiply_fragments(void* const (&operands)[kLanes]) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Product& mine = *static_cast<Product*>(operands[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][q + i / 2 * 4] = tensor_float(mine.a[i]);
    for (int i = 0; i < 2; ++i) b[q + i * 4][g] = tensor_float(mine.b[i]);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* d = static_cast<Product*>(operands[lane])->d;
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int k = 0; k < 8; ++k) d[i] = __builtin_fmaf(a[g + i / 2 * 8][k], b[k][2 * q + i % 2], d[i]);
    }
  }
}

// What a thread has asked to be copied into shared memory. Until the thread waits for it the place holds NaN.
struct Copy {
  uint32* to;
  const uint32* from;
  int words, group;
};

constexpr int kMaxCopies = 1024;
struct Copies {
  Copy asked[kMaxCopies];
  int count, groups;
  unsigned serial;
};

inline Copies copies[kMaxThreads];

inline Copies& copies_of_this_thread() {
  Copies& mine = copies[current.thread];
  // What an earlier block has not waited for is of no concern.
  if (mine.serial != current.serial) mine.count = mine.groups = 0;
  mine.serial = current.serial;
  return mine;
}

// Results and operands too small for a normal float32 are 0, as the fast functions of the hardware have it.
inline float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }

}  // namespace emulator

DEVICE int thread_index() { return emulator::current.thread; }
DEVICE int block_x() { return emulator::current.block[0]; }
DEVICE int block_y() { return emulator::current.block[1]; }
DEVICE int block_z() { return emulator::current.block[2]; }
DEVICE int grid_x() { return emulator::current.grid[0]; }

DEVICE void prefetch(const void*) {}
DEVICE float4 load_fresh(const float* x) { return *reinterpret_cast<const float4*>(x); }
DEVICE float load_one_fresh(const float* x) { return *x; }
// Blocks run one after the other here; a host that knows so launches what lies between two meetings by itself.
DEVICE void meet_blocks(int*, int, int) { emulator::fail("thread blocks cannot meet on this machine"); }

DEVICE void synchronize_block(EMULATOR_SITE) {
  emulator::meet(emulator::Meeting{"synchronize_block", site, true, nullptr, nullptr});
}

DEVICE void synchronize_warp(EMULATOR_SITE) {
  emulator::meet(emulator::Meeting{"synchronize_warp", site, false, nullptr, nullptr});
}

DEVICE float shuffle_xor(float x, int lanes, EMULATOR_SITE) {
  emulator::Shuffle mine = {x, (thread_index() ^ lanes) & 31, 0};
  emulator::meet_warp("shuffle_xor", site, emulator::shuffle, mine);
  return mine.result;
}

DEVICE float shuffle_from(float x, int lane, EMULATOR_SITE) {
  emulator::Shuffle mine = {x, lane & 31, 0};
  emulator::meet_warp("shuffle_from", site, emulator::shuffle, mine);
  return mine.result;
}

DEVICE void multiply_add(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1, EMULATOR_SITE) {
  emulator::Product mine = {d, {a0, a1, a2, a3}, {b0, b1}};
  emulator::meet_warp("multiply_add", site, emulator::multiply_fragments, mine);
}

DEVICE void multiply(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1, EMULATOR_SITE) {
  for (float& x : d) x = 0.0f;
  emulator::Product mine = {d, {a0, a1, a2, a3}, {b0, b1}};
  emulator::meet_warp("multiply", site, emulator::multiply_fragments, mine);
}

template <typename T>
DEVICE T* global_pointer(T* x) {
  return x;
}

DEVICE uint32 bits(float x) { return __builtin_bit_cast(uint32, x); }
DEVICE float from_bits(uint32 x) { return __builtin_bit_cast(float, x); }
DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float absolute(float x) { return __builtin_fabsf(x); }
DEVICE float larger(float a, float b) { return __builtin_fmaxf(a, b); }
DEVICE float square_root(float x) { return __builtin_sqrtf(x); }
DEVICE float exp2_fast(float x) { return emulator::flush(__builtin_exp2f(x)); }
DEVICE float reciprocal(float x) { return emulator::flush(1 / emulator::flush(x)); }

// To nearest, ties to even; every NaN becomes the one that the hardware writes.
DEVICE uint16 to_bfloat16(float x) {
  if (x != x) return 0x7fff;
  const uint32 whole = bits(x);
  return (whole + 0x7fff + (whole >> 16 & 1)) >> 16;
}

DEVICE uint16 to_float16(float x) { return x != x ? 0x7fff : __builtin_bit_cast(uint16, _Float16(x)); }
DEVICE float from_float16(uint16 x) { return __builtin_bit_cast(_Float16, x); }

DEVICE uint32 pack_bfloat16(float first, float second) {
  return to_bfloat16(first) | uint32(to_bfloat16(second)) << 16;
}

DEVICE uint32 pack_float16(float first, float second) {
  return to_float16(first) | uint32(to_float16(second)) << 16;
}

template <int BYTES>
DEVICE void copy_async(void* shared, const void* global) {
  emulator::Copies& mine = emulator::copies_of_this_thread();
  if (mine.count == emulator::kMaxCopies) emulator::fail("too many copies on their way");
  if ((reinterpret_cast<unsigned long long>(shared) | reinterpret_cast<unsigned long long>(global)) % BYTES != 0) {
    emulator::fail("copy_async: a place is not aligned");
  }
  mine.asked[mine.count++] = {static_cast<uint32*>(shared), static_cast<const uint32*>(global), BYTES / 4, mine.groups};
  // From here on the hardware may write at any time.
  for (int i = 0; i < BYTES / 4; ++i) static_cast<uint32*>(shared)[i] = ~0u;
}

DEVICE void commit_copies() { ++emulator::copies_of_this_thread().groups; }

template <int GROUPS>
DEVICE void wait_for_copies() {
  emulator::Copies& mine = emulator::copies_of_this_thread();
  int left = 0;
  for (int i = 0; i < mine.count; ++i) {
    const emulator::Copy copy = mine.asked[i];
    if (copy.group < mine.groups - GROUPS) {
      for (int word = 0; word < copy.words; ++word) copy.to[word] = copy.from[word];
    } else {
      mine.asked[left++] = copy;
    }
  }
  mine.count = left;
}
