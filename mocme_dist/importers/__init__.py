"""Importers of published graphs: each reads a release of another project and writes a raw folder for `pack`."""

from __future__ import annotations

FORMS = ("libkge", "mmkb", "mmkg", "pykeen", "rdf", "wikidata5m", "wikikg90m")
