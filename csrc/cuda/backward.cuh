// The backward pass of a layer: the time loop by our kernels, dx and the weight gradients by cuBLAS.
#pragma once

#include "call.cuh"
#include "kernels.h"

namespace fusedrnn::cuda {

inline BackwardArguments dense_arguments(const BackwardArguments& a) {
  return {dense(a.dy), dense(a.dh_n),    dense(a.dc_n), dense(a.dcells), a.x,           dense(a.h0),
          dense(a.c0), dense(a.weights), dense(a.y),    dense(a.gates),  dense(a.cells)};
}

template <class Cell, class Math>
class BackwardPass {
  using S = typename Math::Storage;
  using A = Accumulator<S>;
  static constexpr bool apart = Cell::shared < Cell::gates;  // dwx is not drh

 public:
  // What all steps share, and scratch memory. `to` is written to, where the bits of `needs` say so; `every`, if
  // given, gets the gradients of every step in its first four tensors.
  BackwardPass(const Layer& layer, const BackwardArguments& arguments, int64_t needs_, const BackwardResult& to_,
               Stream stream, const AdjointResult* every_ = nullptr)
      : l(layer),
        call(l, arguments.x, stream),
        a(dense_arguments(arguments)),
        x(stable::reshape(a.x, {l.rows, l.I})),
        needs(needs_),
        to(to_),
        every(every_) {
    const int64_t D = l.directions, G = l.gates, H = l.H, P = l.P, N = l.N, each = l.weights_per_direction;
    const int64_t width = padded<S>(G * H), p_width = padded<S>(P);
    const auto turned = [](const Tensor& t) { return stable::contiguous(transposed(t)); };
    const auto gate_by_gate = [&](const Tensor& t) {
      const Tensor wide = widened(stable::reshape(turned(t), {P * G, H}), padded<S>(H));
      return stable::reshape(wide, {P, G * padded<S>(H)});
    };
    const bool aligned = padded<S>(H) == H || l.projected || !Math::resident;
    w_hhs = call.weights_of<S>(a.weights, 1, turned);
    w_hh_gates = aligned ? w_hhs : call.weights_of<S>(a.weights, 1, gate_by_gate);
    if (l.projected) w_hrs = call.weights_of<S>(a.weights, each - 1, turned);
    if (needs & need_dx) w_ih = stacked(l, a.weights, 0, width);

    // Padding is zero, all else is written before it is read.
    const auto scratch = [&](bool exists, const std::vector<int64_t>& shape, bool has_padding, ScalarType dtype) {
      if (!exists) return empty({0}, dtype, x);
      return has_padding ? zeros(shape, dtype, x) : empty(shape, dtype, x);
    };
    const auto of_gates = [&] { return scratch(true, {l.rows, D, width}, width != G * H, l.dtype); };
    const bool in_place = every && width == G * H;
    dwx = in_place ? std::get<0>(*every) : of_gates();
    drh = !apart ? dwx : in_place ? std::get<1>(*every) : of_gates();
    dh = scratch(l.projected, {l.rows, D, p_width}, p_width != P, l.dtype);
    dh_direct = scratch(Cell::carries_h, l.h_shape(), false, l.accumulator());
    dc = scratch(l.has_c, l.c_shape(), false, l.accumulator());

    const auto& [dx, dh0, dc0, dweights] = to;
    p.H = H, p.P = P, p.projected = l.projected;
    for (int64_t d = 0; d < D; ++d) {
      p.direction[d] = {.steps = call.steps(d),
                        .w_hh = rows_of<S>(w_hhs[d]),
                        .w_hh_gates = rows_of<S>(w_hh_gates[d]),
                        .w_hr = l.projected ? rows_of<S>(w_hrs[d]) : Rows<const S>{},
                        .dy = {offset(data<const S>(a.dy), d * P), D * P},
                        .dh_n = offset(data<const S>(a.dh_n), d * N * P),
                        .dc_n = offset(data<const S>(a.dc_n), d * N * H),
                        .dcells = {offset(data<const A>(a.dcells), d * H), D * H},
                        .y = {data<const S>(a.y) + d * P, D * P},
                        .gates = {data<const S>(a.gates) + d * l.saved * H, D * l.saved * H},
                        .cells = {l.has_c ? data<const A>(a.cells) + d * H : nullptr, D * H},
                        .h0 = offset(data<const S>(a.h0), d * N * P),
                        .c0 = offset(data<const S>(a.c0), d * N * H),
                        .drh = {data<S>(drh) + d * width, D * width},
                        .dwx = {apart ? data<S>(dwx) + d * width : nullptr, D * width},
                        .dh = {l.projected ? data<S>(dh) + d * p_width : nullptr, D * p_width},
                        .dc_all = {},
                        .dh_direct = Cell::carries_h ? data<A>(dh_direct) + d * N * P : nullptr,
                        .dc = l.has_c ? data<A>(dc) + d * N * H : nullptr,
                        .dh0 = needs & need_dh0 ? data<S>(dh0) + d * N * P : nullptr,
                        .dc0 = l.has_c && (needs & need_dc0) ? data<S>(dc0) + d * N * H : nullptr,
                        .arrivals = call.arrivals_of(d)};
      if (!every) continue;
      if (!l.projected) p.direction[d].dh = {data<S>(std::get<2>(*every)) + d * P, D * P};
      if (l.has_c) p.direction[d].dc_all = {data<A>(std::get<3>(*every)) + d * H, D * H};
    }
  }

