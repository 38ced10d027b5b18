// The extension module: tasks, tensors and a thread count in, kernels out. Knows nothing of torch: a tensor is
// whatever has a method data_ptr.
//
// A task says how a kernel goes over its operands: everything about a call but where they lie. It is made once for
// tensors of some sizes, strides and dtypes, and runs on any that have these. Making one takes a description
// of each operand: (tensor, byte offset, whether it has elements, dtype code, batch stride, outer stride, inner stride)
// for one that lies in a tensor of the run, (number,) for one that is a number, None for one that is not there; tensor
// and number are positions in the tuple that a run takes. The caller answers for the memory, and has imported torch,
// whose OpenMP runtime the kernels then share.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <dlfcn.h>

#include <atomic>
#include <cstddef>
#include <mutex>
#include <string>
#include <vector>

#include "broadcast.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "math/formulas.h"
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

// An operand that each run fills in.
struct Slot {
  std::ptrdiff_t member;  // where it is in its part of the task
  size_t source;
  int64_t bytes;      // from the tensor's beginning; -1 for a number
  bool has_elements;  // else its memory may be nowhere
};

// A part of a task, or a whole one, and those of its operands that each run fills in.
template <class Part>
class Planned {
 public:
  Part part;

  void add(Operand& operand, const py::handle& description) {
    if (description.is_none()) return;
    operand.given = true;
    const auto fields = description.cast<py::tuple>();
    Slot slot{offset_of(operand), fields[0].cast<size_t>(), -1, false};
    if (fields.size() == 7) {
      slot.bytes = fields[1].cast<int64_t>();
      slot.has_elements = fields[2].cast<bool>();
      operand.dtype = static_cast<DType>(fields[3].cast<int>());
      for (size_t i = 0; i < 3; ++i) operand.stride[i] = fields[i + 4].cast<int64_t>();
    } else if (fields.size() != 1) {
      throw py::value_error("an operand has seven fields, or one for a number");
    }
    take(slot);
  }

  template <size_t size>
  void add(Operand (&operands)[size], const py::tuple& descriptions) {
    if (descriptions.size() > size) throw py::value_error("more operands than a task has room for");
    for (size_t i = 0; i < descriptions.size(); ++i) add(operands[i], descriptions[i]);
  }

  // Puts a smaller part into its place in this one.
  template <class Smaller>
  void add(Smaller& member, const Planned<Smaller>& smaller) {
    member = smaller.part;
    for (Slot slot : smaller.slots()) {
      slot.member += offset_of(member);
      take(slot);
    }
  }

  // The task on these tensors and numbers.
  Part on(const py::tuple& sources) const {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    if (sources.size() < sources_) throw py::value_error("the task has more operands");
    Part filled = part;
    for (const Slot& slot : slots_) {
      Operand& operand = *reinterpret_cast<Operand*>(reinterpret_cast<char*>(&filled) + slot.member);
      PyObject* const source = PyTuple_GET_ITEM(sources.ptr(), static_cast<Py_ssize_t>(slot.source));
      if (slot.bytes < 0) {
        operand.value = PyFloat_AsDouble(source);
      } else if (PyObject* const address = PyObject_CallMethodNoArgs(source, data_ptr)) {
        char* const data = static_cast<char*>(PyLong_AsVoidPtr(address));
        Py_DECREF(address);
        if (data != nullptr)
          operand.data = data + slot.bytes;
        else if (slot.has_elements && !is_zero(source))
          throw py::value_error("a tensor has no memory: its storage has been freed");
        else if (slot.has_elements)  // one number for all elements: nothing is to look for them
          for (int64_t& stride : operand.stride) stride = 0;
      }
      if (PyErr_Occurred()) throw py::error_already_set();
    }
    return filled;
  }

  const std::vector<Slot>& slots() const { return slots_; }

 private:
  // Whether it is one of autograd's zeros without memory. As an operand without data, it is the number 0.
  static bool is_zero(PyObject* tensor) { return py::handle(tensor).attr("_is_zerotensor")().cast<bool>(); }
  template <class Member>
  std::ptrdiff_t offset_of(Member& member) {
    return reinterpret_cast<char*>(&member) - reinterpret_cast<char*>(&part);
  }
  void take(const Slot& slot) {
    slots_.push_back(slot);
    if (slot.source >= sources_) sources_ = slot.source + 1;
  }

