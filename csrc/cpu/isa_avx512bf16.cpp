// The units of work compiled for avx512bf16; setup.py gives this file its compiler flags.
#include "simd_avx512.h"

#include "lora_backward.h"

namespace lorakern {
extern const Variant kVariants_avx512bf16[3];
const Variant kVariants_avx512bf16[3] = LORAKERN_VARIANTS("avx512bf16");
}  // namespace lorakern
