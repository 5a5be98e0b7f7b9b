"""What happens when a compiled module is called: modes, recordings, site plans, hoisted values, CUDA graphs.

Nothing here rewrites a graph (``passes/``) and nothing knows diffusers pipelines (``pipelines/``). May import
``recordings`` and the rooms below.
"""
