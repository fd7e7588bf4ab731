// The units of work compiled for AVX512-BF16, with those of bfloat16's forward on AMX tiles; setup.py gives the flags.
#include "simd_avx512.h"

#include "lora_backward.h"
#include "points_amx.h"

namespace lorakern {
namespace {

constexpr Variant with_tiles(Variant v) {
  v.tile_ranks = kTile;
  v.shrink_scratch = shrink_amx_scratch;
  v.shrink = shrink_amx;
  v.expand_scratch = expand_scratch<TilePanels>;
  v.expand = expand<bf16, TilePanels>;
  return v;
}

constexpr Variant with_tiled_points(Variant v) {
  v.points_scratch = points_amx_scratch;
  v.points_gram = points_gram_amx;
  return v;
}

}  // namespace

extern const Variant kVariants_amx[3];
const Variant kVariants_amx[3] = {with_tiled_points(variant<float>("amx")), variant<f16>("amx"),
                                  with_tiles(variant<bf16>("amx"))};
}  // namespace lorakern
