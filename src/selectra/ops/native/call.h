// What Python hands over: one array of 64-bit words a call, laid out as these structures.
//
// `library.py` and the two `cpu.py` write the words in this order; a change here is a new kAbiVersion.
#pragma once

#include <stdint.h>

namespace selectra {

constexpr int kAbiVersion = 5;

// Steps between two checkpoints of the scan's state, and the height of every tile. With 32 the backward's tiles leave
// the first cache and it takes a fifth longer; with 16 the checkpoints are twice as many: n / 16 numbers for each of u.
constexpr int kChunk = 16;

// What a call answers.
enum Outcome : int {
  kDone = 0,
  kOutOfMemory = 1,
  // cu_seqlens does not rise from 0 to the length.
  kBadBorders = 2,
};

// How a tensor's numbers are stored: in the type that the kernel computes in, or (float kernels) as bfloat16.
enum Storage : int64_t {
  kWhole = 0,
  kHalved = 1,
};

// A tensor: its first element, its strides in elements, and its storage. Without data it is absent.
struct Operand {
  void* data;
  int64_t stride[4];
  int64_t storage;
  // Of a tensor over a grid, whose l positions are rows of `width`: elements from where a row ends to where the next
  // one begins, beyond the stride of a position; 0 where the rows lie one after another.
  int64_t jump = 0;
};

// Of a scan's tensors u, delta, B, C, z, y and their gradients may be halved; of a convolution's x, y and theirs.
struct ScanCall {
  // `sequences` is the batch size, or with borders (packed sequences, batch 1) their number.
  int64_t sequences, length, channels, states, groups, softplus, reverse, threads;
  // Pieces of time that each sequence is cut into, or 0: as the sizes and threads ask for.
  int64_t pieces;
  // Of a route alone: positions in a row of the grid; whether it is walked column by column.
  int64_t width, by_columns;
  // (b, l, d), (b, l, d), (d, n), (b, l, g, n), (b, l, g, n), (d,), (b, l, d), (d,)
  Operand u, delta, A, B, C, D, z, bias;
  // (sequences, d, n), (b, l) bytes, (sequences + 1,) 32-bit integers
  Operand initial, mask, borders;
  // (sequences, d, n); a flat buffer of one state (lanes, padded to vectors) for every chunk, absent when no backward follows; (b, l, d)
  Operand final, checkpoints, y;
  // (b, l, d): what y is added to, where it is there.
  Operand onto;
};

// The gradient of every tensor of the call; those of absent tensors are absent.
struct ScanBackwardCall {
  ScanCall forward;
  Operand dy, dfinal;
  Operand du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial;
  // (b, l, d): what du and dz are added to, where they are there.
  Operand du_onto, dz_onto;
};

struct ConvCall {
  int64_t sequences, length, channels, width, silu, reverse, threads;
  // (b, l, d), (d, k), (d,)
  Operand x, weight, bias;
  // (sequences, d, k), (b, l) bytes, (sequences + 1,) 32-bit integers
  Operand initial, mask, borders;
  // (sequences, d, k), (b, l, d)
  Operand final, y;
};

struct ConvBackwardCall {
  ConvCall forward;
  Operand dy, dfinal;
  Operand dx, dweight, dbias, dinitial;
};

// A matrix, vector or batch whose rows lie without gaps: its first element, elements from row to row, storage.
struct Rows {
  void* data;
  int64_t pitch;
  int64_t storage;
};

// One position of a whole Mamba block. Everything may be halved but ssm.
struct StepCall {
  int64_t batch;
  // How many blocks follow this one in memory; what a block reads may be what it or the one before writes.
  int64_t following;
  // (b, model); the residual stream before and after, with norm_weight alone
  Rows x, residual, stream, y;
  // (b, channels, width), (b, channels, states): read and written
  Rows conv, ssm;
  int64_t model, channels, states, width, rank;
  double eps;
  // Without norm_weight x goes into the projection as it is. Vectors and matrices as mamba_ssm's parameters.
  Rows norm_weight, in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight,
      out_bias;
};

// What a machine's rate is measured of: a vector's worth of a function as the kernels compute it, or moving bytes.
enum Work : int64_t {
  kExponentials = 0,
  kMultiplyAdds = 1,
  kSoftplus = 2,
  kSoftplusAndSlope = 3,
  kSigmoid = 4,
  kCopy = 5,
};

// Vectors of work in a round of a RateCall, a copy aside.
constexpr int kRoundVectors = 24;

// So many rounds of work on every one of the threads; a round of a copy is shared by them.
struct RateCall {
  int64_t work, rounds, threads;
  // Of a copy alone.
  const void* from;
  void* to;
  int64_t bytes;
};

// One build's entry points.
struct Kernels {
  int lanes;
  int (*scan_forward)(const ScanCall&);
  int (*scan_backward)(const ScanBackwardCall&);
  int (*conv_forward)(const ConvCall&);
  int (*conv_backward)(const ConvBackwardCall&);
  int (*step)(const StepCall&);
  // The scans of `count` routes through one grid, one call each, of equal sizes: what a route writes, a later one may
  // read as what its own is added to. Groups, states at the ends, masks and borders there are none.
  int (*cross_forward)(const ScanCall* routes, int64_t count);
  int (*cross_backward)(const ScanBackwardCall* routes, int64_t count);
  int (*rate)(const RateCall&);
};

// Runs body(context, 0) ... body(context, tasks - 1) on up to `threads` threads, the calling one among them.
using TaskBody = void (*)(const void* context, int64_t task);
void run_tasks(int64_t tasks, int64_t threads, TaskBody body, const void* context);

// The wanted number of threads, or that of the cores that this process may use: more only wait for each other.
int64_t useful_threads(int64_t wanted);

// Returns when another thread has set the flag, which it is about to do.
void await_flag(const int32_t* flag);

// Scratch memory of the calling thread, aligned for any vector; kept until the thread ends or asks for more.
void* thread_workspace(uint64_t bytes);

}  // namespace selectra
