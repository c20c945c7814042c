// The version of PyTorch that this library was compiled against, as text that the file holds:
// PyTorch's C++ API changes from one minor version to the next, and lora_kernels/backends/cpu.py
// reads this before it loads the library.
#include <torch/version.h>

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

extern "C" __attribute__((used, visibility("default"))) const char lora_kernels_built_with[] =
    "lora_kernels built with torch " TEXT(TORCH_VERSION_MAJOR) "." TEXT(TORCH_VERSION_MINOR) ";";
