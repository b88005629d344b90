// The forward pass of a layer: the input projection by cuBLAS, the time loop by our kernels.
#pragma once

#include "call.cuh"
#include "kernels.h"

namespace fusedrnn::cuda {

template <class Cell, class Math>
class ForwardPass {
  using S = typename Math::Storage;
  using A = Accumulator<S>;

 public:
  // What all steps share, and scratch memory for the projection of `steps` of them at a time. `to` is written to; its
  // gates and cells are empty if nobody wants them.
  ForwardPass(const Layer& layer, const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
              const std::vector<Tensor>& weights_, const ForwardResult& to, int64_t steps, Stream stream)
      : l(layer), call(l, x, stream), x(stable::reshape(x, {l.rows, l.I})), weights(dense(weights_)) {
    const int64_t D = l.directions, G = l.gates, H = l.H, P = l.P, N = l.N;
    const auto& [y, h_n, c_n, gates, cells] = to;
    const std::vector<int64_t> none{0};
    const auto same = [](const Tensor& t) { return t; };
    w_ih = transposed(stacked(l, weights, 0, G * H));
    w_hhs = call.weights_of<S>(weights, 1, same);
    if (l.projected) w_hrs = call.weights_of<S>(weights, l.weights_per_direction - 1, same);
    wx = empty({steps < l.T ? steps * N : l.rows, D * G * H}, l.dtype, x);

    // States: h before even and before odd steps, c, and h before the projection.
    const int64_t width = padded<S>(P), wide = padded<S>(H);
    h = zeros({2, D, N, width}, l.dtype, x);
    for (int64_t i = 0; h0 && i < 2; ++i) {
      Tensor start = fusedrnn::narrow(stable::select(h, 0, i), 2, 0, P);
      stable::copy_(start, *h0);
    }
    c = empty(l.has_c ? l.c_shape() : none, l.accumulator(), x);
    copy_or_zero(c, c0);
    unprojected = l.projected ? zeros({D, N, wide}, l.dtype, x) : empty(none, l.dtype, x);

    p.H = H, p.P = P, p.projected = l.projected;
    for (int64_t d = 0; d < D; ++d) {
      const Tensor* w = weights.data() + d * l.weights_per_direction;
      p.direction[d] = {.steps = call.steps(d),
                        .wx = {nullptr, D * G * H},
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
                        .gates = {gates.numel() ? data<S>(gates) + d * l.saved * H : nullptr, D * l.saved * H},
                        .cells = {cells.numel() ? data<A>(cells) + d * H : nullptr, D * H},
                        .arrivals = call.arrivals_of(d)};
    }
  }

  // Steps first .. last - 1: all, or of one direction some after others.
  void run(const Plan& plan, int64_t first, int64_t last, Stream stream) {
    const int64_t row = l.offset[first], rows = l.offset[last] - row, width = wx.size(1);
    multiply<Math>(fusedrnn::narrow(wx, 0, 0, rows), fusedrnn::narrow(x, 0, row, rows), w_ih);
    for (int64_t d = 0; d < l.directions; ++d)
      p.direction[d].wx.data = data<const S>(wx) + d * l.gates * l.H - row * width;
    run_forward<Cell, Math>(p, plan, request<Math>(l, false), first, last, stream);
  }

 protected:
  const Layer& l;
  const Call call;
  const Tensor x;
  const std::vector<Tensor> weights;
  std::vector<Tensor> w_hhs, w_hrs;
  Tensor w_ih, wx, h, c, unprojected;
  Forward<S> p{};
};

// The derivative of the forward pass, in one run. `to` gets the changes of y, h_n, c_n and cells, and has no gates;
// `drh` gets those of rh.
template <class Cell, class Math>
class TangentPass : ForwardPass<Cell, Math> {
  using Base = ForwardPass<Cell, Math>;
  using S = typename Math::Storage;
  using Base::l, Base::p;

 public:
  TangentPass(const Layer& layer, const TangentArguments& a, const ForwardResult& to, const Tensor& drh, Stream stream)
      : Base(layer, a.x, a.dh0, a.dc0, a.weights, to, 0, stream),
        a{dense(a.dwx), dense(a.drh),   dense(a.dy),   {}, {}, a.x, dense(a.h0), dense(a.c0), {},
          dense(a.y),   dense(a.gates), dense(a.cells)} {
    const TangentArguments& from = this->a;
    const int64_t D = l.directions, GH = l.gates * l.H;
    for (int64_t d = 0; d < D; ++d) {
      p.direction[d].tangent = {.y = {data<const S>(from.y) + d * l.P, D * l.P},
                                .gates = {data<const S>(from.gates) + d * l.saved * l.H, D * l.saved * l.H},
                                .cells = {l.has_c ? data<const S>(from.cells) + d * l.H : nullptr, D * l.H},
                                .h0 = offset(data<const S>(from.h0), d * l.N * l.P),
                                .c0 = offset(data<const S>(from.c0), d * l.N * l.H),
                                .dwx = {offset(data<const S>(from.dwx), d * GH), D * GH},
                                .drh = {offset(data<const S>(from.drh), d * GH), D * GH},
                                .dy = {offset(data<const S>(from.dy), d * l.P), D * l.P},
                                .drh_out = {data<S>(drh) + d * GH, D * GH}};
    }
  }

  void run(Stream stream) const { run_tangent<Cell, Math>(p, request<Math>(l, false), l.T, stream); }

 private:
  const TangentArguments a;
};

}  // namespace fusedrnn::cuda
