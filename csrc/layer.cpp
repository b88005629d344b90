#include "layer.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <string>

namespace fusedrnn {
namespace {

template <class Shape>
std::string text(const Shape& shape) {
  std::string s;
  for (const int64_t size : shape) s += (s.empty() ? "" : ", ") + std::to_string(size);
  return "[" + s + "]";
}

// Elements from the first one of a tensor to behind its last.
int64_t extent(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return last + 1;
}

// Of `like`'s dtype (or `dtype`) and device, and of this shape.
void check_tensor(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, const Tensor& like,
                  ScalarType dtype) {
  const auto sizes = t.sizes();
  const bool same = sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin());
  STD_TORCH_CHECK(same, "fusedrnn: ", name, ": expected shape ", text(shape), ", got ", text(t.sizes()));
  STD_TORCH_CHECK(t.scalar_type() == dtype, "fusedrnn: ", name, ": expected dtype ", toString(dtype), ", got ",
                  toString(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == like.device(), "fusedrnn: ", name, ": expected the device of x");
  check_storage(name, t);
}

void check_tensor(const char* name, const MaybeTensor& t, std::initializer_list<int64_t> shape, const Tensor& like,
                  ScalarType dtype) {
  if (t) check_tensor(name, *t, shape, like, dtype);
}

// The first row of each time step.
std::vector<int64_t> offsets(const Tensor& batch_sizes, int64_t rows) {
  STD_TORCH_CHECK(batch_sizes.is_cpu() && batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.dim() == 1,
                  "fusedrnn: batch_sizes: expected a one-dimensional int64 tensor on the CPU");
  check_storage("batch_sizes", batch_sizes);
  const int64_t T = batch_sizes.size(0), stride = batch_sizes.stride(0);
  const auto* sizes = static_cast<const int64_t*>(batch_sizes.const_data_ptr());
  std::vector<int64_t> offset(T + 1, 0);
  int64_t last = rows;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t n = sizes[t * stride];
    STD_TORCH_CHECK(n > 0 && n <= last,
                    "fusedrnn: batch_sizes: expected positive sizes that never increase and sum to ", rows,
                    " (the rows of x), got ", n, " at step ", t);
    last = n;
    offset[t + 1] = offset[t] + n;
    STD_TORCH_CHECK(offset[t + 1] <= rows, "fusedrnn: batch_sizes: expected a sum of ", rows,
                    " (the rows of x), got at least ", offset[t + 1]);
  }
  STD_TORCH_CHECK(offset[T] == rows, "fusedrnn: batch_sizes: expected a sum of ", rows, " (the rows of x), got ",
                  offset[T]);
  return offset;
}

}  // namespace

void check_storage(const char* name, const Tensor& t) {
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const int64_t elements = extent(t);
  STD_TORCH_CHECK(elements == 0 || (t.storage_offset() + elements) * int64_t(t.element_size()) <= bytes,
                  "fusedrnn: ", name, ": its storage has been freed or made smaller");
}

