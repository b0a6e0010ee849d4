"""A planted multi-modal graph of any size, and its writers: raw folder, or packed data set."""
