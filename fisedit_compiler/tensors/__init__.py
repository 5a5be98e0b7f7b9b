"""Contents of tensors: compared bit for bit, numbered, and checked late on a device."""
