// shrink and expand of bfloat16 on AMX tiles. One instruction adds 32 products to each of 16 x 16 float32 sums, always
// in the same order, and the sums of a token are always made of the same instructions: they do not depend on the batch.
#pragma once
#include "lora_forward.h"

namespace {

constexpr int kTile = 16;                  // rows of a tile, and columns of a tile of sums
constexpr int64_t kStep = 32;              // terms of a sum that one instruction takes
constexpr int64_t kPanel = kTile * kStep;  // numbers of a panel in one step
constexpr int64_t kTileRanks = 64;         // of a slot, at a time: their panels stay in L2
constexpr int64_t kFewTiles = 64 / kTile;  // tiles of tokens that share a step of a panel in L1

// AddressSanitizer sees what is copied into tiles' memory, but not what tiles load.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kInPlace = false;
#else
constexpr bool kInPlace = true;
#endif

constexpr int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }
constexpr int64_t steps_of(int64_t depth) { return (depth + kStep - 1) / kStep; }

// Gives the thread tiles, and back what it had: others in the process use them too. Those of the left side and of sums
// have as many rows as there are tokens, up to 16.
class Tiles {
 public:
  explicit Tiles(int64_t tokens) {
    struct alignas(64) {
      uint8_t palette = 1, unused[15] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } wanted;
    for (int i = 0; i < 6; ++i) wanted.rows[i] = static_cast<uint8_t>(std::min<int64_t>(tokens, kTile));
    wanted.rows[6] = wanted.rows[7] = kTile;
    _tile_storeconfig(before_);
    asm volatile("" ::"m"(wanted) : "memory");
    _tile_loadconfig(&wanted);
  }
  ~Tiles() {
    if (before_[0])
      _tile_loadconfig(before_);
    else
      _tile_release();
  }
  Tiles(const Tiles&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// Rows that run along the sum as the right side: panel[step][pair][row]. Rows from `live` on and terms from `depth` on
// are zero.
inline void pack_panel(const bf16* rows, int64_t stride, int64_t live, int64_t depth, bf16* panel) {
  for (int64_t k = 0; k < depth; k += kStep, panel += kPanel) {
    Vec block[kTile];
    if (live >= kTile && depth - k >= kStep) {
      for (int i = 0; i < kTile; ++i) block[i].v = _mm512_loadu_ps(rows + i * stride + k);
    } else {
      const uint32_t mask = depth - k >= kStep ? ~0u : (1u << (depth - k)) - 1;
      for (int i = 0; i < kTile; ++i)
        block[i].v =
            i < live ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, rows + i * stride + k)) : _mm512_setzero_ps();
    }
    vec_transpose(block);
    for (int i = 0; i < kTile; ++i) _mm512_store_ps(panel + i * kStep, block[i].v);
  }
}

