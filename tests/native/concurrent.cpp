// Every CPU op from several threads at once, on shared inputs and own outputs, for the sanitizers: each caller must get
// the bits that it gets alone. With the argument `race` all callers write to one y, which must be reported.
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>

#include "cpu/lora.h"
#include "cpu/threads.h"

using namespace lorakern;

static std::atomic<int> workers_started{0};

// The thread pool that csrc finds by name, in a form that the sanitizers see through.
extern "C" void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned) {
  std::vector<std::thread> workers;
  for (unsigned i = 1; i < threads; ++i) workers.emplace_back(body, context);
  workers_started += static_cast<int>(threads) - 1;
  body(context);
  for (std::thread& worker : workers) worker.join();
}

namespace {

constexpr int kCallers = 4, kThreads = 3, kRounds = 2;

using Bytes = std::vector<char>;

struct Sizes {
  Dtype dtype;
  int64_t tokens, choices, slots, r_max, d_in, d_out;
  int slices;
};

constexpr Sizes kSizes[] = {
    {Dtype::kFloat32, 70, 1, 3, 16, 257, 200, 1},    {Dtype::kBFloat16, 33, 2, 5, 21, 300, 129, 2},
    {Dtype::kFloat16, 96, 1, 40, 8, 256, 384, 1},    {Dtype::kBFloat16, 150, 1, 2, 33, 128, 240, 3},
    {Dtype::kFloat32, 40, 3, 4, 24, 130, 65, 2},     {Dtype::kFloat16, 5, 2, 4, 256, 1000, 63, 1},
    {Dtype::kBFloat16, 64, 1, 64, 16, 1024, 512, 1},
};

class Problem {
 public:
  explicit Problem(const Sizes& sizes) : n_(sizes) {
    for (int64_t i = 0; i < pairs(); ++i) {
      indices_.push_back(static_cast<int64_t>(random_() % (n_.slots + 1)) - 1);
      gates_.push_back(static_cast<float>(random_() % 8) / 8);
    }
    for (int64_t s = 0; s < n_.slots; ++s) {
      ranks_.push_back(static_cast<int32_t>(random_() % (n_.r_max + 1)));
      scale_.push_back(static_cast<float>(random_() % 8) / 8);
    }
    x_ = values(n_.tokens * n_.d_in);
    dy_ = values(n_.tokens * columns());
    for (int s = 0; s < n_.slices; ++s) {
      A_.push_back(values(n_.slots * n_.r_max * n_.d_in));
      B_.push_back(values(n_.slots * n_.d_out * n_.r_max));
    }
  }

  void bgmv(char* y, int threads) const {
    LoraParams p = params();
    p.y = y;
    cpu::bgmv(p, view(), threads);
  }

  // Every op once, into new memory: all that they wrote.
  std::vector<Bytes> all(int threads) const {
    std::vector<Bytes> outputs;
    const auto make = [&](int64_t bytes) { return outputs.emplace_back(bytes).data(); };
    int32_t* order = reinterpret_cast<int32_t*>(make((pairs() + n_.slots + 1) * 4));
    cpu::make_plan(view(), n_.tokens, n_.choices, n_.slots, order, order + pairs());

    LoraParams p = params();
    p.plan = {order, order + pairs()};
    p.h = reinterpret_cast<float*>(make(n_.slices * pairs() * n_.r_max * 4));
    cpu::shrink(p, view(), threads);
    p.y = make(y_bytes());
    cpu::expand(p, view(), threads);
    bgmv(make(y_bytes()), threads);

    LoraGradParams g{};
    g.forward = params();
    g.dy = dy_.data();
    g.dy_stride = columns();
    g.dx = make(n_.tokens * n_.d_in * size());
    for (int s = 0; s < n_.slices; ++s) {
      g.dA[s] = make(A_[s].size());
      g.dB[s] = make(B_[s].size());
    }
    g.dscale = reinterpret_cast<float*>(make(n_.slots * 4));
    g.dgates = reinterpret_cast<float*>(make(pairs() * 4));
    cpu::backward(g, view(), threads);
    return outputs;
  }

  int64_t y_bytes() const { return n_.tokens * columns() * size(); }

 private:
  int64_t size() const { return n_.dtype == Dtype::kFloat32 ? 4 : 2; }
  int64_t pairs() const { return n_.tokens * n_.choices; }
  int64_t columns() const { return n_.d_out * n_.slices; }
  cpu::Indices view() const { return {indices_.data(), 8, n_.choices, 1}; }

  // Random bits of finite numbers below 2 in size.
  Bytes values(int64_t count) {
    Bytes bytes(count * size());
    for (char& byte : bytes) byte = static_cast<char>(random_());
    for (size_t high = size() - 1; high < bytes.size(); high += size()) bytes[high] &= static_cast<char>(0xBF);
    return bytes;
  }

  LoraParams params() const {
    LoraParams p{};
    p.dtype = n_.dtype;
    p.num_tokens = n_.tokens;
    p.num_choices = n_.choices;
    p.num_slots = n_.slots;
    p.r_max = n_.r_max;
    p.d_in = n_.d_in;
    p.num_slices = n_.slices;
    p.x = x_.data();
    p.x_stride = n_.d_in;
    for (int s = 0; s < n_.slices; ++s) {
      p.A[s] = {A_[s].data(), n_.r_max * n_.d_in, n_.d_in, n_.r_max};
      p.B[s] = {B_[s].data(), n_.d_out * n_.r_max, n_.r_max, n_.d_out};
    }
    p.y_stride = columns();
    p.scale = scale_.data();
    p.ranks = ranks_.data();
    p.gates = gates_.data();
    p.accumulate = true;
    return p;
  }

  Sizes n_;
  std::mt19937 random_;
  std::vector<int64_t> indices_;
  std::vector<int32_t> ranks_;
  std::vector<float> scale_, gates_;
  Bytes x_, dy_;
  std::vector<Bytes> A_, B_;
};

template <typename Call>
void call_at_once(const Call& call) {
  std::vector<std::thread> callers;
  for (int i = 0; i < kCallers; ++i) callers.emplace_back(call, i);
  for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Problem> problems;
  for (const Sizes& sizes : kSizes) problems.emplace_back(sizes);
  if (argc > 1 && std::strcmp(argv[1], "race") == 0) {
    Bytes y(problems[0].y_bytes());
    call_at_once([&](int) { problems[0].bgmv(y.data(), kThreads); });
    return 0;
  }
  for (const std::string& isa : cpu::usable_isas()) {
    cpu::force_isa(isa);
    std::vector<std::vector<Bytes>> alone;
    for (const Problem& problem : problems) alone.push_back(problem.all(1));
    std::atomic<int> wrong{0};
    workers_started = 0;
    call_at_once([&](int caller) {
      const size_t count = problems.size();
      for (size_t i = 0; i < kRounds * count; ++i)  // each caller begins elsewhere, so that they meet in different ops
        wrong += problems[(i + caller) % count].all(kThreads) != alone[(i + caller) % count];
    });
    std::printf("%s: %d callers, %d worker threads started, %d wrong results\n", isa.c_str(), kCallers,
                workers_started.load(), wrong.load());
    if (wrong || !workers_started) return 1;
  }
}