Layer Layer::check(const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0, const std::vector<Tensor>& weights,
                   const MaybeTensor& batch_sizes, int64_t directions, int64_t layers, bool step, int64_t gates,
                   int64_t saved, bool has_c) {
  STD_TORCH_CHECK(directions == 1 || directions == 2, "fusedrnn: directions: expected 1 or 2, got ", directions);
  STD_TORCH_CHECK(layers > 0, "fusedrnn: layers: expected 1 or more, got ", layers);
  Layer l{};
  l.directions = directions, l.layers = layers, l.gates = gates, l.has_c = has_c;
  l.packed = step || batch_sizes;
  l.step = step;
  l.dtype = x.scalar_type();
  STD_TORCH_CHECK(l.dtype == ScalarType::Float || l.dtype == ScalarType::Double || l.dtype == ScalarType::BFloat16 ||
                      l.dtype == ScalarType::Half,
                  "fusedrnn: x: expected dtype Float, Double, BFloat16 or Half, got ", toString(l.dtype));
  STD_TORCH_CHECK(x.dim() == (l.packed ? 2 : 3), "fusedrnn: x: expected ",
                  step          ? "[N, I]"
                  : batch_sizes ? "[rows, I] with batch_sizes"
                                : "[T, N, I] without batch_sizes",
                  ", got ", text(x.sizes()));
  check_storage("x", x);
  l.I = x.size(x.dim() - 1);
  if (step) {
    l.T = 1, l.N = l.rows = x.size(0);
    if (l.rows > 0) l.offset = {0, l.rows};
  } else if (l.packed) {
    l.rows = x.size(0);
    l.offset = offsets(*batch_sizes, l.rows);
    l.T = int64_t(l.offset.size()) - 1;
    l.N = l.T ? l.offset[1] : h0 && h0->dim() == 3 ? h0->size(1) : 0;
  } else {
    l.T = x.size(0), l.N = x.size(1), l.rows = l.T * l.N;
    l.offset.resize(l.rows > 0 ? l.T + 1 : 0);  // without rows there may be more steps than memory
    for (size_t t = 0; t < l.offset.size(); ++t) l.offset[t] = int64_t(t) * l.N;
  }

  // There may be two directions or several layers, never both.
  const int64_t parts = std::max(directions, layers), count = int64_t(weights.size()), each = count / parts;
  STD_TORCH_CHECK(count % parts == 0 && each >= 2 && each <= 5,
                  "fusedrnn: weights: expected 2 to 5 tensors for each of the ", parts,
                  layers > 1 ? " layers" : " directions", " (w_ih, w_hh, b_ih, b_hh, w_hr), got ", count);
  l.weights_per_direction = each, l.bias = each >= 4, l.projected = each % 2 == 1;
  STD_TORCH_CHECK(has_c || !l.projected, "fusedrnn: weights: only the LSTM has a projection (w_hr), got ", each,
                  " weights per direction");
  STD_TORCH_CHECK(weights[0].dim() == 2 && weights[0].size(0) % gates == 0, "fusedrnn: w_ih: expected [", gates,
                  " * H, I], got ", text(weights[0].sizes()));
  l.H = weights[0].size(0) / gates;
  l.P = l.H;
  if (l.projected) {
    STD_TORCH_CHECK(weights[each - 1].dim() == 2 && weights[each - 1].size(0) > 0,
                    "fusedrnn: w_hr: expected [P, H] with P > 0, got ", text(weights[each - 1].sizes()));
    l.P = weights[each - 1].size(0);
  }
  l.saved = saved + l.projected;
  for (int64_t i = 0; i < parts; ++i) {
    const Tensor* w = weights.data() + i * each;
    check_tensor("w_ih", w[0], {gates * l.H, i < directions ? l.I : l.P}, x, l.dtype);
    check_tensor("w_hh", w[1], {gates * l.H, l.P}, x, l.dtype);
    if (l.bias) check_tensor("b_ih", w[2], {gates * l.H}, x, l.dtype);
    if (l.bias) check_tensor("b_hh", w[3], {gates * l.H}, x, l.dtype);
    if (l.projected) check_tensor("w_hr", w[each - 1], {l.P, l.H}, x, l.dtype);
  }
  STD_TORCH_CHECK(has_c || !c0, "fusedrnn: ", step ? "c" : "c0", ": expected None, this cell has no c");
  if (step) {
    check_tensor("h", h0, {l.N, l.P}, x, l.dtype);
    check_tensor("c", c0, {l.N, l.H}, x, l.dtype);
  } else {
    check_tensor("h0", h0, {parts, l.N, l.P}, x, l.dtype);
    check_tensor("c0", c0, {parts, l.N, l.H}, x, l.dtype);
  }
  return l;
}

void Layer::check_backward(const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                           const MaybeTensor& dcells, const Tensor& y, const Tensor& gates_,
                           const Tensor& cells) const {
  const auto like_y = [&](const char* name, const MaybeTensor& t) {
    if (packed)
      check_tensor(name, t, {rows, directions * P}, y, dtype);
    else
      check_tensor(name, t, {T, N, directions * P}, y, dtype);
  };
  like_y("y", y);
  like_y("dy", dy);
  check_tensor("gates", gates_, {rows, directions, saved, H}, y, dtype);
  if (has_c) check_tensor("cells", cells, {rows, directions, H}, y, accumulator());
  check_tensor("dh_n", dh_n, {directions, N, P}, y, dtype);
  STD_TORCH_CHECK(has_c || !dc_n, "fusedrnn: dc_n: expected None, this cell has no c");
  check_tensor("dc_n", dc_n, {directions, N, H}, y, dtype);
  STD_TORCH_CHECK(has_c || !dcells, "fusedrnn: dcells: expected None, this cell has no c");
  check_tensor("dcells", dcells, {rows, directions, H}, y, accumulator());
}

