// The direct way of a call: from PyTorch's tensors to the launch of a kernel, and through autograd, without
// Python in between.
//
// Python decides what runs a pass, and says so here once (`learn`). A call that is like one that was learnt is
// then looked up, launched and recorded for autograd in C++; for any other, `call` gives None, and Python takes it
// as it would without this file. So nothing is decided here, and only a launch that the driver refuses is an error
// here: what looks unusual in any way goes back to Python. What makes calls alike is what Python's own keys are
// made of (`execute.conv3d`, `native.switch_state`), and what is unusual is what it looks at (`op._unobserved`).

#include <Python.h>
#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

namespace {

using at::Tensor;
using Ints = std::vector<int64_t>;
using Operands = std::array<const Tensor*, 3>;

// Launches

constexpr int64_t ENOUGH = 100;  // programs that blocks of the batch leave (`ENOUGH` of nest.py)

// Where a kernel begins. On a CPU `function` is `int run(void* const* operands, void* out, int64_t batch,
// int threads)`, and `threads` is 0; on a GPU it is a CUfunction.
struct Step {
  uintptr_t function = 0;
  int64_t programs = 0;
  int64_t block = 0;  // so many programs for each block of the batch, of so many steps at most; 0: whatever that is
  unsigned threads = 0, shared = 0;
  int early = 0;  // whether it waits by itself for the kernel before it
  int hidden = 0;  // pointers that Triton appends to a kernel's parameters, for features that are not used

  // Blocks of a batch (`Blocks` of nest.py).
  int64_t blocks(int64_t batch) const {
    int64_t share = std::max<int64_t>(1, std::min(block, batch * programs / ENOUGH));
    return block ? (batch + share - 1) / share : 1;
  }
};

constexpr int64_t MOST_PROGRAMS = std::numeric_limits<int32_t>::max();
constexpr uintptr_t ALIGNMENT = 16;  // of what Triton's kernels read and write

// CUlaunchAttribute and CUlaunchConfig of the CUDA driver.
struct Attribute {
  int id = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
  int none = 0;
  union {
    int allowed = 1;
    char room[64];
  };
};
struct Config {
  std::array<unsigned, 3> grid, block;
  unsigned shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
};

// The CUDA driver's functions, looked up where the driver is: nothing of CUDA is needed to compile this.
struct Driver {
  int (*launch)(const Config*, void*, void**, void**);
  int (*parameter)(void*, size_t, size_t*, size_t*);

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    launch = library ? reinterpret_cast<decltype(launch)>(dlsym(library, "cuLaunchKernelEx")) : nullptr;
    parameter = library ? reinterpret_cast<decltype(parameter)>(dlsym(library, "cuFuncGetParamInfo")) : nullptr;
  }

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }
};

// How many parameters a kernel has behind `known` of its own; -1 where the driver does not say, or they are no
// pointers.
int hidden_parameters(uintptr_t function, size_t known) {
  const Driver& driver = Driver::get();
  if (!driver.launch || !driver.parameter) return -1;
  size_t offset = 0, size = 0, count = 0;
  while (!driver.parameter(reinterpret_cast<void*>(function), count, &offset, &size)) {
    if (size != (count == known - 1 ? sizeof(int32_t) : sizeof(void*))) return -1;
    ++count;
  }
  return count < known ? -1 : static_cast<int>(count - known);
}

// Whether the kernel could be launched; the last of `pointers` is the result's.
bool launch(const Step& step, std::vector<void*>& pointers, int64_t batch, at::Device device) {
  if (!step.threads) {
    using Run = int (*)(void* const*, void*, int64_t, int);
    auto run = reinterpret_cast<Run>(step.function);
    return run(pointers.data(), pointers.back(), batch, at::get_num_threads()) == 0;
  }
  int64_t programs = step.programs * step.blocks(batch);
  if (programs > MOST_PROGRAMS || batch > MOST_PROGRAMS) return false;
  if (!programs) return true;
  int32_t steps = static_cast<int32_t>(batch);
  void* none = nullptr;
  std::vector<void*> parameters;
  for (void*& pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % ALIGNMENT) return false;
    parameters.push_back(&pointer);
  }
  parameters.push_back(&steps);
  parameters.insert(parameters.end(), step.hidden, &none);
  void* stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
  Attribute early;
  Config config = {
      {static_cast<unsigned>(programs), 1, 1}, {step.threads, 1, 1}, step.shared, stream, &early,
      static_cast<unsigned>(step.early)};
  int failed = Driver::get().launch(
      &config, reinterpret_cast<void*>(step.function), parameters.data(), nullptr);
  TORCH_CHECK(!failed, "A kernel of g3dswap's cannot be launched (CUDA error ", failed, ").");
  return true;
}

