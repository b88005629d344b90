// The derivative of a cell's forward along a direction, for any cell: the transpose of Cell::backward, which is linear
// in d and which says all there is to know of it.
#pragma once

#include "cell.h"

namespace fusedrnn {

// The change of the state where wx, rh and prev change by dwx, drh and dprev.
template <class Cell, class T>
FUSEDRNN_INLINE State<T> tangent(const T* saved, State<T> prev, State<T> state, const T* dwx, const T* drh,
                                 State<T> dprev) {
  const auto change_of = [&](State<T> which) __attribute__((always_inline)) {
    T by_wx[Cell::gates], by_rh[Cell::gates];
    const State<T> by = Cell::backward(saved, prev, state, which, by_wx, by_rh);
    T change{};
    if constexpr (Cell::carries_h) change += by.h * dprev.h;
    if constexpr (Cell::has_c) change += by.c * dprev.c;
    for (int g = 0; g < Cell::gates; ++g) change += by_wx[g] * dwx[g] + by_rh[g] * drh[g];
    return change;
  };
  const T none{}, one = none + 1;
  State<T> change{change_of({one, none}), none};
  if constexpr (Cell::has_c) change.c = change_of({none, one});
  return change;
}

}  // namespace fusedrnn
