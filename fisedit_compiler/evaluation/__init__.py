"""How good are sparse edits? Edit pairs through several methods side by side, and what they are measured by.

``fisedit eval`` is the door; :mod:`~fisedit_compiler.evaluation.runner` runs the pairs,
:mod:`~fisedit_compiler.evaluation.results.aggregate` makes figures of the results,
:mod:`~fisedit_compiler.evaluation.pages.report` a page. Nothing here changes how an edit is made, and no other room
but ``cli`` needs it. May import ``pipelines`` and the rooms below.
"""

from fisedit_compiler.evaluation.pairs.pairs import EditPair, PairFile, RejectedLine, read_pairs, write_pairs

__all__ = ["EditPair", "PairFile", "RejectedLine", "read_pairs", "write_pairs"]
