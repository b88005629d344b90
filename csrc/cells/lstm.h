// LSTM (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000), as torch.nn.LSTM.
#pragma once

#include "cell.h"

namespace fusedrnn {

struct LSTM {
  static constexpr int gates = 4;  // i f g o
  static constexpr int saved = 4;  // i f g o, after their activations
  static constexpr int shared = 4;
  static constexpr bool has_c = true, reads_h = false, carries_h = false;

  template <class T>
  FUSEDRNN_INLINE static State<T> forward(const T* wx, const T* rh, State<T> prev, T* saved) {
    const T i = sigmoid(wx[0] + rh[0]);
    const T f = sigmoid(wx[1] + rh[1]);
    const T g = tanh(wx[2] + rh[2]);
    const T o = sigmoid(wx[3] + rh[3]);
    const T c = f * prev.c + i * g;
    const T h = o * tanh(c);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    return {h, c};
  }

  template <class T>
  FUSEDRNN_INLINE static State<T> backward(const T* saved, State<T> prev, State<T> state, State<T> d, T* dwx, T* drh) {
    const T i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const T tanh_c = tanh(state.c);
    const T dc = d.c + d.h * o * (1 - tanh_c * tanh_c);
    dwx[0] = drh[0] = dc * g * i * (1 - i);
    dwx[1] = drh[1] = dc * prev.c * f * (1 - f);
    dwx[2] = drh[2] = dc * i * (1 - g * g);
    dwx[3] = drh[3] = d.h * tanh_c * o * (1 - o);
    return {T{}, dc * f};
  }
};

}  // namespace fusedrnn
