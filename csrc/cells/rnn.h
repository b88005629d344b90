// The Elman RNN (1990), h' = tanh(W_ih x + b_ih + W_hh h + b_hh) or relu of it, as torch.nn.RNN.
#pragma once

#include "cell.h"

namespace fusedrnn {

struct RNNTanh {
  static constexpr int gates = 1, saved = 0, shared = 1;
  static constexpr bool has_c = false, reads_h = true, carries_h = false;

  template <class T>
  FUSEDRNN_INLINE static State<T> forward(const T* wx, const T* rh, State<T>, T*) {
    return {tanh(wx[0] + rh[0]), T{}};
  }

  template <class T>
  FUSEDRNN_INLINE static State<T> backward(const T*, State<T>, State<T> state, State<T> d, T* dwx, T* drh) {
    dwx[0] = drh[0] = d.h * (1 - state.h * state.h);
    return {T{}, T{}};
  }
};

struct RNNRelu {
  static constexpr int gates = 1, saved = 0, shared = 1;
  static constexpr bool has_c = false, reads_h = true, carries_h = false;

  template <class T>
  FUSEDRNN_INLINE static State<T> forward(const T* wx, const T* rh, State<T>, T*) {
    return {relu(wx[0] + rh[0]), T{}};
  }

  template <class T>
  FUSEDRNN_INLINE static State<T> backward(const T*, State<T>, State<T> state, State<T> d, T* dwx, T* drh) {
    dwx[0] = drh[0] = where_positive(state.h, d.h);
    return {T{}, T{}};
  }
};

}  // namespace fusedrnn
