#pragma once

#include <cstdint>
#include <type_traits>

namespace fastdiff::cpu {

// A channels_last model output with two heads holds C mean and C variance channels in every pixel.
// The functions take whole pixels apart, n elements of each head, and put them together.

// Calls body(C) with the number of channels, as a constant if it is small: of loops over an unknown
// number GCC makes calls of memcpy, two for every pixel.
template <typename F>
void with_channels(int64_t channels, const F& body) {
  switch (channels) {
    case 1:
      return body(std::integral_constant<int64_t, 1>{});
    case 2:
      return body(std::integral_constant<int64_t, 2>{});
    case 3:
      return body(std::integral_constant<int64_t, 3>{});
    case 4:
      return body(std::integral_constant<int64_t, 4>{});
    default:
      return body(channels);
  }
}

template <typename T>
void split_heads(const T* in, int64_t channels, int64_t n, T* first, T* second) {
  with_channels(channels, [&](auto C) {
    for (int64_t i = 0; i < n; i += C) {
      for (int64_t c = 0; c < C; ++c) first[i + c] = in[2 * i + c];
      if (!second) continue;
      for (int64_t c = 0; c < C; ++c) second[i + c] = in[2 * i + C + c];
    }
  });
}

template <typename T>
void join_heads(const T* first, const T* second, int64_t channels, int64_t n, T* out) {
  with_channels(channels, [&](auto C) {
    for (int64_t i = 0; i < n; i += C) {
      for (int64_t c = 0; c < C; ++c) out[2 * i + c] = first[i + c];
      for (int64_t c = 0; c < C; ++c) out[2 * i + C + c] = second[i + c];
    }
  });
}

}  // namespace fastdiff::cpu
