// Registration of kernels, launches, and what is asked about kernels.
#include "runtime.h"

#include <cxxabi.h>
#include <cstdio>
#include <unordered_map>

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

// Function-local statics: nvcc's registration code runs before the constructors of this file.
std::vector<const void*>& images() {
  static auto* value = new std::vector<const void*>;
  return *value;
}
std::unordered_map<const void*, sc::Kernel>& kernels() {
  static auto* value = new std::unordered_map<const void*, sc::Kernel>;
  return *value;
}
std::unordered_map<const void*, sc::Kernel>& symbols() {
  static auto* value = new std::unordered_map<const void*, sc::Kernel>;
  return *value;
}
thread_local std::vector<Configuration> configurations;

sc::Kernel* find_kernel(const void* host_function) {
  auto found = kernels().find(host_function);
  return found == kernels().end() ? nullptr : &found->second;
}

}  // namespace

namespace sc {

cudaError_t launch(const Kernel* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                   void** arguments, const dim3* cluster, int cooperative, Stream* stream) {
  jitter();
  if (!kernel || !hooks.prepare_launch) return cudaErrorInvalidDeviceFunction;
  if (!stream || stream->device != current_device()) return cudaErrorInvalidResourceHandle;
  if (kernel->name.find("11spin_kernel") != std::string::npos)  // torch.cuda._sleep
    return enqueue(stream, "sleep", [] { return cudaSuccess; }, {}, /*hold=*/true);
  Lock lock;
  if (device_error(stream->device)) return device_error(stream->device);
  const unsigned grid_sizes[3] = {grid.x, grid.y, grid.z};
  const unsigned block_sizes[3] = {block.x, block.y, block.z};
  int64_t id = 0, address_count = 0;
  const uint64_t* addresses = nullptr;
  if (const int error = ask(hooks.prepare_launch, kernel->image, kernel->name.c_str(), grid_sizes,
                            block_sizes, shared_bytes, arguments, cluster ? &cluster->x : nullptr,
                            cooperative, &id, &addresses, &address_count)) {
    // A launch that is refused leaves the device as it was; a kernel that cannot run here does not.
    if (error == cudaErrorLaunchFailure) device_error(stream->device) = cudaErrorLaunchFailure;
    return (cudaError_t)error;
  }
  counters.launches++;
  if (torch_hooks.current_stream &&
      find_stream(torch_hooks.current_stream(stream->device)) != stream)
    report("foreign stream", kernel->name + " was put on a stream that is not the current one");
  // The prepared launch lives as long as a queue or a graph holds its work.
  std::shared_ptr<int64_t> prepared(new int64_t(id), [](int64_t* held) {
    ask(hooks.drop_launch, *held);
    delete held;
  });
  auto ranges = ranges_of(addresses, (size_t)address_count, stream->device, kernel->name);
  return enqueue(
      stream, kernel->name,
      [prepared, ranges] {
        return ask(hooks.run_launch, *prepared, ranges.data(), (int64_t)ranges.size());
      },
      ranges);
}

}  // namespace sc

using namespace sc;

EXPORTED int sc_image_count() { return (int)images().size(); }
EXPORTED const void* sc_image(int index) { return images()[index]; }

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
char __cudaInitModule(void**) { return 1; }
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
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  return record(launch(find_kernel(function), grid, block, shared_bytes, arguments, nullptr, 0,
                       find_stream(stream)));
}
static const cudaLaunchAttributeValue* find_attribute(const cudaLaunchConfig_t* config,
                                                      cudaLaunchAttributeID id) {
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == id) return &config->attrs[i].val;
  return nullptr;
}
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
  return record(launch(find_kernel(function), config->gridDim, config->blockDim,
                       config->dynamicSmemBytes, arguments, find_cluster(config, &cluster),
                       cooperative ? cooperative->cooperative : 0, find_stream(config->stream)));
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)find_kernel(function);
  return *kernel ? cudaSuccess : record(cudaErrorInvalidDeviceFunction);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t stream) {
  return record(launch((const Kernel*)kernel, grid, block, shared_bytes, arguments, nullptr, 0,
                       find_stream(stream)));
}

// ---- kernels ----
#define FIND_KERNEL(function)                   \
  const Kernel* kernel = find_kernel(function); \
  if (!kernel) return record(cudaErrorInvalidDeviceFunction)
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  jitter();
  FIND_KERNEL(function);
  return record(
      ask(hooks.set_kernel_attribute, kernel->image, kernel->name.c_str(), attribute, value));
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  FIND_KERNEL(function);
  int error = cudaSuccess;
  auto get = [&](int attribute) {
    int64_t value = 0;
    if (!error)
      error = ask(hooks.kernel_attribute, kernel->image, kernel->name.c_str(), attribute, &value);
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
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int block_threads,
                                                                   size_t shared_bytes, unsigned) {
  FIND_KERNEL(function);
  return record(ask(hooks.resident_blocks, kernel->image, kernel->name.c_str(), block_threads,
                    shared_bytes, blocks));
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int block_threads, size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, block_threads,
                                                                shared_bytes, 0);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                           const cudaLaunchConfig_t* config) {
  FIND_KERNEL(function);
  dim3 storage;
  const dim3* cluster = find_cluster(config, &storage);
  const int threads = (int)(config->blockDim.x * config->blockDim.y * config->blockDim.z);
  return record(ask(hooks.resident_clusters, kernel->image, kernel->name.c_str(), threads,
                    config->dynamicSmemBytes, cluster ? &cluster->x : nullptr, clusters));
}
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, const void* function,
                                                 const cudaLaunchConfig_t*) {
  FIND_KERNEL(function);
  int64_t value = 0;
  const int error =
      ask(hooks.kernel_attribute, kernel->image, kernel->name.c_str(), MAX_CLUSTER_BLOCKS, &value);
  return *blocks = (int)value, record(error);
}

// ---- __device__ and __constant__ variables ----
cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  auto found = symbols().find(symbol);
  if (found == symbols().end()) return record(cudaErrorInvalidSymbol);
  uint64_t size;
  return record(ask(hooks.symbol, found->second.image, found->second.name.c_str(),
                    (uint64_t*)pointer, &size));
}

}  // extern "C"
