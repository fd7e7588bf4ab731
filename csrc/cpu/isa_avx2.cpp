// The units of work compiled for avx2; setup.py gives this file its compiler flags.
#include "simd_avx2.h"

#include "lora_backward.h"

namespace lorakern {
extern const Variant kVariants_avx2[3];
const Variant kVariants_avx2[3] = LORAKERN_VARIANTS("avx2");
}  // namespace lorakern
