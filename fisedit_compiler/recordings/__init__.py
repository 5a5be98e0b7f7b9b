"""What runs leave behind: slots, turns of edits that share them, and copies of inputs."""
