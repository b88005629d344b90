// The operators: a whole layer, all its directions, in one call. fusedrnn/ops.py documents them.
#include <torch/csrc/stable/library.h>

#include <string>

// A fragment, as torch 2.10's STABLE_TORCH_LIBRARY takes the macro's name for the namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(FUSEDRNN_NAMESPACE, m) {
  m.def(
      "segments(Tensor lengths, Tensor? reset, Tensor first_row, Tensor step_row, int directions)"
      " -> (Tensor batch_sizes, Tensor source, Tensor initial, Tensor final)");
  for (const std::string cell : {"lstm", "gru", "rnn_tanh", "rnn_relu"}) {
    m.def((cell + "(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, int directions, bool save,"
                  " bool tf32=False)"
                  " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)")
              .c_str());
    m.def((cell + "_inference(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, int directions)"
                  " -> Tensor[]")
              .c_str());
    m.def((cell + "_step(Tensor x, Tensor h, Tensor? c, Tensor[] weights) -> Tensor[]").c_str());
    m.def((cell + "_advance(Tensor x, Tensor(a!) h, Tensor(b!)? c, Tensor[] weights, Tensor? batch_sizes,"
                  " int layers, Tensor(c!) y) -> ()")
              .c_str());
    m.def((cell + "_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor? h0, Tensor? c0,"
                  " Tensor[] weights, Tensor? batch_sizes, int directions, Tensor y, Tensor gates, Tensor cells,"
                  " int needs, bool tf32=False)"
                  " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)")
              .c_str());
    m.def((cell + "_tangent(Tensor? dwx, Tensor? drh, Tensor? dy, Tensor? dh0, Tensor? dc0, Tensor x, Tensor? h0,"
                  " Tensor? c0, Tensor[] weights, Tensor? batch_sizes, int directions, Tensor y, Tensor gates,"
                  " Tensor cells, bool tf32=False)"
                  " -> (Tensor dy, Tensor dh_n, Tensor dc_n, Tensor dcells, Tensor drh)")
              .c_str());
    m.def((cell + "_adjoint(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor? h0, Tensor? c0,"
                  " Tensor[] weights, Tensor? batch_sizes, int directions, Tensor y, Tensor gates, Tensor cells,"
                  " bool tf32=False)"
                  " -> (Tensor dwx, Tensor drh, Tensor dh, Tensor dc, Tensor dh0, Tensor dc0)")
              .c_str());
    m.def((cell +
           "_curvature(Tensor wx, Tensor rh, Tensor h, Tensor? c, Tensor? dwx, Tensor? drh, Tensor? dh, Tensor? dc,"
           " Tensor upstream_h, Tensor? upstream_c, Tensor? dupstream_h)"
           " -> (Tensor dby_wx, Tensor dby_rh, Tensor dby_h, Tensor dby_c, Tensor dh_after)")
              .c_str());
    m.def((cell + "_plan(Tensor like, int N, int H, int P, int directions, bool backward, bool projected,"
                  " int layers, bool tf32=False) -> (str name, str reason, int[] numbers)")
              .c_str());
    m.def((cell + "_stack(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, int layers, int chunk, bool save,"
                  " bool tf32=False)"
                  " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor[] saved)")
              .c_str());
    m.def((cell + "_stack_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0,"
                  " Tensor[] weights, int layers, int chunk, Tensor y, Tensor[] saved, int[] needs, bool tf32=False)"
                  " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)")
              .c_str());
  }
}
