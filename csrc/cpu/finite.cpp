#include "finite.h"

#include <algorithm>

namespace lorakern::cpu {
namespace {

constexpr int64_t kBlock = 4096;

// Not finite is what has all bits of the exponent.
template <typename Bits>
bool without(const void* data, int64_t count, Bits exponent) {
  const Bits* bits = static_cast<const Bits*>(data);
  for (int64_t i = 0; i < count; i += kBlock) {
    Bits found = 0;
    for (int64_t j = i; j < std::min(i + kBlock, count); ++j)
      found |= static_cast<Bits>((bits[j] & exponent) == exponent);
    if (found) return false;
  }
  return true;
}

}  // namespace

bool all_finite(const void* data, Dtype dtype, int64_t count) {
  switch (dtype) {
    case Dtype::kFloat16:
      return without<uint16_t>(data, count, 0x7C00);
    case Dtype::kBFloat16:
      return without<uint16_t>(data, count, 0x7F80);
    case Dtype::kFloat32:
      return without<uint32_t>(data, count, 0x7F800000);
    default:
      return without<uint64_t>(data, count, 0x7FF0000000000000);
  }
}

}  // namespace lorakern::cpu
