// The lock of the device, reports to Python, and pauses that shake out races between threads.
#include "runtime.h"

#include <dlfcn.h>
#include <unistd.h>
#include <random>
#include <utility>

namespace sc {

namespace {

// Python's own functions: this library is loaded by a Python that has them.
struct Gil {
  int (*held)() = (int (*)())dlsym(RTLD_DEFAULT, "PyGILState_Check");
  void* (*put_down)() = (void* (*)())dlsym(RTLD_DEFAULT, "PyEval_SaveThread");
  void (*take_up)(void*) = (void (*)(void*))dlsym(RTLD_DEFAULT, "PyEval_RestoreThread");
  int (*ensure)() = (int (*)())dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
  void (*release)(int) = (void (*)(int))dlsym(RTLD_DEFAULT, "PyGILState_Release");
  int (*stop_collecting)() = (int (*)())dlsym(RTLD_DEFAULT, "PyGC_Disable");
  int (*collect_again)() = (int (*)())dlsym(RTLD_DEFAULT, "PyGC_Enable");
};
const Gil& gil() {
  static const Gil functions;
  return functions;
}
std::recursive_mutex& mutex() {
  static auto* value = new std::recursive_mutex;
  return *value;
}
std::vector<std::pair<std::string, std::string>>& waiting_reports() {
  static auto* value = new std::vector<std::pair<std::string, std::string>>;
  return *value;
}
unsigned jitter_microseconds = 0;

}  // namespace

thread_local bool in_allocator = false;

Lock::Lock() {
  if (mutex().try_lock()) return;
  if (gil().held && gil().held()) {
    void* thread = gil().put_down();
    mutex().lock();
    gil().take_up(thread);
  } else {
    mutex().lock();
  }
}
Lock::~Lock() { mutex().unlock(); }

NoCollection::NoCollection() : gil(sc::gil().ensure()), enabled(sc::gil().stop_collecting()) {}
NoCollection::~NoCollection() {
  if (enabled) sc::gil().collect_again();
  sc::gil().release(gil);
}

void report(const char* kind, const std::string& what) {
  if (!hooks.report) return;
  if (!in_allocator || (gil().held && gil().held()))
    ask(hooks.report, kind, what.c_str());
  else
    waiting_reports().push_back({kind, what});
}

void jitter() {
  if (!jitter_microseconds) return;
  static thread_local std::minstd_rand random(std::random_device{}());
  const unsigned pause = random() % jitter_microseconds;
  if (gil().held && gil().held()) {
    void* thread = gil().put_down();
    usleep(pause);
    gil().take_up(thread);
  } else {
    usleep(pause);
  }
}

}  // namespace sc

EXPORTED void sc_set_jitter(unsigned microseconds) { sc::jitter_microseconds = microseconds; }
// Hands over the reports of threads that did not hold the GIL.
EXPORTED void sc_flush_reports() {
  sc::Lock lock;
  for (const auto& [kind, what] : std::exchange(sc::waiting_reports(), {}))
    sc::ask(sc::hooks.report, kind.c_str(), what.c_str());
}
