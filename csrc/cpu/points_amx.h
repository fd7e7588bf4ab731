// Inner products of bfloat16 points on AMX tiles.
#pragma once
#include "lora_amx.h"
#include "points_unit.h"

namespace {

constexpr int64_t kTiledColumns = 256;                   // of all points at a time
constexpr int64_t kTiledStride = kTiledColumns + kStep;  // rows of a tile lie in different sets of the cache
constexpr int64_t kTiledSteps = kTiledColumns / kStep;

// Rows of a set over `depth` columns, and zeros up to whole steps.
inline void copy_rows(const RowSet& set, int64_t begin, int64_t depth, bf16* out) {
  const bf16* data = static_cast<const bf16*>(set.data) + begin * set.column_stride;
  const int64_t width = steps_of(depth) * kStep;
  if (set.column_stride == 1) {
    for (int64_t r = 0; r < set.rows; ++r, data += set.row_stride, out += kTiledStride) {
      int64_t k = 0;
      for (; k + kStep <= depth; k += kStep) {
        __builtin_prefetch(data + k + kTiledColumns, 0, 2);
        _mm512_store_si512(out + k, _mm512_loadu_si512(data + k));
      }
      if (k < depth) _mm512_store_si512(out + k, _mm512_maskz_loadu_epi16((1u << (depth - k)) - 1, data + k));
    }
    return;
  }
  for (int64_t r = 0; r < set.rows; r += kTile) {
    const int live = static_cast<int>(std::min<int64_t>(set.rows - r, kTile));
    for (int64_t k = 0; k < width; k += kStep) {
      Vec pairs[kTile];  // two columns each
      for (int64_t i = 0; i < kTile; ++i) {
        bf16 columns[2][kTile] = {};
        const bf16* rows[2] = {};
        for (int64_t j = 0; j < 2; ++j) {
          const int64_t column = k + 2 * i + j;
          if (column >= depth) continue;
          rows[j] = data + r * set.row_stride + column * set.column_stride;
          if (set.row_stride == 1) {
            __builtin_prefetch(rows[j] + kTiledColumns * set.column_stride, 0, 2);
            continue;
          }
          for (int l = 0; l < live; ++l) columns[j][l] = rows[j][l * set.row_stride];
          rows[j] = columns[j];
        }
        Outer<bf16>::Cell cells[kTile];
        Outer<bf16>::pack_rows(rows, live, cells);
        std::memcpy(&pairs[i], cells, sizeof(cells));
      }
      vec_transpose(pairs);
      for (int l = 0; l < live; ++l) _mm512_store_ps(out + (r + l) * kTiledStride + k, pairs[l].v);
    }
  }
}

// Rows that run along the sum, and the same rows as panels.
inline int64_t points_amx_scratch(int64_t count) {  // floats
  const int64_t rows = tiles_of(count) * kTile;
  return std::max(points_scratch(count), rows * (kTiledStride + kTiledColumns) / 2);
}

inline void points_gram_amx(const PointsUnit& u, float* scratch) {
  if (!all_bfloat16(u)) return points_gram_of<Outer<float>>(u, scratch);
  const Rows& x = u.points->parts[u.part];
  const int64_t tiles = tiles_of(x.rows), width = packed_width(x.rows);
  static_assert(kWidth == kTile, "rows of the sums are whole tiles");
  bf16 *left = reinterpret_cast<bf16*>(scratch), *panels = left + tiles * kTile * kTiledStride;
  std::fill(left + x.rows * kTiledStride, panels, bf16());
  const Tiles used(tiles * kTile);
  for (int64_t begin = u.begin; begin < u.end; begin += kTiledColumns) {
    const int64_t depth = std::min(u.end - begin, kTiledColumns), steps = steps_of(depth), size = steps * kPanel;
    bf16* to = left;
    for (int64_t s = 0; s < x.num_sets; to += x.sets[s++].rows * kTiledStride) copy_rows(x.sets[s], begin, depth, to);
    for (int64_t t = 0; t < tiles; ++t)
      pack_panel(left + t * kTile * kTiledStride, kTiledStride, kTile, steps * kStep, panels + t * size);
    for (int64_t j = 0; j < tiles; j += 2)
      with_constant<2>(static_cast<int>(tiles - j), [&](auto N) {
        for (int64_t i = 0; i <= j; i += 2)
          with_constant<2>(static_cast<int>(tiles - i), [&](auto M) {
            multiply<decltype(M)::value, decltype(N)::value>(left + i * kTile * kTiledStride, kTiledStride,
                                                             panels + j * size, size, steps, begin > u.begin,
                                                             u.out + (i * width + j) * kTile, width);
          });
      });
  }
  if (u.points->scales) scale_products(u, u.points->scales + u.part * x.rows);
}

}  // namespace
