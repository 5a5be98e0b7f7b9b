"""Results as pictures: sheets, overlays, seams."""
