// The extension module: tasks, tensors and a thread count in, kernels out. Knows nothing of torch: a tensor is
// whatever has a method data_ptr.
//
// A task says how a kernel walks its operands: everything about a call but where they lie. It is made once for
// tensors of some sizes, strides and dtypes, and runs on any that have these. Making one takes the form of each operand
// in order: (tensor, byte offset, dtype code, batch stride, outer stride, inner stride) for one that lies in a tensor
// of the run, (number,) for one that is a number, None for one that is not there; tensor and number are positions in
// the tuple that a run takes. The caller answers for the memory, and has imported torch, whose OpenMP runtime the
// kernels then share.

#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/kernels.h"
#include "operand.h"
#if defined(FUSEDVAE_WITH_CUDA)
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using namespace fusedvae;

namespace {

Extent extent_of(const py::tuple& sizes) {
  return {sizes[0].cast<int64_t>(), sizes[1].cast<int64_t>(), sizes[2].cast<int64_t>()};
}

// A kernel's task, and those of its operands that each run fills in.
template <class Task>
class Planned {
 public:
  Task task;

  void add(Operand& operand, const py::handle& form) {
    if (form.is_none()) return;
    operand.given = true;
    const auto parts = form.cast<py::tuple>();
    Slot slot{reinterpret_cast<char*>(&operand) - reinterpret_cast<char*>(&task), parts[0].cast<size_t>(), -1};
    if (parts.size() == 6) {
      slot.offset = parts[1].cast<int64_t>();
      operand.dtype = static_cast<DType>(parts[2].cast<int>());
      for (size_t i = 0; i < 3; ++i) operand.stride[i] = parts[i + 3].cast<int64_t>();
    } else if (parts.size() != 1) {
      throw py::value_error("an operand's form has six parts, or one for a number");
    }
    slots_.push_back(slot);
    if (slot.source >= sources_) sources_ = slot.source + 1;
  }

  // The task on these tensors and numbers.
  Task on(const py::tuple& sources) const {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    if (sources.size() < sources_) throw py::value_error("the task has more operands");
    Task filled = task;
    for (const Slot& slot : slots_) {
      Operand& operand = *reinterpret_cast<Operand*>(reinterpret_cast<char*>(&filled) + slot.member);
      PyObject* const source = PyTuple_GET_ITEM(sources.ptr(), static_cast<Py_ssize_t>(slot.source));
      if (slot.offset < 0) {
        operand.value = PyFloat_AsDouble(source);
      } else if (PyObject* const address = PyObject_CallMethodNoArgs(source, data_ptr)) {
        operand.data = static_cast<char*>(PyLong_AsVoidPtr(address)) + slot.offset;
        Py_DECREF(address);
      }
      if (PyErr_Occurred()) throw py::error_already_set();
    }
    return filled;
  }

