// The objective's kernels for flat operands in float16.
#include "cuda/objective_flat.h"

namespace fusedvae {
namespace cuda {

template void launch_flat<FlatFloat16>(const ObjectiveTask&, const Plan&, const Launch&);

}  // namespace cuda
}  // namespace fusedvae