// Passes

// What runs one pass of calls that are alike; the operands are those of the layer's pass.
struct Pass {
  bool native = false;  // PyTorch's own kernel
  std::vector<int> reads;
  Ints shape;
  bool batched = false;  // the first of the shape is the batch
  at::MemoryFormat format = at::MemoryFormat::Contiguous;
  Step step;
  int64_t parts = 0;  // partial results to be added up; 0: there are none
  bool parts_batched = false;  // so many for each block of the batch
  std::optional<Step> total;  // adds them up; without one PyTorch does
};

// The result; undefined where Python has to see to it.
Tensor run(const Pass& pass, const Operands& operands) {
  int64_t batch = operands[0]->size(0);
  std::vector<Tensor> held;
  std::vector<void*> pointers;
  for (int place : pass.reads) {
    const Tensor& x = *operands[place];
    held.push_back(x.contiguous(x.dim() == 5 ? pass.format : at::MemoryFormat::Contiguous));
    pointers.push_back(const_cast<void*>(held.back().const_data_ptr()));
  }
  Ints shape = pass.shape;
  if (pass.batched) shape[0] = batch;
  Tensor out = at::empty(shape, operands[0]->options().memory_format(pass.format));
  int64_t blocks = pass.parts_batched ? pass.step.blocks(batch) : 1, parts = pass.parts * blocks;
  auto sums = out.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (!parts || (parts == 1 && out.scalar_type() == sums)) {
    pointers.push_back(out.mutable_data_ptr());
    return launch(pass.step, pointers, batch, out.device()) ? out : Tensor();
  }
  Tensor partial = at::empty({parts, out.numel()}, out.options().dtype(sums).memory_format(std::nullopt));
  pointers.push_back(partial.mutable_data_ptr());
  if (!launch(pass.step, pointers, batch, out.device())) return Tensor();
  if (!pass.total) {
    // The partial results lie in out's order of elements in memory.
    out.as_strided({out.numel()}, {1}).copy_(at::sum(partial, 0));
    return out;
  }
  std::vector<void*> ends = {partial.mutable_data_ptr(), out.mutable_data_ptr()};
  // Its run-time extent is what makes the number of parts one: blocks of the batch, or nothing.
  return launch(*pass.total, ends, blocks, out.device()) ? out : Tensor();
}

// All that decides the choice for a pass, but the batch.
struct Key {
  std::array<int64_t, 32> words{};

  bool operator==(const Key&) const = default;
};

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 1469598103934665603u;
    for (int64_t word : key.words) hash = (hash ^ static_cast<uint64_t>(word)) * 1099511628211u;
    return hash ^ (hash >> 32);
  }
};

int64_t switches(const Tensor& x) {
  const auto& context = at::globalContext();
  int64_t found = context.deterministicAlgorithms();
  if (x.is_cpu()) return found << 1 | context.userEnabledMkldnn();
  found = found << 1 | context.userEnabledCuDNN();
  found = found << 1 | context.deterministicCuDNN();
  auto precision = context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::CONV);
  return found << 1 | (x.scalar_type() == at::kFloat && precision == at::Float32Precision::TF32);
}

enum Kind : int64_t { FORWARD, GRAD_INPUT, GRAD_WEIGHT };

std::array<std::atomic<int64_t>, 3> done{};  // passes of each kind, for whoever counts them

