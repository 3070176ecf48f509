"""MOSS-VL: pure index arithmetic shared by every engine, and the transformers classes in `hf/`."""
