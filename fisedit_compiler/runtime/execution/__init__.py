"""How one call of a program runs: hoisted values, eager and CUDA graphs, dense calls, copies."""
