// A stack of layers of one direction. Where several layers may run at the same time (widest_plan), the sequence is cut
// into chunks, and a layer starts on a chunk when the layer before it has done that chunk: a wave through the stack.
#pragma once

#include <deque>

#include "backward.cuh"
#include "forward.cuh"

namespace fusedrnn::cuda {

using StackResult = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;          // y, h_n, c_n, saved
using StackBackwardResult = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;  // dx, dh0, dc0, dweights

// Calls piece(i, k, stream) for each of the layers that run at the same time, and each of so many pieces of their work.
// Piece (i, k) comes after (i, k - 1) and (i - 1, k).
template <class Piece>
void wavefront(const OnDevice& device, int layers, int64_t pieces, Piece piece) {
  Fork fork(device, layers);
  for (int64_t wave = 0; wave < pieces + layers - 1; ++wave) {
    // Those furthest ahead last: what is waited for is all that a stream has been given so far.
    for (int i = layers - 1; i >= 0; --i) {
      const int64_t k = wave - i;
      if (k < 0 || k >= pieces) continue;
      if (i > 0) fork.wait(i, i - 1);
      fork.run(i, [=](Stream stream) { piece(i, k, stream); });
    }
  }
  fork.join();
}

// A part of a stack's states [layers, N, _], or of nothing.
inline Tensor layer_of(const Tensor& t, int64_t layer) { return t.numel() ? fusedrnn::narrow(t, 0, layer, 1) : t; }
inline MaybeTensor layer_of(const MaybeTensor& t, int64_t layer) {
  return t ? MaybeTensor(fusedrnn::narrow(*t, 0, layer, 1)) : t;
}

// The arguments of a stack, checked. `saved` has every y but the last, all gates, all cells.
struct Stack {
  std::vector<Layer> layers;
  std::vector<Tensor> inputs;  // of each layer, and the last one's output
  int64_t each, steps;         // weights of a layer; steps of a chunk

  // `ys` has the layers' outputs; without it they are new.
  template <class Cell>
  static Stack of(const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0, const std::vector<Tensor>& weights,
                  int64_t count, int64_t chunk, const std::vector<Tensor>* ys) {
    STD_TORCH_CHECK(count > 0 && !weights.empty() && weights.size() % size_t(count) == 0,
                    "fusedrnn: weights: expected as many for each of ", count, " layers, got ", weights.size());
    for (const MaybeTensor& state : {h0, c0}) {
      STD_TORCH_CHECK(!state || (state->dim() == 3 && state->size(0) == count),
                      "fusedrnn: h0, c0: expected a state for each of ", count, " layers");
    }
    Stack s{{}, {x}, int64_t(weights.size()) / count, 0};
    for (int64_t i = 0; i < count; ++i) {
      s.layers.push_back(Layer::of<Cell>(s.inputs[i], layer_of(h0, i), layer_of(c0, i), s.weights(weights, i), {}, 1));
      const Layer& l = s.layers.back();
      STD_TORCH_CHECK(l.H == s.layers[0].H && l.P == s.layers[0].P && l.projected == s.layers[0].projected,
                      "fusedrnn: weights: expected layers of the same size");
      s.inputs.push_back(ys ? (*ys)[size_t(i)] : empty(l.y_shape(), l.dtype, x));
    }
    const int64_t T = s.layers[0].T;
    s.steps = chunk > 0 && chunk < T ? chunk : T;
    return s;
  }

  const Tensor& y() const { return inputs.back(); }
  int64_t count() const { return int64_t(layers.size()); }
  std::vector<Tensor> weights(const std::vector<Tensor>& all, int64_t layer) const {
    return {all.begin() + layer * each, all.begin() + (layer + 1) * each};
  }
  // Without chunks nothing can run at the same time.
  template <class Cell, class Math>
  Plan plan(bool backward, int64_t layers_wanted) const {
    return find_plan<Cell, Math>(request<Math>(layers[0], backward), steps < layers[0].T ? int(layers_wanted) : 1);
  }
};

template <class Cell, class Math>
StackResult stack_forward(const Stack& s, const MaybeTensor& h0, const MaybeTensor& c0,
                          const std::vector<Tensor>& weights, bool save) {
  const Layer& l = s.layers[0];
  const std::vector<int64_t> none{0};
  const int64_t count = s.count();
  const Tensor h_n = empty({count, l.N, l.P}, l.dtype, s.y());
  const Tensor c_n = empty(l.has_c ? std::vector<int64_t>{count, l.N, l.H} : none, l.dtype, s.y());
  std::vector<Tensor> gates, cells;
  for (const Layer& layer : s.layers) {
    gates.push_back(empty(save ? layer.gates_shape() : none, l.dtype, s.y()));
    cells.push_back(empty(save && l.has_c ? layer.cells_shape() : none, l.accumulator(), s.y()));
  }
  if (nothing_to_do(l)) {
    for (int64_t i = 1; i < count; ++i) copy_or_zero(s.inputs[i], {});
    results_without_work(l, h0, c0, {s.y(), h_n, c_n, gates[0], cells[0]});
  } else {
    const OnDevice device(s.y().get_device_index());
    const Plan plan = s.plan<Cell, Math>(false, count);
    const int64_t T = l.T, steps = plan.together > 1 ? s.steps : T;
    for (int64_t first = 0; first < count; first += plan.together) {
      const int64_t together = std::min<int64_t>(plan.together, count - first);
      std::deque<ForwardPass<Cell, Math>> passes;
      for (int64_t i = first; i < first + together; ++i) {
        const ForwardResult to{s.inputs[i + 1], layer_of(h_n, i), layer_of(c_n, i), gates[i], cells[i]};
        passes.emplace_back(s.layers[i], s.inputs[i], layer_of(h0, i), layer_of(c0, i), s.weights(weights, i), to,
                            steps, device.stream());
      }
      wavefront(device, int(together), (T + steps - 1) / steps, [&](int i, int64_t k, Stream stream) {
        passes[i].run(plan, k * steps, std::min((k + 1) * steps, T), stream);
      });
    }
  }
  std::vector<Tensor> saved;
  if (save) {
    saved.assign(s.inputs.begin() + 1, s.inputs.end() - 1);
    saved.insert(saved.end(), gates.begin(), gates.end());
    saved.insert(saved.end(), cells.begin(), cells.end());
  }
  return {s.y(), h_n, c_n, saved};
}

// What a stack's backward pass gets of its forward pass and from above. `needs` has the bits of the layer ops, for each
// layer; those of dx and the states are in the first.
struct StackBackwardArguments {
  MaybeTensor dy, dh_n, dc_n, h0, c0;
  std::vector<Tensor> weights, gates, cells;
  std::vector<int64_t> needs;

