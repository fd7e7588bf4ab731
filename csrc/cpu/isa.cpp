// Which ISA variant to run: chosen by cpuid when the process starts, never at build time.
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "lora.h"
#include "variant.h"

namespace lorakern {

extern const Variant kVariants_generic[3];
#if defined(__x86_64__)
extern const Variant kVariants_avx2[3];
extern const Variant kVariants_avx512[3];
extern const Variant kVariants_avx512bf16[3];
extern const Variant kVariants_amx[3];
#endif

namespace cpu {
namespace {

#if defined(__x86_64__)
// Has the CPU tiles of bfloat16, and does the kernel let this process use them? It has to be asked once.
bool has_tiles() {
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kTile) || !(edx & kBf16)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const std::vector<const Variant*>& usable() {
  static const std::vector<const Variant*> found = [] {
    std::vector<const Variant*> list{kVariants_generic};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      list.push_back(kVariants_avx2);
    if (list.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      list.push_back(kVariants_avx512);
      if (__builtin_cpu_supports("avx512bf16")) {
        list.push_back(kVariants_avx512bf16);
        if (has_tiles()) list.push_back(kVariants_amx);
      }
    }
#endif
    return list;
  }();
  return found;
}

std::atomic<const Variant*>& current() {
  static std::atomic<const Variant*> chosen{usable().back()};
  return chosen;
}

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Variant* variant : usable()) names.push_back(variant->name);
  return names;
}

std::string current_isa() { return current().load()->name; }

void force_isa(const std::string& name) {
  for (const Variant* variant : usable())
    if (name == variant->name) {
      current().store(variant);
      return;
    }
  throw std::invalid_argument("this CPU cannot run the ISA variant '" + name + "'");
}

const Variant& variant_for(Dtype dtype) { return current().load(std::memory_order_relaxed)[static_cast<int>(dtype)]; }

}  // namespace cpu
}  // namespace lorakern
