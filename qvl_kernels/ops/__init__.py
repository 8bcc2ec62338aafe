"""One folder per op: ``__init__`` (public function), ``reference`` (definition), ``cpu`` (C++ binding), ``cases``."""
