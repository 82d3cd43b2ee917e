// Watches every access to shared memory: two threads that touch a byte, one of them writing, with no barrier in
// between, and accesses beyond what the launch asked for.
//
// The kernels are compiled with -fsanitize=thread, which makes the compiler call the functions at the end of this file
// at every load and store; they take the place of the sanitizer's own library.
#include "accesses.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

// The linker's name for the start of this library in memory.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start;

namespace emulator {

Barriers barriers;
int shared_bytes;

long place(const void* code) { return static_cast<const char*>(code) - &__ehdr_start - 1; }

namespace {

// Who may be behind an access on record.
enum Group : uint8_t { kOneThread, kOneWarp, kManyWarps };

// The last write of a byte, or its reads since the last barrier.
struct Access {
  unsigned of_block, of_warp;
  uint16_t thread;
  Group group;
  const void* code;
};

struct Byte {
  Access write, read;
};

Byte bytes[kMaxSharedBytes];

int warp_of(const Access& access) { return access.thread / kLanes; }

bool is_recent(const Access& earlier) { return earlier.code != nullptr && earlier.of_block == barriers.of_block; }

bool in_order(const Access& earlier, const Access& now) {
  if (!is_recent(earlier)) return true;
  if (earlier.group == kManyWarps || warp_of(earlier) != warp_of(now)) return false;
  return earlier.of_warp != now.of_warp || (earlier.group == kOneThread && earlier.thread == now.thread);
}

Group group_of(const Access& earlier, const Access& now) {
  if (!is_recent(earlier)) return kOneThread;
  if (earlier.group == kManyWarps || warp_of(earlier) != warp_of(now)) return kManyWarps;
  // Reads from before a barrier of the warp matter to other warps only.
  if (earlier.of_warp != now.of_warp) return kOneThread;
  return earlier.thread == now.thread ? earlier.group : kOneWarp;
}

void report_race(const Access& earlier, const char* earlier_kind, const Access& now, const char* kind, long index) {
  const char* those = earlier.group == kOneThread ? "" : " and of others";
  char text[256];
  snprintf(text, sizeof text,
           "its %s at [0x%lx] and the %s at [0x%lx] of thread %d%s touch byte %ld of shared memory, no barrier between",
           kind, place(now.code), earlier_kind, place(earlier.code), earlier.thread, those, index);
  fail(text);
}

void report_outside(long index, const void* code) {
  char text[256];
  snprintf(text, sizeof text, "touches byte %ld of shared memory at [0x%lx], the launch has %d bytes", index,
           place(code), shared_bytes);
  fail(text);
}

void touch(Byte& byte, long index, bool writes, Access now) {
  if (!in_order(byte.write, now)) report_race(byte.write, "write", now, writes ? "write" : "read", index);
  if (!writes) {
    now.group = group_of(byte.read, now);
    byte.read = now;
    return;
  }
  if (!in_order(byte.read, now)) report_race(byte.read, "read", now, "write", index);
  byte.write = now;
}

inline void watch(const void* address, unsigned long size, bool writes, const void* code) {
  const long index = static_cast<const unsigned char*>(address) - shared_memory;
  if (static_cast<unsigned long>(index) >= kMaxSharedBytes + kGuardBytes) return;
  if (index + static_cast<long>(size) > shared_bytes) return report_outside(index, code);
  const unsigned of_warp = barriers.of_warp[current.thread / kLanes];
  const Access now = {barriers.of_block, of_warp, static_cast<uint16_t>(current.thread), kOneThread, code};
  for (unsigned long i = 0; i < size; ++i) touch(bytes[index + i], index + i, writes, now);
}

}  // namespace
}  // namespace emulator

#define WATCH(name, size, writes) \
  void __tsan_##name(void* address) { emulator::watch(address, size, writes, __builtin_return_address(0)); }
#define WATCH_RANGE(name, writes)                                \
  void __tsan_##name(void* address, unsigned long size) {        \
    emulator::watch(address, size, writes, __builtin_return_address(0)); \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
WATCH(read1, 1, false)
WATCH(read2, 2, false)
WATCH(read4, 4, false)
WATCH(read8, 8, false)
WATCH(read16, 16, false)
WATCH(write1, 1, true)
WATCH(write2, 2, true)
WATCH(write4, 4, true)
WATCH(write8, 8, true)
WATCH(write16, 16, true)
WATCH(unaligned_read2, 2, false)
WATCH(unaligned_read4, 4, false)
WATCH(unaligned_read8, 8, false)
WATCH(unaligned_read16, 16, false)
WATCH(unaligned_write2, 2, true)
WATCH(unaligned_write4, 4, true)
WATCH(unaligned_write8, 8, true)
WATCH(unaligned_write16, 16, true)
WATCH_RANGE(read_range, false)
WATCH_RANGE(write_range, true)
// Clang's, for copies of structs.
void* __tsan_memcpy(void* to, const void* from, unsigned long size) {
  emulator::watch(from, size, false, __builtin_return_address(0));
  emulator::watch(to, size, true, __builtin_return_address(0));
  return __builtin_memcpy(to, from, size);
}
void* __tsan_memset(void* to, int value, unsigned long size) {
  emulator::watch(to, size, true, __builtin_return_address(0));
  return __builtin_memset(to, value, size);
}

// Every access must lie at a multiple of its type's alignment: the hardware refuses others. Called for
// -fsanitize=alignment; the first words of `data` are the place in the source.
struct AlignmentCheck {
  const char* file;
  unsigned line, column;
};
void __ubsan_handle_type_mismatch_v1(AlignmentCheck* data, unsigned long address) {
  const char* slash = strrchr(data->file, '/');
  char text[256];
  snprintf(text, sizeof text, "address 0x%lx is not aligned for what is read or written at %s:%u", address,
           slash ? slash + 1 : data->file, data->line);
  emulator::fail(text);
}
}
