// The device operations that the kernels are written with, by name. This is the whole of CUDA that a kernel sees, so
// that another implementation of it (tests/cuda_host/device_host.h) runs the same kernels on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "plan.h"

namespace fusedrnn::cuda {

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

// The type that a storage type S computes and accumulates in.
template <class S>
using Accumulator = std::conditional_t<std::is_same_v<S, double>, double, float>;

constexpr int warp_size = 32;

struct Grid {
  unsigned x = 1, y = 1, z = 1;
  int64_t blocks() const { return int64_t(x) * y * z; }
};

// How a kernel is launched: one block of `threads` threads for each index of the grid.
struct Launch {
  Grid grid;
  int threads;
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks run at the same time, or the launch fails
  int cluster = 0;           // so many blocks along x are a cluster: they run at the same time
};

// 16 bytes, what one thread loads at a time.
struct alignas(16) Vector {
  uint32_t word[4];
};

// A matrix in memory: rows of float that are `pitch` apart. What is meant is its transpose, if it is turned.
struct Factor {
  const float* data;
  int pitch;
  bool turned;
};

}  // namespace fusedrnn::cuda

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "runtime.cuh"

#define FUSEDRNN_DEVICE __device__ __forceinline__
#define FUSEDRNN_KERNEL(threads) __global__ void __launch_bounds__(threads)

namespace fusedrnn::cuda {

FUSEDRNN_DEVICE int thread_index() { return int(threadIdx.x); }
FUSEDRNN_DEVICE int block_threads() { return int(blockDim.x); }
FUSEDRNN_DEVICE Grid block_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
FUSEDRNN_DEVICE Grid grid_size() { return {gridDim.x, gridDim.y, gridDim.z}; }

// All threads of the block meet; what any of them wrote before is seen by all.
FUSEDRNN_DEVICE void sync_block() { __syncthreads(); }

// The block's shared memory, Launch::shared_bytes of it.
FUSEDRNN_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(32) unsigned char memory[];
  return memory;
}

FUSEDRNN_DEVICE Vector load(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {v.x, v.y, v.z, v.w};
}
__device__ const Vector no_vector[1] = {};
// Zeros where nothing is. A branch would end only when the load does; without one, all that a thread loads is under way
// together.
FUSEDRNN_DEVICE Vector load_if(bool exists, const void* p) { return load(exists ? p : no_vector); }
// From L2, where other blocks' stores arrive: for what is written while the kernel runs. Volatile as waits are, so
// that it stays behind them.
FUSEDRNN_DEVICE Vector load_l2(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return {v.x, v.y, v.z, v.w};
}

// Adds 1 to the counter; whoever waits for it sees all that this thread wrote or saw (by sync_block) before.
FUSEDRNN_DEVICE void signal(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
// Until the counter has reached the target (modulo 2^32).
FUSEDRNN_DEVICE void wait_for(const uint32_t* counter, uint32_t target) {
  uint32_t value;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  } while (int32_t(value - target) < 0);
}

// ---- the blocks of a cluster: neighbours along the grid's x --------------------------------------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool has_clusters = true;
#else
constexpr bool has_clusters = false;  // kernels that need them are empty, and never launched
#endif

// All threads of the cluster meet; what any of them wrote before is seen by all.
FUSEDRNN_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// In a block's shared memory: counts the bytes that other blocks send into it. A message is there when as many have
// come as are expected; messages have numbers, from 0.
struct alignas(8) Mailbox {
  uint64_t state;
};
FUSEDRNN_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
// The same place in another block's shared memory.
FUSEDRNN_DEVICE uint32_t shared_address(const void* p, int block) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(block));
  return address;
}

// By one thread, before the cluster meets.
FUSEDRNN_DEVICE void open(Mailbox* mailbox) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(shared_address(mailbox))
      : "memory");
}
// By one thread, once for each message.
FUSEDRNN_DEVICE void expect(Mailbox* mailbox, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mailbox)), "r"(bytes)
               : "memory");
}
// What is waited for is in shared memory, so this acquires nothing beyond the block: at the cluster's scope every
// thread would empty the first-level cache.
FUSEDRNN_DEVICE void wait_for(const Mailbox* mailbox, uint32_t message) {
  asm volatile(
      "{\n\t.reg .pred there;\n"
      "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n\t@!there bra "
      "again;\n\t}" ::"r"(shared_address(mailbox)),
      "r"(message % 2)
      : "memory");
}

// Writes to the same place `to` in a block of a cluster of several, whose mailbox counts it.
FUSEDRNN_DEVICE void send(const Vector& v, Vector* to, const Mailbox* mailbox, int block) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   shared_address(to, block)),
               "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]), "r"(shared_address(mailbox, block))
               : "memory");
}
FUSEDRNN_DEVICE void send(float a, float b, float* to, const Mailbox* mailbox, int block) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                   shared_address(to, block)),
               "f"(a), "f"(b), "r"(shared_address(mailbox, block))
               : "memory");
}

// ---- numbers and products ------------------------------------------------------------------------------------------

FUSEDRNN_DEVICE float widen(bf16 s) { return __uint_as_float(uint32_t(s.bits) << 16); }
FUSEDRNN_DEVICE float widen(half s) { return __half2float(__ushort_as_half(s.bits)); }
FUSEDRNN_DEVICE float widen(float s) { return s; }
FUSEDRNN_DEVICE double widen(double s) { return s; }

// Rounded to nearest even.
template <class S>
FUSEDRNN_DEVICE S narrow(Accumulator<S> a) {
  if constexpr (std::is_same_v<S, bf16>)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(a))};
  else if constexpr (std::is_same_v<S, half>)
    return {__half_as_ushort(__float2half_rn(a))};
  else
    return a;
}
FUSEDRNN_DEVICE uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// 2^x and 1 / x, to a relative error of 2^-22 and 2^-23; what is below the normal numbers is 0.
FUSEDRNN_DEVICE float approximate_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
FUSEDRNN_DEVICE float approximate_inverse(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

// c[16, 8] += a[16, 16] b[16, 8], by a warp. Lane l, with g = l / 4 and t = l % 4, holds, two values to a word,
// a: rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8; b: rows 2t, 2t + 8 of column g;
// c: columns 2t, 2t + 1 of row g, then of row g + 8.
FUSEDRNN_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FUSEDRNN_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same with a[16, 8] b[8, 8] of TF32 numbers: a: rows g, g + 8, g, g + 8 at columns t, t, t + 4, t + 4;
// b: rows t, t + 4 of column g.
FUSEDRNN_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace fusedrnn::cuda

#else
#include "device_host.h"
#endif
