"""``torch.compile(unet, backend="fisedit")``: the passes and the runtime of ``sparsify``, behind Dynamo's guards.

What lives here: the backend, and how a call that Dynamo traced becomes a call of the module. No pass and no kernel: the
programs are those of ``sparsify``. May import ``api`` and ``extend`` beside it, ``module`` and the rooms below.
"""

from fisedit_compiler.dynamo.backend import edit, fisedit, record, sparse_module

__all__ = ["edit", "fisedit", "record", "sparse_module"]
