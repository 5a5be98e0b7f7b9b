"""What programs are written in: sizes, specs, layouts, signatures of calls, listings."""
