// DLPack's C exchange interface, major version 1: what of it we call, by its published layout. A type publishes it as a
// capsule, so that one build reads the tensors of every torch that has it.
#pragma once
#include <cstdint>

namespace lorakern::dlpack {

constexpr const char* kCapsuleName = "dlpack_exchange_api";
constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;

enum Code : uint8_t { kInt = 0, kFloat = 2, kBFloat = 4 };

struct Tensor {  // borrowed from its owner, and the shape and strides as well
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  ExchangeApi* older;                                    // the same table for an older major version, or null
  void* unused[3];                                       // functions of owned tensors
  int (*tensor_from_object)(void* object, Tensor* out);  // 0, or -1 with a Python exception set; may be null
  void* stream;
};

}  // namespace lorakern::dlpack
