// A machine that runs one block, or one cluster of blocks, of CUDA threads after the other on the CPU.
//
// Every thread of a block is a fiber with a stack of its own. Threads run one at a time, each up to its next meeting:
// a warp operation, a barrier of the block or the cluster, or its return. A warp has made a turn when each of its 32
// lanes has come to a meeting; all of them must have come to the same one.
#pragma once

namespace emulator {

// The result of every kernel; the word marks kernels in the preprocessed source.
typedef void Kernel;

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
// Of all blocks of a cluster together: what this machine holds.
constexpr int kMaxFibers = 2048;
constexpr int kMaxBlocks = 8;
// What one block may use on sm_90.
constexpr int kMaxSharedBytes = 227 * 1024;
// Written and checked behind the shared memory of a launch.
constexpr int kGuardBytes = 4096;
constexpr int kAllSharedBytes = kMaxBlocks * (kMaxSharedBytes + kGuardBytes);

// A line of the kernel's source.
struct Site {
  const char* file;
  int line;
};

// Does a warp operation, given what each lane brought to the meeting.
typedef void (*WarpOperation)(void* const (&operands)[kLanes]);

// Whom a thread waits for at a meeting.
enum Scope { kOfWarp, kOfBlock, kOfCluster };

// Where a thread stands. No name: it returned. No operation: nothing to do but to wait for the others.
struct Meeting {
  const char* name;
  Site site;
  Scope scope;
  WarpOperation operation;
  void* operands;
};

// What is asked of a launch; Python's ctypes mirrors it.
struct Launch {
  int grid[3];
  int threads;
  int shared_bytes;
  // Blocks along x that run side by side and see each other's shared memory.
  int cluster;
  // 0: warps, lanes and blocks in their natural order; otherwise drawn.
  unsigned seed;
};

// The thread that runs now, counted through the cluster; the first block of the cluster; how many blocks there are, and
// how large they are.
struct Current {
  int thread;
  int block[3];
  int grid[3];
  int threads, shared_stride;
  // Differs from block to block and from launch to launch.
  unsigned serial;
};

extern Current current;
extern unsigned char shared_memory[kAllSharedBytes];

// The place of the running thread's block in its cluster.
inline int rank() { return current.thread / current.threads; }
inline unsigned char* shared_memory_of(int rank) { return shared_memory + rank * current.shared_stride; }

// Counts an arrival of the running thread's warp at the cluster's barrier, which it then may wait for.
void arrive_at_cluster(const Site& site);

// Waits until all threads of the warp (or block, or cluster) stand at the same meeting.
void meet(const Meeting& meeting);

// Ends the launch with a message; does not return to the kernel.
void fail(const char* message);

typedef void (*Body)(const void* call);

// Runs a kernel on all blocks; a null pointer, or what went wrong.
const char* run(const Launch& launch, Body body, const void* call);

// Says that the words do not fill the kernel's argument.
const char* wrong_words(int got, int wanted);

}  // namespace emulator