// `third` is the bias of a forward pass, or null, and the gradient of its result in a backward pass.
Key key_of(int64_t kind, const Tensor& input, const Tensor& weight, const Tensor* third) {
  Key key;
  auto word = key.words.begin();
  auto facts = [&word](const Tensor& x) {
    *word++ = static_cast<int64_t>(x.scalar_type());
    *word++ = static_cast<int64_t>(x.device().type()) << 32 | static_cast<uint8_t>(x.device().index());
  };
  *word++ = kind;
  *word++ = switches(input);
  for (int i = 1; i < 5; ++i) *word++ = input.size(i);
  for (int i = 0; i < 5; ++i) *word++ = input.stride(i);
  for (int i = 0; i < 5; ++i) *word++ = weight.size(i);
  for (int i = 0; i < 5; ++i) *word++ = weight.stride(i);
  facts(input);
  facts(weight);
  if (third) {
    *word++ = third->dim();
    for (int i = third->dim() == 5; i < third->dim(); ++i) *word++ = third->size(i);
    facts(*third);
  }
  return key;
}

// Calls with equal arguments beside their tensors. Sites live as long as the process.
struct Site {
  Ints stride, padding, dilation, output_padding;
  int64_t groups = 1;
  bool transposed = false;
  bool activated = false;  // by a kernel; where autograd records, the activation is a step of its own
  std::string tune, cache;

  std::shared_ptr<const Pass> find(const Key& key) const {
    std::shared_lock guard(lock);
    auto found = passes.find(key);
    return found == passes.end() ? nullptr : found->second;
  }

  mutable std::shared_mutex lock;
  std::unordered_map<Key, std::shared_ptr<const Pass>, Hash> passes;
};

// Whether somebody asks for what is executed: the dispatcher then leads to whoever it is.
bool observed() {
  auto state = c10::impl::tls_local_dispatch_key_set();
  return !(state.included_ - c10::default_included_set).empty() || at::impl::torch_function_mode_enabled() ||
      c10::impl::dispatch_mode_enabled() || at::hasCallbacks();
}

bool plain(const Tensor& x) {
  constexpr c10::DispatchKeySet wrapped({
      c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::FuncTorchBatched,
      c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize, c10::DispatchKey::Negative,
      c10::DispatchKey::Conjugate, c10::DispatchKey::ZeroTensor,
  });
  return (x.is_cpu() || x.is_cuda()) && x.layout() == at::kStrided && !x.key_set().has_any(wrapped);
}

Tensor forward(
    const Site& site, const Pass& pass, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  c10::DeviceGuard device(input.device());
  Tensor out = pass.native
      ? at::convolution(
            input, weight, bias, site.stride, site.padding, site.dilation, site.transposed, site.output_padding,
            site.groups)
      : run(pass, {&input, &weight, bias ? &*bias : nullptr});
  done[FORWARD] += out.defined();
  return out;
}

// The gradients that are wanted of input and weight; nothing where Python has to see to it.
std::optional<std::array<Tensor, 2>> gradients(
    const Site& site, const Tensor& grad, const Tensor& input, const Tensor& weight, std::array<bool, 2> wanted) {
  std::array<std::shared_ptr<const Pass>, 2> passes;
  std::array<bool, 3> native = {false, false, false};
  for (int i = 0; i < 2; ++i) {
    if (!wanted[i]) continue;
    passes[i] = site.find(key_of(i ? GRAD_WEIGHT : GRAD_INPUT, input, weight, &grad));
    if (!passes[i]) return std::nullopt;
    native[i] = passes[i]->native;
  }
  c10::DeviceGuard device(input.device());
  std::array<Tensor, 2> found;
  for (int i = 0; i < 2; ++i) {
    if (!wanted[i] || native[i]) continue;
    found[i] = run(*passes[i], {&grad, &input, &weight});
    if (!found[i].defined()) return std::nullopt;
  }
  if (native[0] || native[1]) {
    auto both = at::convolution_backward(
        grad, input, weight, std::nullopt, site.stride, site.padding, site.dilation, site.transposed,
        site.output_padding, site.groups, native);
    if (native[0]) found[0] = std::get<0>(both);
    if (native[1]) found[1] = std::get<1>(both);
  }
  done[GRAD_INPUT] += wanted[0];
  done[GRAD_WEIGHT] += wanted[1];
  return found;
}

// Autograd

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// By the operator, which Python implements.
variable_list dispatched(
    const Site& site, const Tensor& grad, const Tensor& input, const Tensor& weight, std::array<bool, 3> wanted) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("g3dswap::conv3d_backward", "");
  torch::jit::Stack stack;
  torch::jit::push(
      stack, grad, input, weight, site.stride, site.padding, site.dilation, site.groups,
      c10::List<bool>({wanted[0], wanted[1], wanted[2]}), site.tune, site.cache, site.transposed,
      site.output_padding);
  op.callBoxed(stack);
  variable_list found;
  for (auto& value : stack) found.push_back(value.isNone() ? Tensor() : value.toTensor());
  return found;
}

