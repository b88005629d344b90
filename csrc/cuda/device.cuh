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
#include <cuda_runtime.h>
#include <library_types.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// cuBLAS's, which has no header in every toolkit: that of the library torch has loaded, or null.
extern "C" __attribute__((weak)) int cublasGemmEx(void* handle, int a_turned, int b_turned, int m, int n, int k,
                                                  const void* alpha, const void* a, int a_type, int a_pitch,
                                                  const void* b, int b_type, int b_pitch, const void* beta, void* c,
                                                  int c_type, int c_pitch, int compute, int algorithm);

#define FUSEDRNN_DEVICE __device__ __forceinline__
#define FUSEDRNN_KERNEL(threads) __global__ void __launch_bounds__(threads)

namespace fusedrnn::cuda {

// ---- inside a kernel -----------------------------------------------------------------------------------------------

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

// ---- the blocks of a cluster: all those along the grid's x ---------------------------------------------------------

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

// ---- on the host ---------------------------------------------------------------------------------------------------

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error("fusedrnn: " + std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Makes a device the current one while it lives, and knows torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(int32_t index) : guard_(index), index_(index) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    stream_ = static_cast<Stream>(stream);
  }
  int32_t index() const { return index_; }
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
  Stream stream_;
};

// Streams that run side by side: number 0 is torch's current one, and the others begin with what that one has got so
// far. Ends with join(), after which the current stream waits for all.
class Fork {
 public:
  Fork(const OnDevice& device, int streams) : device_(device.index()), lanes_(lanes(device, streams)) {
    for (int i = 1; i < streams; ++i) wait(i, 0);
  }
  Fork(const Fork&) = delete;
  // Where an error left work on the streams, whose memory the current one may use next.
  ~Fork() {
    for (size_t i = 1; i < lanes_.size(); ++i) {
      cudaEventRecord(lanes_[i].event, lanes_[i].stream);
      cudaStreamWaitEvent(lanes_[0].stream, lanes_[i].event, 0);
    }
  }

  // What a stream gets from now on waits for all that another one has got.
  void wait(int stream, int other) {
    const Lane& lane = lanes_[size_t(other)];
    check(cudaEventRecord(lane.event, lane.stream), "cudaEventRecord");
    check(cudaStreamWaitEvent(lanes_[size_t(stream)].stream, lane.event, 0), "cudaStreamWaitEvent");
  }

  // Calls work(stream), while that stream is torch's current one.
  template <class Work>
  void run(int stream, Work work) {
    const Stream to = lanes_[size_t(stream)].stream;
    if (stream == 0) return work(to);
    CUDAStreamGuardHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_stream_guard(to, device_, &handle));
    const std::unique_ptr<CUDAStreamGuardOpaque, AOTITorchError (*)(CUDAStreamGuardHandle)> guard(
        handle, aoti_torch_delete_cuda_stream_guard);
    work(to);
  }

  void join() {
    for (; lanes_.size() > 1; lanes_.pop_back()) wait(0, int(lanes_.size()) - 1);
  }

 private:
  struct Lane {
    Stream stream;
    cudaEvent_t event;
  };

  // Each of torch's streams has its own beside it, made once: what one captures as a graph concerns no other.
  static std::vector<Lane> lanes(const OnDevice& device, int count) {
    static std::mutex mutex;
    static std::map<std::pair<int32_t, Stream>, std::vector<Lane>> all;
    const std::lock_guard lock(mutex);
    std::vector<Lane>& found = all[{device.index(), device.stream()}];
    while (found.size() < size_t(count)) {
      Lane lane{device.stream(), nullptr};
      if (!found.empty()) {
        check(cudaStreamCreateWithFlags(&lane.stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
      }
      check(cudaEventCreateWithFlags(&lane.event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
      found.push_back(lane);
    }
    return {found.begin(), found.begin() + count};
  }

  int32_t device_;
  std::vector<Lane> lanes_;
};

// The current device.
inline Device device_facts() {
  int device = 0, processors = 0, shared = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  return {processors, shared, major >= 9 ? 16 : 0};
}

// Lets a kernel have what a launch wants of it; never less than another thread's launch needs at the same time.
template <class Params>
cudaError_t allow(void (*kernel)(Params), const Launch& l) {
  cudaError_t error = cudaSuccess;
  if (l.shared_bytes > 48 * 1024) {
    const int most = int(device_facts().shared_bytes);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (l.cluster > 8 && error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

inline cudaLaunchConfig_t configuration(const Launch& l, Stream stream, cudaLaunchAttribute& attribute) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(l.grid.x, l.grid.y, l.grid.z);
  config.blockDim = dim3(unsigned(l.threads));
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = stream;
  if (l.cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else if (l.cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(l.cluster), 1, 1};
  }
  config.attrs = &attribute;
  config.numAttrs = l.cooperative || l.cluster ? 1 : 0;
  return config;
}

// Blocks that the whole device can run at the same time.
template <class Params>
int64_t resident_blocks(void (*kernel)(Params), const Launch& l) {
  check(allow(kernel, l), "cudaFuncSetAttribute");
  int per_processor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, l.threads, l.shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return int64_t(per_processor) * device_facts().processors;
}

// Clusters that the whole device can run at the same time; 0 where they can't run, or the driver compiled the kernel
// from PTX of an architecture without clusters, for which it is empty.
template <class Params>
int64_t resident_clusters(void (*kernel)(Params), const Launch& l) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  if (attributes.ptxVersion < 90) return 0;
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = configuration(l, nullptr, attribute);
  int clusters = 0;
  if (allow(kernel, l) == cudaSuccess && cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess)
    return clusters;
  cudaGetLastError();  // forgotten: another plan is taken
  return 0;
}

template <class Params>
void launch(void (*kernel)(Params), const Launch& l, Stream stream, Params p) {
  check(allow(kernel, l), "cudaFuncSetAttribute");
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = configuration(l, stream, attribute);
  void* arguments[] = {&p};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), "launch");
}

// out = a b in TF32, [m, n] = [m, k] [k, n], on the current device; false if that can't be done. With torch's handle of
// this thread, which has torch's current stream and a workspace that outlives a captured graph.
inline bool multiply_tf32(float* out, int m, int n, int k, Factor a, Factor b) {
  if (!cublasGemmEx) return false;
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  constexpr int success = 0, fast_tf32 = 77, default_algorithm = -1;  // cublas_api.h
  const float one = 1, zero = 0;
  // cuBLAS has columns where we have rows, so it computes out' = b' a'.
  return cublasGemmEx(handle, b.turned, a.turned, n, m, k, &one, b.data, CUDA_R_32F, b.pitch, a.data, CUDA_R_32F,
                      a.pitch, &zero, out, CUDA_R_32F, n, fast_tf32, default_algorithm) == success;
}

}  // namespace fusedrnn::cuda

#else
#include "device_host.h"
#endif
