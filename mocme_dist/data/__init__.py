"""Raw folders, packed data sets and feature stores; everything on disk that training reads."""
