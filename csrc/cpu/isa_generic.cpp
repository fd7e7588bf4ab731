// The units of work compiled for generic; setup.py gives this file its compiler flags.
#include "simd_generic.h"

#include "lora_backward.h"

namespace lorakern {
extern const Variant kVariants_generic[3];
const Variant kVariants_generic[3] = LORAKERN_VARIANTS("generic");
}  // namespace lorakern
