// The fake libcuda.so.1: what torch's DriverAPI and Triton's launcher use of the driver API.
// Everything else that they name is a loud error, see build.py.
#include <cuda.h>

#include <cstring>
#include <fstream>
#include <iterator>

#include "runtime.h"

using namespace sc;

static int contexts[64];

static CUresult driver_error(int runtime_error) {  // the numbers are the same, but for these
  switch (runtime_error) {
    case cudaErrorInvalidDeviceFunction:
      return CUDA_ERROR_NOT_FOUND;
    case cudaErrorInvalidConfiguration:
      return CUDA_ERROR_INVALID_VALUE;
    default:
      return (CUresult)runtime_error;
  }
}

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = CUDART_VERSION, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) {
  return *text = cudaGetErrorString((cudaError_t)error), CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** text) {
  return *text = cudaGetErrorName((cudaError_t)error), CUDA_SUCCESS;
}
// NVRTC asks for its cache of compiled kernels, goes without one, and crashes without this
// function.
CUresult cuGetExportTable(const void**, const CUuuid*) { return CUDA_ERROR_NOT_FOUND; }

// ---- devices and contexts: the primary context of each device is the only one ----
CUresult cuDeviceGetCount(int* count) { return *count = device_count(), CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal < 0 || ordinal >= device_count()) return CUDA_ERROR_INVALID_DEVICE;
  return *device = ordinal, CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int length, CUdevice) {
  return strncpy(name, "software CUDA device", (size_t)length), CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  if (attribute == CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE) return *value = 2619000, CUDA_SUCCESS;
  if (attribute == CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH) return *value = 5120, CUDA_SUCCESS;
  return (CUresult)cudaDeviceGetAttribute(value, (cudaDeviceAttr)attribute, device);
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = (CUcontext)&contexts[device], CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  return *context = (CUcontext)&contexts[current_device()], CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  return (CUresult)cudaSetDevice((int)((int*)context - contexts));
}
CUresult cuCtxGetDevice(CUdevice* device) { return *device = current_device(), CUDA_SUCCESS; }
CUresult cuLogsRegisterCallback(CUlogsCallback, void*, CUlogsCallbackHandle* handle) {
  return *handle = nullptr, CUDA_SUCCESS;  // there is never anything to log
}
CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  sc::Lock lock;
  auto* found = find_allocation((const void*)pointer);
  if (!found) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return *(CUdeviceptr*)value = pointer, CUDA_SUCCESS;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
    return *(int*)value = found->second.device, CUDA_SUCCESS;
  return (CUresult)unsupported("cuPointerGetAttribute", "does not know this attribute");
}

// ---- modules: the hook finds the PTX that a cubin was made of ----
CUresult cuModuleLoadData(CUmodule* module, const void* data) {
  int image = 0;
  if (!hooks.load_module) return CUDA_ERROR_NOT_INITIALIZED;
  if (const int error = ask(hooks.load_module, data, &image)) return driver_error(error);
  return *module = (CUmodule)(intptr_t)(image + 1), CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule* module, const char* path) {  // torch.compile's own launcher
  std::ifstream file(path, std::ios::binary);
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  const std::string data((std::istreambuf_iterator<char>(file)), {});
  return cuModuleLoadData(module, data.data());
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  auto* kernel = new Kernel{(int)(intptr_t)module - 1, name};  // lives on: queues may name it
  int64_t value = 0;
  if (ask(hooks.kernel_attribute, kernel->image, name, MAX_THREADS, &value))
    return delete kernel, CUDA_ERROR_NOT_FOUND;
  return *function = (CUfunction)kernel, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  auto* kernel = (const Kernel*)function;
  int number;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      return *value = 32, CUDA_SUCCESS;  // unknown here
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      return *value = 0, CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      number = MAX_THREADS;
      break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      number = STATIC_SHARED;
      break;
    default:
      return (CUresult)unsupported("cuFuncGetAttribute", "does not know this attribute");
  }
  int64_t found = 0;
  const int error =
      ask(hooks.kernel_attribute, kernel->image, kernel->name.c_str(), number, &found);
  return *value = (int)found, driver_error(error);
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  auto* kernel = (const Kernel*)function;
  if (attribute > CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE)
    return CUDA_ERROR_INVALID_VALUE;  // oversized shared memory: no such device
  return driver_error(
      ask(hooks.set_kernel_attribute, kernel->image, kernel->name.c_str(), attribute, value));
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments,
                          void** extra) {
  if (extra) return (CUresult)unsupported("cuLaunchKernelEx", "with packed arguments");
  dim3 storage, *cluster = nullptr;
  int cooperative = 0;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      const auto& dim = attribute.value.clusterDim;
      storage = dim3(dim.x, dim.y, dim.z);
      cluster = &storage;
    } else if (attribute.id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) {
      cooperative = attribute.value.cooperative;
    }
  }
  return driver_error(
      launch((const Kernel*)function, dim3(config->gridDimX, config->gridDimY, config->gridDimZ),
             dim3(config->blockDimX, config->blockDimY, config->blockDimZ), config->sharedMemBytes,
             arguments, cluster, cooperative, find_stream((cudaStream_t)config->hStream)));
}
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        CUstream stream, void** arguments, void** extra) {
  CUlaunchConfig config = {};
  config.gridDimX = grid_x, config.gridDimY = grid_y, config.gridDimZ = grid_z;
  config.blockDimX = block_x, config.blockDimY = block_y, config.blockDimZ = block_z;
  config.sharedMemBytes = shared_bytes;
  config.hStream = stream;
  return cuLaunchKernelEx(&config, function, arguments, extra);
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function,
                                      const CUlaunchConfig* config) {
  auto* kernel = (const Kernel*)function;
  unsigned sizes[3] = {1, 1, 1};
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      const auto& dim = config->attrs[i].value.clusterDim;
      sizes[0] = dim.x, sizes[1] = dim.y, sizes[2] = dim.z;
    }
  const int threads = (int)(config->blockDimX * config->blockDimY * config->blockDimZ);
  return driver_error(ask(hooks.resident_clusters, kernel->image, kernel->name.c_str(), threads,
                          config->sharedMemBytes, sizes, clusters));
}

}  // extern "C"
