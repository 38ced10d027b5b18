// What a kernel is given: plain descriptions of memory. The codes and field orders are shared with the Python side.
#pragma once

#include <cstdint>

#include "math/target.h"

namespace fusedvae {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, u8 = 4 };

FUSEDVAE_INLINE int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 8;
    case DType::f32:
      return 4;
    case DType::u8:
      return 1;
    default:
      return 2;
  }
}

// The canonical form: element (b, o, i) of the extent lies at data[b * stride[0] + o * stride[1] + i * stride[2]],
// in elements; stride[2] is 1, or 0 where the operand is broadcast. Without data the operand is the number `value`,
// or, if that is absent too, was not given.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[3] = {0, 0, 0};
  double value = 0;
  bool given = false;

  FUSEDVAE_INLINE explicit operator bool() const { return given; }
  FUSEDVAE_INLINE bool is_number() const { return given && data == nullptr; }
  FUSEDVAE_INLINE bool is_uniform() const {
    return data == nullptr || (stride[0] == 0 && stride[1] == 0 && stride[2] == 0);
  }
};

struct Extent {
  int64_t batch = 1, outer = 1, inner = 1;

  FUSEDVAE_INLINE int64_t sample() const { return outer * inner; }
  FUSEDVAE_INLINE int64_t count() const { return batch * sample(); }
};

// Strides of the logical row-major index over an extent; unlike an operand's, the inner one may be anything.
struct IndexStrides {
  int64_t batch = 0, outer = 0, inner = 1;
};

}  // namespace fusedvae
