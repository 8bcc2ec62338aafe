"""int8 and int4 weights of models: modules that hold them, conversion in place, and files."""
