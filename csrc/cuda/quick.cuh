// Numbers for which the GPU's own approximations are good enough: those that tensor cores multiply, rounded to 11 bits
// or fewer. The functions of csrc/math.h in a few instructions, to an absolute error of 4e-7.
#pragma once

#include "../math.h"
#include "device.cuh"

namespace fusedrnn::cuda {

struct Quick {
  float value;

  Quick() = default;
  FUSEDRNN_DEVICE Quick(float value) : value(value) {}
  FUSEDRNN_DEVICE explicit operator float() const { return value; }
  FUSEDRNN_DEVICE friend Quick operator+(Quick a, Quick b) { return a.value + b.value; }
  FUSEDRNN_DEVICE friend Quick operator-(Quick a, Quick b) { return a.value - b.value; }
  FUSEDRNN_DEVICE friend Quick operator*(Quick a, Quick b) { return a.value * b.value; }
  FUSEDRNN_DEVICE friend bool operator<(Quick a, Quick b) { return a.value < b.value; }
  FUSEDRNN_DEVICE friend bool operator<=(Quick a, Quick b) { return a.value <= b.value; }
};

// Where exp overflows, the reciprocal is 0.
FUSEDRNN_DEVICE Quick sigmoid(Quick x) { return approximate_inverse(1 + approximate_exp2(-1.442695041f * x.value)); }
FUSEDRNN_DEVICE Quick tanh(Quick x) {
  return 1 - 2 * approximate_inverse(1 + approximate_exp2(2 * 1.442695041f * x.value));
}

}  // namespace fusedrnn::cuda
