// What the kernels need of the machine, in one place: numbers, warps, the tensor cores' small product.
//
// Compiled by NVRTC without any header of the toolkit. Everything here exists from sm_80 on.
#pragma once

typedef long long int64;
typedef unsigned long long uint64;
typedef unsigned int uint32;
typedef unsigned short uint16;

#ifndef SELECTRA_EMULATED

#define DEVICE static __device__ __forceinline__
#define MEMBER __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int grid_x() { return gridDim.x; }

// A pointer into the device's memory, which a load from elsewhere would leave open.
template <typename T>
DEVICE T* global_pointer(T* x) {
    __builtin_assume(__isGlobal(x));
    return x;
}

// Asks for the line of 128 bytes that a pointer is in, to wait in the cache of the whole device.
DEVICE void prefetch(const void* x) { asm volatile("prefetch.global.L2 [%0];" ::"l"(x)); }

DEVICE void synchronize_block() { __syncthreads(); }
DEVICE void synchronize_warp() { __syncwarp(); }
DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
DEVICE float shuffle_from(float x, int lane) { return __shfl_sync(~0u, x, lane); }

DEVICE uint32 bits(float x) { return __float_as_uint(x); }
DEVICE float from_bits(uint32 x) { return __uint_as_float(x); }
DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float absolute(float x) { return fabsf(x); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float square_root(float x) { return __fsqrt_rn(x); }

// 2^x, within 2 units in the last place; numbers too small for float32 are 0.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// bfloat16 and float16 as they lie in memory.
DEVICE uint16 to_bfloat16(float x) {
    uint16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

DEVICE uint16 to_float16(float x) {
    uint16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

DEVICE float from_float16(uint16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

// Two numbers in a word, the first in its lower half.
DEVICE uint32 pack_bfloat16(float first, float second) {
    uint32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
    return y;
}

DEVICE uint32 pack_float16(float first, float second) {
    uint32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
    return y;
}

// d (16 x 8) += a (16 x 8) times b (8 x 8). With g = lane / 4 and q = lane % 4 a lane holds
//   d: (g, 2q) (g, 2q + 1) (g + 8, 2q) (g + 8, 2q + 1)    a: (g, q) (g + 8, q) (g, q + 4) (g + 8, q + 4)
//   b: (q, g) (q + 4, g)
// Of a and b the upper 19 bits are read; sums are float32. All lanes take part: were it not volatile, the compiler might
// double it into the two ways of a branch.
DEVICE void multiply_add(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(bits(a0)), "r"(bits(a1)), "r"(bits(a2)), "r"(bits(a3)), "r"(bits(b0)), "r"(bits(b1)));
}

// The same from zero: d = a b.
DEVICE void multiply(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(bits(a0)), "r"(bits(a1)), "r"(bits(a2)), "r"(bits(a3)), "r"(bits(b0)), "r"(bits(b1)), "f"(0.0f));
}

// Copies BYTES (8 or 16; both places aligned to them) into shared memory, behind the thread's back.
template <int BYTES>
DEVICE void copy_async(void* shared, const void* global) {
    uint32 to = uint32(__cvta_generic_to_shared(shared));
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES) : "memory");
}

// The copies asked for since the last call become one group.
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of this thread's groups but the latest GROUPS; other threads see the copies after a barrier.
template <int GROUPS>
DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// What other thread blocks have written before they met this one: past the cache that is the multiprocessor's own.
DEVICE float4 load_fresh(const float* x) {
    float4 y;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(y.x), "=f"(y.y), "=f"(y.z), "=f"(y.w) : "l"(x));
    return y;
}

DEVICE float load_one_fresh(const float* x) {
    float y;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(y) : "l"(x));
    return y;
}

// Waits until every thread block of a launch that has them all at work at once (a cooperative one) has come to meeting
// number `meeting`, from 1 on: `met` says of each to which one it came. What was written before is seen after. One warp
// speaks for its thread block; it does best to have no loads on their way.
DEVICE void meet_blocks(int* met, int meeting, int warp) {
    __syncthreads();
    if (thread_index() / 32 == warp) {
        int lane = thread_index() % 32;
        if (lane == 0) asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(met + block_x()), "r"(meeting) : "memory");
        for (int other = lane; other < grid_x(); other += 32) {
            int seen;
            do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(met + other) : "memory");
            while (seen < meeting);
        }
    }
    __syncthreads();
}

#else

// Tests run the kernels on the CPU: tests/ops/emulator has all of the above by the same names.
#include "primitives.h"

#endif

// The upper 19 bits of a float32: what the tensor cores read of it.
DEVICE float upper(float x) { return from_bits(bits(x) & 0xffffe000u); }

DEVICE float from_bfloat16(uint16 x) { return from_bits(uint32(x) << 16); }
