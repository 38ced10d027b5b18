// The objective's kernels for flat operands in float32.
#include "cuda/objective_flat.h"

namespace fusedvae {
namespace cuda {

template void launch_flat<FlatFloat32>(const ObjectiveTask&, const Plan&, const Launch&);

}  // namespace cuda
}  // namespace fusedvae
