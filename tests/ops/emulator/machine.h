// A machine that runs one block of CUDA threads after the other on the CPU.
//
// Every thread of a block is a fiber with a stack of its own. Threads run one at a time, each up to its next meeting:
// a warp operation, a barrier of the block, or its return. A warp has made a turn when each of its 32 lanes has come to
// a meeting; all of them must have come to the same one.
#pragma once

namespace emulator {

// The result of every kernel; the word marks kernels in the preprocessed source.
typedef void Kernel;

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
// What one block may use on sm_90.
constexpr int kMaxSharedBytes = 227 * 1024;
// Written and checked behind the shared memory of a launch.
constexpr int kGuardBytes = 4096;

// A line of the kernel's source.
struct Site {
  const char* file;
  int line;
};

// Does a warp operation, given what each lane brought to the meeting.
typedef void (*WarpOperation)(void* const (&operands)[kLanes]);

// Where a thread stands. No name: it returned. No operation: nothing to do but to wait for the others.
struct Meeting {
  const char* name;
  Site site;
  bool of_block;
  WarpOperation operation;
  void* operands;
};

// What is asked of a launch; Python's ctypes mirrors it.
struct Launch {
  int grid[3];
  int threads;
  int shared_bytes;
  // 0: warps, lanes and blocks in their natural order; otherwise drawn.
  unsigned seed;
};

// The thread that runs now, its block, and how many blocks there are.
struct Current {
  int thread;
  int block[3];
  int grid[3];
  // Differs from block to block and from launch to launch.
  unsigned serial;
};

extern Current current;
extern unsigned char shared_memory[kMaxSharedBytes + kGuardBytes];

// Waits until all threads of the warp (or block) stand at the same meeting.
void meet(const Meeting& meeting);

// Ends the launch with a message; does not return to the kernel.
void fail(const char* message);

typedef void (*Body)(const void* call);

// Runs a kernel on all blocks; a null pointer, or what went wrong.
const char* run(const Launch& launch, Body body, const void* call);

// Says that the words do not fill the kernel's argument.
const char* wrong_words(int got, int wanted);

}  // namespace emulator
