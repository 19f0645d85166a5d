// Memory and copies. Device memory is host memory, filled with ones (NaN) when it is allocated.
//
// torch's caching allocator stands between a tensor and cudaMalloc. It reports what it hands out
// (fallback.cpp listens), so that a kernel may access the very bytes of the tensors it was given,
// and a tensor's fresh memory is NaN even where it was another tensor's before.
#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace sc {

namespace {

constexpr int kMaxDevices = 64;
constexpr int kFresh = 0xff, kFreed = 0xfd;

std::map<uintptr_t, Allocation>& allocations() {  // of cudaMalloc and its relatives
  static auto* value = new std::map<uintptr_t, Allocation>;
  return *value;
}
std::map<uintptr_t, Allocation>& tensors() {  // parts of them
  static auto* value = new std::map<uintptr_t, Allocation>;
  return *value;
}
std::map<uintptr_t, Allocation>& freed_tensors() {  // until their memory is handed out again
  static auto* value = new std::map<uintptr_t, Allocation>;
  return *value;
}
// Freed tensors that recorded streams may still use: what torch's allocator has them wait for.
std::map<uintptr_t, std::vector<std::shared_ptr<Mark>>>& awaiting_streams() {
  static auto* value = new std::map<uintptr_t, std::vector<std::shared_ptr<Mark>>>;
  return *value;
}
thread_local uintptr_t being_freed = 0;  // the allocator records its events right behind
size_t used[kMaxDevices];

const std::pair<const uintptr_t, Allocation>* holder(const std::map<uintptr_t, Allocation>& map,
                                                     uintptr_t address) {
  auto after = map.upper_bound(address);
  if (after == map.begin()) return nullptr;
  const auto& found = *std::prev(after);
  return address < found.first + std::max<size_t>(found.second.size, 1) ? &found : nullptr;
}

size_t total_memory() {
  static const size_t bytes = [] {
    const char* text = getenv("SOFTWARE_CUDA_MEMORY");
    return text && *text ? strtoull(text, nullptr, 10) : (size_t)80 << 30;
  }();
  return bytes;
}

cudaError_t allocate(void** pointer, size_t size, MemoryKind kind) {
  Lock lock;
  if (forbidden_in_capture()) return cudaErrorStreamCaptureUnsupported;
  const int device = current_device();
  if (device_error(device)) return device_error(device);
  if (kind == MemoryKind::device && used[device] + size > total_memory())
    return cudaErrorMemoryAllocation;
  const size_t rounded = (size + 512) / 512 * 512;
  *pointer = aligned_alloc(512, rounded);
  if (!*pointer) return cudaErrorMemoryAllocation;
  memset(*pointer, kFresh, rounded);
  allocations()[(uintptr_t)*pointer] = {size, device, kind};
  if (kind == MemoryKind::device) used[device] += size;
  counters.mallocs++;
  if (kind == MemoryKind::device && torch_hooks.watch_allocator) {
    torch_hooks.watch_allocator();
    torch_hooks.watch_allocator = nullptr;
  }
  return cudaSuccess;
}

// A real cudaFree waits for the device. Here the memory only lives on until the queues are empty,
// so that freeing does not hide a missing wait.
std::vector<void*>& waiting_to_be_freed() {
  static auto* value = new std::vector<void*>;
  return *value;
}
cudaError_t release(void* pointer) {
  Lock lock;
  if (!pointer) return cudaSuccess;
  auto found = allocations().find((uintptr_t)pointer);
  if (found == allocations().end() || found->second.registered) return cudaErrorInvalidValue;
  if (found->second.kind == MemoryKind::device) used[found->second.device] -= found->second.size;
  counters.frees++;
  waiting_to_be_freed().push_back(pointer);
  if (any_pending()) return cudaSuccess;
  for (void* old : waiting_to_be_freed()) {
    auto dead = allocations().find((uintptr_t)old);
    if (dead == allocations().end()) continue;
    auto& gone = freed_tensors();
    gone.erase(gone.lower_bound(dead->first), gone.lower_bound(dead->first + dead->second.size));
    memset(old, kFreed, dead->second.size);  // what still uses it should notice
    allocations().erase(dead);
    free(old);
  }
  waiting_to_be_freed().clear();
  return cudaSuccess;
}

bool pageable(const void* address) { return !find_allocation(address); }
bool is_pinned(const void* address) {
  const auto* found = find_allocation(address);
  return found && found->second.kind == MemoryKind::pinned;
}

cudaError_t copy_async(void* to, const void* from, size_t size, Stream* stream) {
  Lock lock;
  if (!size) return cudaSuccess;
  const bool to_pageable = pageable(to), from_pageable = pageable(from);
  if (stream->capture && (to_pageable || from_pageable)) {
    stream->capture->invalid = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  if (device_error(stream->device)) return device_error(stream->device);
  if (to_pageable) {  // returns when it is done
    note_wait("copy to the host");
    if (const cudaError_t error = drain(stream)) return error;
    memmove(to, from, size);
    return cudaSuccess;
  }
  const Range target{(uint64_t)to, (uint64_t)to + size};
  if (from_pageable) {  // is staged: the source may change when the call has returned
    auto staged = std::make_shared<std::string>((const char*)from, size);
    const auto copy = [=] { return memcpy(to, staged->data(), size), cudaSuccess; };
    return enqueue(stream, "copy", copy, {target});
  }
  // What the host reads too early is NaN, not what an earlier copy has left there.
  const bool is_later = lazy() || is_behind(stream);
  if (is_later && !stream->capture && is_pinned(to) && !is_pinned(from) &&
      unfinished_use({}, target).empty())
    memset(to, kFresh, size);
  const auto copy = [=] { return memmove(to, from, size), cudaSuccess; };
  return enqueue(stream, "copy", copy, {target, {(uint64_t)from, (uint64_t)from + size}});
}

}  // namespace

const std::pair<const uintptr_t, Allocation>* find_allocation(const void* address) {
  if (auto* found = holder(tensors(), (uintptr_t)address)) return found;
  return holder(allocations(), (uintptr_t)address);
}

static void report_unfinished_use(uintptr_t address, const Allocation& memory) {
  const std::string user = unfinished_use(memory, {address, address + memory.size});
  if (!user.empty())
    report("freed in use", "memory was freed while " + user +
                               ", on another stream, has not run (Tensor.record_stream)");
}

// ---- what torch's allocator hands out ----
void tensor_allocated(uintptr_t address, size_t size, int device, Stream* stream, bool own_pool) {
  Lock lock;
  being_freed = 0;
  auto& gone = freed_tensors();
  auto first = gone.upper_bound(address);
  if (first != gone.begin() && std::prev(first)->first + std::prev(first)->second.size > address)
    --first;
  const auto end = gone.lower_bound(address + size);
  if (own_pool && !stream->capture)
    for (auto old = first; old != end; ++old) report_unfinished_use(old->first, old->second);
  gone.erase(first, end);
  static uint64_t serial = 0;
  tensors()[address] = {size, device, MemoryKind::device, false, stream, own_pool, ++serial};
  // Behind the work that still uses the memory for the tensor before.
  const auto fill = [=] { return memset((void*)address, kFresh, size), cudaSuccess; };
  if (!is_behind(stream) && !stream->capture)
    fill();
  else
    enqueue_later(stream, "fresh memory", fill);
}
void tensor_freed(uintptr_t address) {
  Lock lock;
  auto found = tensors().find(address);
  if (found == tensors().end()) return;
  freed_tensors().insert_or_assign(address, found->second);
  tensors().erase(found);
  awaiting_streams()[address].clear();
  being_freed = address;
}
void event_recorded(const std::shared_ptr<Mark>& mark) {
  auto found = awaiting_streams().find(being_freed);
  if (found != awaiting_streams().end()) found->second.push_back(mark);
}
void memory_reusable(uintptr_t address) {
  Lock lock;
  awaiting_streams().erase(address);
  being_freed = 0;
  auto found = freed_tensors().find(address);
  // Memory of a pool goes to those who use the pool only, such as captures, or back with a
  // cudaFree, which waits. They may order the streams before they take it again.
  if (found != freed_tensors().end() && !found->second.own_pool)
    report_unfinished_use(address, found->second);
}
uint64_t serial_of(uint64_t address) {
  Lock lock;
  auto* found = holder(tensors(), address);
  return found && !found->second.own_pool ? found->second.serial : 0;
}

std::vector<Range> ranges_of(const uint64_t* addresses, size_t count, int device,
                             const std::string& user) {
  std::vector<Range> found;
  for (size_t i = 0; i < count; i++) {
    const uintptr_t address = addresses[i];
    auto* allocation = find_allocation((const void*)address);
    if (allocation) {
      const Allocation& memory = allocation->second;
      if (memory.kind == MemoryKind::device && memory.device != device)
        report("other device", user + " on device " + std::to_string(device) +
                                   " was given memory of device " + std::to_string(memory.device));
      else
        found.push_back({allocation->first, allocation->first + memory.size});
    }
    if (holder(freed_tensors(), address))
      report("freed memory", user + " was given memory that has been freed");
  }
  return found;
}

}  // namespace sc

