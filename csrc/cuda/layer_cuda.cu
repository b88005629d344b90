// The ops on a GPU.
#include <torch/csrc/stable/library.h>

#include "../curvature_tensors.h"
#include "curvature.cuh"
#include "stack.cuh"

namespace fusedrnn::cuda {
namespace {

template <class Cell, class Math>
ForwardResult forward(const Layer& l, const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                      const std::vector<Tensor>& weights, bool save) {
  const std::vector<int64_t> none{0};
  const Tensor y = empty(l.y_shape(), l.dtype, x), h_n = empty(l.h_shape(), l.dtype, x);
  const Tensor c_n = empty(l.has_c ? l.c_shape() : none, l.dtype, x);
  const Tensor gates = empty(save ? l.gates_shape() : none, l.dtype, x);
  const Tensor cells = empty(save && l.has_c ? l.cells_shape() : none, l.accumulator(), x);
  const ForwardResult to{y, h_n, c_n, gates, cells};
  if (nothing_to_do(l)) {
    results_without_work(l, h0, c0, to);
    return to;
  }
  const OnDevice device(x.get_device_index());
  const Plan plan = find_plan<Cell, Math>(request<Math>(l, false), 1);
  ForwardPass<Cell, Math>(l, x, h0, c0, weights, to, l.T, device.stream()).run(plan, 0, l.T, device.stream());
  return to;
}

template <class Cell, class Math>
BackwardResult backward(const Layer& l, const BackwardArguments& a, int64_t needs) {
  const auto result = [&](int64_t bit, const std::vector<int64_t>& shape) {
    return empty(needs & bit ? shape : std::vector<int64_t>{0}, l.dtype, a.x);
  };
  const Tensor dx = result(need_dx, {a.x.sizes().begin(), a.x.sizes().end()});
  const Tensor dh0 = result(need_dh0, l.h_shape()), dc0 = result(l.has_c ? need_dc0 : 0, l.c_shape());
  std::vector<Tensor> dweights;
  for (size_t i = 0; i < a.weights.size(); ++i)
    dweights.push_back(result(need_first_weight << i, {a.weights[i].sizes().begin(), a.weights[i].sizes().end()}));
  const BackwardResult to{dx, dh0, dc0, dweights};
  if (nothing_to_do(l)) {
    gradients_without_work(l, a.dh_n, a.dc_n, to);
    return to;
  }
  const OnDevice device(a.x.get_device_index());
  const Plan plan = find_plan<Cell, Math>(request<Math>(l, true), 1);
  BackwardPass<Cell, Math> pass(l, a, needs, to, device.stream());
  pass.run(plan, 0, l.T, device.stream());
  pass.weight_gradients(device.stream());
  return to;
}

template <class Cell, class Math>
TangentResult tangent(const Layer& l, const TangentArguments& a) {
  const std::vector<int64_t> none{0};
  const Tensor dy = empty(l.y_shape(), l.dtype, a.x), dh_n = empty(l.h_shape(), l.dtype, a.x);
  const Tensor dc_n = empty(l.has_c ? l.c_shape() : none, l.dtype, a.x);
  const Tensor dcells = empty(l.has_c ? l.cells_shape() : none, l.dtype, a.x);
  const Tensor drh = empty({l.rows, l.directions, l.gates * l.H}, l.dtype, a.x);
  const ForwardResult to{dy, dh_n, dc_n, empty(none, l.dtype, a.x), dcells};
  if (nothing_to_do(l)) {
    results_without_work(l, a.dh0, a.dc0, to);
  } else {
    const OnDevice device(a.x.get_device_index());
    TangentPass<Cell, Math>(l, a, to, drh, device.stream()).run(device.stream());
  }
  return {dy, dh_n, dc_n, dcells, drh};
}

template <class Cell, class Math>
AdjointResult adjoint(const Layer& l, const BackwardArguments& a) {
  const auto result = [&](bool exists, const std::vector<int64_t>& shape) {
    return empty(exists ? shape : std::vector<int64_t>{0}, l.dtype, a.x);
  };
  const std::vector<int64_t> gates{l.rows, l.directions, l.gates * l.H};
  const AdjointResult every{result(true, gates),       result(Cell::shared < Cell::gates, gates),
                            result(true, l.y_shape()), result(l.has_c, l.cells_shape()),
                            result(true, l.h_shape()), result(l.has_c, l.c_shape())};
  const auto& [dwx, drh, dh, dc, dh0, dc0] = every;
  const BackwardResult to{empty({0}, l.dtype, a.x), dh0, dc0, {}};
  if (nothing_to_do(l)) {
    gradients_without_work(l, a.dh_n, a.dc_n, to);
    return every;
  }
  const OnDevice device(a.x.get_device_index());
  PlanRequest wanted = request<Math>(l, true);
  wanted.tensor_cores = false;  // kernels whose weights stay on the chip have no registers for more results
  const Plan plan = find_plan<Cell, Math>(wanted, 1);
  BackwardPass<Cell, Math> pass(l, a, need_dh0 | need_dc0, to, device.stream(), &every);
  pass.run(plan, 0, l.T, device.stream());
  pass.gradients_of_every_step();
  return every;
}

// Calls function(Math{}) with the way to multiply of a dtype; float multiplies in TF32 if that is allowed.
template <class Function>
auto with_math(ScalarType dtype, bool tf32, Function function) {
  if (dtype == ScalarType::Double) return function(Fma<double>{});
  if (dtype == ScalarType::BFloat16) return function(TensorCores<bf16>{});
  if (dtype == ScalarType::Half) return function(TensorCores<half>{});
  return tf32 ? function(TensorCores<float>{}) : function(Fma<float>{});
}

template <class Cell>
ForwardResult forward_op(const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                         const std::vector<Tensor>& weights, const MaybeTensor& batch_sizes, int64_t directions,
                         bool save, bool tf32) {
  const Layer l = Layer::of<Cell>(x, h0, c0, weights, batch_sizes, directions);
  return with_math(l.dtype, tf32,
                   [&](auto math) { return forward<Cell, decltype(math)>(l, x, h0, c0, weights, save); });
}

template <class Cell>
BackwardResult backward_op(const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                           const MaybeTensor& dcells, const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                           const std::vector<Tensor>& weights, const MaybeTensor& batch_sizes, int64_t directions,
                           const Tensor& y, const Tensor& gates, const Tensor& cells, int64_t needs, bool tf32) {
  const Layer l = Layer::of<Cell>(x, h0, c0, weights, batch_sizes, directions);
  l.check_backward(dy, dh_n, dc_n, dcells, y, gates, cells);
  const BackwardArguments a{dy, dh_n, dc_n, dcells, x, h0, c0, weights, y, gates, cells};
  return with_math(l.dtype, tf32, [&](auto math) { return backward<Cell, decltype(math)>(l, a, needs); });
}

// Of a dtype that linear ops are for.
template <class Function>
auto with_wide_math(ScalarType dtype, bool tf32, Function function) {
  if (dtype == ScalarType::Double) return function(Fma<double>{});
  return tf32 ? function(TensorCores<float>{}) : function(Fma<float>{});
}

template <class Cell>
TangentResult tangent_op(const MaybeTensor& dwx, const MaybeTensor& drh, const MaybeTensor& dy, const MaybeTensor& dh0,
                         const MaybeTensor& dc0, const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                         const std::vector<Tensor>& weights, const MaybeTensor& batch_sizes, int64_t directions,
                         const Tensor& y, const Tensor& gates, const Tensor& cells, bool tf32) {
  const Layer l = Layer::of<Cell>(x, h0, c0, weights, batch_sizes, directions);
  l.check_tangent(dwx, drh, dy, dh0, dc0, y, gates, cells);
  const TangentArguments a{dwx, drh, dy, dh0, dc0, x, h0, c0, weights, y, gates, cells};
  return with_wide_math(l.dtype, tf32, [&](auto math) { return tangent<Cell, decltype(math)>(l, a); });
}

template <class Cell>
AdjointResult adjoint_op(const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                         const MaybeTensor& dcells, const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                         const std::vector<Tensor>& weights, const MaybeTensor& batch_sizes, int64_t directions,
                         const Tensor& y, const Tensor& gates, const Tensor& cells, bool tf32) {
  const Layer l = Layer::of<Cell>(x, h0, c0, weights, batch_sizes, directions);
  l.check_linear();
  l.check_backward(dy, dh_n, dc_n, dcells, y, gates, cells);
  const BackwardArguments a{dy, dh_n, dc_n, dcells, x, h0, c0, weights, y, gates, cells};
  return with_wide_math(l.dtype, tf32, [&](auto math) { return adjoint<Cell, decltype(math)>(l, a); });
}

template <class Cell>
CurvatureResult curvature_op(const Tensor& wx, const Tensor& rh, const Tensor& h, const MaybeTensor& c,
                             const MaybeTensor& dwx, const MaybeTensor& drh, const MaybeTensor& dh,
                             const MaybeTensor& dc, const Tensor& upstream_h, const MaybeTensor& upstream_c,
                             const MaybeTensor& dupstream_h) {
  const CurvatureArguments a{wx, rh, h, c, dwx, drh, dh, dc, upstream_h, upstream_c, dupstream_h};
  const OnDevice device(wx.get_device_index());
  const auto run = [&](const auto& p) { launch_curvature<Cell>(p, device.stream()); };
  return wx.scalar_type() == ScalarType::Double ? with_curvature<Cell, double>(a, run)
                                                : with_curvature<Cell, float>(a, run);
}

template <class Cell>
StackResult stack_op(const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0, const std::vector<Tensor>& weights,
                     int64_t layers, int64_t chunk, bool save, bool tf32) {
  const Stack s = Stack::of<Cell>(x, h0, c0, weights, layers, chunk, nullptr);
  return with_math(s.layers[0].dtype, tf32,
                   [&](auto math) { return stack_forward<Cell, decltype(math)>(s, h0, c0, weights, save); });
}

template <class Cell>
StackBackwardResult stack_backward_op(const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                                      const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                                      const std::vector<Tensor>& weights, int64_t layers, int64_t chunk,
                                      const Tensor& y, const std::vector<Tensor>& saved,
                                      const std::vector<int64_t>& needs, bool tf32) {
  const size_t count = size_t(layers);
  STD_TORCH_CHECK(saved.size() + 1 == 3 * count && needs.size() == count,
                  "fusedrnn: saved, needs: expected what the forward op saved of ", layers, " layers, and ", layers,
                  " masks");
  std::vector<Tensor> ys{saved.begin(), saved.begin() + layers - 1};
  ys.push_back(y);
  const auto gates = saved.begin() + layers - 1, cells = gates + layers;
  const Stack s = Stack::of<Cell>(x, h0, c0, weights, layers, chunk, &ys);
  const StackBackwardArguments a{dy, dh_n, dc_n, h0, c0, weights, {gates, cells}, {cells, saved.end()}, needs};
  for (int64_t i = 0; i < layers; ++i) {
    const BackwardArguments own = a.of(s, i, i + 1 < layers ? MaybeTensor{} : dy);
    s.layers[i].check_backward(own.dy, own.dh_n, own.dc_n, {}, own.y, own.gates, own.cells);
  }
  return with_math(s.layers[0].dtype, tf32, [&](auto math) { return stack_backward<Cell, decltype(math)>(s, a); });
}

using PlanResult = std::tuple<std::string, std::string, std::vector<int64_t>>;

// The plan that the device of `like`, a tensor of the layer's dtype, takes for one of so many layers.
template <class Cell>
PlanResult plan_op(const Tensor& like, int64_t N, int64_t H, int64_t P, int64_t directions, bool backward,
                   bool projected, int64_t layers, bool tf32) {
  STD_TORCH_CHECK(std::min({N, H, P, layers}) > 0 && (directions == 1 || directions == 2),
                  "fusedrnn: plan: expected positive sizes, and 1 or 2 directions");
  const OnDevice device(like.get_device_index());
  return with_math(like.scalar_type(), tf32, [&](auto math) {
    using Math = decltype(math);
    const PlanRequest request{
        N, H, P, int(directions), Cell::gates, backward, sizeof(typename Math::Storage), Math::resident, projected};
    const Plan plan = find_plan<Cell, Math>(request, int(layers));
    return PlanResult{plan.name,
                      plan.reason,
                      {plan.columns(), plan.units(), plan.blocks_x, plan.blocks_y, plan.shared_bytes(), plan.together}};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FUSEDRNN_NAMESPACE, FUSEDRNN_CUDA_KEY, m) {
  m.impl("lstm", TORCH_BOX(&forward_op<LSTM>));
  m.impl("gru", TORCH_BOX(&forward_op<GRU>));
  m.impl("rnn_tanh", TORCH_BOX(&forward_op<RNNTanh>));
  m.impl("rnn_relu", TORCH_BOX(&forward_op<RNNRelu>));
  m.impl("lstm_backward", TORCH_BOX(&backward_op<LSTM>));
  m.impl("gru_backward", TORCH_BOX(&backward_op<GRU>));
  m.impl("rnn_tanh_backward", TORCH_BOX(&backward_op<RNNTanh>));
  m.impl("rnn_relu_backward", TORCH_BOX(&backward_op<RNNRelu>));
  m.impl("lstm_plan", TORCH_BOX(&plan_op<LSTM>));
  m.impl("lstm_stack", TORCH_BOX(&stack_op<LSTM>));
  m.impl("gru_plan", TORCH_BOX(&plan_op<GRU>));
  m.impl("gru_stack", TORCH_BOX(&stack_op<GRU>));
  m.impl("rnn_tanh_plan", TORCH_BOX(&plan_op<RNNTanh>));
  m.impl("rnn_tanh_stack", TORCH_BOX(&stack_op<RNNTanh>));
  m.impl("rnn_relu_plan", TORCH_BOX(&plan_op<RNNRelu>));
  m.impl("rnn_relu_stack", TORCH_BOX(&stack_op<RNNRelu>));
  m.impl("lstm_stack_backward", TORCH_BOX(&stack_backward_op<LSTM>));
  m.impl("gru_stack_backward", TORCH_BOX(&stack_backward_op<GRU>));
  m.impl("rnn_tanh_stack_backward", TORCH_BOX(&stack_backward_op<RNNTanh>));
  m.impl("rnn_relu_stack_backward", TORCH_BOX(&stack_backward_op<RNNRelu>));
  m.impl("lstm_tangent", TORCH_BOX(&tangent_op<LSTM>));
  m.impl("gru_tangent", TORCH_BOX(&tangent_op<GRU>));
  m.impl("rnn_tanh_tangent", TORCH_BOX(&tangent_op<RNNTanh>));
  m.impl("rnn_relu_tangent", TORCH_BOX(&tangent_op<RNNRelu>));
  m.impl("lstm_adjoint", TORCH_BOX(&adjoint_op<LSTM>));
  m.impl("gru_adjoint", TORCH_BOX(&adjoint_op<GRU>));
  m.impl("rnn_tanh_adjoint", TORCH_BOX(&adjoint_op<RNNTanh>));
  m.impl("rnn_relu_adjoint", TORCH_BOX(&adjoint_op<RNNRelu>));
  m.impl("lstm_curvature", TORCH_BOX(&curvature_op<LSTM>));
  m.impl("gru_curvature", TORCH_BOX(&curvature_op<GRU>));
  m.impl("rnn_tanh_curvature", TORCH_BOX(&curvature_op<RNNTanh>));
  m.impl("rnn_relu_curvature", TORCH_BOX(&curvature_op<RNNRelu>));
}

}  // namespace fusedrnn::cuda
