// What both devices' implementations of the ops need of tensors.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "layer.h"

namespace fusedrnn {

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1)) strides[i] = stride;
  return strides;
}

inline int32_t code_of(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// Uninitialised and contiguous, on like's device.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype, const Tensor& like) {
  const std::vector<int64_t> strides = contiguous_strides(shape);
  AtenTensorHandle handle;
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), code_of(dtype),
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline MaybeTensor dense(const MaybeTensor& t) { return t ? MaybeTensor(dense(*t)) : t; }
inline std::vector<Tensor> dense(std::vector<Tensor> ts) {
  for (Tensor& t : ts) t = dense(t);
  return ts;
}

template <class S>
S* data(const Tensor& t) {
  return static_cast<S*>(t.data_ptr());
}
template <class S>
S* data(const MaybeTensor& t) {
  return t ? data<S>(*t) : nullptr;
}
template <class S>
S* offset(S* p, int64_t n) {
  return p ? p + n : nullptr;
}

// torch::stable::narrow and zero_ take a Tensor&, though they change no handle.
inline Tensor narrow(Tensor t, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(t, dim, start, length);
}
inline Tensor zeros(const std::vector<int64_t>& shape, ScalarType dtype, const Tensor& like) {
  Tensor t = empty(shape, dtype, like);
  return torch::stable::zero_(t);
}

// A copy of `from` (zeros without it) in `to`, unless nobody wants it.
inline void copy_or_zero(Tensor to, const MaybeTensor& from) {
  if (to.numel() == 0) return;
  if (from)
    torch::stable::copy_(to, *from);
  else
    torch::stable::zero_(to);
}

// The upstream gradients and the results of forward, as backward gets them.
struct BackwardArguments {
  MaybeTensor dy, dh_n, dc_n, dcells;
  Tensor x;
  MaybeTensor h0, c0;
  std::vector<Tensor> weights;
  Tensor y, gates, cells;
};

// What changes, and the layer's arguments and results where that is, as the tangent op gets them.
struct TangentArguments {
  MaybeTensor dwx, drh, dy, dh0, dc0;
  Tensor x;
  MaybeTensor h0, c0;
  std::vector<Tensor> weights;
  Tensor y, gates, cells;
};

inline bool nothing_to_do(const Layer& l) { return l.rows == 0 || l.H == 0; }

// No step: the state (or its gradient) stays as it was. No unit: a projection of nothing, which is 0.
inline MaybeTensor state_without_work(const Layer& l, const MaybeTensor& state) {
  return l.rows == 0 ? state : MaybeTensor();
}
inline void results_without_work(const Layer& l, const MaybeTensor& h0, const MaybeTensor& c0,
                                 const ForwardResult& results) {
  const auto& [y, h_n, c_n, gates, cells] = results;
  copy_or_zero(y, {});
  copy_or_zero(h_n, state_without_work(l, h0));
  if (l.has_c) copy_or_zero(c_n, c0);
}
inline void gradients_without_work(const Layer& l, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                                   const BackwardResult& results) {
  const auto& [dx, dh0, dc0, dweights] = results;
  copy_or_zero(dx, {});
  copy_or_zero(dh0, state_without_work(l, dh_n));
  copy_or_zero(dc0, dc_n);
  for (const Tensor& t : dweights) copy_or_zero(t, {});
}

}  // namespace fusedrnn
