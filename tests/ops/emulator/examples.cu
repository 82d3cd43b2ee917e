// Small kernels that test the emulator itself.
#include "warp.cuh"

struct Call {
  const float* in;
  float* out;
  int64 n;
};

// out[warp] = sum over the warp's lanes of in.
KERNEL warp_sum(const __grid_constant__ Call call) {
  const int i = block_x() * 128 + thread_index();
  float sum = call.in[i];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  if (thread_index() % 32 == 0) call.out[i / 32] = sum;
}

// out[i] = in[a lane of the same warp, drawn by n].
KERNEL permute(const Call call) {
  const int i = thread_index();
  call.out[i] = shuffle_from(call.in[i], (i % 32) * int(call.n) + 3);
}

struct ProductCall {
  const float *a, *b;
  float* d;
};

// d (16, 8) += a (16, 8) b (8, 8), one warp.
KERNEL product(const ProductCall call) {
  const int g = thread_index() / 4, q = thread_index() % 4;
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = call.d[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
  const float *a = call.a + g * 8 + q, *b = call.b + q * 8 + g;
  multiply_add(d, a[0], a[64], a[4], a[68], b[0], b[32]);
  for (int i = 0; i < 4; ++i) call.d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = d[i];
}

// out[block] = sum of a block's n elements by halves in shared memory; BARRIER says whether threads wait in between.
KERNEL __launch_bounds__(256) block_sum(const Call call) {
  SHARED_MEMORY(memory);
  float* sums = (float*)memory;
  const int i = thread_index(), n = call.n;
  sums[i] = call.in[block_x() * n + i];
  synchronize_block();
  for (int half = n / 2; half > 0; half /= 2) {
    if (i < half) sums[i] += sums[i + half];
#if BARRIER
    synchronize_block();
#endif
  }
  if (i == 0) call.out[block_x()] = sums[0];
}

// out[i] = in[i of the other half of the warp], through shared memory that a warp rewrites n times.
KERNEL warp_exchange(const Call call) {
  SHARED_MEMORY(memory);
  float* slots = (float*)memory;
  const int i = thread_index();
  float x = call.in[i];
  for (int turn = 0; turn < call.n; ++turn) {
    slots[i] = x;
    synchronize_warp();
    x = slots[i ^ 16];
#if BARRIER
    synchronize_warp();
#endif
  }
  call.out[i] = x;
}

// Two groups of n numbers through shared memory by copies in the background; a thread puts out the next thread's pair.
// BARRIER says whether threads wait for their copies.
KERNEL copy(const Call call) {
  SHARED_MEMORY(memory);
  float* slots = (float*)memory;
  const int i = 2 * thread_index(), n = call.n;
  for (int group = 0; group < 2; ++group) {
    copy_async<8>(slots + group * n + i, call.in + group * n + i);
    commit_copies();
  }
  for (int group = 0; group < 2; ++group) {
#if BARRIER
    if (group == 0) wait_for_copies<1>();
    if (group == 1) wait_for_copies<0>();
#endif
    synchronize_block();
    for (int j = 0; j < 2; ++j) call.out[group * n + i + j] = slots[group * n + (i + 2) % n + j];
  }
}

// Lane n of warp 1 takes no part in the shuffle.
KERNEL divergent_shuffle(const Call call) {
  const int i = thread_index();
  float x = call.in[i];
  if (i != 32 + call.n) x += shuffle_xor(x, 1);
  call.out[i] = x;
}

// Lane n of warp 1 shuffles while the others multiply.
KERNEL mixed_operations(const Call call) {
  float d[4] = {0, 0, 0, 0}, x = 1;
  if (thread_index() == 32 + call.n) {
    x = shuffle_xor(x, 1);
  } else {
    multiply_add(d, x, x, x, x, x, x);
  }
  call.out[thread_index()] = x + d[0];
}

// Warp n does not wait for the block.
KERNEL missing_warp(const Call call) {
  if (thread_index() / 32 != call.n) synchronize_block();
  call.out[thread_index()] = 0;
}

KERNEL write_beyond(const Call call) {
  SHARED_MEMORY(memory);
  if (thread_index() == 0) memory[call.n] = 1;
}

// Reads four numbers at once, from the n-th on.
KERNEL load_four(const Call call) {
  const float4 four = *(const float4*)(call.in + call.n);
  call.out[thread_index()] = four.x + four.w;
}

// out (z, y, x, threads) = the block's and the thread's place in a grid of n blocks along x and y.
KERNEL coordinates(const Call call) {
  const int64 block = (block_z() * call.n + block_y()) * call.n + block_x();
  call.out[block * 64 + thread_index()] = block_z() * 1000 + block_y() * 100 + block_x() * 10 + thread_index() / 100.f;
}

struct ConvertCall {
  const float* in;
  uint16 *bfloat16, *float16;
  float *from_bfloat16, *from_float16;
};

KERNEL convert(const ConvertCall call) {
  const int i = block_x() * 32 + thread_index();
  call.bfloat16[i] = to_bfloat16(call.in[i]);
  call.float16[i] = to_float16(call.in[i]);
  call.from_bfloat16[i] = from_bfloat16(call.bfloat16[i]);
  call.from_float16[i] = from_float16(call.float16[i]);
}

// out = 2^in, 1/in, in * in + 1: 3 n numbers.
KERNEL functions(const Call call) {
  const int i = block_x() * 32 + thread_index();
  call.out[i] = exp2_fast(call.in[i]);
  call.out[call.n + i] = reciprocal(call.in[i]);
  call.out[2 * call.n + i] = fma(call.in[i], call.in[i], 1.f);
}

// n turns of all that makes threads meet, for the clock.
KERNEL busy(const Call call) {
  float d[4] = {0, 0, 0, 0}, x = call.in[thread_index()];
  for (int turn = 0; turn < call.n; ++turn) {
    x = shuffle_xor(x, 1);
    multiply_add(d, x, x, x, x, x, x);
    if (turn % 8 == 0) synchronize_block();
  }
  call.out[thread_index()] = d[0] + x;
}
