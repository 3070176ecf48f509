"""Fine-tuning of MOSS-VL with transformers' Trainer: the documented command line."""
