// The ops on a GPU: the products over all rows by cuBLAS, the time loop by our kernels.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "../tensors.h"
#include "kernels.h"
#include "rows.cuh"

namespace fusedrnn::cuda {
namespace {

namespace stable = torch::stable;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Elements of a row of n, padded to whole vectors.
template <class S>
int64_t padded(int64_t n) {
  return round_up(n, int64_t(sizeof(Vector) / sizeof(S)));
}

// Columns of t, which has `columns` of them, in the first columns of rows of `width`; the rest is zero.
Tensor widened(const Tensor& t, int64_t width) {
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

Tensor transposed(const Tensor& t) { return stable::transpose(t, 0, 1); }

// A matrix or a transposed one as cuBLAS takes it; none if it is empty, too large or has other strides.
std::optional<Factor> factor(const Tensor& t) {
  const int turned = t.stride(1) != 1;  // then what lies in memory as a row is a column
  const int64_t rows = t.size(turned), columns = t.size(!turned);
  const int64_t pitch = rows == 1 ? columns : t.stride(turned);
  if (t.numel() == 0 || t.stride(!turned) != 1 || pitch < columns) return {};
  if (std::max(rows, pitch) > std::numeric_limits<int>::max()) return {};
  return Factor{data<const float>(t), int(pitch), turned != 0};
}

// The same numbers to autograd, which refuses an operation with `out` on what requires gradients.
Tensor detached(const Tensor& t) {
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

void sum_rows(Tensor out, const Tensor& t) {
  const std::vector<int64_t> rows{0};
  stable::sum_out(out, t, rows);
}

// One of each direction's weights, one below the other, each padded to `rows`.
Tensor stacked(const Layer& l, const std::vector<Tensor>& weights, int64_t index, int64_t rows) {
  const Tensor& first = weights[index];
  if (l.directions == 1 && first.size(0) == rows) return first;
  std::vector<int64_t> shape(first.sizes().begin(), first.sizes().end());
  shape[0] = l.directions * rows;
  const Tensor all = zeros(shape, l.dtype, first);
  for (int64_t d = 0; d < l.directions; ++d) {
    Tensor to = fusedrnn::narrow(all, 0, d * rows, first.size(0));
    stable::copy_(to, weights[d * l.weights_per_direction + index]);
  }
  return all;
}

bool nothing_to_do(const Layer& l) { return l.rows == 0 || l.H == 0; }

// No step: the state (or its gradient) stays as it was. No unit: a projection of nothing, which is 0.
MaybeTensor state_without_work(const Layer& l, const MaybeTensor& state) { return l.rows == 0 ? state : MaybeTensor(); }

// Everything that one call of an op needs on its device.
struct Call {
  const Layer& l;
  OnDevice device;
  Tensor offsets;   // of packed rows
  Tensor arrivals;  // [D, batch tiles of the smallest size * counter_pitch]

  Call(const Layer& layer, const Tensor& x) : l(layer), device(x.get_device_index()) {
    arrivals = zeros({l.directions, tiles() * counter_pitch}, ScalarType::Int, x);
    if (!l.packed) return;
    offsets = empty({l.T + 1}, ScalarType::Long, x);
    for (int64_t from = 0; from <= l.T; from += Numbers::most) {
      Numbers numbers{};
      numbers.count = int(std::min<int64_t>(Numbers::most, l.T + 1 - from));
      std::copy_n(l.offset.begin() + from, numbers.count, numbers.value);
      numbers.to = data<int64_t>(offsets) + from;
      launch(write_numbers, {.grid = {}, .threads = row_threads}, device.stream(), numbers);
    }
  }

  int64_t tiles() const { return round_up(l.N, tile_shapes[0].columns()) / tile_shapes[0].columns(); }
  Steps steps(int64_t d) const { return {l.T, l.N, l.packed ? data<const int64_t>(offsets) : nullptr, d == 1}; }
  uint32_t* arrivals_of(int64_t d) const { return data<uint32_t>(arrivals) + d * tiles() * counter_pitch; }

  template <class Math>
  PlanRequest request(bool backward) const {
    constexpr int64_t element = sizeof(typename Math::Storage);
    return {l.T, l.N, l.H, l.P, int(l.directions), int(l.gates), backward, element, Math::resident, l.projected};
  }

  // Every direction's W of [D * rows] weights, as the tile reads it.
  template <class S, class Function>
  std::vector<Tensor> weights_of(const std::vector<Tensor>& weights, int64_t index, Function function) const {
    std::vector<Tensor> found;
    for (int64_t d = 0; d < l.directions; ++d)
      found.push_back(tiled<S>(function(weights[d * l.weights_per_direction + index])));
    return found;
  }
};

template <class Cell, class Math>
ForwardResult forward(const Layer& l, const Tensor& x, const MaybeTensor& h0_, const MaybeTensor& c0_,
                      const std::vector<Tensor>& weights_, bool save) {
  using S = typename Math::Storage;
  using A = Accumulator<S>;
  const std::vector<int64_t> none{0};
  const Tensor y = empty(l.y_shape(), l.dtype, x), h_n = empty(l.h_shape(), l.dtype, x);
  const Tensor c_n = empty(l.has_c ? l.c_shape() : none, l.dtype, x);
  const Tensor gates = empty(save ? l.gates_shape() : none, l.dtype, x);
  const Tensor cells = empty(save && l.has_c ? l.cells_shape() : none, l.accumulator(), x);
  if (nothing_to_do(l)) {
    copy_or_zero(y, {});
    copy_or_zero(h_n, state_without_work(l, h0_));
    copy_or_zero(c_n, c0_);
    return {y, h_n, c_n, gates, cells};
  }
  const Call call(l, x);
  const int64_t D = l.directions, G = l.gates, H = l.H, P = l.P, N = l.N;
  const std::vector<Tensor> weights = dense(weights_);
  const int64_t w_hr = l.weights_per_direction - 1;
  const auto same = [](const Tensor& t) { return t; };

  const Tensor wx = empty({l.rows, D * G * H}, l.dtype, x);
  multiply<Math>(wx, stable::reshape(x, {l.rows, l.I}), transposed(stacked(l, weights, 0, G * H)));
  const std::vector<Tensor> w_hhs = call.weights_of<S>(weights, 1, same);
  const std::vector<Tensor> w_hrs = l.projected ? call.weights_of<S>(weights, w_hr, same) : std::vector<Tensor>{};

  // States: h before even and before odd steps, c, and h before the projection.
  const int64_t width = padded<S>(P), wide = padded<S>(H);
  const Tensor h = zeros({2, D, N, width}, l.dtype, x);
  for (int64_t i = 0; h0_ && i < 2; ++i) {
    Tensor to = fusedrnn::narrow(stable::select(h, 0, i), 2, 0, P);
    stable::copy_(to, *h0_);
  }
  const Tensor c = empty(l.has_c ? l.c_shape() : none, l.accumulator(), x);
  copy_or_zero(c, c0_);
  const Tensor unprojected = l.projected ? zeros({D, N, wide}, l.dtype, x) : empty(none, l.dtype, x);

  Forward<S> p{};
  p.H = H, p.P = P, p.projected = l.projected;
  for (int64_t d = 0; d < D; ++d) {
    const Tensor* w = weights.data() + d * l.weights_per_direction;
    p.direction[d] = {.steps = call.steps(d),
                      .wx = {data<const S>(wx) + d * G * H, D * G * H},
                      .w_hh = rows_of<S>(w_hhs[d]),
                      .b_ih = l.bias ? data<const S>(w[2]) : nullptr,
                      .b_hh = l.bias ? data<const S>(w[3]) : nullptr,
                      .w_hr = l.projected ? rows_of<S>(w_hrs[d]) : Rows<const S>{},
                      .h = {{data<S>(h) + d * N * width, width}, {data<S>(h) + (D + d) * N * width, width}},
                      .unprojected = {l.projected ? data<S>(unprojected) + d * N * wide : nullptr, wide},
                      .c = l.has_c ? data<A>(c) + d * N * H : nullptr,
                      .y = {data<S>(y) + d * P, D * P},
                      .h_n = data<S>(h_n) + d * N * P,
                      .c_n = l.has_c ? data<S>(c_n) + d * N * H : nullptr,
                      .gates = {save && l.saved ? data<S>(gates) + d * l.saved * H : nullptr, D * l.saved * H},
                      .cells = {save && l.has_c ? data<A>(cells) + d * H : nullptr, D * H},
                      .arrivals = call.arrivals_of(d)};
  }
  run_forward<Cell, Math>(p, call.request<Math>(false), call.device.stream());
  return {y, h_n, c_n, gates, cells};
}

// The upstream gradients and the results of forward, as backward gets them.
struct BackwardArguments {
  MaybeTensor dy, dh_n, dc_n, dcells;
  Tensor x;
  MaybeTensor h0, c0;
  std::vector<Tensor> weights;
  Tensor y, gates, cells;
};

template <class Cell, class Math>
BackwardResult backward(const Layer& l, const BackwardArguments& a, int64_t needs) {
  using S = typename Math::Storage;
  using A = Accumulator<S>;
  const auto result = [&](int64_t bit, const std::vector<int64_t>& shape) {
    return empty(needs & bit ? shape : std::vector<int64_t>{0}, l.dtype, a.x);
  };
  const std::vector<int64_t> x_shape = {a.x.sizes().begin(), a.x.sizes().end()};
  const Tensor dx = result(need_dx, x_shape);
  const Tensor dh0 = result(need_dh0, l.h_shape()), dc0 = result(l.has_c ? need_dc0 : 0, l.c_shape());
  std::vector<Tensor> dweights;
  for (size_t i = 0; i < a.weights.size(); ++i)
    dweights.push_back(result(need_first_weight << i, {a.weights[i].sizes().begin(), a.weights[i].sizes().end()}));
  if (nothing_to_do(l)) {
    copy_or_zero(dx, {});
    copy_or_zero(dh0, state_without_work(l, a.dh_n));
    copy_or_zero(dc0, a.dc_n);
    for (const Tensor& t : dweights) copy_or_zero(t, {});
    return {dx, dh0, dc0, dweights};
  }

  const Call call(l, a.x);
  const int64_t D = l.directions, H = l.H, P = l.P, N = l.N, each = l.weights_per_direction;
  const int64_t width = padded<S>(l.gates * H), p_width = padded<S>(P);
  const Tensor x = stable::reshape(a.x, {l.rows, l.I}), y = dense(a.y), gates = dense(a.gates), cells = dense(a.cells);
  const MaybeTensor dy = dense(a.dy), dh_n = dense(a.dh_n), dc_n = dense(a.dc_n), dcells = dense(a.dcells);
  const MaybeTensor h0 = dense(a.h0), c0 = dense(a.c0);
  const std::vector<Tensor> weights = dense(a.weights);
  const auto turned = [](const Tensor& t) { return stable::contiguous(transposed(t)); };
  const std::vector<Tensor> w_hhs = call.weights_of<S>(weights, 1, turned);
  const auto gate_by_gate = [&](const Tensor& t) {
    const Tensor wide = widened(stable::reshape(turned(t), {P * l.gates, H}), padded<S>(H));
    return stable::reshape(wide, {P, l.gates * padded<S>(H)});
  };
  const bool aligned = padded<S>(H) == H || l.projected || !Math::resident;
  const std::vector<Tensor> w_hh_gates = aligned ? w_hhs : call.weights_of<S>(weights, 1, gate_by_gate);
  const std::vector<Tensor> w_hrs = l.projected ? call.weights_of<S>(weights, each - 1, turned) : std::vector<Tensor>{};

  // Padding is zero, all else is written before it is read.
  const auto scratch = [&](bool exists, const std::vector<int64_t>& shape, bool has_padding, ScalarType dtype) {
    if (!exists) return empty({0}, dtype, x);
    return has_padding ? zeros(shape, dtype, x) : empty(shape, dtype, x);
  };
  constexpr bool apart = Cell::shared < Cell::gates;  // dwx is not drh
  const Tensor drh = scratch(true, {l.rows, D, width}, width != l.gates * H, l.dtype);
  const Tensor dwx = apart ? scratch(true, {l.rows, D, width}, width != l.gates * H, l.dtype) : drh;
  const Tensor dh = scratch(l.projected, {l.rows, D, p_width}, p_width != P, l.dtype);
  const Tensor dh_direct = scratch(Cell::carries_h, l.h_shape(), false, l.accumulator());
  const Tensor dc = scratch(l.has_c, l.c_shape(), false, l.accumulator());

  Backward<S> p{};
  p.H = H, p.P = P, p.projected = l.projected;
  for (int64_t d = 0; d < D; ++d) {
    p.direction[d] = {.steps = call.steps(d),
                      .w_hh = rows_of<S>(w_hhs[d]),
                      .w_hh_gates = rows_of<S>(w_hh_gates[d]),
                      .w_hr = l.projected ? rows_of<S>(w_hrs[d]) : Rows<const S>{},
                      .dy = {offset(data<const S>(dy), d * P), D * P},
                      .dh_n = offset(data<const S>(dh_n), d * N * P),
                      .dc_n = offset(data<const S>(dc_n), d * N * H),
                      .dcells = {offset(data<const A>(dcells), d * H), D * H},
                      .y = {data<const S>(y) + d * P, D * P},
                      .gates = {data<const S>(gates) + d * l.saved * H, D * l.saved * H},
                      .cells = {l.has_c ? data<const A>(cells) + d * H : nullptr, D * H},
                      .h0 = offset(data<const S>(h0), d * N * P),
                      .c0 = offset(data<const S>(c0), d * N * H),
                      .drh = {data<S>(drh) + d * width, D * width},
                      .dwx = {apart ? data<S>(dwx) + d * width : nullptr, D * width},
                      .dh = {l.projected ? data<S>(dh) + d * p_width : nullptr, D * p_width},
                      .dh_direct = Cell::carries_h ? data<A>(dh_direct) + d * N * P : nullptr,
                      .dc = l.has_c ? data<A>(dc) + d * N * H : nullptr,
                      .dh0 = needs & need_dh0 ? data<S>(dh0) + d * N * P : nullptr,
                      .dc0 = l.has_c && (needs & need_dc0) ? data<S>(dc0) + d * N * H : nullptr,
                      .arrivals = call.arrivals_of(d)};
  }
  run_backward<Cell, Math>(p, call.request<Math>(true), call.device.stream());

  if (needs & need_dx) {
    const Tensor all = stable::reshape(dwx, {l.rows, D * width});
    multiply<Math>(stable::reshape(dx, {l.rows, l.I}), all, stacked(l, weights, 0, width));
  }
  const auto wanted = [&](int64_t d, int64_t i) { return needs & (need_first_weight << (d * each + i)); };
  const auto gradient_rows = [&](const Tensor& t, int64_t d) {
    return fusedrnn::narrow(stable::select(t, 1, d), 1, 0, l.gates * H);
  };
  for (int64_t d = 0; d < D; ++d) {
    const Tensor* dw = dweights.data() + d * each;
    const Tensor dwx_d = gradient_rows(dwx, d), drh_d = gradient_rows(drh, d);
    if (wanted(d, 0)) multiply<Math>(dw[0], transposed(dwx_d), x);
    if (wanted(d, 1)) {
      const Tensor h_prev = empty({l.rows, P}, l.dtype, x);
      const PreviousRows<S> rows{p.direction[d].steps, P, p.direction[d].y, p.direction[d].h0, data<S>(h_prev)};
      launch(previous_rows<S>, {.grid = {unsigned(std::min<int64_t>(l.T, 4096))}, .threads = row_threads},
             call.device.stream(), rows);
      multiply<Math>(dw[1], transposed(drh_d), h_prev);
    }
    if (l.bias && wanted(d, 2)) sum_rows(dw[2], dwx_d);
    if (l.bias && wanted(d, 3)) sum_rows(dw[3], drh_d);
    if (l.projected && wanted(d, each - 1)) {
      const Tensor unprojected =
          stable::select(stable::select(stable::reshape(gates, {l.rows, D, l.saved, H}), 1, d), 1, Cell::saved);
      multiply<Math>(dw[each - 1], transposed(fusedrnn::narrow(stable::select(dh, 1, d), 1, 0, P)), unprojected);
    }
  }
  return {dx, dh0, dc0, dweights};
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
}

}  // namespace fusedrnn::cuda
