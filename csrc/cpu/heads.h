#pragma once

#include <cstdint>

namespace fastdiff::cpu {

// A channels_last model output with two heads holds C mean and C variance channels in every pixel.
// These take whole pixels apart, n elements of each head, and put them together.
template <typename T>
void split_heads(const T* in, int64_t channels, int64_t n, T* first, T* second) {
  for (int64_t i = 0; i < n; i += channels) {
    for (int64_t c = 0; c < channels; ++c) first[i + c] = in[2 * i + c];
    if (!second) continue;
    for (int64_t c = 0; c < channels; ++c) second[i + c] = in[2 * i + channels + c];
  }
}

template <typename T>
void join_heads(const T* first, const T* second, int64_t channels, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += channels) {
    for (int64_t c = 0; c < channels; ++c) out[2 * i + c] = first[i + c];
    for (int64_t c = 0; c < channels; ++c) out[2 * i + channels + c] = second[i + c];
  }
}

}  // namespace fastdiff::cpu
