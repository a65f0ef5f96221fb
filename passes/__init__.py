"""Pure graph passes: arcs, closure, cuts, regions and schedules, over frozen data. No autograd here."""
