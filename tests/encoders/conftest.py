"""The fixtures `packed` and `encoders`."""

from encoder_fixtures import encoders, packed  # noqa: F401 (fixtures)
