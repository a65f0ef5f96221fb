"""The joint graph of forward and backward: its forward half, the rewrite, and the added nodes."""
