#include "tile.h"

#include <algorithm>
#include <cstring>

#include "bfloat16.h"
#include "fastdiff/q_sample.h"
#include "float16.h"
#include "philox_words.h"
#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastdiff::cpu {
namespace {

FASTDIFF_HD void from_bfloat16_loop(const uint16_t* in, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = bits_to_float(static_cast<uint32_t>(in[i]) << 16);
}
constexpr auto from_bfloat16 = clones<from_bfloat16_loop>;

FASTDIFF_HD void from_float16_loop(const uint16_t* in, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = float16_to_float(in[i]);
}
constexpr auto from_float16 = clones<from_float16_loop>;

FASTDIFF_HD void from_uint8_loop(const uint8_t* in, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = pixel_from_uint8(in[i]);
}
constexpr auto from_uint8 = clones<from_uint8_loop>;

FASTDIFF_HD void to_bfloat16_loop(const float* in, uint16_t* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint16_t>(round_to_bfloat16(in[i]) >> 16);
}
constexpr auto to_bfloat16 = clones<to_bfloat16_loop>;

FASTDIFF_HD void to_float16_loop(const float* in, uint16_t* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = round_to_float16(in[i]);
}
constexpr auto to_float16 = clones<to_float16_loop>;

// The counter is kept in 32-bit words: 64-bit lanes would halve the vector's width.
FASTDIFF_HD void philox_words_portable_loop(uint64_t key, uint64_t stream, const uint64_t* blocks,
                                            PhiloxWords& words) {
#pragma omp simd
  for (int lane = 0; lane < kPhiloxLanes; ++lane) {
    const uint64_t block = blocks[lane];
    const Words w =
        philox4x32(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream, key);
    words.w[0][lane] = w.w0;
    words.w[1][lane] = w.w1;
    words.w[2][lane] = w.w2;
    words.w[3][lane] = w.w3;
  }
}
constexpr auto philox_words_portable = clones<philox_words_portable_loop>;

// Chosen once, when the library is loaded.
PhiloxFunction best_philox_words() {
#if FASTDIFF_HAS_PHILOX_X86
  if (isa() == Isa::kAvx512) return philox_words_avx512;
  if (isa() == Isa::kAvx2) return philox_words_avx2;
#endif
  return philox_words_portable;
}

// The normals of sixteen blocks, in order.
FASTDIFF_HD void normals_from_words_loop(const PhiloxWords& words, float* out) {
  float n0[kPhiloxLanes], n1[kPhiloxLanes], n2[kPhiloxLanes], n3[kPhiloxLanes];
#pragma omp simd
  for (int lane = 0; lane < kPhiloxLanes; ++lane) {
    box_muller(words.w[0][lane], words.w[1][lane], n0[lane], n1[lane]);
    box_muller(words.w[2][lane], words.w[3][lane], n2[lane], n3[lane]);
  }
#pragma omp simd
  for (int lane = 0; lane < kPhiloxLanes; ++lane) {
    out[4 * lane] = n0[lane];
    out[4 * lane + 1] = n1[lane];
    out[4 * lane + 2] = n2[lane];
    out[4 * lane + 3] = n3[lane];
  }
}
constexpr auto normals_from_words = clones<normals_from_words_loop>;

void normal_blocks(uint64_t key, uint64_t stream, uint64_t first, int64_t blocks, float* out) {
  PhiloxWords words;
  const auto make_words = [&](int64_t base) {
    uint64_t block[kPhiloxLanes];
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      block[lane] = first + static_cast<uint64_t>(base + lane);
    }
    philox_words(key, stream, block, words);
  };
  int64_t base = 0;
  for (; base + kPhiloxLanes <= blocks; base += kPhiloxLanes) {
    make_words(base);
    normals_from_words(words, out + 4 * base);
  }
  if (base < blocks) {
    float normals[4 * kPhiloxLanes];
    make_words(base);
    normals_from_words(words, normals);
    std::memcpy(out + 4 * base, normals, 16 * (blocks - base));
  }
}

// Pixels per tile of a channels_last tensor: a multiple of 4, and enough that the Philox blocks cut
// at both ends of a channel's run cost little; up to 16 channels a multiple of what philox_words
// makes.
int64_t tile_pixels(const SampleLayout& layout) {
  constexpr int64_t kWhole = 4 * kPhiloxLanes;
  const int64_t pixels = kTile / layout.inner;
  return pixels >= kWhole ? pixels / kWhole * kWhole : std::max<int64_t>(16, pixels / 4 * 4);
}

