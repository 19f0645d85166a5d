// Registration of kernels, launches, and what is asked about kernels.
#include "fake_cudart.h"

#include <vector>

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

// Function-local statics, as in fake_cudart.h.
std::vector<const void*>& images() {
  static std::vector<const void*> value;
  return value;
}
std::unordered_map<const void*, Kernel>& kernels() {
  static std::unordered_map<const void*, Kernel> value;
  return value;
}

thread_local std::vector<Configuration> configurations;

Kernel* find_kernel(const void* host_function) {
  auto found = kernels().find(host_function);
  return found == kernels().end() ? nullptr : &found->second;
}

}  // namespace

// ---- for Python ----
EXPORTED void emulator_set_hooks(const Hooks* new_hooks) {
  hooks = *new_hooks;
}
EXPORTED int emulator_image_count() {
  return (int)images().size();
}
EXPORTED const void* emulator_image(int index) {
  return images()[index];
}

extern "C" {

// ---- registration, called by the constructors nvcc generates ----
void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const void* data;
    void* unused;
  };
  images().push_back(((const Wrapper*)wrapper)->data);
  return (void**)(images().size() - 1);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) {
  return 1;
}

void __cudaRegisterFunction(void** image, const char* host_function, char*, const char* name, int,
                            uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host_function] = {(int)(intptr_t)image, name};
}
void __cudaRegisterVar(void** image, char* host_variable, char*, const char* name, int, size_t, int,
                       int) {
  symbols()[host_variable] = {(int)(intptr_t)image, name};
}

// ---- launches ----
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                     cudaStream_t stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  if (configurations.empty()) return record(cudaErrorMissingConfiguration);
  const Configuration top = configurations.back();
  configurations.pop_back();
  *grid = top.grid;
  *block = top.block;
  *shared_bytes = top.shared_bytes;
  *(cudaStream_t*)stream = top.stream;
  return cudaSuccess;
}

static cudaError_t launch(const Kernel* kernel, dim3 grid, dim3 block, void** arguments,
                          size_t shared_bytes, const dim3* cluster, int cooperative) {
  if (!kernel || !hooks.launch) return record(cudaErrorInvalidDeviceFunction);
  const unsigned grid_sizes[3] = {grid.x, grid.y, grid.z};
  const unsigned block_sizes[3] = {block.x, block.y, block.z};
  return record(hooks.launch(kernel->image, kernel->name.c_str(), grid_sizes, block_sizes,
                             shared_bytes, arguments, cluster ? &cluster->x : nullptr,
                             cooperative));
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  return launch(find_kernel(function), grid, block, arguments, shared_bytes, nullptr, 0);
}
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block,
                                        void** arguments, size_t shared_bytes, cudaStream_t) {
  return launch(find_kernel(function), grid, block, arguments, shared_bytes, nullptr, 1);
}
static const cudaLaunchAttributeValue* find_attribute(const cudaLaunchConfig_t* config,
                                                      cudaLaunchAttributeID id) {
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == id) return &config->attrs[i].val;
  return nullptr;
}
// The cluster dimensions a launch asks for, or null; `storage` holds them.
static const dim3* find_cluster(const cudaLaunchConfig_t* config, dim3* storage) {
  const auto* value = find_attribute(config, cudaLaunchAttributeClusterDimension);
  if (!value) return nullptr;
  *storage = dim3(value->clusterDim.x, value->clusterDim.y, value->clusterDim.z);
  return storage;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  dim3 cluster;
  const auto* cooperative = find_attribute(config, cudaLaunchAttributeCooperative);
  return launch(find_kernel(function), config->gridDim, config->blockDim, arguments,
                config->dynamicSmemBytes, find_cluster(config, &cluster),
                cooperative ? cooperative->cooperative : 0);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)find_kernel(function);
  return *kernel ? cudaSuccess : record(cudaErrorInvalidDeviceFunction);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t) {
  return launch((const Kernel*)kernel, grid, block, arguments, shared_bytes, nullptr, 0);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                    size_t shared_bytes, cudaStream_t stream) {
  return __cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

// ---- kernels ----
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const Kernel* kernel = find_kernel(function);
  if (!kernel) return record(cudaErrorInvalidDeviceFunction);
  return record(hooks.set_kernel_attribute(kernel->image, kernel->name.c_str(), attribute, value));
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) {
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const Kernel* kernel = find_kernel(function);
  if (!kernel) return record(cudaErrorInvalidDeviceFunction);
  int error = cudaSuccess;
  auto get = [&](int attribute) {
    int64_t value = 0;
    if (!error)
      error = hooks.kernel_attribute(kernel->image, kernel->name.c_str(), attribute, &value);
    return (int)value;
  };
  *attributes = cudaFuncAttributes{};
  attributes->sharedSizeBytes = (size_t)get(STATIC_SHARED);
  attributes->maxDynamicSharedSizeBytes = get(cudaFuncAttributeMaxDynamicSharedMemorySize);
  attributes->maxThreadsPerBlock = get(MAX_THREADS);
  attributes->clusterDimMustBeSet = get(cudaFuncAttributeClusterDimMustBeSet);
  attributes->requiredClusterWidth = get(cudaFuncAttributeRequiredClusterWidth);
  attributes->requiredClusterHeight = get(cudaFuncAttributeRequiredClusterHeight);
  attributes->requiredClusterDepth = get(cudaFuncAttributeRequiredClusterDepth);
  attributes->nonPortableClusterSizeAllowed = get(cudaFuncAttributeNonPortableClusterSizeAllowed);
  return record(error);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                           const cudaLaunchConfig_t* config) {
  const Kernel* kernel = find_kernel(function);
  if (!kernel) return record(cudaErrorInvalidDeviceFunction);
  dim3 storage;
  const dim3* cluster = find_cluster(config, &storage);
  const int threads = (int)(config->blockDim.x * config->blockDim.y * config->blockDim.z);
  return record(hooks.resident_clusters(kernel->image, kernel->name.c_str(), threads,
                                        config->dynamicSmemBytes, cluster ? &cluster->x : nullptr,
                                        clusters));
}
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, const void* function,
                                                 const cudaLaunchConfig_t*) {
  const Kernel* kernel = find_kernel(function);
  if (!kernel) return record(cudaErrorInvalidDeviceFunction);
  int64_t value = 0;
  const int error =
      hooks.kernel_attribute(kernel->image, kernel->name.c_str(), MAX_CLUSTER_BLOCKS, &value);
  *blocks = (int)value;
  return record(error);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int block_threads,
                                                                   size_t shared_bytes, unsigned) {
  const Kernel* kernel = find_kernel(function);
  if (!kernel) return record(cudaErrorInvalidDeviceFunction);
  return record(hooks.resident_blocks(kernel->image, kernel->name.c_str(), block_threads,
                                      shared_bytes, blocks));
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int block_threads, size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, block_threads,
                                                                shared_bytes, 0);
}

}  // extern "C"
