"""Quantised (int8, int4) weights of models: modules that hold them, conversion in place, and files."""
