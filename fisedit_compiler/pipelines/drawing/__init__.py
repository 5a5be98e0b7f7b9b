"""Results as pictures: sheets, overlays, seams.

Nothing here runs a model or knows an Editor: it is given pictures, masks and latents. May import what the room
``pipelines`` may.
"""
