#pragma once

// State of the software CUDA device, shared by the fake libcudart.so.13, the fake libcuda.so.1 and
// the CPU fallback of torch's operators.
//
// Device memory is host memory. Every stream is a queue of work. Mode "eager" runs work when it is
// enqueued, unless its stream sleeps (torch.cuda._sleep) or waits for one that does: what should
// have waited for that stream then reads memory that has not been written yet. Mode "lazy" runs
// work only when something waits for it. A captured graph is a list of the same work, which every
// launch of the graph enqueues again.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))
#define SC_API __attribute__((visibility("default")))

namespace sc {

// ---- one lock for all of it ----
// Hooks call Python while it is held, so no thread may wait for it with the GIL in its hands: the
// GIL is put down while waiting.
class SC_API Lock {
 public:
  Lock();
  ~Lock();
  Lock(const Lock&) = delete;
};

// Around every hook: Python collects no garbage in the meantime. A tensor in it would be freed
// under the lock of torch's allocator, and who holds that one may be waiting for the lock of the
// device.
class SC_API NoCollection {
 public:
  NoCollection();
  ~NoCollection();
  NoCollection(const NoCollection&) = delete;

 private:
  Lock lock;
  int gil;
  int enabled;
};
// The answer of a hook.
template <typename Hook, typename... Arguments>
int ask(Hook hook, Arguments... arguments) {
  NoCollection none;
  return hook(arguments...);
}

// ---- memory ----
struct Stream;
enum class MemoryKind { device, pinned };

// What cudaMalloc gave, or a tensor's part of it, as torch's caching allocator hands it out.
struct Allocation {
  size_t size;
  int device;
  MemoryKind kind;
  bool registered = false;   // cudaHostRegister: not ours to free
  Stream* stream = nullptr;  // of a tensor: the stream that its memory belongs to
  bool own_pool = false;     // of a tensor: from a graph's pool or a torch.cuda.MemPool
  uint64_t serial = 0;       // of a tensor: tells it from those that had its address before
};
struct Range {
  uint64_t begin, end;
};

// ---- work ----
typedef std::function<int()> Work;  // returns a cudaError_t

// A point in a stream: what an event has recorded.
struct Mark {
  bool done = false;
  double seconds = 0;  // host clock when it was reached
  Stream* stream = nullptr;
  int polls = 0;
};

struct Item {
  std::string what;
  Work work;                   // empty for a mark or a wait
  std::vector<Range> uses;     // the memory that the work was given
  std::shared_ptr<Mark> mark;  // reached after the work
  std::shared_ptr<Mark> wait;  // first runs the other stream up to there
  bool hold = false;           // torch.cuda._sleep: stops its stream until the host waits for it
};

struct Capture {
  unsigned long long id;
  int mode;
  Stream* origin;
  bool invalid = false;
  std::vector<Item> items;
  std::vector<std::map<uint64_t, uint64_t>> serials;  // see Graph
  std::vector<Stream*> streams;
  std::map<Stream*, bool> unjoined;  // forked streams with work that the origin has not waited for