  // The arguments of a layer's backward op.
  BackwardArguments of(const Stack& s, int64_t i, const MaybeTensor& upstream) const {
    return {upstream,        layer_of(dh_n, i),     layer_of(dc_n, i), {},       s.inputs[i], layer_of(h0, i),
            layer_of(c0, i), s.weights(weights, i), s.inputs[i + 1],   gates[i], cells[i]};
  }
};

template <class Cell, class Math>
StackBackwardResult stack_backward(const Stack& s, const StackBackwardArguments& a) {
  const Layer& l = s.layers[0];
  const int64_t count = s.count(), states = a.needs[0] & (need_dh0 | (l.has_c ? need_dc0 : 0));
  const auto result = [&](bool needed, const std::vector<int64_t>& shape) {
    return empty(needed ? shape : std::vector<int64_t>{0}, l.dtype, s.y());
  };
  const auto like = [](const Tensor& t) { return std::vector<int64_t>{t.sizes().begin(), t.sizes().end()}; };
  const Tensor dh0 = result(states & need_dh0, {count, l.N, l.P});
  const Tensor dc0 = result(states & need_dc0, {count, l.N, l.H});
  std::vector<Tensor> dx, dweights;  // of each layer's input; of all layers
  std::vector<int64_t> needs;
  int64_t bottom = count;  // the first layer that has anything to do
  for (int64_t i = 0; i < count; ++i) {
    const int64_t own = (a.needs[i] & ~(need_dx | need_dh0 | need_dc0)) | states;
    const bool goes_on = i == 0 ? a.needs[0] & need_dx : bottom < i;
    needs.push_back(own | (goes_on ? need_dx : 0));
    if (needs[i] && bottom == count) bottom = i;
    dx.push_back(result(goes_on, like(s.inputs[i])));
    for (int64_t j = 0; j < s.each; ++j)
      dweights.push_back(result(own & (need_first_weight << j), like(a.weights[i * s.each + j])));
  }
  if (nothing_to_do(l)) {
    gradients_without_work(l, a.dh_n, a.dc_n, {dx[0], dh0, dc0, dweights});
  } else if (bottom < count) {
    const OnDevice device(s.y().get_device_index());
    const Plan plan = s.plan<Cell, Math>(true, count - bottom);
    const int64_t T = l.T, steps = plan.together > 1 ? s.steps : T, chunks = (T + steps - 1) / steps;
    for (int64_t end = count; end > bottom; end -= plan.together) {
      const int64_t together = std::min<int64_t>(plan.together, end - bottom);
      std::deque<BackwardPass<Cell, Math>> passes;
      for (int64_t i = end - 1; i >= end - together; --i) {
        const MaybeTensor dy = i + 1 < count ? MaybeTensor(dx[i + 1]) : a.dy;
        const BackwardResult to{dx[i], layer_of(dh0, i), layer_of(dc0, i), s.weights(dweights, i)};
        passes.emplace_back(s.layers[i], a.of(s, i, dy), needs[i], to, device.stream());
      }
      wavefront(device, int(together), chunks + 1, [&](int i, int64_t k, Stream stream) {
        if (k == chunks) return passes[i].weight_gradients(stream);
        const int64_t first = (chunks - 1 - k) * steps;
        passes[i].run(plan, first, std::min(first + steps, T), stream);
      });
    }
  }
  return {dx[0], dh0, dc0, dweights};
}

}  // namespace fusedrnn::cuda
