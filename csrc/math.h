// The elementwise functions of the cells. T is a scalar (float, double) or a SIMD vector of them
// (GCC/Clang vector extension); the same code serves every instruction set, and CUDA.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX__
#include <immintrin.h>
#endif

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

// 2^x = scale + p: the scale is a power of two, p = scale (2^f - 1) of the fraction f.
template <class T>
struct Exp2Parts {
  T p, scale;
};

// 2^(factor x) for |factor x| within the exponent's range: factor x = n + f, |f| <= 1/2, then 2^f - 1 = f q(f). q is
// a minimax polynomial for float (relative error 1.1e-8) and the series of (2^f - 1) / f for double (below 1e-17).
template <class T>
FUSEDRNN_INLINE Exp2Parts<T> exp2_parts(T x, scalar_t<T> factor) {
  using S = scalar_t<T>;
  using Bits = typename Lanes<T>::bits;
  constexpr bool single = sizeof(S) == 4;
  // 1.5 * 2^mantissa bits, so that adding it rounds to an integer, plus the exponent's bias.
  constexpr S round = single ? S(12582912 + 127) : S(6755399441055744 + 1023);
  constexpr int mantissa = single ? 23 : 52;

  const T shifted = x * factor + round;  // its low bits hold n + bias
  const T n = shifted - round;
  const T f = x * factor - n;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = bits << mantissa;
  T scale;
  std::memcpy(&scale, &bits, sizeof(scale));

  T q;
  if constexpr (single) {
    q = f * S(1.5403512e-4) + S(1.33907353e-3);
    q = f * q + S(9.61823761e-3);
    q = f * q + S(5.55035733e-2);
    q = f * q + S(2.40226492e-1);
    q = f * q + S(6.93147182e-1);
  } else {  // ln(2)^k / k!
    q = f * S(1.3691488853904124e-12) + S(2.5678435993488206e-11);
    q = f * q + S(4.4455382718708114e-10);
    q = f * q + S(7.0549116208011233e-9);
    q = f * q + S(1.0178086009239699e-7);
    q = f * q + S(1.3215486790144309e-6);
    q = f * q + S(1.5252733804059841e-5);
    q = f * q + S(1.5403530393381610e-4);
    q = f * q + S(1.3333558146428443e-3);
    q = f * q + S(9.6181291076284772e-3);
    q = f * q + S(5.5504108664821580e-2);
    q = f * q + S(2.4022650695910072e-1);
    q = f * q + S(6.9314718055994531e-1);
  }
  return {f * scale * q, scale};
}

// Written so that NaN stays NaN.
template <class T>
FUSEDRNN_INLINE T clamp(T x, scalar_t<T> lo, scalar_t<T> hi) {
  const T low = T{} + lo, high = T{} + hi;
  // The compiler does not see that these are the vectors' maximum and minimum, which give x if it is NaN.
#ifdef __AVX__
  if constexpr (sizeof(T) == 32 && sizeof(lo) == 4) return _mm256_min_ps(high, _mm256_max_ps(low, x));
#endif
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 64 && sizeof(lo) == 4)
    return _mm512_maskz_min_ps(-1, high, _mm512_maskz_max_ps(-1, low, x));
#endif
  x = x < low ? low : x;
  return x > high ? high : x;
}

// a / b. On a GPU to 2 units in the last place, for |b| < 2^126: an exact one branches, and so would stand between
// neighbouring gates.
template <class T>
FUSEDRNN_INLINE T divide(T a, T b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, float>) return __fdividef(a, b);
#endif
  return a / b;
}

// 1 / (1 + exp(-x))
template <class T>
FUSEDRNN_INLINE T sigmoid(T x) {
  using S = scalar_t<T>;
  constexpr S limit = sizeof(S) == 4 ? 87 : 708;
  const Exp2Parts<T> e = exp2_parts(clamp(x, -limit, limit), S(-1.4426950408889634));
  return divide(T{} + S(1), e.p + (e.scale + S(1)));
}

// expm1(2x) / (expm1(2x) + 2): no cancellation near 0.
template <class T>
FUSEDRNN_INLINE T tanh(T x) {
  using S = scalar_t<T>;
  constexpr S limit = sizeof(S) == 4 ? 10 : 20;
  const Exp2Parts<T> e = exp2_parts(clamp(x, -limit, limit), S(2 * 1.4426950408889634));
  const T expm1 = e.p + (e.scale - S(1));
  return divide(expm1, expm1 + S(2));
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
