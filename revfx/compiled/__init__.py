"""What `torch.compile` is given: the backend, the partitioner, and a capture by dynamo."""