void Layer::check_tangent(const MaybeTensor& dwx, const MaybeTensor& drh, const MaybeTensor& dy, const MaybeTensor& dh0,
                          const MaybeTensor& dc0, const Tensor& y, const Tensor& gates_, const Tensor& cells) const {
  check_linear();
  check_backward(dy, {}, {}, {}, y, gates_, cells);
  check_tensor("dwx", dwx, {rows, directions, gates * H}, y, dtype);
  check_tensor("drh", drh, {rows, directions, gates * H}, y, dtype);
  check_tensor("dh0", dh0, {directions, N, P}, y, dtype);
  STD_TORCH_CHECK(has_c || !dc0, "fusedrnn: dc0: expected None, this cell has no c");
  check_tensor("dc0", dc0, {directions, N, H}, y, dtype);
}

void Layer::check_linear() const {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "fusedrnn: x: expected dtype Float or Double, got ", toString(dtype));
  STD_TORCH_CHECK(H > 0, "fusedrnn: w_ih: expected one hidden unit or more");
}

void check_curvature(const CurvatureArguments& a, int64_t gates, bool has_c, bool reads_h) {
  const ScalarType dtype = a.wx.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "fusedrnn: wx: expected dtype Float or Double, got ", toString(dtype));
  STD_TORCH_CHECK(a.wx.dim() == 2 && a.wx.size(1) % gates == 0, "fusedrnn: wx: expected [rows, ", gates, " * H], got ",
                  text(a.wx.sizes()));
  const int64_t rows = a.wx.size(0), width = a.wx.size(1), H = width / gates;
  const auto check = [&](const char* name, const MaybeTensor& t, int64_t columns) {
    check_tensor(name, t, {rows, columns}, a.wx, dtype);
  };
  check("wx", a.wx, width), check("rh", a.rh, width), check("dwx", a.dwx, width), check("drh", a.drh, width);
  if (reads_h) check("h", a.h, H), check("dh", a.dh, H);
  check("upstream_h", a.upstream_h, H), check("dupstream_h", a.dupstream_h, H);
  for (const auto& [name, t] : {std::pair("c", a.c), std::pair("dc", a.dc), std::pair("upstream_c", a.upstream_c)}) {
    STD_TORCH_CHECK(has_c || !t, "fusedrnn: ", name, ": expected None, this cell has no c");
    check(name, t, H);
  }
}

bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto begin = [](const Tensor& t) { return static_cast<const char*>(t.data_ptr()); };
  const auto end = [&](const Tensor& t) { return begin(t) + extent(t) * int64_t(t.element_size()); };
  return begin(a) < end(b) && begin(b) < end(a);
}

void Layer::check_advance(const Tensor& h, const MaybeTensor& c, const Tensor& y) const {
  STD_TORCH_CHECK(c.has_value() == has_c, "fusedrnn: c: expected ", has_c ? "a tensor" : "None, this cell has no c");
  if (packed)
    check_tensor("y", y, {rows, directions * P}, h, dtype);
  else
    check_tensor("y", y, {T, N, directions * P}, h, dtype);
  STD_TORCH_CHECK(h.is_contiguous() && (!c || c->is_contiguous()) && y.is_contiguous(),
                  "fusedrnn: h, c, y: expected contiguous tensors, as they are written to");
  STD_TORCH_CHECK(!overlap(h, y) && !(c && (overlap(*c, y) || overlap(h, *c))),
                  "fusedrnn: h, c, y: expected memory of their own for each, as they are written to");
}

std::vector<int64_t> Layer::y_shape() const {
  if (packed) return {rows, directions * P};
  return {T, N, directions * P};
}

std::vector<int64_t> Layer::h_shape() const {
  if (step) return {N, P};
  return {directions, N, P};
}

std::vector<int64_t> Layer::c_shape() const {
  if (step) return {N, H};
  return {directions, N, H};
}

ScalarType Layer::accumulator() const { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

}  // namespace fusedrnn
