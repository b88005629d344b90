// Matrices as the kernels and cuBLAS take them, and the products over all rows.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <optional>

#include "../tensors.h"
#include "device.cuh"
#include "params.h"
#include "tile.cuh"

namespace fusedrnn::cuda {

namespace stable = torch::stable;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Elements of a row of n, padded to whole vectors.
template <class S>
int64_t padded(int64_t n) {
  return round_up(n, int64_t(sizeof(Vector) / sizeof(S)));
}

// Columns of t, which has `columns` of them, in the first columns of rows of `width`; the rest is zero.
inline Tensor widened(const Tensor& t, int64_t width) {
  if (t.size(1) == width) return t;
  const Tensor wide = zeros({t.size(0), width}, t.scalar_type(), t);
  Tensor to = fusedrnn::narrow(wide, 1, 0, t.size(1));
  stable::copy_(to, t);
  return wide;
}

// A matrix [rows, columns] as the tile reads it: rows padded and aligned.
template <class S>
Tensor tiled(const Tensor& t) {
  const Tensor wide = widened(dense(t), padded<S>(t.size(1)));
  return reinterpret_cast<uintptr_t>(wide.data_ptr()) % sizeof(Vector) ? stable::clone(wide) : wide;
}

template <class S>
Rows<const S> rows_of(const Tensor& t) {
  return {data<const S>(t), t.size(1)};
}

inline Tensor transposed(const Tensor& t) { return stable::transpose(t, 0, 1); }

// A matrix or a transposed one as cuBLAS takes it; none if it is empty, too large or has other strides.
inline std::optional<Factor> factor(const Tensor& t) {
  const int turned = t.stride(1) != 1;  // then what lies in memory as a row is a column
  const int64_t rows = t.size(turned), columns = t.size(!turned);
  const int64_t pitch = rows == 1 ? columns : t.stride(turned);
  if (t.numel() == 0 || t.stride(!turned) != 1 || pitch < columns) return {};
  if (std::max(rows, pitch) > std::numeric_limits<int>::max()) return {};
  return Factor{data<const float>(t), int(pitch), turned != 0};
}

// The same numbers to autograd, which refuses an operation with `out` on what requires gradients.
inline Tensor detached(const Tensor& t) {
  std::array<StableIValue, 1> stack{stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return stable::detail::to<Tensor>(stack[0]);
}

// out = a b: in TF32 if that is Math's way, which torch's products do only where a switch of their own says so.
// Autocast changes the dtype of matmul and sum, but leaves the variants with an output alone.
template <class Math>
void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  if constexpr (std::is_same_v<Math, TensorCores<float>>) {
    const std::optional<Factor> left = factor(a), right = factor(b);
    if (left && right &&
        multiply_tf32(data<float>(out), int(a.size(0)), int(b.size(1)), int(a.size(1)), *left, *right)) {
      return;
    }
  }
  std::array<StableIValue, 3> stack{stable::detail::from(detached(a)), stable::detail::from(detached(b)),
                                    stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  stable::detail::to<Tensor>(stack[0]);  // takes the result's reference off the stack
}

inline void sum_rows(Tensor out, const Tensor& t) {
  const std::vector<int64_t> rows{0};
  stable::sum_out(out, t, rows);
}

}  // namespace fusedrnn::cuda
