"""The graph passes, imported as `revfx.passes`: the values that can be inverted, and in which order.

`program.py` has the data that all of them share. Nothing here runs autograd.
"""