// The channels of a run of pixels, interleaved: those of pictures and of latents, which GCC
// shuffles in registers.
FASTDIFF_HD void interleave_3_loop(const float* a, const float* b, const float* c, float* out,
                                   int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[3 * i] = a[i];
    out[3 * i + 1] = b[i];
    out[3 * i + 2] = c[i];
  }
}
constexpr auto interleave_3 = clones<interleave_3_loop>;

FASTDIFF_HD void interleave_4_loop(const float* a, const float* b, const float* c, const float* d,
                                   float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[4 * i] = a[i];
    out[4 * i + 1] = b[i];
    out[4 * i + 2] = c[i];
    out[4 * i + 3] = d[i];
  }
}
constexpr auto interleave_4 = clones<interleave_4_loop>;

// Floats of a channel's run, with the elements of Philox blocks that are cut.
int64_t row_floats(const SampleLayout& layout) { return tile_pixels(layout) + 8; }

}  // namespace

const PhiloxFunction philox_words = best_philox_words();

void stream_bytes(void* destination, const void* source, int64_t n) {
  char* out = static_cast<char*>(destination);
  const char* in = static_cast<const char*>(source);
#if defined(__x86_64__)
  const int64_t head = std::min<int64_t>(n, (16 - reinterpret_cast<uintptr_t>(out) % 16) % 16);
  std::memcpy(out, in, head);
  int64_t i = head;
  for (; i + 16 <= n; i += 16) {
    const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), value);
  }
  std::memcpy(out + i, in + i, n - i);
#else
  std::memcpy(out, in, n);
#endif
}

const float* load_tile(DType dtype, const void* base, int64_t offset, int64_t n, float* buffer) {
  switch (dtype) {
    case DType::kBFloat16:
      from_bfloat16(static_cast<const uint16_t*>(base) + offset, buffer, n);
      return buffer;
    case DType::kFloat16:
      from_float16(static_cast<const uint16_t*>(base) + offset, buffer, n);
      return buffer;
    case DType::kUInt8:
      from_uint8(static_cast<const uint8_t*>(base) + offset, buffer, n);
      return buffer;
    default:
      return static_cast<const float*>(base) + offset;
  }
}

void store_tile(DType dtype, void* base, int64_t offset, int64_t n, const float* tile,
                bool stream) {
  char* out = static_cast<char*>(base) + offset * size_of(dtype);
  if (dtype == DType::kFloat32) {
    if (stream) {
      stream_bytes(out, tile, n * 4);
    } else {
      std::memcpy(out, tile, n * 4);
    }
    return;
  }
  const auto convert = dtype == DType::kBFloat16 ? to_bfloat16 : to_float16;
  if (!stream) {
    convert(tile, reinterpret_cast<uint16_t*>(out), n);
    return;
  }
  uint16_t halves[kTile];
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = std::min(kTile, n - i);
    convert(tile + i, halves, count);
    stream_bytes(out + 2 * i, halves, 2 * count);
  }
}

void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

int64_t tile_elements(const SampleLayout& layout) {
  return layout.inner == 1 ? kTile : tile_pixels(layout) * layout.inner;
}

int64_t normal_scratch(const SampleLayout& layout) {
  if (layout.inner == 1) return tile_elements(layout) + 8;
  return tile_elements(layout) + std::min<int64_t>(layout.inner, 4) * row_floats(layout);
}

const float* normal_tile(const SampleLayout& layout, uint64_t key, uint64_t stream, int64_t first,
                         int64_t n, float* scratch) {
  // Normals of `count` consecutive logical elements from `begin`, which may start within a block.
  const auto run = [&](int64_t begin, int64_t count, float* out) {
    const int64_t block = begin / 4;
    normal_blocks(key, stream, block, (begin + count + 3) / 4 - block, out);
    return out + begin % 4;
  };
  if (layout.inner == 1) return run(first, n, scratch);

  const int64_t channels = layout.inner;
  const int64_t first_pixel = first / channels, pixels = n / channels;
  float* row_scratch = scratch + tile_elements(layout);
  const auto row = [&](int64_t c, float* memory) {
    return run(c * (layout.numel / channels) + first_pixel, pixels, memory);
  };
  if (channels == 3 || channels == 4) {
    const float* rows[4];
    for (int64_t c = 0; c < channels; ++c) rows[c] = row(c, row_scratch + c * row_floats(layout));
    if (channels == 3) {
      interleave_3(rows[0], rows[1], rows[2], scratch, pixels);
    } else {
      interleave_4(rows[0], rows[1], rows[2], rows[3], scratch, pixels);
    }
    return scratch;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const float* normals = row(c, row_scratch);
    for (int64_t p = 0; p < pixels; ++p) scratch[p * channels + c] = normals[p];
  }
  return scratch;
}

}  // namespace fastdiff::cpu
