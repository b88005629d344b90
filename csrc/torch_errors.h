// What torch raised when one of its C functions fails: those give a code alone, and torch's headers, as of the version
// that they are compiled for, raise the name of the function. The build includes this before everything else.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

// Of libtorch, from torch 2.13 on; null before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fusedrnn {

[[noreturn]] inline void raise_torch_error(const char* call) {
  if (torch_exception_get_what_without_backtrace)
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  throw std::runtime_error("fusedrnn: torch failed, perhaps out of memory, in " + std::string(call));
}

}  // namespace fusedrnn

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)    \
  if ((call) != TORCH_SUCCESS) {        \
    fusedrnn::raise_torch_error(#call); \
  }
