"""Fine-tuning of dense models and of what EMoE makes of them, compared seed by seed."""
