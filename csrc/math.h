// The elementwise functions of the cells. T is a scalar (float, double) or a SIMD vector of them
// (GCC/Clang vector extension); the same code serves every instruction set, and CUDA.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define FUSEDRNN_INLINE __host__ __device__ __forceinline__
#else
// always_inline is more than speed: each instruction set's translation unit must keep its own copy.
#define FUSEDRNN_INLINE inline __attribute__((always_inline))
#endif

namespace fusedrnn {

// The scalar type of T, and the unsigned integer type of T's shape and width.
template <class T, bool = std::is_floating_point_v<T>>
struct Lanes {
  using scalar = T;
  using bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
};
template <class T>
struct Lanes<T, false> {
  using scalar = std::remove_reference_t<decltype(std::declval<T&>()[0])>;
  typedef typename Lanes<scalar>::bits bits __attribute__((vector_size(sizeof(T))));
};
template <class T>
using scalar_t = typename Lanes<T>::scalar;

// exp(x) = scale * (1 + p): the scale is a power of two, p = expm1 of the reduced argument.
template <class T>
struct ExpParts {
  T p, scale;
};

// Argument reduction x = n ln2 + r, |r| <= ln2 / 2, then a polynomial in r: Cephes' for float
// (S. Moshier, expf), Taylor to degree 13 for double (truncation below 1e-17).
template <class T>
FUSEDRNN_INLINE ExpParts<T> exp_parts(T x) {
  using S = scalar_t<T>;
  using Bits = typename Lanes<T>::bits;
  constexpr bool single = sizeof(S) == 4;
  constexpr S log2e = S(1.4426950408889634);
  constexpr S ln2_hi = single ? S(0.693359375) : S(0.693147180369123816490);
  constexpr S ln2_lo = single ? S(-2.12194440e-4) : S(1.90821492927058770002e-10);
  constexpr S round = single ? S(12582912.0) : S(6755399441055744.0);  // 1.5 * 2^mantissa bits
  constexpr int mantissa = single ? 23 : 52;
  constexpr int bias = single ? 127 : 1023;

  const T shifted = x * log2e + round;  // its low bits hold n, rounded to nearest
  const T n = shifted - round;
  const T r = (x - n * ln2_hi) - n * ln2_lo;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + bias) << mantissa;
  T scale;
  std::memcpy(&scale, &bits, sizeof(scale));

  T q;
  if constexpr (single) {
    q = r * S(1.9875691500e-4) + S(1.3981999507e-3);
    q = q * r + S(8.3334519073e-3);
    q = q * r + S(4.1665795894e-2);
    q = q * r + S(1.6666665459e-1);
    q = q * r + S(5.0000001201e-1);
  } else {
    q = r * S(1.0 / 6227020800.0) + S(1.0 / 479001600.0);
    q = q * r + S(1.0 / 39916800.0);
    q = q * r + S(1.0 / 3628800.0);
    q = q * r + S(1.0 / 362880.0);
    q = q * r + S(1.0 / 40320.0);
    q = q * r + S(1.0 / 5040.0);
    q = q * r + S(1.0 / 720.0);
    q = q * r + S(1.0 / 120.0);
    q = q * r + S(1.0 / 24.0);
    q = q * r + S(1.0 / 6.0);
    q = q * r + S(0.5);
  }
  return {q * (r * r) + r, scale};
}

// Written so that NaN stays NaN.
template <class T>
FUSEDRNN_INLINE T clamp(T x, scalar_t<T> lo, scalar_t<T> hi) {
  const T low = T{} + lo, high = T{} + hi;
  x = x < low ? low : x;
  return x > high ? high : x;
}

// 1 / (1 + exp(-x))
template <class T>
FUSEDRNN_INLINE T sigmoid(T x) {
  constexpr scalar_t<T> limit = sizeof(scalar_t<T>) == 4 ? 87 : 708;
  const ExpParts<T> e = exp_parts(clamp(-x, -limit, limit));
  return scalar_t<T>(1) / (e.p * e.scale + (e.scale + scalar_t<T>(1)));
}

// expm1(2x) / (expm1(2x) + 2): no cancellation near 0.
template <class T>
FUSEDRNN_INLINE T tanh(T x) {
  constexpr scalar_t<T> limit = sizeof(scalar_t<T>) == 4 ? 10 : 20;
  const ExpParts<T> e = exp_parts(clamp(x, -limit, limit) * scalar_t<T>(2));
  const T expm1 = e.p * e.scale + (e.scale - scalar_t<T>(1));
  return expm1 / (expm1 + scalar_t<T>(2));
}

// max(x, 0), NaN kept.
template <class T>
FUSEDRNN_INLINE T relu(T x) {
  return x < T{} ? T{} : x;
}

// d where y > 0, else 0: the derivative of relu by its result y, times d (NaN in y gives d, as in torch).
template <class T>
FUSEDRNN_INLINE T where_positive(T y, T d) {
  return y <= T{} ? T{} : d;
}

}  // namespace fusedrnn
