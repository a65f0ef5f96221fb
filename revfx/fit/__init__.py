"""Any model in the memory that is given: what to keep, what to compute again, when, and how (`convert(memory=...)`)."""
