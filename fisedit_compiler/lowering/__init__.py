"""From rewritten graphs to what runs: whole programs, staged steps, cut products, Inductor."""
