// Narrow floating-point elements as bits, and what every file that compiles for one instruction set
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
// float8_e4m3fn: as a float16 its sign, exponent and mantissa make its value divided by 256.
struct E4M3 {
  uint8_t bits;
};

}  // namespace lora_kernels
