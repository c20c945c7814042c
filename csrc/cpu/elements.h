// Half-precision elements as bits, and what every file that compiles for one instruction set
// includes beforehand.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace lora_kernels {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

}  // namespace lora_kernels
