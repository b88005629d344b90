// A layer's arguments, checked: what every device's implementation of the ops starts from.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

namespace fusedrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// For the CUDA library, which has its own file.
#define FUSEDRNN_EXPORT __attribute__((visibility("default")))

// What an op's arguments say. Raises a RuntimeError that names the argument, what was expected and what came.
struct FUSEDRNN_EXPORT Layer {
  int64_t T, N, I, H, P, rows;       // steps, batch, input size, hidden size, size of h per direction, rows of x
  int64_t directions, gates, saved;  // saved: slots of the gates tensor per unit
  int64_t layers;                    // 1 but in a stack; its states and weights are one layer's after the other's
  int64_t weights_per_direction;
  bool has_c, bias, projected, packed;
  bool step;  // of a cell: x is [N, I], and the states have no dimension for directions
  ScalarType dtype;
  std::vector<int64_t> offset;  // [T + 1], the first row of each step; empty if there are no rows

  template <class Cell>
  static Layer of(const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0, const std::vector<Tensor>& weights,
                  const MaybeTensor& batch_sizes, int64_t directions) {
    return check(x, h0, c0, weights, batch_sizes, directions, 1, false, Cell::gates, Cell::saved, Cell::has_c);
  }
  template <class Cell>
  static Layer of_stack(const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
                        const std::vector<Tensor>& weights, const MaybeTensor& batch_sizes, int64_t layers) {
    return check(x, h0, c0, weights, batch_sizes, 1, layers, false, Cell::gates, Cell::saved, Cell::has_c);
  }
  template <class Cell>
  static Layer of_step(const Tensor& x, const Tensor& h, const MaybeTensor& c, const std::vector<Tensor>& weights) {
    return check(x, h, c, weights, {}, 1, 1, true, Cell::gates, Cell::saved, Cell::has_c);
  }
  // The arguments of the backward op beyond the forward op's.
  void check_backward(const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                      const MaybeTensor& dcells, const Tensor& y, const Tensor& gates, const Tensor& cells) const;

  // What the tangent and the adjoint op need: float32 or float64, and a hidden unit.
  void check_linear() const;

  // The arguments of the tangent op beyond the forward op's.
  void check_tangent(const MaybeTensor& dwx, const MaybeTensor& drh, const MaybeTensor& dy, const MaybeTensor& dh0,
                     const MaybeTensor& dc0, const Tensor& y, const Tensor& gates, const Tensor& cells) const;

  // The results that an advance op writes; h and c are its states as well.
  void check_advance(const Tensor& h, const MaybeTensor& c, const Tensor& y) const;

  std::vector<int64_t> y_shape() const;
  std::vector<int64_t> h_shape() const;
  std::vector<int64_t> c_shape() const;
  std::vector<int64_t> gates_shape() const { return {rows, directions, saved, H}; }
  std::vector<int64_t> cells_shape() const { return {rows, directions, H}; }
  // float64 for float64, else float32.
  ScalarType accumulator() const;

 private:
  static Layer check(const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0, const std::vector<Tensor>& weights,
                     const MaybeTensor& batch_sizes, int64_t directions, int64_t layers, bool step, int64_t gates,
                     int64_t saved, bool has_c);
};

// The tensors of a curvature op, named as in curvature.h.
struct CurvatureArguments {
  Tensor wx, rh, h;
  MaybeTensor c, dwx, drh, dh, dc;
  Tensor upstream_h;
  MaybeTensor upstream_c, dupstream_h;
};
FUSEDRNN_EXPORT void check_curvature(const CurvatureArguments& a, int64_t gates, bool has_c, bool reads_h);

// Raises a RuntimeError unless all of the tensor lies in its storage: one can be freed, or made smaller, under tensors.
FUSEDRNN_EXPORT void check_storage(const char* name, const Tensor& t);

// Whether the first and last bytes of two tensors say that they may share some.
bool overlap(const Tensor& a, const Tensor& b);

// Outputs of the ops.
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;        // y, h_n, c_n, gates, cells
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;  // dx, dh0, dc0, dweights
using TangentResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;        // dy, dh_n, dc_n, dcells, drh
using CurvatureResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // dby_wx, dby_rh, dby_h, dby_c, dh_after
// dwx, drh, dh, dc, dh0, dc0
using AdjointResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Bits of the backward op's `needs`.
constexpr int64_t need_dx = 1, need_dh0 = 2, need_dc0 = 4, need_first_weight = 8;

}  // namespace fusedrnn
