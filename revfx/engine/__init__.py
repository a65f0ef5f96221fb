"""The engine: it watches the operators of a forward, drops saved tensors, and gives them back in the backward."""
