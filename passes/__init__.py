"""Pure graph passes: arcs, closure, cuts, regions and plans, over frozen data. No autograd here."""
