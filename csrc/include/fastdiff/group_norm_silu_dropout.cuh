#pragma once

// Dropout in the kernels of group_norm_silu: the masks of a lane's vectors (fastdiff/dropout.h).

#include "fastdiff/group_norm_silu_items.cuh"

namespace fastdiff {

// Which of V elements are kept: the sign bit of a byte each, four bytes together.
template <int V>
struct KeptElements {
  uint32_t signs[V < 4 ? 1 : V / 4];

  // Zeroes the others.
  template <typename T>
  __device__ __forceinline__ void apply(Vector<T, V>& vector) const {
    if constexpr (V == 1) {
      if (!(signs[0] & 0x80u)) vector.values[0] = from_float<T>(0.0f);
    } else {
      constexpr int kOfWord = 4 / sizeof(T), kWords = V / kOfWord;
      uint32_t words[kWords];
      memcpy(words, &vector, sizeof(words));
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        // A byte's sign in all bits of its element.
        const uint32_t first = kOfWord == 2 ? 0x9988u : 0x8888u, next = kOfWord * 0x1111u;
        words[i] &= permute(signs[i * kOfWord / 4], first + i % (4 / kOfWord) * next);
      }
      memcpy(&vector, words, sizeof(words));
    }
  }

 private:
  // Unlike __byte_perm, with a byte's sign in place of the byte where a selector has its high bit.
  static __device__ __forceinline__ uint32_t permute(uint32_t bytes, uint32_t selectors) {
    uint32_t permuted;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(permuted) : "r"(bytes), "r"(selectors));
    return permuted;
  }
};

// The masks of one lane's vectors of an item.
template <bool ChannelsLast, int V>
struct LaneDropout {
  static_assert(V == 1 || V % Dropout::kSide == 0);
  uint64_t key, stream;
  uint64_t block;      // of the first channel and pixel 0
  uint64_t row;        // blocks per Dropout::kSide channels
  uint32_t threshold;  // 256 less that of Dropout, in every byte
  int word;            // of the first channel in its block
  int64_t pixel;       // of the first vector
  int step;            // pixels from one vector to the next

  // Vector k without the elements that are dropped.
  template <typename T>
  __device__ __forceinline__ Vector<T, V> kept(int k, Vector<T, V> vector) const {
    mask(k).apply(vector);
    return vector;
  }
  __device__ __forceinline__ void skip(int count) { pixel += count * step; }

 private:
  __device__ __forceinline__ KeptElements<V> mask(int k) const {
    const int64_t p = pixel + k * step;
    const unsigned byte = static_cast<unsigned>(p) % Dropout::kSide;
    const uint64_t first = block + static_cast<uint64_t>(p) / Dropout::kSide;
    // Of a key that it knows nothing of, the compiler keeps no ten pairs of round keys in
    // registers.
    uint64_t fresh = key;
    asm volatile("" : "+l"(fresh));
    KeptElements<V> kept;
    if constexpr (V == 1) {
      kept.signs[0] = signs(of_channel(words(first, fresh)) >> 8 * byte);
    } else {
#pragma unroll
      for (int i = 0; i < V / Dropout::kSide; ++i) {
        kept.signs[i] = signs(ChannelsLast ? of_pixel(words(first + i * row, fresh), byte)
                                           : of_channel(words(first + i, fresh)));
      }
    }
    return kept;
  }
  __device__ __forceinline__ Words words(uint64_t counter, uint64_t fresh) const {
    return philox4x32(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), stream,
                      fresh);
  }
  __device__ __forceinline__ uint32_t of_channel(const Words& words) const {
    const uint32_t low = word & 1 ? words.w1 : words.w0, high = word & 1 ? words.w3 : words.w2;
    return word & 2 ? high : low;
  }
  static __device__ __forceinline__ uint32_t of_pixel(const Words& words, unsigned byte) {
    const unsigned pair = byte * 0x11u + 0x40u;
    return __byte_perm(__byte_perm(words.w0, words.w1, pair), __byte_perm(words.w2, words.w3, pair),
                       0x5410u);
  }
  // In the sign of every byte whether the byte plus that of `threshold` exceeds 255.
  __device__ __forceinline__ uint32_t signs(uint32_t bytes) const {
    constexpr uint32_t kRest = 0x7F7F7F7Fu;
    const uint32_t carries = (bytes & kRest) + (threshold & kRest);
    return (bytes & threshold) | ((bytes | threshold) & carries);
  }
};

// What drops elements of a sample whose items begin with `channel`.
struct SampleDropout {
  static constexpr bool kDrops = true;
  const Dropout& dropout;
  uint64_t key;
  int channel;
  int64_t pixels;
  float scale;  // of the elements that are kept

  __device__ __forceinline__ SampleDropout(const Dropout& of_call, const GroupNormLayout& layout,
                                           int64_t sample, int first_channel)
      : dropout(of_call),
        key(of_call.source.key(sample)),
        channel(first_channel),
        pixels(layout.pixels),
        scale(of_call.scale()) {}

  template <typename Float>
  __device__ __forceinline__ Float scaled(Float value) const {
    return multiply(value, broadcast<Float>(scale));
  }

  template <bool ChannelsLast, int V>
  __device__ __forceinline__ LaneDropout<ChannelsLast, V> masks(const Items<ChannelsLast, V>& items,
                                                                const Item& item) const {
    const int64_t c = channel + item.channel;
    return {key,
            dropout.source.stream,
            Dropout::block(c, 0, pixels),
            Dropout::block(Dropout::kSide, 0, pixels),
            static_cast<uint32_t>(256 - dropout.threshold) * 0x01010101u,
            static_cast<int>(c % Dropout::kSide),
            items.pixel(item),
            items.pixel_step()};
  }
};

// Nothing is dropped, and nothing of the above is compiled.
struct NoDropout {
  static constexpr bool kDrops = false;

  struct Masks {
    template <typename Vector>
    __device__ __forceinline__ Vector kept(int, const Vector& vector) const {
      return vector;
    }
    __device__ __forceinline__ void skip(int) {}
  };

  __device__ __forceinline__ NoDropout(const Dropout&, const GroupNormLayout&, int64_t, int) {}
  template <typename Float>
  __device__ __forceinline__ Float scaled(Float value) const {
    return value;
  }
  template <typename Items>
  __device__ __forceinline__ Masks masks(const Items&, const Item&) const {
    return {};
  }
};

}  // namespace fastdiff
