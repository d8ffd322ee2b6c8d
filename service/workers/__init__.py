"""One process per device: the parent starts, watches and replaces them; the child decodes, computes and renders."""
