// Memory, copies, and __device__ and __constant__ variables.
#include "fake_cudart.h"

#include <cstdlib>
#include <cstring>

// ---- for Python ----
EXPORTED int emulator_allocations(uint64_t* address_and_size, int capacity) {
  int count = 0;
  for (const auto& allocation : allocations()) {
    if (count < capacity) {
      address_and_size[2 * count] = (uint64_t)allocation.first;
      address_and_size[2 * count + 1] = allocation.second;
    }
    count++;
  }
  return count;
}

extern "C" {

// ---- memory: ordinary host memory, poisoned, tracked for bounds checks ----
cudaError_t cudaMalloc(void** pointer, size_t size) {
  const size_t kAlignment = 256;
  const size_t rounded = (size + kAlignment) / kAlignment * kAlignment;
  *pointer = aligned_alloc(kAlignment, rounded);
  if (!*pointer) return record(cudaErrorMemoryAllocation);
  memset(*pointer, 0xff, rounded);
  allocations()[*pointer] = size;
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  if (pointer && !allocations().erase(pointer)) return record(cudaErrorInvalidValue);
  free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t) {
  return cudaMalloc(pointer, size);
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) {
  return cudaFree(pointer);
}
cudaError_t cudaMallocManaged(void** pointer, size_t size, unsigned) {
  return cudaMalloc(pointer, size);
}
cudaError_t cudaMallocHost(void** pointer, size_t size) {
  return cudaMalloc(pointer, size);
}
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  return cudaMalloc(pointer, size);
}
cudaError_t cudaFreeHost(void* pointer) {
  return cudaFree(pointer);
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  return *free_bytes = *total = (size_t)16 << 30, cudaSuccess;
}

cudaError_t cudaMemset(void* destination, int value, size_t size) {
  memset(destination, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* destination, int value, size_t size, cudaStream_t) {
  return cudaMemset(destination, value, size);
}
cudaError_t cudaMemcpy(void* destination, const void* source, size_t size, cudaMemcpyKind) {
  memmove(destination, source, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t size, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(destination, source, size, kind);
}
cudaError_t cudaMemcpy2D(void* destination, size_t destination_pitch, const void* source,
                         size_t source_pitch, size_t width, size_t height, cudaMemcpyKind) {
  for (size_t row = 0; row < height; row++)
    memmove((char*)destination + row * destination_pitch, (const char*)source + row * source_pitch,
            width);
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* destination, size_t destination_pitch, const void* source,
                              size_t source_pitch, size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t) {
  return cudaMemcpy2D(destination, destination_pitch, source, source_pitch, width, height, kind);
}

// ---- __device__ and __constant__ variables ----
static cudaError_t find_symbol(const void* host_variable, uint64_t* address, uint64_t* size) {
  auto found = symbols().find(host_variable);
  if (found == symbols().end()) return record(cudaErrorInvalidSymbol);
  return record(hooks.symbol(found->second.image, found->second.name.c_str(), address, size));
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  uint64_t size;
  return find_symbol(symbol, (uint64_t*)pointer, &size);
}
cudaError_t cudaGetSymbolSize(size_t* size, const void* symbol) {
  uint64_t address;
  return find_symbol(symbol, &address, (uint64_t*)size);
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* source, size_t count, size_t offset,
                               cudaMemcpyKind) {
  uint64_t address, size;
  const cudaError_t error = find_symbol(symbol, &address, &size);
  if (error) return error;
  if (offset + count > size) return record(cudaErrorInvalidValue);
  memcpy((char*)address + offset, source, count);
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* source, size_t count,
                                    size_t offset, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, source, count, offset, kind);
}
cudaError_t cudaMemcpyFromSymbol(void* destination, const void* symbol, size_t count, size_t offset,
                                 cudaMemcpyKind) {
  uint64_t address, size;
  const cudaError_t error = find_symbol(symbol, &address, &size);
  if (error) return error;
  if (offset + count > size) return record(cudaErrorInvalidValue);
  memcpy(destination, (const char*)address + offset, count);
  return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbolAsync(void* destination, const void* symbol, size_t count,
                                      size_t offset, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyFromSymbol(destination, symbol, count, offset, kind);
}

}  // extern "C"