// M tiles of rows on the left, `stride` numbers from each other, times N panels: M * 16 rows of N * 16 sums, `width`
// numbers from each other, to which what was there is added where `resume` says so. M * N <= 4.
template <int M, int N>
void multiply(const bf16* left, int64_t stride, const bf16* panel, int64_t panel_size, int64_t steps, bool resume,
              float* sums, int64_t width = N * kTile) {
  const auto row = static_cast<int64_t>(width * sizeof(float));
  const auto sum = [&](int m, int n) { return sums + (m * width + n) * kTile; };
  asm volatile("" ::: "memory");  // the intrinsics do not say that they read memory
  if (resume) {
    _tile_loadd(0, sum(0, 0), row);
    if (N > 1) _tile_loadd(1, sum(0, 1), row);
    if (M > 1) _tile_loadd(2, sum(1, 0), row);
    if (M > 1 && N > 1) _tile_loadd(3, sum(1, 1), row);
    if (M > 2) _tile_loadd(1, sum(2, 0), row);
    if (M > 3) _tile_loadd(3, sum(3, 0), row);
  } else {
    _tile_zero(0);
    if (N > 1 || M > 2) _tile_zero(1);
    if (M > 1) _tile_zero(2);
    if (M * N > 3) _tile_zero(3);
  }
  const int64_t bytes = stride * sizeof(bf16), tile = kTile * stride;
  for (int64_t s = 0; s < steps; ++s, left += kStep, panel += kPanel) {
    _tile_loadd(6, panel, 64);
    if (N > 1) _tile_loadd(7, panel + panel_size, 64);
    _tile_loadd(4, left, bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (N > 1) _tile_dpbf16ps(1, 4, 7);
    if (M > 1) _tile_loadd(5, left + tile, bytes);
    if (M > 1) _tile_dpbf16ps(2, 5, 6);
    if (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
    if (M > 2) _tile_loadd(7, left + 2 * tile, bytes);
    if (M > 2) _tile_dpbf16ps(1, 7, 6);
    if (M > 3) _tile_loadd(4, left + 3 * tile, bytes);
    if (M > 3) _tile_dpbf16ps(3, 4, 6);
  }
  _tile_stored(0, sum(0, 0), row);
  if (N > 1) _tile_stored(1, sum(0, 1), row);
  if (M > 1) _tile_stored(2, sum(1, 0), row);
  if (M > 1 && N > 1) _tile_stored(3, sum(1, 1), row);
  if (M > 2) _tile_stored(1, sum(2, 0), row);
  if (M > 3) _tile_stored(3, sum(3, 0), row);
  asm volatile("" ::: "memory");
}

// The rows that the tiles of `some` tokens of a slot have, which has `all` of them: see Tiles.
constexpr int64_t tile_rows(int64_t some, int64_t all) { return all <= kTile ? some : tiles_of(some) * kTile; }

// x of some pairs over `depth` columns as tiles of left rows: as it lies, where the tokens follow each other and fill
// tiles; else a copy with zeros around it.
struct TokenRows {
  const bf16* data;
  int64_t stride;
};

inline TokenRows token_rows(const LoraParams& p, const int32_t* pairs, int64_t count, int64_t rows, int64_t begin,
                            int64_t depth, bf16* copy) {
  const bf16* x = static_cast<const bf16*>(p.x) + begin;
  const bool in_a_row = p.num_choices == 1 && pairs[count - 1] - pairs[0] == count - 1;
  if (kInPlace && in_a_row && rows == count && depth % kStep == 0) return {x + pairs[0] * p.x_stride, p.x_stride};
  const int64_t width = steps_of(depth) * kStep;
  for (int64_t i = 0; i < rows; ++i) {
    const bf16* from = i < count ? x + token_of(p, pairs[i]) * p.x_stride : nullptr;
    for (int64_t k = 0; k < width; k += kStep) {
      const uint32_t mask = !from ? 0 : depth - k >= kStep ? ~0u : (1u << (depth - k)) - 1;
      const __m512i some = mask == ~0u ? _mm512_loadu_si512(from + k)
                           : mask      ? _mm512_maskz_loadu_epi16(mask, from + k)
                                       : _mm512_setzero_si512();
      _mm512_store_si512(copy + i * width + k, some);
    }
  }
  return {copy, width};
}

struct ShrinkScratch {
  int64_t panels, copy, sums;  // floats
  explicit ShrinkScratch(const ShrinkUnit& u)
      : panels(kTileRanks * kDotBlock / 2),
        copy(kFewTiles * kTile * kDotBlock / 2),
        sums(kTileRanks * (u.pairs.count + kFewTiles * kTile)) {}
};

inline int64_t shrink_amx_scratch(const ShrinkUnit& u) {
  const ShrinkScratch need(u);
  return need.panels + need.copy + need.sums;
}

inline void shrink_amx(const LoraParams& p, const ShrinkUnit& u, float* scratch) {
  const ShrinkScratch need(u);
  bf16* const panels = reinterpret_cast<bf16*>(scratch);
  bf16* const copy = reinterpret_cast<bf16*>(scratch + need.panels);
  float* const sums = scratch + need.panels + need.copy;  // by panel, then by few tiles of tokens
  const Weight& weight = p.A[u.slice];
  const bf16* rows = static_cast<const bf16*>(weight.data) + u.pairs.slot * weight.slot_stride;
  float* h = p.h + u.slice * p.num_tokens * p.num_choices * p.r_max;
  const Tiles tiles(u.pairs.count);
  const int64_t tokens = tiles_of(u.pairs.count) * kTile;
  for (int64_t first = u.row_begin; first < u.row_end; first += kTileRanks) {
    const int64_t ranks = std::min(u.row_end - first, kTileRanks), num_panels = tiles_of(ranks);
    for (int64_t begin = 0; begin == 0 || begin < p.d_in; begin += kDotBlock) {
      const int64_t depth = std::min(p.d_in - begin, kDotBlock), steps = steps_of(depth), size = steps * kPanel;
      const bf16* block = rows + first * weight.row_stride + begin;
      for (int64_t n = 0; n < num_panels; ++n)
        pack_panel(block + n * kTile * weight.row_stride, weight.row_stride, ranks - n * kTile, depth,
                   panels + n * size);
      for (int64_t i = 0; i < u.pairs.count; i += kFewTiles * kTile) {
        const int64_t count = std::min(u.pairs.count - i, kFewTiles * kTile);
        const int64_t rows_of_tiles = tile_rows(count, u.pairs.count);
        const TokenRows x = token_rows(p, u.pairs.ids + i, count, rows_of_tiles, begin, depth, copy);
        for (int64_t n = 0; n < num_panels; ++n)
          with_constant<kFewTiles>(static_cast<int>(tiles_of(count)), [&](auto M) {
            multiply<decltype(M)::value, 1>(x.data, x.stride, panels + n * size, 0, steps, begin > 0,
                                            sums + (n * tokens + i) * kTile);
          });
      }
    }
    for (int64_t n = 0; n < num_panels; ++n) {
      const int live = static_cast<int>(std::min<int64_t>(ranks - n * kTile, kTile));
      for (int64_t i = 0; i < u.pairs.count; ++i)
        vec_store_n(h + u.pairs.ids[i] * p.r_max + first + n * kTile, vec_load(sums + (n * tokens + i) * kTile), live);
    }
  }
}

// expand of one slot: see Panels. Tokens against two tiles of columns at a time.
struct TilePanels {
  static constexpr int64_t kColumns = 2 * kTile, kTokens = 2 * kTile;
  static constexpr int64_t kPackedNumbers = 1 << 16;  // of weights, packed for many tokens: they stay in L2

  static int64_t columns_at_once(const ExpandJob& job) {
    const int64_t pair = 2 * steps_of(job.params->r_max) * kPanel;
    return std::max<int64_t>(kPackedNumbers / std::max<int64_t>(pair, 1), 1) * kColumns;
  }

  static int64_t scratch(const ExpandJob& job, int64_t most) {
    if (!job.by_columns) return Panels<bf16>::scratch(job, most);
    const int64_t numbers = steps_of(job.params->r_max) * (tiles_of(most) * kPanel + columns_at_once(job) * kStep);
    return numbers / 2 + kTokens * kColumns;
  }

  // h of the pairs in bfloat16, zero to the ends of the tiles.
  static void pack_left(const ExpandJob& job, int w, const Pairs& pairs, int64_t rank, bf16* left) {
    const int64_t width = steps_of(rank) * kStep;
    for (int64_t i = 0; i < tile_rows(pairs.count, pairs.count); ++i)
      for (int64_t k = 0; k < width; k += kTile) {
        const int some = i < pairs.count ? static_cast<int>(std::clamp<int64_t>(rank - k, 0, kTile)) : 0;
        const Vec h = some ? vec_load_n(job.left[w] + pairs.ids[i] * job.params->r_max + k, some) : vec_zero();
        vec_store(left + i * width + k, h);
      }
  }

  template <typename T, typename D>
  static void add(const ExpandJob& job, int w, const Pairs& pairs, int64_t begin, const Target<D>& target,
                  float* scratch) {
    if (!job.by_columns) return Panels<bf16>::add<T>(job, w, pairs, begin, target, scratch);
    const LoraParams& p = *job.params;
    const Weight& weight = job.weights[w];
    const int64_t rank = rank_of(p, pairs.slot), steps = steps_of(rank), size = steps * kPanel;
    const int64_t stride = p.packed ? rank : weight.row_stride, width = steps * kStep;
    const bf16* rows = static_cast<const bf16*>(weight.data) + pairs.slot * weight.slot_stride + begin * stride;
    float* const sums = scratch;
    bf16* const left = reinterpret_cast<bf16*>(scratch + kTokens * kColumns);
    bf16* const panels = left + tiles_of(pairs.count) * size;
    pack_left(job, w, pairs, rank, left);
    const Tiles tiles(pairs.count);
    const int64_t chunk = pairs.count <= kTile ? kColumns : columns_at_once(job);
    for (int64_t first = 0; first < target.width; first += chunk) {
      const int64_t columns = std::min(chunk, target.width - first);
      for (int64_t n = 0; n < tiles_of(columns); ++n) {
        const int64_t row = first + n * kTile;
        pack_panel(rows + row * stride, stride, target.width - row, rank, panels + n * size);
      }
      for (int64_t i = 0; i < pairs.count; i += kTokens) {
        const int64_t count = std::min(pairs.count - i, kTokens);
        D* out[kTokens];
        float factor[kTokens];
        for (int64_t j = 0; j < count; ++j) {
          const int64_t pair = pairs.ids[i + j];
          out[j] = target.data + (token_of(p, pair) - target.first_token) * target.stride + first;
          factor[j] = job.use_factors ? factor_of(p, job.gates, pairs.slot, pair) : 1.0f;
        }
        for (int64_t c = 0; c < columns; c += kColumns) {
          const int64_t live = std::min(columns - c, kColumns);
          const bf16* panel = panels + c / kTile * size;
          with_constant<2>(static_cast<int>(tiles_of(count)), [&](auto M) {
            with_constant<2>(static_cast<int>(tiles_of(live)), [&](auto N) {
              constexpr int kVecs = decltype(N)::value;
              multiply<decltype(M)::value, kVecs>(left + i * width, width, panel, size, steps, false, sums);
              for (int64_t j = 0; j < count; ++j) {
                const float* row = sums + j * kVecs * kTile;
                if (live == kVecs * kTile) {
                  Vec value[kVecs];
                  for (int v = 0; v < kVecs; ++v) value[v] = vec_load(row + v * kTile);
                  add_vecs<kVecs>(out[j] + c, value, factor[j], target.accumulate);
                } else {
                  for (int64_t v = 0; v * kTile < live; ++v)
                    add_vec_n(out[j] + c + v * kTile, vec_load(row + v * kTile), factor[j], target.accumulate,
                              static_cast<int>(std::min<int64_t>(live - v * kTile, kTile)));
                }
              }
            });
          });
        }
      }
    }
  }
};

}  // namespace
