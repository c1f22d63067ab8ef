"""What the field means by routing, balance loss and capacity: tables computed by this package."""

from npmoe.conventions.balance import BalanceRow, balance_table, example_routing
from npmoe.conventions.capacity import (
    CAPACITY_CONVENTIONS,
    CAPACITY_EXAMPLES,
    CapacityConvention,
    CapacityRow,
    capacity_convention,
    capacity_table,
)
from npmoe.conventions.routing import (
    ROUTING_CONVENTIONS,
    RoutingConvention,
    RoutingRow,
    routing_convention,
    routing_table,
)
from npmoe.conventions.text import balance_text, capacity_text, routing_text, tables_as_values

__all__ = [
    "CAPACITY_CONVENTIONS",
    "CAPACITY_EXAMPLES",
    "ROUTING_CONVENTIONS",
    "BalanceRow",
    "CapacityConvention",
    "CapacityRow",
    "RoutingConvention",
    "RoutingRow",
    "balance_table",
    "balance_text",
    "capacity_convention",
    "capacity_table",
    "capacity_text",
    "example_routing",
    "routing_convention",
    "routing_table",
    "routing_text",
    "tables_as_values",
]
