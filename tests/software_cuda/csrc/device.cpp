// Errors and devices.
#include "runtime.h"

#include <dlfcn.h>
#include <cstdio>
#include <cstring>

namespace sc {

static thread_local cudaError_t last_error = cudaSuccess;

cudaError_t& device_error(int device) {
  static cudaError_t errors[64];
  return errors[device];
}

cudaError_t record(int error) {
  if (error != cudaSuccess) last_error = (cudaError_t)error;
  return (cudaError_t)error;
}
int unsupported(const char* function, const char* why) {
  fprintf(stderr, "software_cuda: %s %s\n", function, why);
  report("not implemented", std::string(function) + " " + why);
  return record(cudaErrorNotSupported);
}
static int64_t attribute(int number) {
  int64_t value = 0;
  if (!hooks.device_attribute) {
    fprintf(stderr, "software_cuda: no device description yet\n");
    return 0;
  }
  ask(hooks.device_attribute, number, &value);
  return value;
}

}  // namespace sc

using namespace sc;

// As good as new after a kernel that failed: what on a real device takes a new process.
EXPORTED void sc_reset_errors() {
  Lock lock;
  last_error = cudaSuccess;
  for (int i = 0; i < device_count(); i++) device_error(i) = cudaSuccess;
}

extern "C" {

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

#define ERROR_NAMES(X)                                                                             \
  X(cudaSuccess, "no error")                                                                       \
  X(cudaErrorInvalidValue, "invalid argument")                                                     \
  X(cudaErrorMemoryAllocation, "out of memory")                                                    \
  X(cudaErrorInvalidConfiguration, "invalid configuration argument")                               \
  X(cudaErrorInvalidSymbol, "invalid device symbol")                                               \
  X(cudaErrorMissingConfiguration, "__global__ function call is not configured")                   \
  X(cudaErrorInvalidDeviceFunction, "invalid device function")                                     \
  X(cudaErrorInvalidDevice, "invalid device ordinal")                                              \
  X(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution")                 \
  X(cudaErrorInvalidResourceHandle, "invalid resource handle")                                     \
  X(cudaErrorNotReady, "device not ready")                                                         \
  X(cudaErrorIllegalAddress, "an illegal memory access was encountered")                           \
  X(cudaErrorLaunchOutOfResources, "too many resources requested for launch")                      \
  X(cudaErrorLaunchTimeout, "the launch timed out and was terminated")                             \
  X(cudaErrorAssert, "device-side assert triggered")                                               \
  X(cudaErrorMisalignedAddress, "misaligned address")                                              \
  X(cudaErrorLaunchFailure, "unspecified launch failure")                                          \
  X(cudaErrorNotSupported, "operation not supported")                                              \
  X(cudaErrorInvalidClusterSize, "cluster misconfiguration")                                       \
  X(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing")         \
  X(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture")  \
  X(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream")    \
  X(cudaErrorStreamCaptureUnmatched, "capture was not initiated in this stream")                   \
  X(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work")                          \
  X(cudaErrorStreamCaptureMerge, "stream capture attempt would merge two captures")                \
  X(cudaErrorIllegalState, "the operation cannot be performed in the present state")               \
  X(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region") \
  X(cudaErrorCapturedEvent,                                                                        \
    "operation not permitted on an event last recorded in a capturing stream")

const char* cudaGetErrorString(cudaError_t error) {
#define STRING_CASE(name, text) \
  case name:                    \
    return text;
  switch (error) {
    ERROR_NAMES(STRING_CASE)
    default:
      return "unrecognized error code";
  }
}
const char* cudaGetErrorName(cudaError_t error) {
#define NAME_CASE(name, text) \
  case name:                  \
    return #name;
  switch (error) {
    ERROR_NAMES(NAME_CASE)
    default:
      return "cudaErrorUnknown";
  }
}

cudaError_t cudaGetDevice(int* device) { return *device = current_device(), cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = device_count(), cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return record(cudaErrorInvalidDevice);
  return current_device() = device, cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  snprintf(id, (size_t)length, "0000:%02X:00.0", device + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr number, int) {
  int64_t result = 0;
  const int error = ask(hooks.device_attribute, number, &result);
  return *value = (int)result, record(error);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= device_count()) return record(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  strcpy(p->name, "software CUDA device");
  memset(p->uuid.bytes, device + 1, sizeof p->uuid.bytes);
  size_t free_bytes;
  cudaMemGetInfo(&free_bytes, &p->totalGlobalMem);
  p->major = (int)attribute(cudaDevAttrComputeCapabilityMajor);
  p->minor = (int)attribute(cudaDevAttrComputeCapabilityMinor);
  p->warpSize = (int)attribute(cudaDevAttrWarpSize);
  p->multiProcessorCount = (int)attribute(cudaDevAttrMultiProcessorCount);
  p->maxThreadsPerBlock = (int)attribute(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsPerMultiProcessor = (int)attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->maxBlocksPerMultiProcessor = (int)attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  p->sharedMemPerBlock = (size_t)attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = (size_t)attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = (size_t)attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->reservedSharedMemPerBlock = (size_t)attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  p->regsPerBlock = (int)attribute(cudaDevAttrMaxRegistersPerBlock);
  p->regsPerMultiprocessor = (int)attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  p->l2CacheSize = (int)attribute(cudaDevAttrL2CacheSize);
  p->clusterLaunch = (int)attribute(cudaDevAttrClusterLaunch);
  p->memoryBusWidth = 5120;
  p->pciBusID = device + 1;
  p->concurrentKernels = p->unifiedAddressing = p->streamPrioritiesSupported = 1;
  p->asyncEngineCount = 3;
  p->textureAlignment = 512;
  for (int axis = 0; axis < 3; axis++) {
    p->maxGridSize[axis] = (int)attribute(cudaDevAttrMaxGridDimX + axis);
    p->maxThreadsDim[axis] = (int)attribute(cudaDevAttrMaxBlockDimX + axis);
  }
  return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  // torch asks for "cuMemcpy" and the like; the library exports them under the header's names.
  *function = driver ? dlsym(driver, symbol) : nullptr;
  if (!*function && driver) *function = dlsym(driver, (std::string(symbol) + "_v2").c_str());
  if (status)
    *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
