// The host's side of device.cuh: streams, what a device can run, launches, and a product by cuBLAS.
#pragma once

#include <cuda_runtime.h>
#include <library_types.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// cuBLAS's, which has no header in every toolkit: that of the library torch has loaded, or null.
extern "C" __attribute__((weak)) int cublasGemmEx(void* handle, int a_turned, int b_turned, int m, int n, int k,
                                                  const void* alpha, const void* a, int a_type, int a_pitch,
                                                  const void* b, int b_type, int b_pitch, const void* beta, void* c,
                                                  int c_type, int c_pitch, int compute, int algorithm);

namespace fusedrnn::cuda {

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // or torch would find it at its next launch
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

// What `ask` gives for a key, asked once: for what is slow to ask, and stays as it is. (One memory for each `ask`.)
template <class Key, class Ask>
auto remembered(const Key& key, Ask ask) {
  static std::mutex mutex;
  static std::map<Key, decltype(ask())> answers;
  const std::lock_guard lock(mutex);
  const auto found = answers.find(key);
  return found != answers.end() ? found->second : answers.emplace(key, ask()).first->second;
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// The current device.
inline Device device_facts() {
  const int device = current_device();
  return remembered(device, [&] {
    const auto fact = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
      return value;
    };
    return Device{fact(cudaDevAttrMultiProcessorCount), fact(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                  fact(cudaDevAttrComputeCapabilityMajor) >= 9 ? 16 : 0};
  });
}

// A kernel's launches on the current device, as far as they differ for the answers below.
template <class Params>
auto launch_key(void (*kernel)(Params), const Launch& l) {
  return std::tuple(current_device(), reinterpret_cast<const void*>(kernel), l.threads, l.shared_bytes, l.cluster);
}

// Lets a kernel have what launches can want of it: never less than another thread's needs at the same time.
template <class Params>
cudaError_t allow(void (*kernel)(Params), const Launch& l) {
  const bool large = l.shared_bytes > 48 * 1024, wide = l.cluster > 8;
  return remembered(std::tuple(current_device(), reinterpret_cast<const void*>(kernel), large, wide), [&] {
    cudaError_t error = cudaSuccess;
    if (large) {
      const int most = int(device_facts().shared_bytes);
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (wide && error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return error;
  });
}

using Attributes = std::array<cudaLaunchAttribute, 2>;
inline cudaLaunchConfig_t configuration(const Launch& l, Stream stream, Attributes& attributes) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(l.grid.x, l.grid.y, l.grid.z);
  config.blockDim = dim3(unsigned(l.threads));
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = stream;
  config.attrs = attributes.data();
  if (l.cluster) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(l.cluster), 1, 1};
  }
  if (l.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  return config;
}

// Blocks that the whole device can run at the same time.
template <class Params>
int64_t resident_blocks(void (*kernel)(Params), const Launch& l) {
  return remembered(launch_key(kernel, l), [&] {
    check(allow(kernel, l), "cudaFuncSetAttribute");
    int per_processor = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, l.threads, l.shared_bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return int64_t(per_processor) * device_facts().processors;
  });
}

// Clusters that the whole device can run at the same time; 0 where they can't run, or the driver compiled the kernel
// from PTX of an architecture without clusters, for which it is empty.
template <class Params>
int64_t resident_clusters(void (*kernel)(Params), const Launch& l) {
  return remembered(launch_key(kernel, l), [&]() -> int64_t {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    if (attributes.ptxVersion < 90) return 0;
    Launch clusters_alone = l;  // the question is about nothing else
    clusters_alone.cooperative = false;
    Attributes attributes_of_launch{};
    const cudaLaunchConfig_t config = configuration(clusters_alone, nullptr, attributes_of_launch);
    int clusters = 0;
    if (allow(kernel, l) == cudaSuccess && cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess)
      return clusters;
    cudaGetLastError();  // forgotten: another plan is taken
    return 0;
  });
}

template <class Params>
void launch(void (*kernel)(Params), const Launch& l, Stream stream, Params p) {
  check(allow(kernel, l), "cudaFuncSetAttribute");
  Attributes attributes{};
  const cudaLaunchConfig_t config = configuration(l, stream, attributes);
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
