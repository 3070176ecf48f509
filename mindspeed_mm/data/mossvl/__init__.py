"""MOSS-VL fine-tuning data: JSON records in two formats to batches of the model."""
