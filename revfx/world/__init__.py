"""Worlds in which a forward runs on other tensors for a while, after which everything is as before."""
