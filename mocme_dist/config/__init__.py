"""The configuration: `schema` says what exists, `load` reads it."""

from mocme_dist.config.load import dump_config, load_config
from mocme_dist.config.schema import Config

__all__ = ["Config", "dump_config", "load_config"]
