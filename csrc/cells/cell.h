// What a cell is.
//
// A cell is a stateless struct: the math of one hidden unit in one time step, and nothing else.
// T is a scalar or a SIMD vector of units. wx = W_ih x + b_ih and rh = W_hh h_prev + b_hh arrive
// gate by gate, apart, in PyTorch's gate order.
//
//   gates     G: rows of W_ih and W_hh per unit
//   saved     values per unit that backward needs from forward (beside h and c)
//   shared    the first `shared` gates have the same gradient for wx and rh
//   has_c     the cell has a second state c
//   reads_h   forward or backward read h or h_prev themselves (h_prev not only through rh)
//   carries_h backward passes a gradient to h_prev directly (not only through rh)
//
//   forward(wx, rh, prev, saved) -> state
//   backward(saved, prev, state, d, dwx, drh) -> dprev: d = (dL/dh, dL/dc); the direct part of
//       dL/d(prev), that is, without what flows through rh.
#pragma once

#include "../math.h"

namespace fusedrnn {

template <class T>
struct State {
  T h, c;
};

}  // namespace fusedrnn