// A result that is there already. As a tensor it would count as an input of the function that records it.
struct Made {
  Tensor result;
};

struct Conv3d : torch::autograd::Function<Conv3d> {
  static Tensor forward(
      AutogradContext* context, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
      const Site* site, const Made& made) {
    context->save_for_backward({input, weight});
    context->saved_data["biased"] = bias.has_value();
    context->saved_data["site"] = static_cast<int64_t>(reinterpret_cast<intptr_t>(site));
    return made.result;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto& site = *reinterpret_cast<const Site*>(context->saved_data["site"].toInt());
    auto saved = context->get_saved_variables();
    const Tensor &grad = grads[0], &input = saved[0], &weight = saved[1];
    std::array<bool, 3> wanted = {context->needs_input_grad(0), context->needs_input_grad(1), false};
    wanted[2] = context->saved_data["biased"].toBool() && context->needs_input_grad(2);
    if (!at::GradMode::is_enabled() && !observed() && plain(grad) && plain(input) && plain(weight)) {
      auto found = gradients(site, grad, input, weight, {wanted[0], wanted[1]});
      if (found) {
        Tensor of_bias = wanted[2] ? at::sum(grad, {0, 2, 3, 4}) : Tensor();
        return {(*found)[0], (*found)[1], of_bias, Tensor(), Tensor()};
      }
    }
    auto found = dispatched(site, grad, input, weight, wanted);
    found.resize(5);
    return found;
  }
};

// Python

struct WithoutLock {
  PyThreadState* state = PyEval_SaveThread();
  WithoutLock() = default;
  WithoutLock(const WithoutLock&) = delete;
  WithoutLock& operator=(const WithoutLock&) = delete;
  ~WithoutLock() {
    PyEval_RestoreThread(state);
  }
};

PyObject* sites = nullptr;  // from a call's arguments beside its tensors to its site, in a capsule
std::vector<std::unique_ptr<Site>> every_site;

bool is_plain(PyObject* x) {
  auto type = reinterpret_cast<PyObject*>(Py_TYPE(x));
  return (type == THPVariableClass || type == ParameterClass) && plain(THPVariable_Unpack(x));
}

const Site* site_of(PyObject* conf) {
  PyObject* found = PyDict_GetItemWithError(sites, conf);
  if (!found) PyErr_Clear();  // lists, which Python makes tuples of
  return found ? static_cast<const Site*>(PyCapsule_GetPointer(found, nullptr)) : nullptr;
}

// The tensors of a forward pass.
struct Operated {
  Tensor input, weight;
  std::optional<Tensor> bias;
};

// The result, undefined where Python has to see to it; `recorded` is whether autograd is to know of it.
Tensor called(const Site& site, const Operated& of, bool recorded) {
  if (!of.input.size(0) || (recorded && site.activated)) return Tensor();
  auto pass = site.find(key_of(FORWARD, of.input, of.weight, of.bias ? &*of.bias : nullptr));
  if (!pass) return Tensor();
  Tensor out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = forward(site, *pass, of.input, of.weight, of.bias);
  }
  return recorded && out.defined() ? Conv3d::apply(of.input, of.weight, of.bias, &site, Made{out}) : out;
}

Tensor called_under_autocast(const Site& site, Operated of) {
  std::optional<c10::impl::ExcludeDispatchKeyGuard> cast;
  auto type = of.input.device().type();
  if (at::autocast::is_autocast_enabled(type)) {
    auto dtype = at::autocast::get_autocast_dtype(type);
    of.input = at::autocast::cached_cast(dtype, of.input, type);
    of.weight = at::autocast::cached_cast(dtype, of.weight, type);
    if (of.bias) of.bias = at::autocast::cached_cast(dtype, *of.bias, type);
    cast.emplace(at::autocast::get_autocast_dispatch_key_from_device_type(type));
  }
  bool wanted = of.input.requires_grad() || of.weight.requires_grad() || (of.bias && of.bias->requires_grad());
  return called(site, of, wanted && at::GradMode::is_enabled());
}

