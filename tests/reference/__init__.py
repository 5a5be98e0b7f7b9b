"""Independent oracles: slow, obvious implementations that share no code with the package they judge."""
