"""The second door: ``torch.compile(unet, backend="fisedit")``, with the passes and the runtime of ``sparsify``."""

from fisedit_compiler.dynamo.backend import edit, fisedit, record, sparse_module

__all__ = ["edit", "fisedit", "record", "sparse_module"]
