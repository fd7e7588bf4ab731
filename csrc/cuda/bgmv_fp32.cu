// The kernels of lora.cuh and mixture.cuh for one dtype: a file of their own, so that dtypes compile side by side.
#include "launch.cuh"

namespace lorakern::cuda {

template cudaError_t launch_bgmv<float>(const BgmvParams&, const Device&, cudaStream_t);
template int planes_of<float>(const BgmvParams&, const Device&);
template cudaError_t load_bgmv<float>(Device*);

}  // namespace lorakern::cuda
