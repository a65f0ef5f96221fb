"""Memory budgets for any model: which tensors to keep, which to recompute, and when (`convert(memory=...)`)."""