  std::vector<Slot> slots_;
  size_t sources_ = 0;
};

const int64_t* seed_at(uintptr_t address) {
  return reinterpret_cast<const int64_t*>(address);
}

// The number of the formula of that name in a list.
template <class... Formula>
int number_of(const std::string& name, scalar::List<Formula...>) {
  using Names = scalar::List<Formula...>;
  for (int k = 0; k < Names::kSize; ++k)
    if (name == Names::kNames[k]) return k;
  throw py::value_error("no formula of the name " + name);
}

Form form_of(const py::handle& fields) {
  const auto form = fields.cast<py::tuple>();
  return {static_cast<Map>(form[0].cast<int>()), form[1].cast<bool>(), form[2].cast<double>(), form[3].cast<double>(),
          form[4].cast<double>()};
}

// A formula's task, but for the formula.
Planned<ElementwiseTask> elementwise_task(bool in_double, const py::tuple& extent, const py::tuple& inputs,
                                          const py::tuple& forms, const py::tuple& gains, const py::object& weight,
                                          const py::object& incoming, const py::object& value, const py::tuple& grads) {
  if (forms.size() > kMostScales || gains.size() > kMostInputs)
    throw py::value_error("more forms or gains than a task has room for");
  Planned<ElementwiseTask> plan;
  ElementwiseTask& task = plan.part;
  task.in_double = in_double;
  task.extent = extent_of(extent);
  plan.add(task.inputs, inputs);
  for (size_t k = 0; k < forms.size(); ++k) task.forms[k] = form_of(forms[k]);
  for (size_t k = 0; k < gains.size(); ++k) task.gains[k] = gains[k].cast<double>();
  plan.add(task.weight, weight);
  plan.add(task.incoming, incoming);
  plan.add(task.value, value);
  plan.add(task.grads, grads);
  if (!can_sum(task)) throw py::value_error("sums that the kernels cannot make");
  return plan;
}

// A latent's task, whose seed is an operand to the caller.
class PlannedLatent {
 public:
  PlannedLatent(const std::string& divergence, const Planned<ElementwiseTask>& elements, const py::tuple& index,
                const py::object& seed, const py::object& offset, const py::object& noise, const py::object& grad_z,
                const py::object& z) {
    LatentTask& task = plan_.part.task;
    plan_.add(task.divergence, elements);
    task.divergence.formula = number_of(divergence, scalar::Divergences{});
    task.index = {index[0].cast<int64_t>(), index[1].cast<int64_t>(), index[2].cast<int64_t>()};
    plan_.add(plan_.part.seed, seed);
    plan_.add(task.offset, offset);
    plan_.add(task.noise, noise);
    plan_.add(task.grad_z, grad_z);
    plan_.add(task.z, z);
  }
  LatentTask on(const py::tuple& sources) const {
    Seeded filled = plan_.on(sources);
    filled.task.seed = static_cast<const int64_t*>(filled.seed.data);
    return filled.task;
  }
  const LatentTask& task() const { return plan_.part.task; }

 private:
  struct Seeded {
    LatentTask task;
    Operand seed;
  };
  Planned<Seeded> plan_;
};

Planned<Term> term(const std::string& formula, const Planned<ElementwiseTask>* elements, const py::object& given,
                   int64_t given_count, double factor, const py::object& normalizer, double constant,
                   const py::object& coefficient, const py::object& out) {
  Planned<Term> plan;
  if (elements) {
    plan.add(plan.part.elements, *elements);
    plan.part.elements.formula = number_of(formula, scalar::Formulas{});
  }
  plan.add(plan.part.given, given);
  plan.part.given_count = given_count;
  plan.part.factor = factor;
  plan.add(plan.part.normalizer, normalizer);
  plan.part.constant = constant;
  plan.add(plan.part.coefficient, coefficient);
  plan.add(plan.part.out, out);
  return plan;
}

