// Numbers that carry how they change along some direction: what a cell computes with them, it differentiates.
#pragma once

#include "cell.h"

namespace fusedrnn {

template <class T>
struct Dual {
  T value, change;

  FUSEDRNN_INLINE friend Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.change + b.change}; }
  FUSEDRNN_INLINE friend Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.change - b.change}; }
  FUSEDRNN_INLINE friend Dual operator-(int a, Dual b) { return {scalar_t<T>(a) - b.value, -b.change}; }
  FUSEDRNN_INLINE friend Dual operator*(Dual a, Dual b) {
    return {a.value * b.value, a.change * b.value + a.value * b.change};
  }
};

template <class T>
FUSEDRNN_INLINE Dual<T> sigmoid(Dual<T> x) {
  const T y = sigmoid(x.value);
  return {y, x.change * y * (1 - y)};
}
template <class T>
FUSEDRNN_INLINE Dual<T> tanh(Dual<T> x) {
  const T y = tanh(x.value);
  return {y, x.change * (1 - y * y)};
}
template <class T>
FUSEDRNN_INLINE Dual<T> relu(Dual<T> x) {
  const T y = relu(x.value);
  return {y, where_positive(y, x.change)};
}
template <class T>
FUSEDRNN_INLINE Dual<T> where_positive(Dual<T> y, Dual<T> d) {
  return {where_positive(y.value, d.value), where_positive(y.value, d.change)};
}

// The gradients of one step and how they change where its arguments and the upstream gradients d do.
template <class Cell, class T>
struct StepGradients {
  Dual<T> dwx[Cell::gates], drh[Cell::gates];
  State<Dual<T>> dprev;
  Dual<T> h;

  FUSEDRNN_INLINE StepGradients(const Dual<T>* wx, const Dual<T>* rh, State<Dual<T>> prev, State<Dual<T>> d) {
    Dual<T> saved[Cell::saved + 1];
    const State<Dual<T>> state = Cell::forward(wx, rh, prev, saved);
    h = state.h;
    dprev = Cell::backward(saved, prev, state, d, dwx, drh);
  }
};

}  // namespace fusedrnn
