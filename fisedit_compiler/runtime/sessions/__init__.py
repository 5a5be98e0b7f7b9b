"""What a mode does with the calls of a run: recording, editing, checking."""
