// The units of work compiled for avx512; setup.py gives this file its compiler flags.
#include "simd_avx512.h"

#include "lora_backward.h"

namespace lorakern {
extern const Variant kVariants_avx512[3];
const Variant kVariants_avx512[3] = LORAKERN_VARIANTS("avx512");
}  // namespace lorakern
