// The fake libnccl.so.2: none of it is implemented, and every function but these says so by its
// name (build.py). The real one would fail somewhere in the driver, without a word of why.
#include "runtime.h"

extern "C" {

const char* ncclGetErrorString(int) { return "not implemented by the software CUDA device"; }
const char* ncclGetLastError(void*) { return "use gloo"; }
int ncclGetVersion(int* version) { return *version = 22700, 0; }

}  // extern "C"
