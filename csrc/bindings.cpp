// The extension module: pointers, sizes and strides in, kernels out. Knows nothing of torch.
//
// An operand is a tuple (address, dtype code, batch stride, outer stride, inner stride), a number, or None. The caller
// answers for the memory behind the addresses, and has imported torch, whose OpenMP runtime the kernels then share.

#include <pybind11/pybind11.h>

#include "cpu/kernels.h"
#include "operand.h"

namespace py = pybind11;
using namespace fusedvae;

namespace pybind11::detail {

// Operands and extents are parsed by hand: dozens of integers a call, on the path of every training step.
inline int64_t integer_at(PyObject* tuple, Py_ssize_t i) {
  return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
}

template <>
struct type_caster<Operand> {
  PYBIND11_TYPE_CASTER(Operand, const_name("Operand"));

  bool load(handle source, bool) {
    PyObject* p = source.ptr();
    if (p == Py_None) return true;
    value.given = true;
    if (PyTuple_Check(p)) {
      if (PyTuple_GET_SIZE(p) != 5) return false;
      value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(p, 0));
      value.dtype = static_cast<DType>(integer_at(p, 1));
      for (int i = 0; i < 3; ++i) value.stride[i] = integer_at(p, 2 + i);
    } else {
      value.value = PyFloat_AsDouble(p);
    }
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
  }
};

template <class T, int64_t T::* a, int64_t T::* b, int64_t T::* c>
struct triple_caster {
  PYBIND11_TYPE_CASTER(T, const_name("Triple"));

  bool load(handle source, bool) {
    PyObject* p = source.ptr();
    if (!PyTuple_Check(p) || PyTuple_GET_SIZE(p) != 3) return false;
    value.*a = integer_at(p, 0);
    value.*b = integer_at(p, 1);
    value.*c = integer_at(p, 2);
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
  }
};
template <>
struct type_caster<Extent> : triple_caster<Extent, &Extent::batch, &Extent::outer, &Extent::inner> {};
template <>
struct type_caster<IndexStrides>
    : triple_caster<IndexStrides, &IndexStrides::batch, &IndexStrides::outer, &IndexStrides::inner> {};

}  // namespace pybind11::detail

namespace {

const int64_t* seed_at(uintptr_t address) {
  return reinterpret_cast<const int64_t*>(address);
}

NllTask nll_task(const py::tuple& a) {
  NllTask task;
  task.extent = a[0].cast<Extent>();
  Operand* const operands[] = {&task.recon_x,      &task.x,      &task.spread,     &task.value,
                               &task.grad_recon_x, &task.grad_x, &task.grad_spread};
  for (size_t i = 0; i < 7; ++i) *operands[i] = a[i + 1].cast<Operand>();
  task.is_variance = a[8].cast<bool>();
  task.eps = a[9].cast<double>();
  return task;
}

LatentTask kl_task(const py::tuple& a) {
  LatentTask task;
  task.extent = a[0].cast<Extent>();
  Operand* const operands[] = {&task.mu, &task.logvar, &task.grad_mu, &task.grad_logvar};
  for (size_t i = 0; i < 4; ++i) *operands[i] = a[i + 1].cast<Operand>();
  return task;
}

void normal(Operand out, int64_t count, uintptr_t seed, int threads) {
  NormalTask task;
  task.out = out;
  task.count = count;
  task.seed = static_cast<uint64_t>(*seed_at(seed));
  py::gil_scoped_release release;
  kernels().normal(task, threads);
}

void latent(Extent extent, IndexStrides index, Operand mu, Operand logvar, Operand noise, Operand grad_z,
            uintptr_t seed, Operand grad_kl, Operand z, Operand grad_mu, Operand grad_logvar, Operand kl, int threads) {
  LatentTask task;
  task.extent = extent;
  task.index = index;
  task.mu = mu;
  task.logvar = logvar;
  task.noise = noise;
  task.grad_z = grad_z;
  task.seed = seed_at(seed);
  task.grad_kl = grad_kl;
  task.z = z;
  task.grad_mu = grad_mu;
  task.grad_logvar = grad_logvar;
  task.kl = kl;
  py::gil_scoped_release release;
  kernels().latent(task, threads);
}

void elbo(const py::object& nll, const py::object& kl, Operand kl_in, int64_t kl_in_count, Operand beta, int values,
          double scale, double constant, Operand loss, Operand nll_out, Operand kl_out, int threads) {
  ElboTask task;
  if ((task.has_nll = !nll.is_none())) task.nll = nll_task(nll);
  if ((task.has_kl = !kl.is_none())) task.kl = kl_task(kl);
  task.kl_in = kl_in;
  task.kl_in_count = kl_in_count;
  task.beta = beta;
  task.values = static_cast<Values>(values);
  task.scale = scale;
  task.constant = constant;
  task.loss = loss;
  task.nll_out = nll_out;
  task.kl_out = kl_out;
  py::gil_scoped_release release;
  kernels().elbo(task, threads);
}

void nll_backward(const py::tuple& nll, Operand weight, int threads) {
  NllTask task = nll_task(nll);
  task.weight = weight;
  py::gil_scoped_release release;
  kernels().nll(task, threads);
}

void scale(const py::list& tensors, Operand factor, int threads) {
  for (const py::handle item : tensors) {
    const auto pair = item.cast<py::tuple>();
    ScaleTask task;
    task.tensor = pair[0].cast<Operand>();
    task.count = pair[1].cast<int64_t>();
    task.factor = factor;
    py::gil_scoped_release release;
    kernels().scale(task, threads);
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fusedvae's compiled kernels";
  m.def("cpu_isa", [] { return kernels().isa; }, "The instruction set that the CPU kernels use.");
  m.def("normal", &normal);
  m.def("latent", &latent);
  m.def("elbo", &elbo);
  m.def("nll_backward", &nll_backward);
  m.def("scale", &scale);
}
