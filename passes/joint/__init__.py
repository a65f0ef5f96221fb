"""The joint graph of forward and backward: its forward half, the rewrite, and what the rewrite adds."""