  void take(Item item);
};

struct Graph {
  std::vector<Item> items;
  // By item: its tensors that it does not keep alive, as the pool of a graph does.
  std::vector<std::map<uint64_t, uint64_t>> serials;  // by address
};

struct Stream {
  int device = 0;
  bool legacy = false;    // the default stream
  bool blocking = false;  // waits for the legacy stream, and it for this one
  int priority = 0;
  std::deque<Item> queue;
  bool running = false;
  int polls = 0;
  std::shared_ptr<Capture> capture;
};

struct Event {
  int device = 0;
  bool timing = true;
  std::shared_ptr<Mark> mark;
  std::shared_ptr<Capture> capture;  // recorded on a capturing stream
  Stream* captured_on = nullptr;
};

struct Kernel {
  int image;
  std::string name;
};

// ---- what Python provides; all return a cudaError_t. Mirrored by emulation.py. ----
struct Hooks {
  // Checks a launch and keeps its parameters; `id` names it from then on. Returns the words of the
  // parameters that may be addresses: those that the kernel loads as 64 bits.
  int (*prepare_launch)(int image, const char* kernel, const unsigned* grid, const unsigned* block,
                        uint64_t shared_bytes, void** arguments, const unsigned* cluster,
                        int cooperative, int64_t* id, const uint64_t** addresses,
                        int64_t* address_count);
  int (*run_launch)(int64_t id, const Range* ranges, int64_t count);
  int (*drop_launch)(int64_t id);
  int (*kernel_attribute)(int image, const char* kernel, int attribute, int64_t* value);
  int (*set_kernel_attribute)(int image, const char* kernel, int attribute, int64_t value);
  int (*resident_blocks)(int image, const char* kernel, int block_threads, uint64_t shared_bytes,
                         int* blocks);
  int (*resident_clusters)(int image, const char* kernel, int block_threads, uint64_t shared_bytes,
                           const unsigned* cluster, int* clusters);
  int (*device_attribute)(int attribute, int64_t* value);
  int (*symbol)(int image, const char* name, uint64_t* address, uint64_t* size);
  int (*load_module)(const void* data, int* image);  // a cubin of Triton
  // Something that a test may want to know: see reports.py for the kinds.
  int (*report)(const char* kind, const char* what);
};
// Numbers for kernel_attribute, besides cudaFuncAttribute values.
enum KernelAttribute { STATIC_SHARED = 100, MAX_THREADS = 101, MAX_CLUSTER_BLOCKS = 102 };

// What the fallback, which knows torch, provides.
struct TorchHooks {
  cudaStream_t (*current_stream)(int device) = nullptr;
  void (*watch_allocator)() = nullptr;  // called before the first cudaMalloc returns
};

struct Counters {          // totals
  int64_t host_waits = 0;  // times that the host waited for the device
  int64_t launches = 0, mallocs = 0, frees = 0;
};

SC_API extern Hooks hooks;
SC_API extern TorchHooks torch_hooks;
SC_API extern Counters counters;

SC_API int device_count();
SC_API int& current_device();
SC_API bool lazy();
SC_API cudaError_t record(int error);  // sets the thread's last error
// The error of a kernel that failed on the device: every later call gets it, until a reset.
SC_API cudaError_t& device_error(int device);
SC_API int unsupported(const char* function, const char* why = "is not implemented");
SC_API void report(const char* kind, const std::string& what);
// Set while torch's allocator calls: it holds its lock, for which a thread with the GIL may wait,
// so a report from here does not wait for the GIL.
SC_API extern thread_local bool in_allocator;
SC_API void note_wait(const char* what);  // the host waits for the device
SC_API void jitter();                     // a pause that shakes out races between threads

// ---- streams ----
SC_API Stream* find_stream(cudaStream_t handle);  // null: no such stream
SC_API cudaError_t enqueue(Stream* stream, std::string what, Work work,
                           std::vector<Range> uses = {}, bool hold = false);
SC_API void enqueue_later(Stream* stream, std::string what, Work work);  // never runs it at once
SC_API bool is_behind(Stream* stream);     // has work that has not run yet
SC_API cudaError_t drain(Stream* stream);  // runs all that is queued there
SC_API cudaError_t run_until(const std::shared_ptr<Mark>& mark);
SC_API cudaError_t drain_device(int device);
SC_API cudaError_t drain_legacy(int device);  // what a synchronous call of the device waits for
SC_API cudaError_t advance_all();             // runs what can run without a wait by the host
SC_API cudaError_t push(Stream* stream, Item item);
SC_API std::shared_ptr<Mark> tail(Stream* stream);
SC_API bool any_pending();
// Work on other streams than the memory's own that uses it and has not run, unless that stream
// waits for it: empty if there is none.
SC_API std::string unfinished_use(const Allocation& allocation, Range range);
SC_API bool forbidden_in_capture();  // for calls that a global capture forbids; invalidates it

// ---- memory ----
SC_API const std::pair<const uintptr_t, Allocation>* find_allocation(const void* address);
SC_API void tensor_allocated(uintptr_t address, size_t size, int device, Stream* stream,
                             bool own_pool);
SC_API void tensor_freed(uintptr_t address);
void event_recorded(const std::shared_ptr<Mark>& mark);  // by the allocator, if it is freeing
// torch's allocator may hand it out again: the streams that were recorded, by Tensor.record_stream
// or by torch itself, have used it.
SC_API void memory_reusable(uintptr_t address);
// Of the tensor that holds this address, if there is one and it is of no pool; else 0.
SC_API uint64_t serial_of(uint64_t address);
// The memory that these numbers point to, if they are addresses; says what is wrong with it.
SC_API std::vector<Range> ranges_of(const uint64_t* addresses, size_t count, int device,
                                    const std::string& user);

// ---- kernels ----
SC_API cudaError_t launch(const Kernel* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                          void** arguments, const dim3* cluster, int cooperative, Stream* stream);

}  // namespace sc
