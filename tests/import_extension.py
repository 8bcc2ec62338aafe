"""Imports the extension qvl_kernels._C of a directory without its package and without PyTorch.

python tests/import_extension.py DIRECTORY    # the one that holds _C*.so; default: that of the installed package
"""

import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def main() -> None:
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
    else:
        folder = Path(importlib.util.find_spec("qvl_kernels").submodule_search_locations[0])
    file = next(path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_C{suffix}").is_file())
    spec = importlib.util.spec_from_file_location("qvl_kernels._C", file)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    best, supported = extension.isa(), extension.supported_isas().split(", ")
    for isa in supported:
        extension.use_isa(isa)
        assert extension.isa() == isa
    assert best in supported and extension.max_threads() >= 1
    print(f"Python {sys.version.split()[0]}: {file.name}, kernels for {', '.join(supported)}")


main()
