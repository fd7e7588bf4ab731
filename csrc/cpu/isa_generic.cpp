// The units of work compiled for generic; setup.py gives this file its compiler flags.
#include "lora_backward.h"
#include "simd_generic.h"

namespace lorakern {
extern const Variant kVariants_generic[3];
const Variant kVariants_generic[3] = LORAKERN_VARIANTS("generic");
}  // namespace lorakern
