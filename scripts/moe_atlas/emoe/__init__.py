"""Dense feed-forward layers (FFNs) read as experts without new parameters: EMoE (Qiu et al. 2024, arXiv 2310.10908)."""
