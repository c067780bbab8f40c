"""Whether the FFNs of a dense model are modular: EMoE's experts on texts, without tuning (arXiv 2310.10908)."""
