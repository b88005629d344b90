// GRU (Cho et al. 2014), reset after the matmul, as torch.nn.GRU and cuDNN:
//   n = tanh(W_in x + b_in + r * (W_hn h + b_hn)),  h' = (1 - z) n + z h
#pragma once

#include "cell.h"

namespace fusedrnn {

struct GRU {
  static constexpr int gates = 3;   // r z n
  static constexpr int saved = 4;   // r z n after their activations, and rh of n
  static constexpr int shared = 2;  // n's wx and rh meet only after the reset gate
  static constexpr bool has_c = false, reads_h = true, carries_h = true;

  template <class T>
  FUSEDRNN_INLINE static State<T> forward(const T* wx, const T* rh, State<T> prev, T* saved) {
    const T r = sigmoid(wx[0] + rh[0]);
    const T z = sigmoid(wx[1] + rh[1]);
    const T n = tanh(wx[2] + r * rh[2]);
    const T h = n + z * (prev.h - n);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = rh[2];
    return {h, T{}};
  }

  template <class T>
  FUSEDRNN_INLINE static State<T> backward(const T* saved, State<T> prev, State<T>, State<T> d, T* dwx, T* drh) {
    const T r = saved[0], z = saved[1], n = saved[2], rh_n = saved[3];
    const T dn = d.h * (1 - z) * (1 - n * n);
    dwx[0] = drh[0] = dn * rh_n * r * (1 - r);
    dwx[1] = drh[1] = d.h * (prev.h - n) * z * (1 - z);
    dwx[2] = dn;
    drh[2] = dn * r;
    return {d.h * z, T{}};
  }
};

}  // namespace fusedrnn
