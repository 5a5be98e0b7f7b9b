"""The VAE's decoder as a part of a pipeline: what of it is compiled, the VAE that decodes sparsely, and its runs.

A decoder is called once, at the end of a run, so its modes are entered there, when the masks are known. Nothing here
knows the Editor. May import ``pipelines``.
"""
