"""Reading checkpoints: files, tensors, manifest."""
