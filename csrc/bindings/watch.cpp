// Whether Python objects are still what they were, and Python objects brought back into the caches. Before and after the layers of a token
// thousands of cache lines of modules, dictionaries and tensors are looked at, which the weights have pushed out of the caches;
// the interpreter would wait for one after the other (1 ms). Here all are asked for first.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <tuple>
#include <vector>

#include "common.h"

namespace qvl {

namespace {

constexpr uintptr_t kLine = 64;

struct Names {
  py::str data_ptr{"data_ptr"}, numel{"numel"}, dtype{"dtype"};
};

const Names& names() {
  static const Names* names = new Names;  // never freed: the interpreter may be gone by then
  return *names;
}

uint64_t number(const py::object& object, const py::str& method) {
  PyObject* found = PyObject_CallMethodNoArgs(object.ptr(), method.ptr());
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::int_>(found).cast<uint64_t>();
}

// The cache lines of objects: where they lay when they were added. What has moved since costs time, nothing else: memory is fetched, not read.
class Footprint {
 public:
  Footprint() = default;

  explicit Footprint(const std::vector<py::object>& objects) {
    for (const py::object& object : objects) {
      add_object(object);
      if (PyDict_CheckExact(object.ptr())) add_table(object);
    }
    finish();
  }

  void add_object(const py::object& object) { add(reinterpret_cast<const char*>(object.ptr()) - kHeader, kHeader + kObject); }

  void add_table(const py::object& object) {
    const auto* dict = reinterpret_cast<const PyDictObject*>(object.ptr());
    add(dict->ma_keys, std::max<size_t>(kLine, object.attr("__sizeof__")().cast<size_t>() - sizeof(PyDictObject)));
    if (dict->ma_values) add(dict->ma_values, kInlineValues);
  }

  void add(const void* begin, size_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(begin) / kLine, last = (reinterpret_cast<uintptr_t>(begin) + bytes - 1) / kLine;
    for (uintptr_t line = first; line <= last; ++line) lines_.push_back(line * kLine);
  }

  void finish() {
    std::sort(lines_.begin(), lines_.end());
    lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
  }

  // Inlined by force: GCC takes a function that only prefetches for one without effects, and drops the calls.
  [[gnu::always_inline]] void fetch() const {
    for (uintptr_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
  }

 private:
  // Sizes in bytes of what is looked at.
  static constexpr size_t kHeader = 32, kObject = 64, kInlineValues = 192;

  std::vector<uintptr_t> lines_;
};

// A tensor that keeps memory, number of elements and dtype. PyTorch is asked only where a byte of what the tensor consists of has changed:
// its three answers take 0.2 us. No layout is known here: a tensor in which its numbers are not where they should be is asked every time.
class WatchedTensor {
 public:
  explicit WatchedTensor(py::object tensor) : tensor_(std::move(tensor)), known_(ask()) { keep(); }

  void add_to(Footprint& footprint) const {
    for (const Part& part : parts_) footprint.add(part.begin, part.bytes);
  }

  bool holds() {
    if (std::all_of(parts_.begin(), parts_.end(), [](const Part& part) { return part.same(); })) return true;
    if (ask() != known_) return false;
    keep();
    return true;
  }

 private:
  using Answers = std::tuple<uint64_t, uint64_t, PyObject*>;  // of data_ptr, numel and dtype, which lives as long as PyTorch

  // Bytes of one object, as they were.
  struct Part {
    const char* begin;
    size_t bytes;
    std::array<char, 168> was;

    void keep() { std::memcpy(was.data(), begin, bytes); }
    bool same() const { return std::memcmp(was.data(), begin, bytes) == 0; }
    bool contains(uint64_t number) const {
      for (size_t at = 0; at < bytes; at += sizeof number)
        if (std::memcmp(was.data() + at, &number, sizeof number) == 0) return true;
      return false;
    }
  };

  Answers ask() const {
    return {number(tensor_, names().data_ptr), number(tensor_, names().numel), py::object(tensor_.attr(names().dtype)).ptr()};
  }

  void keep() {
    const auto impl = tensor_.attr("_cdata").cast<Ptr>();
    const auto [storage, memory] = storage_of(tensor_);
    // The object without its count of references, its TensorImpl up to the dtype, its StorageImpl: one leads to the next.
    parts_ = {{{reinterpret_cast<const char*>(tensor_.ptr()) + offsetof(PyObject, ob_type), 24, {}},
               {static_cast<const char*>(in(impl)), 168, {}},
               {static_cast<const char*>(in(storage)), 48, {}}}};
    for (Part& part : parts_) part.keep();
    if (!parts_[0].contains(impl) || !parts_[1].contains(storage) || !parts_[1].contains(std::get<1>(known_)) || !parts_[2].contains(memory))
      parts_[0].was.fill(0);  // never the same: no object is without a type
  }

  static std::pair<Ptr, uint64_t> storage_of(const py::object& tensor) {
    const py::object storage = tensor.attr("untyped_storage")();
    return {storage.attr("_cdata").cast<Ptr>(), number(storage, names().data_ptr)};
  }