Planned<ObjectiveTask> objective_task(const py::tuple& terms, int values, const py::object& loss,
                                      const py::object& grad_scale) {
  if (terms.size() > ObjectiveTask::kMostTerms) throw py::value_error("more terms than an objective has room for");
  Planned<ObjectiveTask> plan;
  ObjectiveTask& task = plan.part;
  for (const py::handle& part : terms) plan.add(task.terms[task.count++], part.cast<const Planned<Term>&>());
  task.values = static_cast<Values>(values);
  plan.add(task.loss, loss);
  plan.add(task.grad_scale, grad_scale);
  return plan;
}

Planned<ScaleTask> scale_task(const py::tuple& tensors, const py::tuple& counts, const py::tuple& factor,
                              const py::object& coefficient, const py::object& product) {
  Planned<ScaleTask> plan;
  plan.add(plan.part.tensors, tensors);
  for (size_t i = 0; i < tensors.size(); ++i) plan.part.counts[i] = counts[i].cast<int64_t>();
  plan.add(plan.part.factor, factor);
  plan.add(plan.part.coefficient, coefficient);
  plan.add(plan.part.product, product);
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

// Of the strides of a value and of gradients, None for what is not wanted: see broadcast.h.
bool can_sum_strides(const py::tuple& extent, const py::tuple& strides) {
  ElementwiseTask task;
  task.extent = extent_of(extent);
  for (size_t k = 0; k < strides.size() && k <= kMostInputs; ++k) {
    if (strides[k].is_none()) continue;
    Operand& operand = k == 0 ? task.value : task.grads[k - 1];
    const auto steps = strides[k].cast<py::tuple>();
    operand.given = true;
    for (size_t i = 0; i < 3; ++i) operand.stride[i] = steps[i].cast<int64_t>();
  }
  return can_sum(task);
}

// A run of a kernel on the CPU.
template <class Plan, class Task>
auto run(void (*Kernels::*kernel)(const Task&, int)) {
  return [kernel](const Plan& plan, const py::tuple& sources, int threads) {
    const Task task = plan.on(sources);
    py::gil_scoped_release release;
    (kernels().*kernel)(task, threads);
  };
}

#if defined(FUSEDVAE_WITH_CUDA)
cuda::Launch launch_on(int device, uintptr_t stream, uintptr_t workspace, uintptr_t counter) {
  return {device, reinterpret_cast<void*>(stream), reinterpret_cast<void*>(workspace),
          reinterpret_cast<unsigned*>(counter)};
}

// Launches on a stream share a workspace and a counter. Some are of two kernels, between which no other thread's may
// come.
std::mutex launching;

// A launch of a kernel on a GPU.
template <class Plan, class Task>
auto launch(void (*kernel)(const Task&, const cuda::Launch&)) {
  return [kernel](const Plan& plan, const py::tuple& sources, int device, uintptr_t stream, uintptr_t workspace,
                  uintptr_t counter) {
    const Task task = plan.on(sources);
    py::gil_scoped_release release;  // before the lock: who holds that must not wait for the interpreter
    const std::lock_guard<std::mutex> lock(launching);
    kernel(task, launch_on(device, stream, workspace, counter));
  };
}
#endif

// The file of the OpenMP runtime that the kernels are bound to; empty without one.
std::string openmp_runtime() {
  Dl_info found;
  if (!GOMP_parallel || !dladdr(reinterpret_cast<void*>(GOMP_parallel), &found) || !found.dli_fname) return "";
  return found.dli_fname;
}

// How many threads take part in a loop that asks for so many.
int working_threads(int threads) {
  std::atomic<int> shares{0};
  const auto body = [&](int64_t, int64_t) { ++shares; };
  const scalar::Loop loop{threads, body};
  const scalar::Loop* const loops[] = {&loop};
  scalar::parallel_for(threads, loops, 1);
  return shares;
}

template <class List>
py::tuple names_of() {
  py::tuple names(List::kSize);
  for (size_t k = 0; k < names.size(); ++k) names[k] = List::kNames[k];
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fusedvae's compiled kernels";
  m.def("cpu_isa", [] { return kernels().isa; }, "The instruction set that the CPU kernels use.");
  m.def("openmp_runtime", &openmp_runtime, "The file of the OpenMP runtime that they run on; empty without one.");
  m.def("working_threads", &working_threads, py::call_guard<py::gil_scoped_release>(),
        "How many threads a loop gets that asks for so many.");
  m.def("formulas", &names_of<scalar::Formulas>, "The names of the formulas that the kernels know.");
  m.def("divergences", &names_of<scalar::Divergences>, "The names of those that they take beside a sample.");
  m.def("can_sum", &can_sum_strides, "Whether the kernels can sum a value and gradients of these strides.");
  m.def("normal", [](uintptr_t out, int dtype, int64_t count, uintptr_t seed, int threads) {
    const NormalTask task = normal_task(out, dtype, count, seed);
    py::gil_scoped_release release;
    kernels().normal(task, threads);
  });
  using py::arg;
  const py::none none;
  auto latent =
      py::class_<PlannedLatent>(m, "LatentTask")
          .def(py::init<const std::string&, const Planned<ElementwiseTask>&, const py::tuple&, const py::object&,
                        const py::object&, const py::object&, const py::object&, const py::object&>(),
               arg("divergence"), arg("elements"), arg("index"), py::kw_only(), arg("seed"), arg("offset"),
               arg("noise"), arg("grad_z"), arg("z"))
          .def("run", run<PlannedLatent>(&Kernels::latent));
  py::class_<Planned<ElementwiseTask>>(m, "ElementwiseTask")
      .def(py::init(&elementwise_task), arg("in_double"), arg("extent"), py::kw_only(), arg("inputs"),
           arg("forms") = py::tuple(), arg("gains") = py::tuple(), arg("weight") = none, arg("incoming") = none,
           arg("value") = none, arg("grads"));
  py::class_<Planned<Term>>(m, "Term").def(py::init(&term), arg("formula"), arg("elements"), py::kw_only(),
                                           arg("given") = none, arg("given_count") = 0, arg("factor") = 1.0,
                                           arg("normalizer") = none, arg("constant") = 0.0, arg("coefficient") = none,
                                           arg("out") = none);
  auto objective =
      py::class_<Planned<ObjectiveTask>>(m, "ObjectiveTask")
          .def(py::init(&objective_task), arg("terms"), arg("values"), arg("loss"), arg("grad_scale") = none)
          .def("run", run<Planned<ObjectiveTask>>(&Kernels::objective));
  auto scale = py::class_<Planned<ScaleTask>>(m, "ScaleTask")
                   .def(py::init(&scale_task), arg("tensors"), arg("counts"), arg("factor"), arg("coefficient") = none,
                        arg("product") = none)
                   .def("run", run<Planned<ScaleTask>>(&Kernels::scale));
#if defined(FUSEDVAE_WITH_CUDA)
  m.def("cuda_unavailable", &cuda::unavailable, "Why each GPU here cannot run the CUDA kernels; empty if it can.");
  m.def(
      "cuda_counters",
      [] {
        const cuda::Counters counters = cuda::counters();
        return py::make_tuple(reinterpret_cast<uintptr_t>(counters.first), counters.count);
      },
      "The address of the current GPU's counters, and how many there are.");
  m.def("launch_normal", [](uintptr_t out, int dtype, int64_t count, uintptr_t seed, int device, uintptr_t stream) {
    const NormalTask task = normal_task(out, dtype, count, seed);
    py::gil_scoped_release release;
    cuda::normal(task, launch_on(device, stream, 0, 0));
  });
  latent.def("launch", launch<PlannedLatent>(&cuda::latent))
      .def_property_readonly("workspace_bytes",
                             [](const PlannedLatent& plan) { return cuda::workspace_bytes(plan.task()); });
  objective.def("launch", launch<Planned<ObjectiveTask>>(&cuda::objective))
      .def_property_readonly("workspace_bytes",
                             [](const Planned<ObjectiveTask>& plan) { return cuda::workspace_bytes(plan.part); });
  scale.def("launch", launch<Planned<ScaleTask>>(&cuda::scale))
      .def_property_readonly("workspace_bytes", [](py::object) { return 0; });
#endif
}
