// Whether Python objects are still what they were. Before every token some 8,000 cache lines of modules, dictionaries and tensors are looked
// at, which the weights of the last token have pushed out of the caches; the interpreter would wait for one after the other (1 ms).
// Here all are asked for first, then looked at.
#include <tuple>
#include <vector>

#include "common.h"

namespace qvl {

namespace {

// Inlined by force: GCC takes a function that only prefetches for one without effects, and drops the calls.
[[gnu::always_inline]] inline void fetch(const void* address, size_t bytes) {
  const char* begin = static_cast<const char*>(address);
  for (size_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(begin + offset, 0, 2);
  __builtin_prefetch(begin + bytes - 1, 0, 2);
}

// Sizes in bytes of what is looked at; too much or too little costs time, nothing else.
constexpr size_t kHeader = 32, kObject = 48, kDictTable = 256, kInlineValues = 192, kTensorImpl = 192, kStorageImpl = 128;

class Watch {
 public:
  using Entry = std::tuple<py::dict, py::str, py::object>;

  Watch(std::vector<Entry> entries, std::vector<std::pair<py::dict, py::str>> absent, std::vector<std::pair<py::dict, py::str>> empty,
        std::vector<py::object> types, std::vector<py::object> tensors)
      : entries_(std::move(entries)), absent_(std::move(absent)), empty_(std::move(empty)) {
    for (py::object& object : types) types_.emplace_back(object, py::type::of(object));
    for (const auto& [dict, key] : empty_) hooks_.push_back(item(dict, key));
    for (py::object& tensor : tensors) {
      Tensor t{tensor, number(tensor, names().data_ptr), number(tensor, names().numel), tensor.attr("dtype"), nullptr, nullptr};
      t.impl = address(tensor.attr("_cdata"));
      t.storage = address(tensor.attr("untyped_storage")().attr("_cdata"));
      tensors_.push_back(std::move(t));
    }
  }

  [[gnu::always_inline]] void fetch_objects() const {
    for (const auto& [dict, key, value] : entries_) fetch_object(dict);
    for (const auto& [dict, key] : absent_) fetch_object(dict);
    for (const auto& [dict, key] : empty_) fetch_object(dict);
    for (const void* hooks : hooks_) fetch(hooks, 24);
    for (const auto& [object, type] : types_) fetch(object.ptr(), 16);
    for (const Tensor& t : tensors_) fetch_object(t.tensor), fetch(t.impl, kTensorImpl), fetch(t.storage, kStorageImpl);
  }

  [[gnu::always_inline]] void fetch_tables() const {
    for (const auto& [dict, key, value] : entries_) fetch_table(dict);
    for (const auto& [dict, key] : absent_) fetch_table(dict);
    for (const auto& [dict, key] : empty_) fetch_table(dict);
  }

  bool holds() const {
    for (const auto& [dict, key, value] : entries_)
      if (item(dict, key) != value.ptr()) return false;
    for (const auto& [dict, key] : absent_)
      if (item(dict, key)) return false;
    for (const auto& [dict, key] : empty_) {
      PyObject* found = item(dict, key);
      if (!found || !PyDict_Check(found) || PyDict_GET_SIZE(found) != 0) return false;
    }
    for (const auto& [object, type] : types_)
      if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != type.ptr()) return false;
    for (const Tensor& t : tensors_)
      if (number(t.tensor, names().data_ptr) != t.data || number(t.tensor, names().numel) != t.elements ||
          !py::object(t.tensor.attr(names().dtype)).is(t.dtype))
        return false;
    return true;
  }

 private:
  struct Tensor {
    py::object tensor;
    uint64_t data, elements;
    py::object dtype;
    const void *impl, *storage;  // only fetched ahead, never read
  };

  static const void* address(const py::handle& number) { return in(number.cast<Ptr>()); }

  struct Names {
    py::str data_ptr{"data_ptr"}, numel{"numel"}, dtype{"dtype"};
  };
  static const Names& names() {
    static const Names* names = new Names;  // never freed: the interpreter may be gone by then
    return *names;
  }

  static uint64_t number(const py::object& tensor, const py::str& method) {
    PyObject* found = PyObject_CallMethodNoArgs(tensor.ptr(), method.ptr());
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::int_>(found).cast<uint64_t>();
  }

  static PyObject* item(const py::dict& dict, const py::str& key) {
    PyObject* found = PyDict_GetItemWithError(dict.ptr(), key.ptr());
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return found;
  }

  [[gnu::always_inline]] static void fetch_object(const py::object& object) {
    fetch(reinterpret_cast<const char*>(object.ptr()) - kHeader, kHeader + kObject);
  }

  [[gnu::always_inline]] static void fetch_table(const py::dict& dict) {
    const auto* d = reinterpret_cast<const PyDictObject*>(dict.ptr());
    fetch(d->ma_keys, kDictTable);
    if (d->ma_values) fetch(d->ma_values, kInlineValues);
  }

  std::vector<Entry> entries_;
  std::vector<std::pair<py::dict, py::str>> absent_, empty_;
  std::vector<const void*> hooks_;  // the empty dictionaries: only fetched ahead, never read
  std::vector<std::pair<py::object, py::object>> types_;
  std::vector<Tensor> tensors_;
};

}  // namespace

void bind_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch", "What dictionaries hold, types of objects, and memory of tensors, as they are when it is made")
      .def(py::init<std::vector<Watch::Entry>, std::vector<std::pair<py::dict, py::str>>, std::vector<std::pair<py::dict, py::str>>,
                    std::vector<py::object>, std::vector<py::object>>(),
           py::kw_only(), "entries"_a, "absent"_a, "empty"_a, "types"_a, "tensors"_a,
           "entries: (dictionary, key, object that it holds); absent: (dictionary, key that it lacks); empty: (dictionary, key of an empty "
           "dictionary); types: objects that keep their class; tensors: that keep memory, number of elements and dtype")
      .def_static(
          "all_hold",
          [](const std::vector<const Watch*>& watches) {
            for (const Watch* watch : watches) watch->fetch_objects();
            for (const Watch* watch : watches) watch->fetch_tables();
            for (const Watch* watch : watches)
              if (!watch->holds()) return false;
            return true;
          },
          "watches"_a, "Whether all is as it was");
}

}  // namespace qvl