  py::object tensor_;
  Answers known_;
  std::array<Part, 3> parts_;
};

class Watch {
 public:
  using Entry = std::tuple<py::dict, py::str, py::object>;
  using Place = std::pair<py::dict, py::str>;

  Watch(std::vector<Entry> entries, std::vector<Place> absent, std::vector<Place> empty, std::vector<py::object> types, std::vector<py::object> tensors)
      : entries_(std::move(entries)), absent_(std::move(absent)), empty_(std::move(empty)) {
    for (py::object& object : types) {
      types_.emplace_back(object, py::type::of(object));
      footprint_.add(object.ptr(), sizeof(PyObject));
    }
    for (py::object& tensor : tensors) {
      tensors_.emplace_back(tensor);
      tensors_.back().add_to(footprint_);
    }
    for (const py::object& dict : dicts()) {
      if constexpr (kVersions) {
        footprint_.add(version_at(dict), sizeof(uint64_t));
      } else {
        footprint_.add(dict.ptr(), sizeof(PyDictObject));
        footprint_.add_table(dict);
      }
    }
    footprint_.finish();
  }

  [[gnu::always_inline]] void fetch() const { footprint_.fetch(); }

  bool holds() {
    if (!same_versions()) {
      if (!dicts_hold()) return false;
      keep_versions();
    }
    for (const auto& [object, type] : types_)
      if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != type.ptr()) return false;
    for (WatchedTensor& tensor : tensors_)
      if (!tensor.holds()) return false;
    return true;
  }

 private:
  bool dicts_hold() const {
    for (const auto& [dict, key, value] : entries_)
      if (item(dict, key) != value.ptr()) return false;
    for (const auto& [dict, key] : absent_)
      if (item(dict, key)) return false;
    for (const auto& [dict, key] : empty_) {
      PyObject* found = item(dict, key);
      if (!found || !PyDict_Check(found) || PyDict_GET_SIZE(found) != 0) return false;
    }
    return true;
  }

  // Until Python 3.11 a dictionary has a number that no other has had, and that changes with every change of it.
#if PY_VERSION_HEX < 0x030C0000
  static constexpr bool kVersions = true;
  static const uint64_t* version_at(const py::object& dict) { return &reinterpret_cast<const PyDictObject*>(dict.ptr())->ma_version_tag; }
#else
  static constexpr bool kVersions = false;
  static const uint64_t* version_at(const py::object&) { return nullptr; }
#endif

  bool same_versions() const {
    for (const auto& [dict, known] : versions_)
      if (*version_at(dict) != known) return false;
    return !versions_.empty();
  }

  void keep_versions() {
    versions_.clear();
    if constexpr (kVersions)
      for (const py::object& dict : dicts()) versions_.emplace_back(dict, *version_at(dict));
  }

  // All that are looked at, each once.
  std::vector<py::object> dicts() const {
    std::vector<py::object> found;
    for (const auto& [dict, key, value] : entries_) found.push_back(dict);
    for (const auto& [dict, key] : absent_) found.push_back(dict);
    for (const auto& [dict, key] : empty_) {
      found.push_back(dict);
      PyObject* inner = item(dict, key);
      if (inner && PyDict_Check(inner)) found.push_back(py::reinterpret_borrow<py::object>(inner));
    }
    std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.ptr() < b.ptr(); });
    found.erase(std::unique(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.is(b); }), found.end());
    return found;
  }

  static PyObject* item(const py::dict& dict, const py::str& key) {
    PyObject* found = PyDict_GetItemWithError(dict.ptr(), key.ptr());
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return found;
  }

  std::vector<Entry> entries_;
  std::vector<Place> absent_, empty_;
  Footprint footprint_;
  std::vector<std::pair<py::object, uint64_t>> versions_;  // of all dictionaries, when they last held what they should
  std::vector<std::pair<py::object, py::object>> types_;
  std::vector<WatchedTensor> tensors_;
};

}  // namespace

void bind_watch(py::module_& m) {
  py::class_<Footprint>(m, "Footprint", "Where objects lie, with the tables of dictionaries; keeps none of them alive")
      .def(py::init<const std::vector<py::object>&>(), "objects"_a)
      .def("fetch", [](const Footprint& footprint) { footprint.fetch(); }, "Brings the objects into the processor's caches.");

  py::class_<Watch>(m, "Watch", "What dictionaries hold, types of objects, and memory of tensors, as they are when it is made")
      .def(py::init<std::vector<Watch::Entry>, std::vector<Watch::Place>, std::vector<Watch::Place>, std::vector<py::object>, std::vector<py::object>>(),
           py::kw_only(), "entries"_a, "absent"_a, "empty"_a, "types"_a, "tensors"_a,
           "entries: (dictionary, key, object that it holds); absent: (dictionary, key that it lacks); empty: (dictionary, key of an empty "
           "dictionary); types: objects that keep their class; tensors: that keep memory, number of elements and dtype")
      .def_static(
          "all_hold",
          [](const std::vector<Watch*>& watches) {
            for (const Watch* watch : watches) watch->fetch();
            for (Watch* watch : watches)
              if (!watch->holds()) return false;
            return true;
          },
          "watches"_a, "Whether all is as it was");
}

}  // namespace qvl