 private:
  struct Slot {
    std::ptrdiff_t member;  // of the operand in the task
    size_t source;
    int64_t offset;  // in bytes; -1 for a number
  };
  std::vector<Slot> slots_;
  size_t sources_ = 0;
};

const int64_t* seed_at(uintptr_t address) {
  return reinterpret_cast<const int64_t*>(address);
}

// Forms in the order of the structs in tasks.h.

template <class Task>
void add_nll(Planned<Task>& plan, NllTask& task, const py::tuple& extent, const py::tuple& forms, bool is_variance,
             double eps) {
  task.extent = extent_of(extent);
  task.is_variance = is_variance;
  task.eps = eps;
  Operand* const operands[] = {&task.recon_x,      &task.x,      &task.spread,     &task.weight, &task.value,
                               &task.grad_recon_x, &task.grad_x, &task.grad_spread};
  for (size_t i = 0; i < 8; ++i) plan.add(*operands[i], forms[i]);
}

template <class Task>
void add_latent(Planned<Task>& plan, LatentTask& task, const py::tuple& extent, const py::tuple& index,
                const py::tuple& forms) {
  task.extent = extent_of(extent);
  task.index = {index[0].cast<int64_t>(), index[1].cast<int64_t>(), index[2].cast<int64_t>()};
  Operand* const operands[] = {&task.mu,      &task.logvar,      &task.noise,   &task.grad_z, &task.z,
                               &task.grad_mu, &task.grad_logvar, &task.grad_kl, &task.kl};
  for (size_t i = 0; i < 9; ++i) plan.add(*operands[i], forms[i]);
}

Planned<NllTask> nll_task(const py::tuple& extent, const py::tuple& forms, bool is_variance, double eps) {
  Planned<NllTask> plan;
  add_nll(plan, plan.task, extent, forms, is_variance, eps);
  return plan;
}

Planned<LatentTask> latent_task(const py::tuple& extent, const py::tuple& index, const py::tuple& forms) {
  Planned<LatentTask> plan;
  add_latent(plan, plan.task, extent, index, forms);
  return plan;
}

Planned<ElboTask> elbo_task(const py::object& nll, const py::object& kl, const py::tuple& others, int64_t kl_in_count,
                            int values, double scale, double constant) {
  Planned<ElboTask> plan;
  ElboTask& task = plan.task;
  if ((task.has_nll = !nll.is_none())) {
    const auto a = nll.cast<py::tuple>();
    add_nll(plan, task.nll, a[0], a[1], a[2].cast<bool>(), a[3].cast<double>());
  }
  if ((task.has_kl = !kl.is_none())) {
    const auto a = kl.cast<py::tuple>();
    add_latent(plan, task.kl, a[0], a[1], a[2]);
  }
  Operand* const operands[] = {&task.kl_in, &task.beta, &task.loss, &task.nll_out, &task.kl_out};
  if (others.size() > 5) throw py::value_error("more operands than a task has room for");
  for (size_t i = 0; i < others.size(); ++i) plan.add(*operands[i], others[i]);
  task.kl_in_count = kl_in_count;
  task.values = static_cast<Values>(values);
  task.scale = scale;
  task.constant = constant;
  return plan;
}

// A run of a kernel on the CPU.
template <class Task>
auto run(void (*Kernels::*kernel)(const Task&, int)) {
  return [kernel](const Planned<Task>& plan, const py::tuple& sources, int threads) {
    const Task task = plan.on(sources);
    py::gil_scoped_release release;
    (kernels().*kernel)(task, threads);
  };
}

void run_latent(const Planned<LatentTask>& plan, const py::tuple& sources, uintptr_t seed, int threads) {
  LatentTask task = plan.on(sources);
  task.seed = seed_at(seed);
  py::gil_scoped_release release;
  kernels().latent(task, threads);
}

#if defined(FUSEDVAE_WITH_CUDA)
cuda::Place place_of(int device, uintptr_t stream, uintptr_t workspace) {
  return {device, reinterpret_cast<void*>(stream), reinterpret_cast<void*>(workspace)};
}

// A launch of a kernel on a GPU.
template <class Task>
auto launch(void (*kernel)(const Task&, const cuda::Place&)) {
  return [kernel](const Planned<Task>& plan, const py::tuple& sources, int device, uintptr_t stream,
                  uintptr_t workspace) { kernel(plan.on(sources), place_of(device, stream, workspace)); };
}

void launch_latent(const Planned<LatentTask>& plan, const py::tuple& sources, uintptr_t seed, int device,
                   uintptr_t stream, uintptr_t workspace) {
  LatentTask task = plan.on(sources);
  task.seed = seed_at(seed);
  cuda::latent(task, place_of(device, stream, workspace));
}

template <class Task>
int64_t workspace_bytes(const Planned<Task>& plan) {
  return cuda::workspace_bytes(plan.task);
}

int64_t no_workspace(const Planned<ScaleTask>&) {
  return 0;
}
#endif

Planned<ScaleTask> scale_task(const py::tuple& forms, const py::tuple& counts, const py::tuple& factor) {
  if (forms.size() > ScaleTask::kMost) throw py::value_error("more tensors than a task has room for");
  Planned<ScaleTask> plan;
  for (size_t i = 0; i < forms.size(); ++i) {
    plan.add(plan.task.tensors[i], forms[i]);
    plan.task.counts[i] = counts[i].cast<int64_t>();
  }
  plan.add(plan.task.factor, factor);
  return plan;
}

NormalTask normal_task(uintptr_t out, int dtype, int64_t count, uintptr_t seed) {
  NormalTask task;
  task.out.given = true;
  task.out.data = reinterpret_cast<void*>(out);
  task.out.dtype = static_cast<DType>(dtype);
  task.out.stride[2] = 1;
  task.count = count;
  task.seed = seed_at(seed);
  return task;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fusedvae's compiled kernels";
  m.def("cpu_isa", [] { return kernels().isa; }, "The instruction set that the CPU kernels use.");
  m.def("normal", [](uintptr_t out, int dtype, int64_t count, uintptr_t seed, int threads) {
    const NormalTask task = normal_task(out, dtype, count, seed);
    py::gil_scoped_release release;
    kernels().normal(task, threads);
  });
  auto nll =
      py::class_<Planned<NllTask>>(m, "NllTask").def(py::init(&nll_task)).def("run", run<NllTask>(&Kernels::nll));
  auto latent = py::class_<Planned<LatentTask>>(m, "LatentTask").def(py::init(&latent_task)).def("run", &run_latent);
  auto elbo =
      py::class_<Planned<ElboTask>>(m, "ElboTask").def(py::init(&elbo_task)).def("run", run<ElboTask>(&Kernels::elbo));
  auto scale = py::class_<Planned<ScaleTask>>(m, "ScaleTask")
                   .def(py::init(&scale_task))
                   .def("run", run<ScaleTask>(&Kernels::scale));
#if defined(FUSEDVAE_WITH_CUDA)
  m.def("cuda_unavailable", &cuda::unavailable, "Why no GPU here can run the CUDA kernels; empty if all can.");
  m.def("launch_normal", [](uintptr_t out, int dtype, int64_t count, uintptr_t seed, int device, uintptr_t stream) {
    cuda::normal(normal_task(out, dtype, count, seed), place_of(device, stream, 0));
  });
  nll.def("launch", launch<NllTask>(&cuda::nll)).def_property_readonly("workspace_bytes", &workspace_bytes<NllTask>);
  latent.def("launch", &launch_latent).def_property_readonly("workspace_bytes", &workspace_bytes<LatentTask>);
  elbo.def("launch", launch<ElboTask>(&cuda::elbo))
      .def_property_readonly("workspace_bytes", &workspace_bytes<ElboTask>);
  scale.def("launch", launch<ScaleTask>(&cuda::scale)).def_property_readonly("workspace_bytes", &no_workspace);
#endif
}
