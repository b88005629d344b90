// A model without Python: a package of torch._inductor.aoti_compile_and_package with layers of fusedrnn in it, run on
// T steps of N sequences of I numbers from -1 to 1. Prints its first result, a number a line.
//
//   T=$(python -c "import torch; print(torch.__path__[0])")
//   c++ -std=c++20 aot_inductor.cpp -o aot_inductor -I$T/include -I$T/include/torch/csrc/api/include
//     -L$T/lib -Wl,-rpath,$T/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl
//   ./aot_inductor model.pt2 .../fusedrnn/lib/libfusedrnn.so 9 4 3
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>

int main(int count, char** arguments) {
  if (count != 6) return std::fprintf(stderr, "usage: aot_inductor PACKAGE LIBRARY T N I\n"), 2;
  if (!dlopen(arguments[2], RTLD_NOW)) return std::fprintf(stderr, "%s\n", dlerror()), 1;  // it registers the ops
  const int64_t T = std::atoi(arguments[3]), N = std::atoi(arguments[4]), I = std::atoi(arguments[5]);
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  const at::Tensor y = model.run({at::linspace(-1, 1, T * N * I).reshape({T, N, I})})[0].contiguous();
  for (int64_t i = 0; i < y.numel(); ++i) std::printf("%.9g\n", y.const_data_ptr<float>()[i]);
}
