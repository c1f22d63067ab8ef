"""Backends that accelerate npmoe. Use them as ``backend="name"``; never import this package."""

# Checked by the registry: the folder's short name may collide with somebody else's package.
NPMOE_ACCEL_VERSION = "0.1.0"