using namespace sc;

// As if the allocator took back now what waits for the streams that were recorded.
EXPORTED void sc_wait_for_recorded_streams() {
  Lock lock;
  const auto awaiting = awaiting_streams();
  for (const auto& [address, marks] : awaiting) {
    for (const auto& mark : marks) run_until(mark);  // work that fails is reported
    memory_reusable(address);
  }
}

extern "C" {

cudaError_t cudaMalloc(void** pointer, size_t size) {
  return record(allocate(pointer, size, MemoryKind::device));
}
cudaError_t cudaFree(void* pointer) { return record(release(pointer)); }
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  return record(allocate(pointer, size, MemoryKind::pinned));
}
cudaError_t cudaMallocHost(void** pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }
cudaError_t cudaFreeHost(void* pointer) { return record(release(pointer)); }
cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  Lock lock;
  allocations()[(uintptr_t)pointer] = {size, current_device(), MemoryKind::pinned, true};
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) {
  Lock lock;
  return allocations().erase((uintptr_t)pointer) ? cudaSuccess
                                                 : record(cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *total = total_memory();
  *free_bytes = *total - used[current_device()];
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  Lock lock;
  *attributes = {};
  auto* found = find_allocation(pointer);
  if (!found) {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = -2;
    attributes->hostPointer = (void*)pointer;
    return cudaSuccess;
  }
  const bool pinned = found->second.kind == MemoryKind::pinned;
  attributes->type = pinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  attributes->device = found->second.device;
  attributes->devicePointer = (void*)pointer;
  attributes->hostPointer = pinned ? (void*)pointer : nullptr;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                            cudaStream_t handle) {
  Stream* stream = find_stream(handle);
  if (!stream) return record(cudaErrorInvalidResourceHandle);
  return record(copy_async(to, from, size, stream));
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size,
                                cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  Lock lock;
  if (forbidden_in_capture()) return record(cudaErrorStreamCaptureUnsupported);
  note_wait("cudaMemcpy");
  if (const cudaError_t error = drain_legacy(current_device())) return record(error);
  memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t handle) {
  Stream* stream = find_stream(handle);
  if (!stream) return record(cudaErrorInvalidResourceHandle);
  for (size_t row = 0; row < height; row++)
    if (const cudaError_t error = copy_async((char*)to + row * to_pitch,
                                             (const char*)from + row * from_pitch, width, stream))
      return record(error);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t handle) {
  Stream* stream = find_stream(handle);
  if (!stream) return record(cudaErrorInvalidResourceHandle);
  const auto fill = [=] { return memset(to, value, size), cudaSuccess; };
  return record(enqueue(stream, "memset", fill, {{(uint64_t)to, (uint64_t)to + size}}));
}
cudaError_t cudaMemset(void* to, int value, size_t size) {
  return cudaMemsetAsync(to, value, size, nullptr);
}

}  // extern "C"