  // Steps last - 1 down to first, and their dx: all, or of one direction some after others.
  void run(const Plan& plan, int64_t first, int64_t last, Stream stream) {
    const bool initial = first == 0 && (needs & (need_dh0 | (l.has_c ? need_dc0 : 0)));
    run_backward<Cell, Math>(p, plan, request<Math>(l, true), initial ? -1 : first, last, stream);
    if (!(needs & need_dx)) return;
    const int64_t row = l.offset[first], rows = l.offset[last] - row, width = dwx.size(1) * dwx.size(2);
    const Tensor dx = stable::reshape(std::get<0>(to), {l.rows, l.I});
    const Tensor gradients = fusedrnn::narrow(stable::reshape(dwx, {l.rows, width}), 0, row, rows);
    multiply<Math>(fusedrnn::narrow(dx, 0, row, rows), gradients, w_ih);
  }

  // What `every` gets beside what the kernels write to it; after all steps.
  void gradients_of_every_step() const {
    const auto copy = [](Tensor to, const Tensor& from, int64_t width) {
      if (to.data_ptr() == from.data_ptr()) return;
      to = stable::reshape(to, {from.size(0), from.size(1), width});
      stable::copy_(to, fusedrnn::narrow(from, 2, 0, width));
    };
    copy(std::get<0>(*every), dwx, l.gates * l.H);
    if (apart) copy(std::get<1>(*every), drh, l.gates * l.H);
    if (l.projected) copy(std::get<2>(*every), dh, l.P);
  }

  // After all steps.
  void weight_gradients(Stream stream) const {
    const int64_t each = l.weights_per_direction;
    const auto wanted = [&](int64_t d, int64_t i) { return needs & (need_first_weight << (d * each + i)); };
    const auto gradient_rows = [&](const Tensor& t, int64_t d) {
      return fusedrnn::narrow(stable::select(t, 1, d), 1, 0, l.gates * l.H);
    };
    for (int64_t d = 0; d < l.directions; ++d) {
      const Tensor* dw = std::get<3>(to).data() + d * each;
      const Tensor dwx_d = gradient_rows(dwx, d), drh_d = gradient_rows(drh, d);
      if (wanted(d, 0)) multiply<Math>(dw[0], transposed(dwx_d), x);
      if (wanted(d, 1)) {
        const Tensor h_prev = empty({l.rows, l.P}, l.dtype, x);
        const PreviousRows<S> rows{p.direction[d].steps, l.P, p.direction[d].y, p.direction[d].h0, data<S>(h_prev)};
        const Grid grid{unsigned(std::min<int64_t>(l.T, 4096)), unsigned(std::min<int64_t>(l.N, 64))};
        launch(previous_rows<S>, {.grid = grid, .threads = row_threads}, stream, rows);
        multiply<Math>(dw[1], transposed(drh_d), h_prev);
      }
      if (l.bias && wanted(d, 2)) sum_rows(dw[2], dwx_d);
      if (l.bias && wanted(d, 3)) sum_rows(dw[3], drh_d);
      if (l.projected && wanted(d, each - 1)) {
        const Tensor unprojected = stable::select(
            stable::select(stable::reshape(a.gates, {l.rows, l.directions, l.saved, l.H}), 1, d), 1, Cell::saved);
        multiply<Math>(dw[each - 1], transposed(fusedrnn::narrow(stable::select(dh, 1, d), 1, 0, l.P)), unprojected);
      }
    }
  }

 private:
  const Layer& l;
  const Call call;
  const BackwardArguments a;
  const Tensor x;
  const int64_t needs;
  const BackwardResult to;
  const AdjointResult* const every;
  std::vector<Tensor> w_hhs, w_hh_gates, w_hrs;
  Tensor w_ih, drh, dwx, dh, dh_direct, dc;
  Backward<S> p{};
};

}  // namespace fusedrnn::cuda
