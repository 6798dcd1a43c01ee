"""The client of a teacher server. Needs `pip install 'fused-distill[client]'`."""

from .. import require_packages

require_packages("client")
