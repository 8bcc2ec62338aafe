#!/usr/bin/env bash
# Builds the extension for each Python in PYTHONS (default: the supported ones that are installed) and imports it alone.
set -euo pipefail
checkout="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
if [ -z "${PYTHONS:-}" ]; then
  for version in 3.11 3.12 3.13; do
    if "python$version" -c 'import ensurepip, venv' 2>/dev/null; then PYTHONS="${PYTHONS:-} python$version"; fi
  done
fi
[ -n "${PYTHONS:-}" ] || { echo "qvl: no Python found; name some: make test-python PYTHONS=\"python3.12 python3.13\""; exit 1; }
# A copy, as of a fresh checkout: setuptools would find objects that were built here.
mkdir "$work/source"
git -C "$checkout" ls-files -z --cached --others --exclude-standard | (cd "$checkout" && tar --null -T - -cf -) | tar -xf - -C "$work/source"
cd "$work/source"
for python in $PYTHONS; do
  environment="$work/$(basename "$python")-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  "$python" -m venv "$environment"
  "$environment/bin/python" -m pip install -q $(grep -E '^(setuptools|pybind11)==' "$checkout/requirements-common.txt")
  "$environment/bin/python" setup.py -q build_ext --build-lib "$environment/built" --build-temp "$environment/objects"
  "$environment/bin/python" tests/import_extension.py "$environment/built/qvl_kernels"
done
