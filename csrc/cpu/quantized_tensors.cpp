// Quantised weights as tensors and sizes: checked, so that no kernel reads past their memory.
#include <algorithm>

#include "operators.h"

namespace lora_kernels {
namespace {

// The bytes of t; an error unless it is a contiguous tensor on the CPU with memory for them.
int64_t bytes_of(const Tensor& t, const char* name) {
  TORCH_CHECK(t.device().is_cpu() && t.is_contiguous(), name,
              " must be a contiguous tensor on the CPU, got one on ", t.device());
  const auto bytes = int64_t(t.numel() * t.element_size());
  const auto held = int64_t(t.storage().nbytes()) - t.storage_offset() * int64_t(t.element_size());
  TORCH_CHECK(bytes == 0 || (t.const_data_ptr() != nullptr && bytes <= held), name,
              " must have memory for ", bytes, " bytes, its storage holds ", held);
  return bytes;
}

template <class T>
const T* data(const Tensor& t, const char* name, at::ScalarType type, int64_t count) {
  TORCH_CHECK(t.scalar_type() == type, name, " must be ", type, ", got ", t.scalar_type());
  TORCH_CHECK(t.numel() == count, name, " must have ", count, " elements, got ", t.numel());
  bytes_of(t, name);
  return static_cast<const T*>(t.const_data_ptr());
}

void read_nf4(QuantizedTensors& w, at::IntArrayRef sizes) {
  TORCH_CHECK(sizes.size() == 3 && sizes[0] >= 0 && sizes[1] >= 0 &&
                  (sizes[1] == 0 || sizes[0] <= INT64_MAX / sizes[1]),
              "sizes of nf4 must be N, K and transposed, got ", sizes);
  const auto& t = w.tensors;
  const bool doubly = t.size() == 6;
  TORCH_CHECK(doubly || t.size() == 3, "packed must be 3 or 6 tensors of nf4, got ", t.size());
  Quantized& q = w.weight;
  q.format = Format::NF4;
  q.rows = sizes[0];
  q.cols = sizes[1];
  w.transposed = sizes[2] != 0;
  const int64_t elements = q.rows * q.cols, blocks = ceil_div(elements, NF4_BLOCK);
  const int64_t bytes = bytes_of(t[0], "packed"), needed = ceil_div(elements, 2);
  TORCH_CHECK(bytes >= needed, "packed must have ", needed, " bytes, two elements of [", q.rows,
              ", ", q.cols, "] in each, got ", bytes);
  q.codes = static_cast<const uint8_t*>(t[0].const_data_ptr());
  q.code = data<float>(t[2], "code", at::kFloat, 16);
  if (!doubly) {
    q.absmax = data<float>(t[1], "absmax", at::kFloat, blocks);
    return;
  }
  q.absmax8 = data<uint8_t>(t[1], "absmax", at::kByte, blocks);
  q.code2 = data<float>(t[3], "code2", at::kFloat, 256);
  q.absmax2 = data<float>(t[4], "absmax2", at::kFloat, ceil_div(blocks, NF4_BLOCK2));
  q.offset = *data<float>(t[5], "offset", at::kFloat, 1);
}

// Codes of 8 bits in rows and a scale for each of their blocks: those of int8 are whole rows.
void read_bytes(QuantizedTensors& w, Format format, at::IntArrayRef sizes) {
  const auto& t = w.tensors;
  const bool fp8 = format == Format::FP8;
  TORCH_CHECK(sizes.size() == (fp8 ? 3 : 1) && (!fp8 || std::min(sizes[0], sizes[1]) >= 1),
              "sizes must be ", fp8 ? "two of a block and transposed" : "transposed alone",
              ", got ", sizes);
  TORCH_CHECK(t.size() == 2 && t[0].dim() == 2, "packed must be codes [N, K] and their scales");
  Quantized& q = w.weight;
  q.format = format;
  q.rows = t[0].size(0);
  q.cols = t[0].size(1);
  w.transposed = sizes.back() != 0;
  q.codes = data<uint8_t>(t[0], "codes", fp8 ? at::kFloat8_e4m3fn : at::kChar, q.rows * q.cols);
  // No block is larger than the matrix, so that sums of their sizes stay numbers.
  const int64_t most_rows = std::max<int64_t>(q.rows, 1), most_cols = std::max<int64_t>(q.cols, 1);
  q.block_rows = fp8 ? std::min(sizes[0], most_rows) : 1;
  q.block_cols = fp8 ? std::min(sizes[1], most_cols) : most_cols;
  const int64_t across = fp8 ? ceil_div(q.cols, q.block_cols) : 1;
  q.absmax = data<float>(t[1], "scales", at::kFloat, ceil_div(q.rows, q.block_rows) * across);
  // No boundary is within a row of one block, so that its runs may have any length.
  q.run = across == 1 || q.block_cols % BYTES_RUN == 0 ? BYTES_RUN : q.block_cols;
}

}  // namespace

QuantizedTensors::QuantizedTensors(at::TensorList packed, const std::string& format,
                                   at::IntArrayRef sizes, at::ScalarType dtype) {
  tensors.reserve(packed.size());
  for (const Tensor& t : packed) tensors.push_back(in_memory(t, "packed")->contiguous());
  weight.type = type_of(dtype);
  if (format == "nf4") {
    read_nf4(*this, sizes);
  } else {
    const bool fp8 = format == "fp8";
    TORCH_CHECK(fp8 || format == "int8", "format must be nf4, int8 or fp8, got ", format);
    read_bytes(*this, fp8 ? Format::FP8 : Format::INT8, sizes);
  }
}

Matrix QuantizedTensors::view() const {
  // Rows of one element too are more than one apart: a stride of 1 says along which dimension codes
  // lie.
  const int64_t row_stride = std::max<int64_t>(weight.cols, 2);
  const Matrix stored{nullptr, weight.type, weight.rows, weight.cols, row_stride, 1};
  return transposed ? stored.transposed() : stored;
}

}  // namespace lora_kernels
