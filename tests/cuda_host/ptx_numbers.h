// What PTX instructions do with numbers, as the PTX ISA says.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "ptx_memory.h"

namespace fusedrnn::cuda::host {

// Integers wrap around.
template <class T, class F>
T wrapping(T a, T b, F f) {
  if constexpr (std::is_integral_v<T>)
    return T(f(uint64_t(a), uint64_t(b)));
  else
    return f(a, b);
}
constexpr auto add = []<class T>(T a, T b) { return wrapping(a, b, [](auto x, auto y) { return x + y; }); };
constexpr auto subtract = []<class T>(T a, T b) { return wrapping(a, b, [](auto x, auto y) { return x - y; }); };
constexpr auto multiply = []<class T>(T a, T b) { return wrapping(a, b, [](auto x, auto y) { return x * y; }); };
constexpr auto multiply_high = [](auto a, auto b) { return decltype(a)(__int128(a) * __int128(b) >> 64); };
constexpr auto divide = [](auto a, auto b) -> decltype(a) {
  if (std::is_integral_v<decltype(a)> && b == decltype(b)(0)) fail("a division by 0");
  return a / b;
};
constexpr auto remainder_of = [](auto a, auto b) -> decltype(a) {
  if (b == 0) fail("a division by 0");
  return a % b;
};
// 0 where the divisor is so large that the hardware's approximation of its inverse is.
constexpr auto divide_approximately = [](float a, float b) {
  return std::isfinite(b) && std::fabs(b) > 0x1p126f ? a * 0.f : a / b;
};
// The other one, if one is not a number.
constexpr auto least = []<class T>(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return std::min(a, b);
  else
    return std::fmin(a, b);
};
constexpr auto most = []<class T>(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return std::max(a, b);
  else
    return std::fmax(a, b);
};
constexpr auto bit_and = [](auto a, auto b) { return a & b; };
constexpr auto bit_or = [](auto a, auto b) { return a | b; };
constexpr auto bit_xor = [](auto a, auto b) { return a ^ b; };
constexpr auto equal = [](auto a, auto b) { return a == b; };
constexpr auto not_equal = [](auto a, auto b) { return a != b && !(a != a) && !(b != b); };
constexpr auto less = [](auto a, auto b) { return a < b; };
constexpr auto less_equal = [](auto a, auto b) { return a <= b; };
constexpr auto greater = [](auto a, auto b) { return a > b; };
constexpr auto greater_equal = [](auto a, auto b) { return a >= b; };

template <class T, auto f>
void binary(Thread& t, const Instruction& i) {
  t.set<T>(i.at[0], T(f(t.get<T>(i.at[1]), t.get<T>(i.at[2]))));
}
template <class T, auto f>
void compare(Thread& t, const Instruction& i) {
  t.set(i.at[0], uint64_t(f(t.get<T>(i.at[1]), t.get<T>(i.at[2]))));
}
// The same, or one is not a number.
template <class T, auto f>
void compare_unordered(Thread& t, const Instruction& i) {
  const T a = t.get<T>(i.at[1]), b = t.get<T>(i.at[2]);
  t.set(i.at[0], uint64_t(std::isunordered(a, b) || f(a, b)));
}
template <class T>
void multiply_wide(Thread& t, const Instruction& i) {
  using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
  t.set(i.at[0], Wide(t.get<T>(i.at[1])) * Wide(t.get<T>(i.at[2])));
}
template <class T>
void multiply_add(Thread& t, const Instruction& i) {
  const T a = t.get<T>(i.at[1]), b = t.get<T>(i.at[2]), c = t.get<T>(i.at[3]);
  if constexpr (std::is_integral_v<T>)
    t.set(i.at[0], add(multiply(a, b), c));
  else
    t.set(i.at[0], std::fma(a, b, c));
}
template <class T>
void shift_left(Thread& t, const Instruction& i) {
  const auto by = t.get<uint32_t>(i.at[2]);
  t.set(i.at[0], by < 8 * sizeof(T) ? T(t.get<T>(i.at[1]) << by) : T(0));
}
template <class T>
void shift_right(Thread& t, const Instruction& i) {
  const auto by = std::min<uint32_t>(t.get<uint32_t>(i.at[2]), 8 * sizeof(T));
  const T value = t.get<T>(i.at[1]);
  t.set(i.at[0], by < 8 * sizeof(T) ? T(value >> by) : T(std::is_signed_v<T> && value < T(0) ? -1 : 0));
}
// a's lowest bits go into b, `length` of them from bit `first` on.
template <class T>
void insert_bits(Thread& t, const Instruction& i) {
  const uint64_t first = t.get<uint32_t>(i.at[3]) & 0xff, length = t.get<uint32_t>(i.at[4]) & 0xff;
  const uint64_t bits = ((uint64_t(1) << length) - 1) << first;
  t.set(i.at[0], T((uint64_t(t.get<T>(i.at[1])) << first & bits) | (uint64_t(t.get<T>(i.at[2])) & ~bits)));
}
template <class T>
void invert(Thread& t, const Instruction& i) {
  t.set(i.at[0], T(~t.get<T>(i.at[1])));
}
template <class T>
void negate(Thread& t, const Instruction& i) {
  t.set(i.at[0], subtract(T(0), t.get<T>(i.at[1])));
}
inline void invert_predicate(Thread& t, const Instruction& i) { t.set(i.at[0], uint64_t(!t.predicate(i.at[1]))); }
template <class T>
void reciprocal(Thread& t, const Instruction& i) {
  t.set(i.at[0], T(1) / t.get<T>(i.at[1]));
}
// With small numbers taken for 0, before and after.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline void reciprocal_approximately(Thread& t, const Instruction& i) {
  t.set(i.at[0], flushed(1 / flushed(t.get<float>(i.at[1]))));
}
inline void exp2_approximately(Thread& t, const Instruction& i) {
  t.set(i.at[0], flushed(std::exp2(flushed(t.get<float>(i.at[1])))));
}
template <class T>
void select(Thread& t, const Instruction& i) {
  t.set(i.at[0], t.get<T>(i.at[t.predicate(i.at[3]) ? 1 : 2]));
}
template <class T>
void move(Thread& t, const Instruction& i) {
  t.set(i.at[0], t.get<T>(i.at[1]));
}
template <class Part>
void join(Thread& t, const Instruction& i) {
  uint64_t bits = 0;
  for (int e = 0; e < i.count; ++e)
    bits |= uint64_t(t.get<Part>(i.at[size_t(1 + e)])) << (8 * sizeof(Part) * size_t(e));
  t.set(i.at[0], bits);
}
template <class Part>
void split(Thread& t, const Instruction& i) {
  for (int e = 0; e < i.count; ++e)
    t.set(i.at[size_t(e)], Part(t.get<uint64_t>(i.at[size_t(i.count)]) >> (8 * sizeof(Part) * size_t(e))));
}
template <class To, class From>
void convert(Thread& t, const Instruction& i) {
  t.set(i.at[0], To(t.get<From>(i.at[1])));
}
// To nearest, ties to even; not a number becomes the canonical one.
inline void convert_to_bf16(Thread& t, const Instruction& i) {
  const auto bits = t.get<uint32_t>(i.at[1]);
  const bool is_nan = std::isnan(t.get<float>(i.at[1]));
  t.set(i.at[0], uint16_t(is_nan ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}
// To nearest, ties away from zero.
inline void convert_to_tf32(Thread& t, const Instruction& i) {
  const auto bits = t.get<uint32_t>(i.at[1]);
  const bool is_finite = std::isfinite(t.get<float>(i.at[1]));
  t.set(i.at[0], is_finite ? (bits + 0x1000) & ~uint32_t(0x1fff) : bits);
}

// d = a b + c of a warp, as the PTX ISA draws the fragments ("Matrix Fragments for mma.m16n8k16", "... m16n8k8").
struct Fragments {
  const Instruction* instruction;
  Thread* thread;
};

template <class S>
float to_float(S s) {
  return float(s);
}
struct Bf16 {
  uint16_t bits;
};
template <>
inline float to_float(Bf16 s) {
  return std::bit_cast<float>(uint32_t(s.bits) << 16);
}
struct Tf32 {
  uint32_t bits;
};
template <>
inline float to_float(Tf32 s) {
  return std::bit_cast<float>(s.bits & ~uint32_t(0x1fff));
}

template <class S>
void multiply_fragments(const Fragments* lane) {
  constexpr int per_register = 4 / int(sizeof(S)), columns_of_a = 8 * per_register;
  constexpr size_t a_first = 4, b_first = 8, c_first = 10;
  // Element e of a lane's fragment.
  const auto element = [&](int l, size_t first, int e) {
    const auto word = lane[l].thread->get<uint32_t>(lane[l].instruction->at[first + size_t(e / per_register)]);
    S s;
    std::memcpy(&s, reinterpret_cast<const char*>(&word) + e % per_register * int(sizeof(S)), sizeof(S));
    return to_float(s);
  };
  float a[16][16] = {}, b[16][8] = {}, d[32][4];
  for (int l = 0; l < 32; ++l) {
    const int group = l >> 2, in_group = l % 4;
    for (int e = 0; e < 4 * per_register; ++e) {
      int row, column;
      if constexpr (per_register == 2) {
        row = e < 2 || (e >= 4 && e < 6) ? group : group + 8;
        column = in_group * 2 + (e & 1) + (e < 4 ? 0 : 8);
      } else {
        row = e == 0 || e == 2 ? group : group + 8;
        column = e < 2 ? in_group : in_group + 4;
      }
      a[row][column] = element(l, a_first, e);
    }
    for (int e = 0; e < 2 * per_register; ++e) {
      int row;
      if constexpr (per_register == 2)
        row = in_group * 2 + (e & 1) + (e < 2 ? 0 : 8);
      else
        row = e == 0 ? in_group : in_group + 4;
      b[row][group] = element(l, b_first, e);
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int e = 0; e < 4; ++e) {
      const int row = e < 2 ? l >> 2 : (l >> 2) + 8, column = l % 4 * 2 + (e & 1);
      float sum = lane[l].thread->get<float>(lane[l].instruction->at[c_first + size_t(e)]);
      for (int k = 0; k < columns_of_a; ++k) sum += a[row][k] * b[k][column];
      d[l][e] = sum;
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int e = 0; e < 4; ++e) lane[l].thread->set(lane[l].instruction->at[size_t(e)], d[l][e]);
  }
}
template <class S>
void mma(Thread& t, const Instruction& i) {
  Warp& warp = t.block().warps[size_t(self().thread / 32)];
  static_assert(sizeof(Fragments) * 32 <= sizeof(warp.operands));
  auto* fragments = reinterpret_cast<Fragments*>(warp.operands);
  fragments[self().thread % 32] = {&i, &t};
  meet(warp.barrier, 32, [&] {
    for (int l = 0; l < 32; ++l) {
      if (fragments[l].instruction != &i) fail_at(i.text, "not all lanes of a warp are here");
    }
    multiply_fragments<S>(fragments);
  });
}

inline void branch(Thread& t, const Instruction& i) { t.next = i.target; }
inline void end(Thread& t, const Instruction&) { t.ended = true; }
inline void nothing(Thread&, const Instruction&) {}

}  // namespace fusedrnn::cuda::host
