"""The ways to edit that are compared.

A method makes pictures; it measures none (``measures/``). May import what the room ``evaluation`` may.
"""