// What input, weight and bias are, if they are plain tensors of a layer.
std::optional<Operated> operated(PyObject* const* given) {
  bool biased = given[2] != Py_None;
  if (!is_plain(given[0]) || !is_plain(given[1]) || (biased && !is_plain(given[2]))) return std::nullopt;
  Operated found{THPVariable_Unpack(given[0]), THPVariable_Unpack(given[1]), std::nullopt};
  if (biased) found.bias = THPVariable_Unpack(given[2]);
  bool usual = found.input.dim() == 5 && found.weight.dim() == 5 && (!biased || found.bias->dim() == 1);
  return usual ? std::optional(std::move(found)) : std::nullopt;
}

PyObject* wrapped(Tensor&& x) {
  if (!x.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(x));
}

// What a function of a site and its tensors makes of (input, weight, bias, conf).
template <typename Compute>
PyObject* answered(PyObject* const* given, Py_ssize_t count, Compute compute) {
  TORCH_CHECK(count == 4, "Give input, weight, bias and conf.");
  const Site* site = site_of(given[3]);
  auto found = site ? operated(given) : std::nullopt;
  if (!found) Py_RETURN_NONE;
  Tensor out;
  {
    WithoutLock released;
    out = compute(*site, std::move(*found));
  }
  return wrapped(std::move(out));
}

// call(input, weight, bias, conf): a layer's result, or None where Python has to see to it.
PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (observed()) Py_RETURN_NONE;
  return answered(given, count, called_under_autocast);
  END_HANDLE_TH_ERRORS
}

// forward(input, weight, bias, conf): the same for the dispatcher, which has seen to autocast and autograd.
PyObject* run_forward(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return answered(given, count, [](const Site& site, const Operated& of) { return called(site, of, false); });
  END_HANDLE_TH_ERRORS
}

// backward(grad, input, weight, conf, of_input, of_weight, of_bias): the gradients that are wanted and None for
// others, or None where Python has to see to it.
PyObject* run_backward(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 7, "backward takes seven arguments.");
  const Site* site = site_of(given[3]);
  if (!site || !is_plain(given[0]) || !is_plain(given[1]) || !is_plain(given[2])) Py_RETURN_NONE;
  Tensor grad = THPVariable_Unpack(given[0]), input = THPVariable_Unpack(given[1]),
         weight = THPVariable_Unpack(given[2]);
  if (grad.dim() != 5 || input.dim() != 5 || weight.dim() != 5 || !input.size(0)) Py_RETURN_NONE;
  std::optional<std::array<Tensor, 2>> found;
  Tensor of_bias;
  {
    WithoutLock released;
    at::AutoDispatchBelowADInplaceOrView guard;
    found = gradients(*site, grad, input, weight, {given[4] == Py_True, given[5] == Py_True});
    if (found && given[6] == Py_True) of_bias = at::sum(grad, {0, 2, 3, 4});
  }
  if (!found) Py_RETURN_NONE;
  THPObjectPtr first(wrapped(std::move((*found)[0]))), second(wrapped(std::move((*found)[1])));
  THPObjectPtr third(wrapped(std::move(of_bias)));
  return PyTuple_Pack(3, first.get(), second.get(), third.get());
  END_HANDLE_TH_ERRORS
}

Ints ints_of(PyObject* sequence) {
  Ints found;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sequence); ++i) {
    found.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(sequence, i)));
  }
  return found;
}

// A site of (stride, padding, dilation, groups, tune, cache, transposed, output_padding, activation).
Site& made_site(PyObject* conf) {
  if (const Site* known = site_of(conf)) return const_cast<Site&>(*known);
  PyObject *stride, *padding, *dilation, *output_padding;
  long long groups;
  const char *tune, *cache, *activation;
  int transposed;
  if (!PyArg_ParseTuple(
          conf, "O!O!O!LsspO!s", &PyTuple_Type, &stride, &PyTuple_Type, &padding, &PyTuple_Type, &dilation, &groups,
          &tune, &cache, &transposed, &PyTuple_Type, &output_padding, &activation)) {
    throw python_error();
  }
  auto site = std::make_unique<Site>();
  site->stride = ints_of(stride);
  site->padding = ints_of(padding);
  site->dilation = ints_of(dilation);
  site->output_padding = ints_of(output_padding);
  site->groups = groups;
  site->transposed = transposed;
  site->tune = tune;
  site->cache = cache;
  site->activated = *activation != 0;
  THPObjectPtr capsule(PyCapsule_New(site.get(), nullptr, nullptr));
  if (!capsule || PyDict_SetItem(sites, conf, capsule)) throw python_error();
  every_site.push_back(std::move(site));
  return *every_site.back();
}

