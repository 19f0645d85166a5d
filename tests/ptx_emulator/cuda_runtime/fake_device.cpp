// Errors, the device, streams and events.
#include "fake_cudart.h"

#include <cstring>

// ---- for Python ----
EXPORTED void emulator_clear_error() {
  last_error = cudaSuccess;
}

extern "C" {

// ---- errors ----
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() {
  return last_error;
}

#define ERROR_NAMES(X)                                                             \
  X(cudaSuccess, "no error")                                                       \
  X(cudaErrorInvalidValue, "invalid argument")                                     \
  X(cudaErrorMemoryAllocation, "out of memory")                                    \
  X(cudaErrorInvalidConfiguration, "invalid configuration argument")               \
  X(cudaErrorInvalidSymbol, "invalid device symbol")                               \
  X(cudaErrorMissingConfiguration, "__global__ function call is not configured")   \
  X(cudaErrorInvalidDeviceFunction, "invalid device function")                     \
  X(cudaErrorInvalidDevice, "invalid device ordinal")                              \
  X(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution") \
  X(cudaErrorIllegalAddress, "an illegal memory access was encountered")           \
  X(cudaErrorLaunchOutOfResources, "too many resources requested for launch")      \
  X(cudaErrorLaunchTimeout, "the launch timed out and was terminated")             \
  X(cudaErrorAssert, "device-side assert triggered")                               \
  X(cudaErrorMisalignedAddress, "misaligned address")                              \
  X(cudaErrorLaunchFailure, "unspecified launch failure")                          \
  X(cudaErrorNotSupported, "operation not supported")                              \
  X(cudaErrorInvalidClusterSize, "cluster misconfiguration")

const char* cudaGetErrorString(cudaError_t error) {
#define STRING_CASE(name, text) \
  case name: return text;
  switch (error) {
    ERROR_NAMES(STRING_CASE)
    default: return "unrecognized error code";
  }
}
const char* cudaGetErrorName(cudaError_t error) {
#define NAME_CASE(name, text) \
  case name: return #name;
  switch (error) {
    ERROR_NAMES(NAME_CASE)
    default: return "cudaErrorUnknown";
  }
}

// ---- devices ----
cudaError_t cudaGetDevice(int* device) {
  return *device = 0, cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  return *count = 1, cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return record(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
cudaError_t cudaDeviceReset() {
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  return *version = CUDART_VERSION, cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  return *version = CUDART_VERSION, cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = *greatest = 0, cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  int64_t result = 0;
  const int error = hooks.device_attribute(attribute, &result);
  *value = (int)result;
  return record(error);
}

static int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  cudaDeviceGetAttribute(&value, attribute, 0);
  return value;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "emulated device");
  properties->major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  properties->minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  properties->warpSize = device_attribute(cudaDevAttrWarpSize);
  properties->multiProcessorCount = device_attribute(cudaDevAttrMultiProcessorCount);
  properties->maxThreadsPerBlock = device_attribute(cudaDevAttrMaxThreadsPerBlock);
  properties->maxThreadsPerMultiProcessor =
      device_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  properties->maxBlocksPerMultiProcessor = device_attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  properties->sharedMemPerBlock = device_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  properties->sharedMemPerBlockOptin = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  properties->sharedMemPerMultiprocessor =
      device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  properties->reservedSharedMemPerBlock = device_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  properties->regsPerBlock = device_attribute(cudaDevAttrMaxRegistersPerBlock);
  properties->regsPerMultiprocessor = device_attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  properties->l2CacheSize = device_attribute(cudaDevAttrL2CacheSize);
  for (int axis = 0; axis < 3; axis++) {
    properties->maxGridSize[axis] =
        device_attribute((cudaDeviceAttr)(cudaDevAttrMaxGridDimX + axis));
    properties->maxThreadsDim[axis] =
        device_attribute((cudaDeviceAttr)(cudaDevAttrMaxBlockDimX + axis));
  }
  return cudaSuccess;
}

// ---- streams and events ----
static void* const kHandle = (void*)0x10;  // any stream or event

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return *stream = (cudaStream_t)kHandle, cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return *event = (cudaEvent_t)kHandle, cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return cudaEventCreate(event);
}
cudaError_t cudaEventDestroy(cudaEvent_t) {
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) {
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t) {
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 0, cudaSuccess;
}

}  // extern "C"
