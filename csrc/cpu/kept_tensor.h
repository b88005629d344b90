// Tensors of kept memory (memory.h), for results that are large.
#pragma once

#include <memory>

#include "../tensors.h"
#include "memory.h"

// Of libtorch, from torch 2.11 on; null before.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace fusedrnn {

// Uninitialised and contiguous, of type S (dtype says the same), on the CPU.
template <class S>
Tensor empty_kept(const std::vector<int64_t>& shape, ScalarType dtype, const Tensor& like) {
  size_t bytes = sizeof(S);
  for (int64_t n : shape) bytes *= size_t(n);
  if (bytes < least_kept_bytes || !torch_from_blob) return empty(shape, dtype, like);
  const auto release = [](Memory* memory) { give_back(*memory), delete memory; };
  std::unique_ptr<Memory, decltype(release)> memory(new Memory(take_memory(bytes)), release);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      memory->base, int64_t(shape.size()), shape.data(), contiguous_strides(shape).data(), 0, code_of(dtype),
      aoti_torch_device_type_cpu(), like.get_device_index(), &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* context) { decltype(release){}(static_cast<Memory*>(context)); }, memory.get()));
  memory.release();
  return Tensor(handle);
}

}  // namespace fusedrnn
