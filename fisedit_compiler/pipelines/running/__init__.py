"""What a pipeline is lent for one run: a scheduler, texts that are encoded already, pictures made on the device.

Afterwards everything is as it was. Who runs the pipeline, and why, is ``editing/``'s business. May import what the room
``pipelines`` may.
"""
