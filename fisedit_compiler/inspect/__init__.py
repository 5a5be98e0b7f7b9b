"""What a compiled module has to say about itself."""
