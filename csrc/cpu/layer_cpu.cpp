// The ops on the CPU: allocation, and the arguments of the kernels for each direction.
#include <torch/csrc/stable/library.h>

#include "../curvature_tensors.h"
#include "arena.h"
#include "kept_tensor.h"
#include "kernels.h"
#include "plan.h"
#include "team.h"

namespace fusedrnn {
namespace {

template <class Cell>
constexpr CellKind kind_of() {
  if constexpr (std::is_same_v<Cell, LSTM>)
    return CellKind::lstm;
  else if constexpr (std::is_same_v<Cell, GRU>)
    return CellKind::gru;
  else if constexpr (std::is_same_v<Cell, RNNTanh>)
    return CellKind::rnn_tanh;
  else {
    static_assert(std::is_same_v<Cell, RNNRelu>);
    return CellKind::rnn_relu;
  }
}

// Rows may be strided, columns not. A copy, as of a sum's upstream gradient, is as large as a result.
template <class S>
Tensor dense_columns(const Tensor& t) {
  if (t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1) return t;
  Tensor copy = empty_kept<S>({t.sizes().begin(), t.sizes().end()}, t.scalar_type(), t);
  return torch::stable::copy_(copy, t);
}

template <class S>
Rows<const S> strided_rows(const Layer& l, const Tensor& t) {
  const int64_t last = t.dim() - 2;
  if (l.packed) return {data<const S>(t), t.stride(last)};
  return {data<const S>(t), t.stride(last), t.stride(0)};
}

Shape shape_of(const Layer& l, bool reverse) {
  return {l.T, l.N, l.I, l.H, l.P, l.offset.data(), reverse, l.projected};
}

template <class S>
Weights<S> weights_of(const Layer& l, const std::vector<Tensor>& weights, int64_t d) {
  const Tensor* w = weights.data() + d * l.weights_per_direction;
  return {data<const S>(w[0]), data<const S>(w[1]), l.bias ? data<const S>(w[2]) : nullptr,
          l.bias ? data<const S>(w[3]) : nullptr,
          l.projected ? data<const S>(w[l.weights_per_direction - 1]) : nullptr};
}

int threads_for(const Layer& l) {
  return plan_threads(max_threads(), layer_multiply_adds(l.rows, l.directions, l.gates, l.H, l.I, l.P));
}

// The kernel on tensors that are dense as it needs them, into the results.
template <class Cell, class S>
void run_forward(const Layer& l, const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                 const std::vector<Tensor>& weights, bool save, const ForwardResult& results) {
  const auto& [y, h_n, c_n, gates, cells] = results;
  Forward<S> p[2];
  const int64_t D = l.directions;
  for (int64_t d = 0; d < D; ++d) {
    p[d] = {.shape = shape_of(l, d == 1),
            .weights = weights_of<S>(l, weights, d),
            .x = strided_rows<S>(l, x),
            .h0 = offset(data<const S>(h0), d * l.N * l.P),
            .c0 = offset(data<const S>(c0), d * l.N * l.H),
            .y = {data<S>(y) + d * l.P, D * l.P},
            .h_n = data<S>(h_n) + d * l.N * l.P,
            .c_n = l.has_c ? data<S>(c_n) + d * l.N * l.H : nullptr,
            .save = save,
            .gates = {save ? data<S>(gates) + d * l.saved * l.H : nullptr, D * l.saved * l.H},
            .cells = {save && l.has_c ? data<Acc<S>>(cells) + d * l.H : nullptr, D * l.H}};
  }
  cpu_kernels().of<S>(kind_of<Cell>()).forward(p, int(D), threads_for(l));
}

template <class Cell, class S>
ForwardResult forward(const Layer& l, const Tensor& x_, const MaybeTensor& h0_, const MaybeTensor& c0_,
                      const std::vector<Tensor>& weights_, bool save) {
  const Tensor x = dense_columns<S>(x_);
  const MaybeTensor h0 = dense(h0_), c0 = dense(c0_);
  const std::vector<Tensor> weights = dense(weights_);
  const std::vector<int64_t> none{0};
  const Tensor y = empty_kept<S>(l.y_shape(), l.dtype, x), h_n = empty(l.h_shape(), l.dtype, x);
  const Tensor c_n = empty(l.has_c ? l.c_shape() : none, l.dtype, x);
  const Tensor gates = empty_kept<S>(save ? l.gates_shape() : none, l.dtype, x);
  const Tensor cells = empty_kept<Acc<S>>(save && l.has_c ? l.cells_shape() : none, l.accumulator(), x);
  const ForwardResult results{y, h_n, c_n, gates, cells};
  if (nothing_to_do(l))
    results_without_work(l, h0, c0, results);
  else
    run_forward<Cell, S>(l, x, h0, c0, weights, save, results);
  return results;
}

// The results there are, and no others: y, h_n and the LSTM's c_n. For one small step, empty tensors cost as much.
template <class Cell, class S>
std::vector<Tensor> infer(const Layer& l, const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                          const std::vector<Tensor>& weights) {
  const Tensor y = empty_kept<S>(l.y_shape(), l.dtype, x), h_n = empty(l.h_shape(), l.dtype, x);
  const Tensor c_n = l.has_c ? empty(l.c_shape(), l.dtype, x) : h_n;
  const ForwardResult results{y, h_n, c_n, y, y};
  if (nothing_to_do(l))
    results_without_work(l, h0, c0, results);
  else
    run_forward<Cell, S>(l, dense_columns<S>(x), dense(h0), dense(c0), dense(weights), false, results);
  return l.has_c ? std::vector<Tensor>{y, h_n, c_n} : std::vector<Tensor>{y, h_n};
}

// Layer by layer, with each one's new states and its output (but the last one's) in scratch memory. The states are
// written when all is done, so that an error leaves them as they were.
template <class Cell, class S>
void advance(const Layer& l, const Tensor& x_, const Tensor& h, const MaybeTensor& c,
             const std::vector<Tensor>& weights_, const Tensor& y) {
  if (nothing_to_do(l)) {
    if (l.rows > 0) copy_or_zero(y, {}), copy_or_zero(h, {});
    return;
  }
  const Tensor x = dense_columns<S>(overlap(x_, y) ? torch::stable::clone(x_) : x_);  // x may be an earlier result
  const std::vector<Tensor> weights = dense(weights_);
  const int64_t h_size = l.N * l.P, c_size = l.has_c ? l.N * l.H : 0, y_size = l.rows * l.P;
  S *h_n, *c_n, *between[2];
  Arena arena;
  arena.allocate([&](Arena& scratch) {
    h_n = scratch.take<S>(l.layers * h_size);
    c_n = scratch.take<S>(l.layers * c_size);
    for (int i = 0; i < 2; ++i) between[i] = scratch.take<S>(i + 1 < l.layers ? y_size : 0);
  });
  for (int64_t i = 0; i < l.layers; ++i) {
    Forward<S> p = {.shape = shape_of(l, false),
                    .weights = weights_of<S>(l, weights, i),
                    .x = i == 0 ? strided_rows<S>(l, x) : Rows<const S>{between[(i - 1) % 2], l.P},
                    .h0 = data<const S>(h) + i * h_size,
                    .c0 = offset(data<const S>(c), i * c_size),
                    .y = {i + 1 < l.layers ? between[i % 2] : data<S>(y), l.P},
                    .h_n = h_n + i * h_size,
                    .c_n = c_n + i * c_size,
                    .save = false,
                    .gates = {},
                    .cells = {}};
    if (i > 0) p.shape.I = l.P;
    cpu_kernels().of<S>(kind_of<Cell>()).forward(&p, 1, threads_for(l));
  }
  std::copy_n(h_n, l.layers * h_size, data<S>(h));
  if (c) std::copy_n(c_n, l.layers * c_size, data<S>(c));
}

template <class Cell, class S>
TangentResult tangent(const Layer& l, const TangentArguments& a) {
  const Tensor y = dense(a.y), gates = dense(a.gates), cells = dense(a.cells);
  const MaybeTensor dwx = dense(a.dwx), drh = dense(a.drh), source = dense(a.dy);
  const MaybeTensor h0 = dense(a.h0), c0 = dense(a.c0), dh0 = dense(a.dh0), dc0 = dense(a.dc0);
  const std::vector<Tensor> weights = dense(a.weights);
  const std::vector<int64_t> none{0};
  const Tensor dy = empty_kept<S>(l.y_shape(), l.dtype, y), dh_n = empty(l.h_shape(), l.dtype, y);
  const Tensor dc_n = empty(l.has_c ? l.c_shape() : none, l.dtype, y);
  const Tensor dcells = empty_kept<S>(l.has_c ? l.cells_shape() : none, l.dtype, y);
  const Tensor drh_out = empty_kept<S>({l.rows, l.directions, l.gates * l.H}, l.dtype, y);
  const TangentResult results{dy, dh_n, dc_n, dcells, drh_out};
  if (nothing_to_do(l)) {
    results_without_work(l, dh0, dc0, {dy, dh_n, dc_n, dcells, dcells});
    return results;
  }
  Forward<S> p[2];
  const int64_t D = l.directions, gates_row = D * l.saved * l.H, GH = l.gates * l.H;
  for (int64_t d = 0; d < D; ++d) {
    p[d] = {.shape = shape_of(l, d == 1),
            .weights = weights_of<S>(l, weights, d),
            .x = {},
            .h0 = offset(data<const S>(dh0), d * l.N * l.P),
            .c0 = offset(data<const S>(dc0), d * l.N * l.H),
            .y = {data<S>(dy) + d * l.P, D * l.P},
            .h_n = data<S>(dh_n) + d * l.N * l.P,
            .c_n = l.has_c ? data<S>(dc_n) + d * l.N * l.H : nullptr,
            .save = false,
            .gates = {},
            .cells = {l.has_c ? data<S>(dcells) + d * l.H : nullptr, D * l.H}};
    p[d].shape.I = 0;
    p[d].weights.b_ih = p[d].weights.b_hh = nullptr;
    p[d].tangent = {.at = {.y = {data<const S>(y) + d * l.P, D * l.P},
                           .gates = {data<const S>(gates) + d * l.saved * l.H, gates_row},
                           .cells = {l.has_c ? data<const S>(cells) + d * l.H : nullptr, D * l.H},
                           .h0 = offset(data<const S>(h0), d * l.N * l.P),
                           .c0 = offset(data<const S>(c0), d * l.N * l.H)},
                    .dwx = {offset(data<const S>(dwx), d * GH), D * GH},
                    .drh = {offset(data<const S>(drh), d * GH), D * GH},
                    .dy = {offset(data<const S>(source), d * l.P), D * l.P},
                    .drh_out = {data<S>(drh_out) + d * GH, D * GH}};
  }
  cpu_kernels().of<S>(kind_of<Cell>()).tangent(p, int(D), threads_for(l));
  return results;
}

// With `every`, the gradients of every step are written to its first four tensors.
template <class Cell, class S>
BackwardResult backward(const Layer& l, const BackwardArguments& a, int64_t needs,
                        const AdjointResult* every = nullptr) {
  const Tensor x = dense_columns<S>(a.x), y = dense(a.y), gates = dense(a.gates), cells = dense(a.cells);
  const MaybeTensor dy = a.dy ? MaybeTensor(dense_columns<S>(*a.dy)) : a.dy;
  const MaybeTensor dh_n = dense(a.dh_n), dc_n = dense(a.dc_n), dcells = dense(a.dcells);
  const MaybeTensor h0 = dense(a.h0), c0 = dense(a.c0);
  const std::vector<Tensor> weights = dense(a.weights);
  const auto result = [&](int64_t bit, const std::vector<int64_t>& shape) {
    return empty_kept<S>(needs & bit ? shape : std::vector<int64_t>{0}, l.dtype, x);
  };
  const std::vector<int64_t> x_shape = {a.x.sizes().begin(), a.x.sizes().end()};
  const Tensor dx = result(need_dx, x_shape), dh0 = result(need_dh0, l.h_shape());
  const Tensor dc0 = result(l.has_c ? need_dc0 : 0, l.c_shape());
  std::vector<Tensor> dweights;
  for (size_t i = 0; i < weights.size(); ++i)
    dweights.push_back(result(need_first_weight << i, {weights[i].sizes().begin(), weights[i].sizes().end()}));
  const auto wanted = [](const Tensor& t, bool need) { return need ? data<S>(t) : nullptr; };
  const BackwardResult results{dx, dh0, dc0, dweights};
  if (nothing_to_do(l)) {
    gradients_without_work(l, dh_n, dc_n, results);
    return results;
  }
  Backward<S> p[2];
  const int64_t D = l.directions, each = l.weights_per_direction;
  if (D == 2) copy_or_zero(dx, {});
  for (int64_t d = 0; d < D; ++d) {
    const auto dw = [&](int64_t i) {
      return wanted(dweights[d * each + i], needs & (need_first_weight << (d * each + i)));
    };
    p[d] = {.shape = shape_of(l, d == 1),
            .weights = weights_of<S>(l, weights, d),
            .dy = dy ? strided_rows<S>(l, *dy) : Rows<const S>{},
            .dh_n = offset(data<const S>(dh_n), d * l.N * l.P),
            .dc_n = offset(data<const S>(dc_n), d * l.N * l.H),
            .dcells = {offset(data<const Acc<S>>(dcells), d * l.H), D * l.H},
            .x = strided_rows<S>(l, x),
            .y = {data<const S>(y) + d * l.P, D * l.P},
            .gates = {data<const S>(gates) + d * l.saved * l.H, D * l.saved * l.H},
            .cells = {l.has_c ? data<const Acc<S>>(cells) + d * l.H : nullptr, D * l.H},
            .h0 = offset(data<const S>(h0), d * l.N * l.P),
            .c0 = offset(data<const S>(c0), d * l.N * l.H),
            .dx = wanted(dx, needs & need_dx),
            .dx_accumulate = D == 2,
            .dh0 = offset(wanted(dh0, needs & need_dh0), d * l.N * l.P),
            .dc0 = offset(wanted(dc0, l.has_c && (needs & need_dc0)), d * l.N * l.H),
            .dw_ih = dw(0),
            .dw_hh = dw(1),
            .db_ih = l.bias ? dw(2) : nullptr,
            .db_hh = l.bias ? dw(3) : nullptr,
            .dw_hr = l.projected ? dw(each - 1) : nullptr};
    p[d].dy.data = offset(p[d].dy.data, d * l.P);
    if (every) {
      const auto& [dwx, drh, dh, dc, _, __] = *every;
      const int64_t GH = l.gates * l.H;
      p[d].dwx = {data<S>(dwx) + d * GH, D * GH};
      if (Cell::shared < Cell::gates) p[d].drh = {data<S>(drh) + d * GH, D * GH};
      p[d].dh = {data<S>(dh) + d * l.P, D * l.P};
      if (l.has_c) p[d].dc = {data<Acc<S>>(dc) + d * l.H, D * l.H};
    }
  }
  cpu_kernels().of<S>(kind_of<Cell>()).backward(p, int(D), threads_for(l));
  return results;
}

template <class Cell, class S>
AdjointResult adjoint(const Layer& l, const BackwardArguments& a) {
  const std::vector<int64_t> none{0}, gates{l.rows, l.directions, l.gates * l.H};
  const Tensor dwx = empty_kept<S>(gates, l.dtype, a.x);
  const Tensor drh = empty_kept<S>(Cell::shared < Cell::gates ? gates : none, l.dtype, a.x);
  const Tensor dh = empty_kept<S>(l.y_shape(), l.dtype, a.x);
  const Tensor dc = empty_kept<S>(l.has_c ? l.cells_shape() : none, l.dtype, a.x);
  const AdjointResult every{dwx, drh, dh, dc, dh, dc};
  const auto [dx, dh0, dc0, dweights] = backward<Cell, S>(l, a, need_dh0 | need_dc0, &every);
  return {dwx, drh, dh, dc, dh0, dc0};
}

// float16 has no arithmetic of its own on most CPUs: it is computed in float32.
Tensor cast(const Tensor& t, ScalarType dtype) { return torch::stable::to(t, dtype); }
MaybeTensor cast(const MaybeTensor& t, ScalarType dtype) { return t ? MaybeTensor(cast(*t, dtype)) : t; }
std::vector<Tensor> cast(std::vector<Tensor> ts, ScalarType dtype) {
  for (Tensor& t : ts) t = cast(t, dtype);
  return ts;
}

template <class Cell>
ForwardResult forward_op(const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                         const std::vector<Tensor>& weights, const MaybeTensor& batch_sizes, int64_t directions,
                         bool save, bool /*tf32*/) {
  Layer l = Layer::of<Cell>(x, h0, c0, weights, batch_sizes, directions);
  if (l.dtype == ScalarType::Double) return forward<Cell, double>(l, x, h0, c0, weights, save);
  if (l.dtype == ScalarType::BFloat16) return forward<Cell, bf16>(l, x, h0, c0, weights, save);
  if (l.dtype == ScalarType::Float) return forward<Cell, float>(l, x, h0, c0, weights, save);
  l.dtype = ScalarType::Float;
  auto [y, h_n, c_n, gates, cells] =
      forward<Cell, float>(l, cast(x, l.dtype), cast(h0, l.dtype), cast(c0, l.dtype), cast(weights, l.dtype), save);
  const ScalarType half = ScalarType::Half;
  return {cast(y, half), cast(h_n, half), cast(c_n, half), cast(gates, half), cells};
}

template <class Cell>
std::vector<Tensor> infer(Layer l, const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                          const std::vector<Tensor>& weights) {
  if (l.dtype == ScalarType::Double) return infer<Cell, double>(l, x, h0, c0, weights);
  if (l.dtype == ScalarType::BFloat16) return infer<Cell, bf16>(l, x, h0, c0, weights);
  if (l.dtype == ScalarType::Float) return infer<Cell, float>(l, x, h0, c0, weights);
  l.dtype = ScalarType::Float;
  const auto f = [&](const auto& t) { return cast(t, l.dtype); };
  return cast(infer<Cell, float>(l, f(x), f(h0), f(c0), f(weights)), ScalarType::Half);
}

template <class Cell>
std::vector<Tensor> inference_op(const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                                 const std::vector<Tensor>& weights, const MaybeTensor& batch_sizes,
                                 int64_t directions) {
  return infer<Cell>(Layer::of<Cell>(x, h0, c0, weights, batch_sizes, directions), x, h0, c0, weights);
}

template <class Cell>
std::vector<Tensor> step_op(const Tensor& x, const Tensor& h, const MaybeTensor& c,
                            const std::vector<Tensor>& weights) {
  std::vector<Tensor> states = infer<Cell>(Layer::of_step<Cell>(x, h, c, weights), x, h, c, weights);
  states.erase(states.begin());  // y, which is h as well
  return states;
}

template <class Cell>
void advance_op(const Tensor& x, Tensor h, std::optional<Tensor> c, const std::vector<Tensor>& weights,
                const MaybeTensor& batch_sizes, int64_t layers, Tensor y) {
  Layer l = Layer::of_stack<Cell>(x, h, c, weights, batch_sizes, layers);
  l.check_advance(h, c, y);
  if (l.dtype == ScalarType::Double) return advance<Cell, double>(l, x, h, c, weights, y);
  if (l.dtype == ScalarType::BFloat16) return advance<Cell, bf16>(l, x, h, c, weights, y);
  if (l.dtype == ScalarType::Float) return advance<Cell, float>(l, x, h, c, weights, y);
  l.dtype = ScalarType::Float;
  const Tensor h_float = cast(h, l.dtype), y_float = cast(y, l.dtype);
  const MaybeTensor c_float = cast(c, l.dtype);
  advance<Cell, float>(l, cast(x, l.dtype), h_float, c_float, cast(weights, l.dtype), y_float);
  torch::stable::copy_(h, h_float);
  torch::stable::copy_(y, y_float);
  if (c) torch::stable::copy_(*c, *c_float);
}

template <class Cell>
BackwardResult backward_op(const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                           const MaybeTensor& dcells, const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                           const std::vector<Tensor>& weights, const MaybeTensor& batch_sizes, int64_t directions,
                           const Tensor& y, const Tensor& gates, const Tensor& cells, int64_t needs, bool /*tf32*/) {
  Layer l = Layer::of<Cell>(x, h0, c0, weights, batch_sizes, directions);
  l.check_backward(dy, dh_n, dc_n, dcells, y, gates, cells);
  const BackwardArguments a{dy, dh_n, dc_n, dcells, x, h0, c0, weights, y, gates, cells};
  if (l.dtype == ScalarType::Double) return backward<Cell, double>(l, a, needs);
  if (l.dtype == ScalarType::BFloat16) return backward<Cell, bf16>(l, a, needs);
  if (l.dtype == ScalarType::Float) return backward<Cell, float>(l, a, needs);
  l.dtype = ScalarType::Float;
  const auto f = [&](const auto& t) { return cast(t, l.dtype); };
  const auto [dx, dh0, dc0, dweights] = backward<Cell, float>(
      l, {f(dy), f(dh_n), f(dc_n), dcells, f(x), f(h0), f(c0), f(weights), f(y), f(gates), cells}, needs);
  const ScalarType half = ScalarType::Half;
  return {cast(dx, half), cast(dh0, half), cast(dc0, half), cast(dweights, half)};
}

template <class Cell>
TangentResult tangent_op(const MaybeTensor& dwx, const MaybeTensor& drh, const MaybeTensor& dy, const MaybeTensor& dh0,
                         const MaybeTensor& dc0, const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                         const std::vector<Tensor>& weights, const MaybeTensor& batch_sizes, int64_t directions,
                         const Tensor& y, const Tensor& gates, const Tensor& cells, bool /*tf32*/) {
  const Layer l = Layer::of<Cell>(x, h0, c0, weights, batch_sizes, directions);
  l.check_tangent(dwx, drh, dy, dh0, dc0, y, gates, cells);
  const TangentArguments a{dwx, drh, dy, dh0, dc0, x, h0, c0, weights, y, gates, cells};
  return l.dtype == ScalarType::Double ? tangent<Cell, double>(l, a) : tangent<Cell, float>(l, a);
}

template <class Cell>
AdjointResult adjoint_op(const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                         const MaybeTensor& dcells, const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                         const std::vector<Tensor>& weights, const MaybeTensor& batch_sizes, int64_t directions,
                         const Tensor& y, const Tensor& gates, const Tensor& cells, bool /*tf32*/) {
  const Layer l = Layer::of<Cell>(x, h0, c0, weights, batch_sizes, directions);
  l.check_linear();
  l.check_backward(dy, dh_n, dc_n, dcells, y, gates, cells);
  const BackwardArguments a{dy, dh_n, dc_n, dcells, x, h0, c0, weights, y, gates, cells};
  return l.dtype == ScalarType::Double ? adjoint<Cell, double>(l, a) : adjoint<Cell, float>(l, a);
}

template <class Cell>
CurvatureResult curvature_op(const Tensor& wx, const Tensor& rh, const Tensor& h, const MaybeTensor& c,
                             const MaybeTensor& dwx, const MaybeTensor& drh, const MaybeTensor& dh,
                             const MaybeTensor& dc, const Tensor& upstream_h, const MaybeTensor& upstream_c,
                             const MaybeTensor& dupstream_h) {
  const CurvatureArguments a{wx, rh, h, c, dwx, drh, dh, dc, upstream_h, upstream_c, dupstream_h};
  const auto run = [&](const auto& p) {
    constexpr double work = 16;  // of an element, in multiply-adds of a layer
    const int threads = plan_threads(max_threads(), double(p.rows) * p.H * Cell::gates * work);
    cpu_kernels().of<std::remove_const_t<std::remove_pointer_t<decltype(p.wx)>>>(kind_of<Cell>()).curvature(p, threads);
  };
  return wx.scalar_type() == ScalarType::Double ? with_curvature<Cell, double>(a, run)
                                                : with_curvature<Cell, float>(a, run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("lstm", TORCH_BOX(&forward_op<LSTM>));
  m.impl("gru", TORCH_BOX(&forward_op<GRU>));
  m.impl("rnn_tanh", TORCH_BOX(&forward_op<RNNTanh>));
  m.impl("rnn_relu", TORCH_BOX(&forward_op<RNNRelu>));
  m.impl("lstm_inference", TORCH_BOX(&inference_op<LSTM>));
  m.impl("gru_inference", TORCH_BOX(&inference_op<GRU>));
  m.impl("rnn_tanh_inference", TORCH_BOX(&inference_op<RNNTanh>));
  m.impl("rnn_relu_inference", TORCH_BOX(&inference_op<RNNRelu>));
  m.impl("lstm_step", TORCH_BOX(&step_op<LSTM>));
  m.impl("gru_step", TORCH_BOX(&step_op<GRU>));
  m.impl("rnn_tanh_step", TORCH_BOX(&step_op<RNNTanh>));
  m.impl("rnn_relu_step", TORCH_BOX(&step_op<RNNRelu>));
  m.impl("lstm_advance", TORCH_BOX(&advance_op<LSTM>));
  m.impl("gru_advance", TORCH_BOX(&advance_op<GRU>));
  m.impl("rnn_tanh_advance", TORCH_BOX(&advance_op<RNNTanh>));
  m.impl("rnn_relu_advance", TORCH_BOX(&advance_op<RNNRelu>));
  m.impl("lstm_backward", TORCH_BOX(&backward_op<LSTM>));
  m.impl("gru_backward", TORCH_BOX(&backward_op<GRU>));
  m.impl("rnn_tanh_backward", TORCH_BOX(&backward_op<RNNTanh>));
  m.impl("rnn_relu_backward", TORCH_BOX(&backward_op<RNNRelu>));
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

}  // namespace fusedrnn
