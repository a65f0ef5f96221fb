"""Plans: which saved tensors of a forward are dropped, and the units that give them back."""
