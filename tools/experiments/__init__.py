"""Studies of quality; each prints and keeps its rows as they come."""

import os

# Ray reads this when it is first imported; without it, a local cluster listens on all interfaces.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
