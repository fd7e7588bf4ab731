// The kernels of lora.cuh and mixture.cuh for one dtype: a file of their own, so that dtypes compile side by side.
#include "launch.cuh"

namespace lorakern::cuda {

template cudaError_t launch_bgmv<__half>(const BgmvParams&, const Device&, cudaStream_t);
template int planes_of<__half>(const BgmvParams&, const Device&);
template cudaError_t load_bgmv<__half>(Device*);

}  // namespace lorakern::cuda
