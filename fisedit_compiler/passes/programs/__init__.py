"""The graphs made from a rewritten one: recording, step and update, hoisted bundles, maps."""
