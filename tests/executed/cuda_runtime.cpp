// As much of the CUDA runtime, and of PyTorch's CUDA shim, as the extension's host code calls, for
// machines without a GPU.
//
// A launch is handed to `launch`, which the test sets; tensors on the CPU count as tensors of
// device `tensor_device`. There is no allocation, copy, event or synchronisation: a library that
// called one would not link.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <string>
#include <unordered_map>
#include <utility>

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
};

constexpr int DEVICES = 4;
Configuration pushed;
cudaError_t last_error = cudaSuccess;

std::unordered_map<const void*, const char*>& kernels() {  // by their host functions
  static std::unordered_map<const void*, const char*> names;
  return names;
}

}  // namespace

extern "C" {

// Set and read by the test.
int (*launch)(const char* kernel, const unsigned grid[3], const unsigned block[3], size_t shared,
              void* stream, void** arguments) = nullptr;
int32_t tensor_device = 0, current_device = 0;
void* streams[DEVICES] = {};  // each device's current stream

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernels()[host] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t stream) {
  const unsigned grid3[] = {grid.x, grid.y, grid.z}, block3[] = {block.x, block.y, block.z};
  const auto kernel = kernels().find(host);
  last_error = launch == nullptr || kernel == kernels().end()
                   ? cudaErrorInvalidDeviceFunction
                   : cudaError_t(launch(kernel->second, grid3, block3, shared, stream, arguments));
  return last_error;
}

// The form that nvcc calls from CUDA 13 on.
cudaError_t __cudaGetKernel(void** kernel, const void* host) {
  *kernel = const_cast<void*>(host);
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string text;
  text = "CUDA error " + std::to_string(int(error));
  return text.c_str();
}

AOTITorchError __real_aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type);

AOTITorchError __wrap_aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type) {
  const AOTITorchError error = __real_aoti_torch_get_device_type(tensor, type);
  if (*type == aoti_torch_device_type_cpu()) *type = aoti_torch_device_type_cuda();
  return error;
}

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = tensor_device;
  return 0;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  if (device < 0 || device >= DEVICES) return 1;
  *stream = streams[device];
  return 0;
}

AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new int32_t(std::exchange(current_device, device)));
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  int32_t* before = reinterpret_cast<int32_t*>(guard);
  current_device = *before;
  delete before;
  return 0;
}

}  // extern "C"
