"""Which edits are made: pairs of prompts, written by hand or by a grammar."""