// A step of (address, programs, block, threads, shared, early), whose kernel has so many parameters.
bool parse(PyObject* entry, size_t parameters, Step& step) {
  unsigned long long function;
  long long programs, block;
  if (!PyArg_ParseTuple(
          entry, "KLLIIp", &function, &programs, &block, &step.threads, &step.shared, &step.early)) {
    throw python_error();
  }
  step.function = function;
  step.programs = programs;
  step.block = block;
  step.hidden = step.threads ? hidden_parameters(step.function, parameters) : 0;
  return step.hidden >= 0;
}

// learn(conf, kind, input, weight, third, plan): how calls like this one are to be run from now on. A plan is
// None for PyTorch's kernel, or (reads, shape, batched, channels_last, step, parts, parts_batched, total). Calls of
// kernels that only Triton can launch stay Python's.
PyObject* learn(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject *conf, *input, *weight, *third, *plan;
  long long kind;
  if (!PyArg_ParseTuple(
          arguments, "O!LOOOO", &PyTuple_Type, &conf, &kind, &input, &weight, &third, &plan)) {
    return nullptr;
  }
  for (PyObject* x : {input, weight, third}) {
    if (x != Py_None && !THPVariable_Check(x)) Py_RETURN_NONE;
  }
  auto pass = std::make_shared<Pass>();
  if (plan == Py_None) {
    pass->native = true;
  } else {
    PyObject *reads, *shape, *step, *total;
    int batched, channels_last, parts_batched;
    long long parts;
    if (!PyArg_ParseTuple(
            plan, "O!O!ppO!LpO", &PyTuple_Type, &reads, &PyTuple_Type, &shape, &batched, &channels_last,
            &PyTuple_Type, &step, &parts, &parts_batched, &total)) {
      return nullptr;
    }
    for (int64_t place : ints_of(reads)) pass->reads.push_back(static_cast<int>(place));
    pass->shape = ints_of(shape);
    pass->batched = batched;
    if (channels_last) pass->format = at::MemoryFormat::ChannelsLast3d;
    pass->parts = parts;
    pass->parts_batched = parts_batched;
    if (!parse(step, pass->reads.size() + 2, pass->step)) Py_RETURN_NONE;
    if (total != Py_None && !parse(total, 3, pass->total.emplace())) Py_RETURN_NONE;
  }
  const Tensor* last = third == Py_None ? nullptr : &THPVariable_Unpack(third);
  Key key = key_of(kind, THPVariable_Unpack(input), THPVariable_Unpack(weight), last);
  Site& site = made_site(conf);
  std::unique_lock guard(site.lock);
  site.passes[key] = std::move(pass);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// forget(): nothing is known any more.
PyObject* forget(PyObject*, PyObject*) {
  for (auto& site : every_site) {
    std::unique_lock guard(site->lock);
    site->passes.clear();
  }
  Py_RETURN_NONE;
}

// counts(): how many forward passes, gradients of inputs and gradients of weights were run here.
PyObject* counts(PyObject*, PyObject*) {
  long long forward = done[FORWARD], of_input = done[GRAD_INPUT], of_weight = done[GRAD_WEIGHT];
  return Py_BuildValue("LLL", forward, of_input, of_weight);
}

template <typename Function>
PyCFunction fast(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"call", fast(call), METH_FASTCALL, nullptr},
    {"forward", fast(run_forward), METH_FASTCALL, nullptr},
    {"backward", fast(run_backward), METH_FASTCALL, nullptr},
    {"learn", learn, METH_VARARGS, nullptr},
    {"forget", forget, METH_NOARGS, nullptr},
    {"counts", counts, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "direct_cpp", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_direct_cpp() {
  sites = PyDict_New();
  return sites ? PyModule_Create(&definition) : nullptr;
}
