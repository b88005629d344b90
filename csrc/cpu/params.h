// What the CPU kernels are given: one direction of one layer, one struct for each pass. Row r of the sequence is time
// step t, batch entry n: r = offset[t] + n, as in torch's PackedSequence; a padded batch is the case where every
// step has N rows.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fusedrnn {

struct bf16 {
  uint16_t bits;
};

// The type that a storage type S computes and accumulates in.
template <class S>
using Acc = std::conditional_t<std::is_same_v<S, bf16>, float, S>;

struct Shape {
  int64_t T, N, I, H, P;  // steps, batch, input size, hidden size, size of h (P = H unless projected)
  const int64_t* offset;  // [T + 1], the first row of each step
  bool reverse;           // the direction runs from T - 1 to 0
  bool projected;

  int64_t rows() const { return offset[T]; }
  int64_t batch(int64_t t) const { return offset[t + 1] - offset[t]; }
  // The time of the s-th step that is computed.
  int64_t time(int64_t s) const { return reverse ? T - 1 - s : s; }
  // Rows that the s-th computed step has; none before the first and after the last.
  int64_t step_batch(int64_t s) const { return s < 0 || s >= T ? 0 : batch(time(s)); }
};

template <class S>
struct Weights {
  const S* w_ih;  // [G * H, I]
  const S* w_hh;  // [G * H, P]
  const S* b_ih;  // [G * H] or null
  const S* b_hh;  // [G * H] or null
  const S* w_hr;  // [P, H] or null
};

// Rows of a matrix that may be strided in time and in the batch; columns are contiguous.
template <class S>
struct Rows {
  S* data;
  int64_t row;        // elements between rows
  int64_t step = -1;  // elements between time steps; -1: a row follows the row before, in time too
  S* at(const Shape& shape, int64_t t, int64_t n) const {
    return data + (step < 0 ? (shape.offset[t] + n) * row : t * step + n * row);
  }
};

// What forward was given and left, where its derivative is taken.
template <class S>
struct Taken {
  Rows<const S> y, gates;
  Rows<const Acc<S>> cells;
  const S* h0;
  const S* c0;
};

// The derivative of a forward pass along a direction. Then h0, c0, y and cells in Forward are the changes of those,
// there is no x, and beside rh these arrive:
template <class S>
struct Tangent {
  Taken<S> at;
  Rows<const S> dwx, drh;  // [rows, G * H] or null data: the changes of wx, and of rh at a constant h_prev
  Rows<const S> dy;        // [rows, P] or null data: the change of h at a constant state before the projection
  Rows<S> drh_out;         // [rows, G * H]: the change of rh
};

template <class S>
struct Forward {
  Shape shape;
  Weights<S> weights;
  Rows<const S> x;     // [rows, I]
  const S* h0;         // [N, P] or null (zeros)
  const S* c0;         // [N, H] or null (zeros)
  Rows<S> y;           // [rows, P]
  S* h_n;              // [N, P]
  S* c_n;              // [N, H]
  bool save;           // gates and cells are kept for backward
  Rows<S> gates;       // [rows, saved, H], and h before the projection, if any
  Rows<Acc<S>> cells;  // [rows, H]
  Tangent<S> tangent = {};
};

template <class S>
struct Backward {
  Shape shape;
  Weights<S> weights;
  Rows<const S> dy;           // [rows, P] or null data
  const S* dh_n;              // [N, P] or null
  const S* dc_n;              // [N, H] or null
  Rows<const Acc<S>> dcells;  // [rows, H] or null data
  Rows<const S> x, y, gates;
  Rows<const Acc<S>> cells;
  const S* h0;
  const S* c0;
  S* dx;               // [rows, I] or null
  bool dx_accumulate;  // add to dx, where the other direction does so too
  S* dh0;              // [N, P] or null
  S* dc0;              // [N, H] or null
  S* dw_ih;            // as the weights, or null
  S* dw_hh;
  S* db_ih;
  S* db_hh;
  S* dw_hr;
  Rows<S> dwx = {}, drh = {};  // [rows, G * H] or null data: dL/dwx and dL/drh of every step
  Rows<S> dh = {};             // [rows, P] or null data: dL/dh
  Rows<Acc<S>> dc = {};        // [rows, H] or null data: dL/dc
};

}  // namespace fusedrnn
