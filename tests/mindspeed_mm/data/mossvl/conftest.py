"""The fixtures of the model's tests."""

from tests.mindspeed_mm.models.mossvl.conftest import nano_moss, processor

__all__ = ["nano_moss", "processor"]
