"""The teacher server. Needs `pip install 'fused-distill[server]'`."""

from .. import require_packages

require_packages("server")
